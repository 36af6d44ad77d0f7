// The precision of the matrix products. Values, sums and everything outside the products are T;
// what a product reads, its operands, is kept in elements, which may hold several values
// consecutive in K.
#pragma once

#include "rounding.h"
#include "simd.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace rnn_ext::RNN_EXT_ISA {

// Operands are the values themselves.
template <class T>
struct FullPrecision {
  using Value = T;
  using Element = T;
  static constexpr int kPerElement = 1;
  static constexpr bool kHasTiles = false;

  static RNN_EXT_INLINE Vec<T> broadcast(Element x) { return splat<T>(x); }
  static RNN_EXT_INLINE Vec<T> multiply_add(Vec<T> left, Vec<T> right, Vec<T> sum) {
    return sum + left * right;
  }
  // Values index .. index+n-1 of a row of operands (n may exceed the lanes).
  static RNN_EXT_INLINE void store(Element* row, int64_t index, Vec<T> v, int64_t n) {
    store_upto(row + index, v, n);
  }
  // A vector of elements from the first n values (n may exceed the lanes).
  static RNN_EXT_INLINE Vec<T> gather(const T* values, int64_t n) { return load_upto(values, n); }
  // Value k of a column of elements, for all lanes; called with k = 0, 1, 2, ...
  static RNN_EXT_INLINE void append(Element* element, int64_t /*k*/, Vec<T> v) {
    RNN_EXT_ISA::store(element, v);
  }
};

#if defined(__AVX512BF16__)
// Operands rounded to bfloat16, two to an element; sums in float. The instruction takes denormal
// operands as zeros.
struct BFloat16Products {
  using Value = float;
  using Element = int32_t;  // value 2i in the lower half of element i
  static constexpr int kPerElement = 2;
#if defined(__AMX_BF16__) || defined(RNN_EXT_EMULATE_TILES)
  static constexpr bool kHasTiles = true;
#else
  static constexpr bool kHasTiles = false;
#endif

  static RNN_EXT_INLINE Vec<int32_t> broadcast(Element x) { return x - Vec<int32_t>{}; }
  static RNN_EXT_INLINE Vec<float> multiply_add(Vec<int32_t> left, Vec<int32_t> right,
                                                Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
  static RNN_EXT_INLINE void store(Element* row, int64_t index, Vec<float> v, int64_t n) {
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(reinterpret_cast<char*>(row) + 2 * index, &narrow,
                size_t(n < kLanes<float> ? n : kLanes<float>) * 2);
  }
  static RNN_EXT_INLINE Vec<int32_t> gather(const float* values, int64_t n) {
    const Vec<float> low = load_upto(values, n);
    const Vec<float> high =
        n > kLanes<float> ? load_upto(values + kLanes<float>, n - kLanes<float>) : Vec<float>{};
    return (Vec<int32_t>)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  }
  static RNN_EXT_INLINE void append(Element* element, int64_t k, Vec<float> v) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const Vec<int32_t> bits =
        __builtin_convertvector((Half)_mm512_cvtneps_pbh((__m512)v), Vec<int32_t>);
    RNN_EXT_ISA::store(element, k % 2 ? load(element) | (bits << 16) : bits);
  }
};
#endif

template <class P>
using Value = typename P::Value;
template <class P>
using Element = typename P::Element;

// Elements that hold n values.
template <class P>
constexpr int64_t elements(int64_t n) {
  return (n + P::kPerElement - 1) / P::kPerElement;
}

// A row of operands from n values, zeros up to padded(n).
template <class P>
void store_row(Element<P>* to, const Value<P>* from, int64_t n) {
  constexpr int64_t kStep = kLanes<Value<P>>;
  for (int64_t i = 0; i < padded(n); i += kStep)
    P::store(to, i, from && i < n ? load_upto(from + i, n - i) : Vec<Value<P>>{}, kStep);
}

}  // namespace rnn_ext::RNN_EXT_ISA
