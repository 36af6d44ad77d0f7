// What the executor can run beyond the names of csrc/cuda/portable.h: more that GPUs have and that
// no kernel of the engine uses. A kernel that comes to need one moves it there, with its other half
// for nvcc.
#pragma once

#include "../../csrc/cuda/portable.h"

namespace rnn_ext::cuda {

namespace host {

uint32_t vote_ballot(bool p);
void atomic_store(uint32_t* p, uint32_t v, bool release);
void device_fence();
void streaming_access(const void* p, size_t bytes);
void load_matrix(uint32_t* registers, const void* row, int count, bool transpose);

}  // namespace host

// All 32 lanes.
template <class T>
RNN_EXT_DEVICE T shuffle(T v, int lane) {
  return shuffle_as(host::Shuffle::kIndex, v, lane);
}
template <class T>
RNN_EXT_DEVICE T shuffle_down(T v, int delta) {
  return shuffle_as(host::Shuffle::kDown, v, delta);
}
RNN_EXT_DEVICE uint32_t vote_ballot(bool p) { return host::vote_ballot(p); }
RNN_EXT_DEVICE bool vote_any(bool p) { return host::vote_ballot(p) != 0; }
RNN_EXT_DEVICE bool vote_all(bool p) { return host::vote_ballot(p) == 0xffffffffu; }

// Order no memory.
RNN_EXT_DEVICE uint32_t load_relaxed(const uint32_t* p) { return host::atomic_load(p, false); }
RNN_EXT_DEVICE void store_relaxed(uint32_t* p, uint32_t v) { host::atomic_store(p, v, false); }
RNN_EXT_DEVICE uint32_t fetch_add_relaxed(uint32_t* p, uint32_t v) {
  return host::atomic_add(p, v, false);
}
// Orders what is before it before what is after it.
RNN_EXT_DEVICE void device_fence() { host::device_fence(); }

// Through the non-coherent cache: for what nobody writes while the kernel runs.
template <class T>
RNN_EXT_DEVICE T load_streaming(const T* p) {
  host::streaming_access(p, sizeof(T));
  return *p;
}

// kCount 8 x 8 matrices of 2-byte elements from shared memory. Lane l gives the address of row
// l % 8 (16 bytes, aligned) of matrix l / 8; lanes beyond 8 kCount give any such address.
// registers[m] is elements (l / 4, 2 (l % 4)..) of matrix m, or of its transpose.
template <int kCount, bool kTranspose = false>
RNN_EXT_DEVICE void load_matrix(uint32_t (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  host::load_matrix(registers, row, kCount, kTranspose);
}

}  // namespace rnn_ext::cuda
