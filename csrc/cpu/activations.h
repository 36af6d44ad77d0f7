// Vectorized sigmoid and tanh, and the math policy that the cells are written against. V is a
// vector or a pair of them.
#pragma once

#include "pair.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504088896341f;
  static constexpr float kLn2 = 0.693147180559945309f;
  static constexpr float kLn2Hi = 0.693359375f;  // few bits: n * kLn2Hi is exact
  static constexpr float kLn2Lo = -2.12194440e-4f;
  static constexpr float kExpMin = -104.0f;  // exp is 0 from here down
  static constexpr float kTanhMin = -30.0f;  // of -2|x|: tanh is 1 from here down
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr int kGuard = 64;  // n + kGuard is a normal exponent wherever exp is not 0
  static constexpr float kUnguard = 0x1p-64f;
  static constexpr float kExpm1[] = {0x1.fffffep-2f, 0x1.5554b4p-3f, 0x1.5556f4p-5f, 0x1.122536p-7f,
                                     0x1.6b9a1p-10f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2 = 0.69314718055994530942;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01;
  static constexpr double kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -746.0;
  static constexpr double kTanhMin = -60.0;
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr int kGuard = 512;
  static constexpr double kUnguard = 0x1p-512;
  static constexpr double kExpm1[] = {
      0x1.0000000000005p-1,  0x1.555555555554cp-3,  0x1.555555555222p-5,   0x1.111111111539fp-7,
      0x1.6c16c17edf5a8p-10, 0x1.a01a01865e22cp-13, 0x1.a019a78ac1a85p-16, 0x1.71de66077cc43p-19,
      0x1.28a1b4699adcep-22, 0x1.ae9c36e4e7d4p-26};
};

// Sets n to x / ln(2) rounded to an integer and returns 2^(n + kOffset), for which that exponent
// must be in the normal range. The low bits of the sum with kShift are the biased exponent.
template <class T, int kOffset, class V>
RNN_EXT_INLINE V nearest_power_of_two(V x, V& n) {
  using C = ExpConstants<T>;
  constexpr T kShift = C::kRound + C::kExponentBias + kOffset;
  const V shifted = x * C::kLog2E + kShift;
  n = shifted - kShift;
  return each([](Vec<T> v) { return (Vec<T>)((Bits<T>)v << C::kMantissaBits); }, shifted);
}

// expm1(r) = r + r^2 q(r) for |r| <= ln(2)/2. The coefficients of q minimize the largest relative
// error of expm1: 2^-26.1 for float, 2^-55.6 for double. They were fitted by Lawson's algorithm
// (reweighted least squares) on Chebyshev points in 60 digits; each was rounded to T before those
// after it were fitted again. Taking the terms in pairs costs no operation and shortens the chain
// of dependent ones.
template <class T, class V>
RNN_EXT_INLINE V expm1_reduced(V r) {
  constexpr const auto& c = ExpConstants<T>::kExpm1;
  constexpr int kTerms = sizeof(c) / sizeof(c[0]), kLastPair = (kTerms - 1) / 2 * 2;
  const V r2 = r * r;
  V q = V{} + c[kLastPair];
  if constexpr (kLastPair + 1 < kTerms) q = c[kLastPair + 1] * r + c[kLastPair];
#pragma GCC unroll 16
  for (int i = kLastPair - 2; i >= 0; i -= 2) q = q * r2 + (c[i + 1] * r + c[i]);
  return q * r2 + r;
}

// The larger of a constant and x; x where that is NaN.
template <class T, class V>
RNN_EXT_INLINE V at_least(T least, V x) {
  return each([=](Vec<T> v) { return larger(splat<T>(least), v); }, x);
}

// exp(x) for x <= 0, denormal results included: the last product alone rounds to them. NaN stays
// NaN.
template <class T, class V>
RNN_EXT_INLINE V exp_nonpositive(V x) {
  using C = ExpConstants<T>;
  x = at_least<T>(C::kExpMin, x);
  V n;
  const V scale = nearest_power_of_two<T, C::kGuard>(x, n);
  const V r = (x - n * C::kLn2Hi) - n * C::kLn2Lo;
  const V p = expm1_reduced<T>(r);
  return (p * scale + scale) * C::kUnguard;
}

