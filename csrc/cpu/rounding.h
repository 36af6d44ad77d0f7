// Rounding to a narrower floating-point type without leaving the wider one.
#pragma once

#include "../sequence.h"
#include "simd.h"

namespace rnn_ext::RNN_EXT_ISA {

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif

template <class T>
RNN_EXT_INLINE Vec<T> round_to(Vec<T> v, Rounding /*rounding*/) {
  return v;
}

template <>
RNN_EXT_INLINE Vec<float> round_to<float>(Vec<float> v, Rounding rounding) {
  if (rounding == Rounding::kNone) return v;
  if (rounding == Rounding::kBFloat16) {
    // Round half to even on the upper 16 bits; the bits of a NaN could overflow or become infinity.
    const Bits<float> bits = (Bits<float>)(v == v ? v : Vec<float>{});
    const Bits<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
    return v == v ? (Vec<float>)rounded : v;
  }
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float(Half(v[i]));
  return v;
}

}  // namespace rnn_ext::RNN_EXT_ISA
