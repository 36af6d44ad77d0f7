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

}  // namespace rnn_ext
