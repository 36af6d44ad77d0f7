#pragma once

#include "cell.h"

namespace rnn_ext {

// GRU (Cho et al. 2014; reset gate after the product, as cuDNN and torch), gate order r, z, n:
//   r = sigmoid(x_r + h_r)   z = sigmoid(x_z + h_z)   n = tanh(x_n + r * h_n)
//   where x = W_ih x_t + b_ih and h = W_hh h_{t-1} + b_hh
//   h_t = (1 - z) * n + z * h_{t-1}
// Backward:
//   dx_n = dh * (1-z) * (1-n^2)         dh_n = dx_n * r
//   dx_r = dh_r = dx_n * h_n * r(1-r)   dx_z = dh_z = dh * (h_{t-1} - n) * z(1-z)
//   dh_{t-1} gets dh * z besides what passes through W_hh
struct GruCell {
  static constexpr int kNumGates = 3;
  static constexpr int kNumSaved = 4;  // r, z, n, W_hn h_{t-1} + b_hn
  static constexpr bool kHasCellState = false;
  static constexpr bool kReadsOutput = false;
  static constexpr bool kReadsPreviousOutput = true;
  static constexpr bool kSplitsGradient = true;  // dL/dx gates and dL/dh gates differ

  template <class M, class V>
  RNN_EXT_CELL_FN static V forward(const M& m, const V* x, const V* h, V h_prev, V& /*c*/,
                                   V* saved) {
    const V r = m.sigmoid(x[0] + h[0]);
    const V z = m.sigmoid(x[1] + h[1]);
    const V n = m.tanh(x[2] + r * h[2]);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = h[2];
    return n + z * (h_prev - n);
  }

  template <class M, class V>
  RNN_EXT_CELL_FN static void backward(const M& m, const V* saved, UnitBackward<V>& u, V* dx,
                                       V* dh) {
    const V r = saved[0], z = saved[1], n = saved[2], h_n = saved[3];
    const V dn = u.dh * (m.one() - z) * m.tanh_grad(n);
    dx[0] = dh[0] = dn * h_n * m.sigmoid_grad(r);
    dx[1] = dh[1] = u.dh * (u.h_prev - n) * m.sigmoid_grad(z);
    dx[2] = dn;
    dh[2] = dn * r;
    u.dh_prev = u.dh * z;
  }
};

// The reset gate before the product (Cho et al. 2014 in its first version, Keras'
// reset_after=False):
//   n = tanh(x_n + W_hn (r * h_{t-1}) + b_hn), all else as above.
// Two stages, for what the product in n reads is known only after the gates. Backward, with dn and
// dz as above and d(rh) = W_hn^T dn:
//   dr = d(rh) * h_{t-1} * r(1-r)      dh_{t-1} gets dh * z + d(rh) * r besides W_hr^T dr + W_hz^T
//   dz
struct GruResetBefore {
  // r and z to saved; returns r * h_{t-1}.
  template <class M, class V>
  RNN_EXT_CELL_FN static V gates(const M& m, const V* x, const V* h, V h_prev, V* saved) {
    saved[0] = m.sigmoid(x[0] + h[0]);
    saved[1] = m.sigmoid(x[1] + h[1]);
    return saved[0] * h_prev;
  }
  template <class M, class V>
  RNN_EXT_CELL_FN static V candidate(const M& m, V x_n, V h_n, V h_prev, V* saved) {
    saved[2] = m.tanh(x_n + h_n);
    return saved[2] + saved[1] * (h_prev - saved[2]);
  }
  template <class M, class V>
  RNN_EXT_CELL_FN static void backward_candidate(const M& m, const V* saved, UnitBackward<V>& u,
                                                 V* dx) {
    dx[1] = u.dh * (u.h_prev - saved[2]) * m.sigmoid_grad(saved[1]);
    dx[2] = u.dh * (m.one() - saved[1]) * m.tanh_grad(saved[2]);
    u.dh_prev = u.dh * saved[1];
  }
  template <class M, class V>
  RNN_EXT_CELL_FN static V backward_gates(const M& m, const V* saved, V h_prev, V drh, V* dx) {
    dx[0] = drh * h_prev * m.sigmoid_grad(saved[0]);
    return drh * saved[0];
  }
};

}  // namespace rnn_ext
