#pragma once

#include "cell.h"

namespace rnn_ext {

// Elman RNN, act = tanh or relu:
//   h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
// Backward, a = pre-activation:
//   da = dh * act'(a), with tanh'(a) = 1 - h^2, relu'(a) = [h > 0]
template <bool kRelu>
struct RnnCell {
  static constexpr int kNumGates = 1;
  static constexpr int kNumSaved = 0;  // h_t is the output itself
  static constexpr bool kHasCellState = false;
  static constexpr bool kReadsOutput = true;
  static constexpr bool kReadsPreviousOutput = false;
  static constexpr bool kSplitsGradient = false;

  template <class M, class V>
  RNN_EXT_CELL_FN static V forward(const M& m, const V* x, const V* h, V /*h_prev*/, V& /*c*/,
                                   V* /*saved*/) {
    const V a = x[0] + h[0];
    return kRelu ? m.relu(a) : m.tanh(a);
  }

  template <class M, class V>
  RNN_EXT_CELL_FN static void backward(const M& m, const V* /*saved*/, UnitBackward<V>& u, V* dx,
                                       V* /*dh*/) {
    dx[0] = kRelu ? m.relu_grad(u.h, u.dh) : u.dh * m.tanh_grad(u.h);
    u.dh_prev = m.zero();
  }
};

}  // namespace rnn_ext
