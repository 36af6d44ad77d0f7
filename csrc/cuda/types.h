// The engine's types, the same for every compiler that meets its interface.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace rnn_ext::cuda {

using Stream = CUstream_st*;
using Status = int;  // a cudaError_t; 0 is success

// Storage types; arithmetic is done in float.
struct alignas(2) Float16 {
  uint16_t bits;
};
struct alignas(2) BFloat16 {
  uint16_t bits;
};

// The type in which values of a storage type are computed.
template <class T>
struct ComputeType {
  using Type = float;
};
template <>
struct ComputeType<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeType<T>::Type;

}  // namespace rnn_ext::cuda
