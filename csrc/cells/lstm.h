#pragma once

#include "cell.h"

namespace rnn_ext {

// LSTM (Hochreiter and Schmidhuber 1997, forget gate of Gers et al. 2000), gate order i, f, g, o:
//   i = sigmoid(a_i)  f = sigmoid(a_f)  g = tanh(a_g)  o = sigmoid(a_o)
//   where a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
//   c_t = f * c_{t-1} + i * g
//   h_t = o * tanh(c_t)          (then h_t <- W_hr h_t with a projection: the engine's product)
// Backward:
//   dc   = dc_t + dh * o * (1 - tanh(c_t)^2)
//   da_i = dc * g * i(1-i)   da_f = dc * c_{t-1} * f(1-f)   da_g = dc * i * (1-g^2)
//   da_o = dh * tanh(c_t) * o(1-o)
//   dc_{t-1} = dc * f
// c_t is recomputed from c_{t-1}: cheaper than keeping both.
struct LstmCell {
  static constexpr int kNumGates = 4;
  static constexpr int kNumSaved = 5;  // i, f, g, o, c_{t-1}
  static constexpr bool kHasCellState = true;
  static constexpr bool kReadsOutput = false;
  static constexpr bool kReadsPreviousOutput = false;
  static constexpr bool kSplitsGradient = false;

  template <class M, class V>
  RNN_EXT_CELL_FN static V forward(const M& m, const V* x, const V* h, V /*h_prev*/, V& c,
                                   V* saved) {
    saved[0] = m.sigmoid(x[0] + h[0]);
    saved[1] = m.sigmoid(x[1] + h[1]);
    saved[2] = m.tanh(x[2] + h[2]);
    saved[3] = m.sigmoid(x[3] + h[3]);
    saved[4] = c;
    c = next_c(m, saved);
    return saved[3] * m.tanh(c);
  }

  // On a CPU the same bits wherever it is compiled into: of two products a compiler may fuse either
  // with the sum, unless one of them is rounded first.
  template <class M, class V>
  RNN_EXT_CELL_FN static V next_c(const M& m, const V* saved) {
    return saved[1] * saved[4] + m.rounded(saved[0] * saved[2]);
  }

  // h_t before the projection, from what was saved.
  template <class M, class V>
  RNN_EXT_CELL_FN static V output(const M& m, const V* saved) {
    return saved[3] * m.tanh(next_c(m, saved));
  }

  template <class M, class V>
  RNN_EXT_CELL_FN static void backward(const M& m, const V* saved, UnitBackward<V>& u, V* dx,
                                       V* /*dh*/) {
    const V o = saved[3], tanh_c = m.tanh(next_c(m, saved));
    dx[3] = u.dh * tanh_c * m.sigmoid_grad(o);
    u.dc = backward_state(m, saved, u.dc + u.dh * o * m.tanh_grad(tanh_c), dx);
    u.dh_prev = m.zero();
  }

  // The part of it that begins with dc, all but da_o; returns dc_{t-1}.
  template <class M, class V>
  RNN_EXT_CELL_FN static V backward_state(const M& m, const V* saved, V dc, V* dx) {
    const V i = saved[0], f = saved[1], g = saved[2], c_prev = saved[4];
    dx[0] = dc * g * m.sigmoid_grad(i);
    dx[1] = dc * c_prev * m.sigmoid_grad(f);
    dx[2] = dc * i * m.tanh_grad(g);
    return dc * f;
  }
};

}  // namespace rnn_ext
