// Window-style truncated backpropagation through time, in the manner of sequence.h: the gradient of
// the loss at step t flows back through steps t, t-1, ..., t-k+1 of all layers and no further.
#pragma once

#include "../sequence.h"
#include "plan.h"

namespace rnn_ext {

// One layer on the way back. Rows n of (N, ...) arrays are t*B + b.
template <class T>
struct WindowLayer {
  DirectionWeights<T> weights;
  const T* reserve = nullptr;  // (N, num_saved, padded(H))
  StepRows<const T> y;         // (T, B, R): this direction's columns of the output
  const T* mask = nullptr;     // (N, R) factors of y on its way to the layer above, null means ones
  const T* h_0 = nullptr;      // (B, R), null means zeros
  const T* dh_n = nullptr;     // (B, R), null means zeros
  const T* dc_n = nullptr;     // (B, H), null means zeros
  // Results: sums over the chains of all t, written not accumulated.
  T* dgx = nullptr;   // (N, G*H) gradients of the gates' input side
  T* dgh = nullptr;   // (N, G*H) of their recurrent side; dgx itself unless the cell splits them
  T* dh = nullptr;    // (N, P) dL/dh after the projection, only with one
  T* dh_0 = nullptr;  // (B, R), null: not asked for
  T* dc_0 = nullptr;  // (B, H), null: not asked for
};

// A stack of layers in one direction; the other direction of a layer is a call of its own.
template <class T>
struct WindowCall {
  SequenceShape shape;    // of the first layer; padded data, directions = 1
  bool reversed = false;  // chains run from t up to t+k-1, from the last step's view backwards
  int64_t window = 1;     // k
  bool linear_activations = false;
  const WindowLayer<T>* layers = nullptr;
  int64_t num_layers = 1;
  StepRows<const T> dy;  // (T, B, R) of the last layer, null data means zeros
};

}  // namespace rnn_ext
