// What the three cells share. A cell is a struct of constants and two static functions written
// against a math policy M and a value type V, so that a CPU vector, a CPU scalar and a CUDA thread
// run the same text. M provides
//   V one(), zero();  V sigmoid(V), tanh(V);          activations
//   V sigmoid_grad(V s), tanh_grad(V y);              derivatives from the activation's value
//   V relu(V), relu_grad(V y, V dy);
#pragma once

#if defined(__CUDACC__)
#define RNN_EXT_CELL_FN __host__ __device__ __forceinline__
#else
#define RNN_EXT_CELL_FN inline __attribute__((always_inline))
#endif

namespace rnn_ext {

// The values of one hidden unit of one batch row on the way back.
template <class V>
struct UnitBackward {
  V h;        // in: h_t (read by RNN only)
  V h_prev;   // in: h_{t-1} (read by GRU only)
  V dh;       // in: dL/dh_t, from the output and from step t+1
  V dc;       // in: dL/dc_t from step t+1; out: dL/dc_{t-1}
  V dh_prev;  // out: the part of dL/dh_{t-1} that does not pass through W_hh
};

}  // namespace rnn_ext
