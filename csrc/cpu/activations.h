// Vectorized sigmoid and tanh, and the math policy that the cells are written against.
#pragma once

#include "simd.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2Hi = 0.693359375f;  // few bits: n * kLn2Hi is exact
  static constexpr float kLn2Lo = -2.12194440e-4f;
  static constexpr float kExpMin = -104.0f;  // exp is 0 from here down
  static constexpr float kTanhMin = -30.0f;  // of -2|x|: tanh is 1 from here down
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr int kTerms = 8;  // of the Taylor series on |r| <= ln(2)/2
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -746.0;
  static constexpr double kTanhMin = -60.0;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr int kTerms = 13;
};

template <class T>
constexpr T reciprocal_factorial(int n) {
  double f = 1;
  for (int i = 2; i <= n; ++i) f *= i;
  return T(1 / f);
}

// x = n * ln(2) + r with integer n and |r| <= ln(2)/2.
template <class T>
RNN_EXT_INLINE void reduce(Vec<T> x, Vec<T>& r, Bits<T>& n) {
  using C = ExpConstants<T>;
  const Vec<T> rounded = x * C::kLog2E + C::kRound;
  n = (Bits<T>)rounded - (Bits<T>)splat<T>(C::kRound);
  const Vec<T> whole = rounded - C::kRound;
  r = x - whole * C::kLn2Hi;
  r = r - whole * C::kLn2Lo;
}

// expm1(r) for |r| <= ln(2)/2.
template <class T>
RNN_EXT_INLINE Vec<T> expm1_reduced(Vec<T> r) {
  constexpr int kTerms = ExpConstants<T>::kTerms;
  Vec<T> p = splat<T>(reciprocal_factorial<T>(kTerms));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i >= 2; --i) p = p * r + reciprocal_factorial<T>(i);
  return p * (r * r) + r;
}

// 2^n for exponents in the normal range.
template <class T>
RNN_EXT_INLINE Vec<T> power_of_two(Bits<T> n) {
  using C = ExpConstants<T>;
  return (Vec<T>)((n + C::kExponentBias) << C::kMantissaBits);
}

// exp(x) for x <= 0, denormal results included; NaN stays NaN (a comparison with it is false).
template <class T>
RNN_EXT_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  const Vec<T> lowest = splat<T>(ExpConstants<T>::kExpMin);
  x = x < lowest ? lowest : x;
  Vec<T> r;
  Bits<T> n;
  reduce<T>(x, r, n);
  const Vec<T> p = expm1_reduced<T>(r) + T(1);
  const Bits<T> half = n >> 1;  // two factors: 2^n itself may be below the normal range
  return p * power_of_two<T>(half) * power_of_two<T>(n - half);
}

template <class T>
RNN_EXT_INLINE Bits<T> sign_mask() {
  return (Bits<T>)splat<T>(T(-0.0));
}
template <class T>
RNN_EXT_INLINE Vec<T> absolute(Vec<T> x) {
  return (Vec<T>)((Bits<T>)x & ~sign_mask<T>());
}

// 1 / (1 + e^-x), evaluated through e^-|x| so that nothing overflows.
template <class T>
RNN_EXT_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-absolute<T>(x));
  const Vec<T> one = splat<T>(T(1));
  return (x >= T(0) ? one : e) / (one + e);
}

// With e = exp(-2|x|) and m = e - 1: tanh(|x|) = -m / (1 + e) near 0, where m is accurate without
// cancellation, and 1 - 2e / (1 + e) elsewhere, where the error sits in the small term: the
// derivative 1 - tanh^2 stays accurate in saturation. One division serves both.
template <class T>
RNN_EXT_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> size = absolute<T>(x), one = splat<T>(T(1));
  const Vec<T> lowest = splat<T>(ExpConstants<T>::kTanhMin);
  const Vec<T> twice = size * T(-2);
  Vec<T> r;
  Bits<T> n;
  reduce<T>(twice < lowest ? lowest : twice, r, n);
  const Vec<T> p = expm1_reduced<T>(r), scale = power_of_two<T>(n);
  const Vec<T> e = p * scale + scale;
  const Vec<T> m = p * scale + (scale - one);
  const auto small = size < T(0.5493);  // tanh = 1/2: both forms err alike there
  const Vec<T> q = (small ? -m : e + e) / (one + e);
  const Vec<T> t = small ? q : one - q;
  return (Vec<T>)(((Bits<T>)t & ~sign_mask<T>()) | ((Bits<T>)x & sign_mask<T>()));
}

// The policy handed to the cells. In linear mode the saturating functions are replaced by their
// tangents at 0, sigmoid(x) -> 0.5 + 0.25 x and tanh(x) -> x: an error then survives a thousand
// steps instead of being squashed, so long sequences can be compared tightly (oneDNN's benchdnn
// tests its RNNs in the same spirit).
template <class T>
struct VectorMath {
  using V = Vec<T>;
  bool linear;

  RNN_EXT_INLINE V zero() const { return V{}; }
  RNN_EXT_INLINE V one() const { return splat<T>(T(1)); }
  RNN_EXT_INLINE V sigmoid(V x) const {
    return linear ? x * T(0.25) + T(0.5) : RNN_EXT_ISA::sigmoid<T>(x);
  }
  RNN_EXT_INLINE V tanh(V x) const { return linear ? x : RNN_EXT_ISA::tanh<T>(x); }
  RNN_EXT_INLINE V sigmoid_grad(V s) const { return linear ? splat<T>(T(0.25)) : s * (one() - s); }
  RNN_EXT_INLINE V tanh_grad(V y) const { return linear ? one() : one() - y * y; }
  // NaN passes through both, as in torch: a comparison with it is false.
  RNN_EXT_INLINE V relu(V x) const { return x < T(0) ? zero() : x; }
  RNN_EXT_INLINE V relu_grad(V y, V dy) const { return y <= T(0) ? zero() : dy; }
};

}  // namespace rnn_ext::RNN_EXT_ISA