template <class T>
RNN_EXT_INLINE Bits<T> sign_bit(Vec<T> x) {
  return (Bits<T>)x & (Bits<T>)splat<T>(T(-0.0));
}
template <class T, class V>
RNN_EXT_INLINE V negative_absolute(V x) {
  return each([](Vec<T> v) { return (Vec<T>)((Bits<T>)v | (Bits<T>)splat<T>(T(-0.0))); }, x);
}

// 1 / (1 + e^-x), evaluated through e = exp(-|x|) so that nothing overflows: 1 / (1 + e) or, where
// x < 0, e / (1 + e). As numerator * (1 - e / (1 + e)), the roundings of 1 + e and of the quotient
// count only e times; dividing the numerator at once costs 2.4 ulp.
template <class T, class V>
RNN_EXT_INLINE V sigmoid(V x) {
  const V e = exp_nonpositive<T>(negative_absolute<T>(x));
  const V numerator = each([](Vec<T> x, Vec<T> e) { return x >= T(0) ? splat<T>(T(1)) : e; }, x, e);
  return numerator - numerator * (e / (T(1) + e));
}

// tanh(|x|) = (1 - E) / (1 + E) with E = exp(-2|x|), in halves: h = (1 - E) / 2, from expm1 and so
// accurate near 0, and e = E / 2. The quotient only corrects a term whose error is smaller:
//   h + h * (h / (1/2 + e)) near 0,
//   2 h - 2 h * (e / (1/2 + e)) in saturation, where 1 - tanh^2 of the backward pass magnifies
//   errors.
// One division serves both. ln(2) in one constant will do: the larger |n|, the less e matters.
template <class T, class V>
RNN_EXT_INLINE V tanh(V x) {
  using C = ExpConstants<T>;
  constexpr T kHalf = T(0.5), kSaturating = T(-0.7);  // tanh = 1/3: both forms err alike there
  const V twice = at_least<T>(C::kTanhMin, negative_absolute<T>(x) * T(2));
  V n;
  const V scale = nearest_power_of_two<T, -1>(twice, n);
  const V p = expm1_reduced<T>(twice - n * C::kLn2);
  const V e = p * scale + scale;
  const V h = (kHalf - scale) - p * scale;
  const V sum = p * scale + (scale + kHalf);  // 1/2 + e without the rounding of e
  const V dividend = each(
      [](Vec<T> twice, Vec<T> e, Vec<T> h) { return twice < kSaturating ? -e : h; }, twice, e, h);
  const V base =
      h + each([](Vec<T> twice, Vec<T> h) { return twice < kSaturating ? h : Vec<T>{}; }, twice, h);
  const V t = base + base * (dividend / sum);
  return each([](Vec<T> t, Vec<T> x) { return (Vec<T>)((Bits<T>)t | sign_bit<T>(x)); }, t, x);
}

// The policy handed to the cells. In linear mode the saturating functions are replaced by their
// tangents at 0, sigmoid(x) -> 0.5 + 0.25 x and tanh(x) -> x: an error then survives a thousand
// steps instead of being squashed, so long sequences can be compared tightly (oneDNN's benchdnn
// tests its RNNs in the same spirit).
template <class T, class V = Vec<T>>
struct VectorMath {
  bool linear;

  // A product that is not fused with what it is added to.
  RNN_EXT_INLINE V rounded(V product) const {
    return each([](Vec<T> v) { return in_register(v); }, product);
  }
  RNN_EXT_INLINE V zero() const { return V{}; }
  RNN_EXT_INLINE V one() const { return V{} + T(1); }
  RNN_EXT_INLINE V sigmoid(V x) const {
    return linear ? x * T(0.25) + T(0.5) : RNN_EXT_ISA::sigmoid<T>(x);
  }
  RNN_EXT_INLINE V tanh(V x) const { return linear ? x : RNN_EXT_ISA::tanh<T>(x); }
  RNN_EXT_INLINE V sigmoid_grad(V s) const { return linear ? V{} + T(0.25) : s * (T(1) - s); }
  RNN_EXT_INLINE V tanh_grad(V y) const { return linear ? one() : T(1) - y * y; }
  // NaN passes through both, as in torch.
  RNN_EXT_INLINE V relu(V x) const { return at_least<T>(T(0), x); }
  RNN_EXT_INLINE V relu_grad(V y, V dy) const {
    return each([](Vec<T> y, Vec<T> dy) { return y <= T(0) ? Vec<T>{} : dy; }, y, dy);
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
