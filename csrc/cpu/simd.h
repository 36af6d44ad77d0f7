// Vectors of one instruction set, by GCC/Clang vector extensions: the same text becomes AVX-512,
// AVX2, SSE2 or NEON. Everything that is compiled per instruction set lives in the namespace
// rnn_ext::RNN_EXT_ISA, so that no inline function of one unit can replace another's at link time.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define RNN_EXT_INLINE inline __attribute__((always_inline))

namespace rnn_ext::RNN_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<int32_t> {
  typedef int32_t type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;
template <class T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
RNN_EXT_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::loose*>(p);
}
template <class T>
RNN_EXT_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::loose*>(p) = v;
}
// Past the caches where a vector is a whole line of them; elsewhere a line would go out in pieces.
// `p` is aligned to the vector. Others see it after flush_streams().
inline constexpr bool kStreams = kVectorBytes == 64;
template <class T>
RNN_EXT_INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#else
  store(p, v);
#endif
}
inline bool is_streamable(const void* p) {
  return kStreams && p && reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0;
}
inline void flush_streams() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// The first n lanes (0 < n < kLanes); the others read as zero and are not written. Where there are
// masks: a copy of a length that is not known is a call of memcpy, at the end of every row.
#if defined(__AVX512F__)
template <class T>
RNN_EXT_INLINE Vec<T> load_first(const T* p, int64_t n) {
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16(mask), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8(mask), p);
}
template <class T>
RNN_EXT_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  const unsigned mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, __mmask16(mask), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, __mmask8(mask), (__m512d)v);
}
#elif defined(__AVX2__)
template <class T>
RNN_EXT_INLINE __m256i mask_of_first(int64_t n) {
  if constexpr (sizeof(T) == 4)
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  else
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
template <class T>
RNN_EXT_INLINE Vec<T> load_first(const T* p, int64_t n) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_maskload_ps(reinterpret_cast<const float*>(p), mask_of_first<T>(n));
  else
    return (Vec<T>)_mm256_maskload_pd(reinterpret_cast<const double*>(p), mask_of_first<T>(n));
}
template <class T>
RNN_EXT_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  if constexpr (sizeof(T) == 4)
    _mm256_maskstore_ps(reinterpret_cast<float*>(p), mask_of_first<T>(n), (__m256)v);
  else
    _mm256_maskstore_pd(reinterpret_cast<double*>(p), mask_of_first<T>(n), (__m256d)v);
}
#else
template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v = {};
  std::memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}
template <class T>
inline void store_first(T* p, Vec<T> v, int64_t n) {
  std::memcpy(p, &v, size_t(n) * sizeof(T));
}
#endif
// Lanes of a row whose remaining length is n (may exceed kLanes).
template <class T>
RNN_EXT_INLINE Vec<T> load_upto(const T* p, int64_t n) {
  return n >= kLanes<T> ? load(p) : load_first(p, n);
}
template <class T>
RNN_EXT_INLINE void store_upto(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>)
    store(p, v);
  else
    store_first(p, v, n);
}
// Zeros in the lanes beyond the first n (n may exceed them).
template <class T>
RNN_EXT_INLINE Vec<T> first_lanes(Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return v;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), (__m512)v);
  else
    return (Vec<T>)_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  return (Vec<T>)((__m256i)v & mask_of_first<T>(n));
#else
  T lanes[kLanes<T>] = {};
  store_first(lanes, v, n);
  return load(lanes);
#endif
}
// The sum of all lanes, in every lane.
template <class T, int kDistance, size_t... kLane>
RNN_EXT_INLINE Vec<T> add_from(Vec<T> v, std::index_sequence<kLane...>) {
  return v + __builtin_shufflevector(v, v, (int(kLane) ^ kDistance)...);
}
template <class T, int kDistance = kLanes<T> / 2>
RNN_EXT_INLINE Vec<T> sum_of_lanes(Vec<T> v) {
  if constexpr (kDistance >= 1)
    return sum_of_lanes<T, kDistance / 2>(
        add_from<T, kDistance>(v, std::make_index_sequence<size_t(kLanes<T>)>()));
  else
    return v;
}
template <class T>
RNN_EXT_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // not {} + x, which would turn -0.0 into 0.0
}

// a > b ? a : b, and so b where either is NaN. Written out, x86 compilers make two to four
// instructions of the one there is for it.
#if defined(__AVX512F__)  // masked: GCC 12 warns of its own header in the plain form
RNN_EXT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
  return _mm512_mask_max_ps(b, __mmask16(-1), a, b);
}
RNN_EXT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) {
  return _mm512_mask_max_pd(b, __mmask8(-1), a, b);
}
#elif defined(__AVX2__)
RNN_EXT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
RNN_EXT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
#elif defined(__SSE2__)
RNN_EXT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
RNN_EXT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm_max_pd(a, b); }
#else
RNN_EXT_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
RNN_EXT_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
#endif

// Both halves of a step of a lane transposition: in every group of kGroup lanes, the low (high)
// half of a's group followed by the low (high) half of b's.
template <class T, int kGroup, int kOffset, size_t... kLane>
RNN_EXT_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<kLane...>) {
  constexpr int kHalf = kGroup / 2;
  return __builtin_shufflevector(
      a, b,
      (int(kLane) % kGroup < kHalf ? int(kLane) + kOffset
                                   : int(kLane) - kHalf + kOffset + kLanes<T>)...);
}

// rows[i][j] <-> rows[j][i] for a square of vectors.
template <class T, int kGroup = kLanes<T>>
RNN_EXT_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kGroup >= 2) {
    constexpr int kHalf = kGroup / 2;
    constexpr auto kAll = std::make_index_sequence<size_t(kLanes<T>)>();
#pragma GCC unroll 16
    for (int base = 0; base < kLanes<T>; base += kGroup) {
#pragma GCC unroll 16
      for (int i = base; i < base + kHalf; ++i) {
        const Vec<T> a = rows[i], b = rows[i + kHalf];
        rows[i] = interleave<T, kGroup, 0>(a, b, kAll);
        rows[i + kHalf] = interleave<T, kGroup, kHalf>(a, b, kAll);
      }
    }
    transpose<T, kHalf>(rows);
  }
}

// v, in a register: the compiler knows neither where it comes from nor what it will be used for.
template <class V>
RNN_EXT_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Lane i of the result is the sum over the lanes of rows[i], with kGroup = kCount = kLanes. Or in
// two passes, the same additions: first every (kLanes / kCount)-th row, with kGroup = kLanes; then
// what that left of each such set, with kGroup = kCount = the number of sets.
template <class T, int kGroup, int kCount>
RNN_EXT_INLINE Vec<T> sum_each(Vec<T>* rows) {
  if constexpr (kCount >= 2) {
    constexpr int kHalf = kCount / 2;
    constexpr auto kAll = std::make_index_sequence<size_t(kLanes<T>)>();
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      const Vec<T> a = rows[i], b = rows[i + kHalf];
      rows[i] =
          interleave<T, kGroup, 0>(a, b, kAll) + interleave<T, kGroup, kGroup / 2>(a, b, kAll);
    }
    return sum_each<T, kGroup / 2, kHalf>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace rnn_ext::RNN_EXT_ISA
