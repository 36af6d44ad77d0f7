// Accuracy of the vectorized sigmoid and tanh of every instruction set over their whole range.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/engine.h"

using namespace rnn_ext;

namespace {

template <class T>
struct Format;
template <>
struct Format<float> {
  using Bits = uint32_t;
  using Wide = double;  // of the references
  static constexpr int kMantissaBits = 23;
  // Every 16381st of all floats, and denser where neither function is trivial.
  static constexpr Bits kCoarse = 16381, kFine = 61;
  static constexpr float kFineFrom = 0x1p-14f, kFineTo = 128;
};
template <>
struct Format<double> {
  using Bits = uint64_t;
  using Wide = long double;
  static constexpr int kMantissaBits = 52;
  static constexpr Bits kCoarse = (Bits(1) << 48) - 59, kFine = (Bits(1) << 41) - 21;
  static constexpr double kFineFrom = 0x1p-30, kFineTo = 1024;
};

template <class T>
using Wide = typename Format<T>::Wide;

template <class T>
std::vector<T> sweep() {
  using F = Format<T>;
  using Bits = typename F::Bits;
  const auto bits = [](T x) { return std::bit_cast<Bits>(x); };
  std::vector<T> points;
  const auto add = [&](Bits b) {
    points.push_back(std::bit_cast<T>(b));
    points.push_back(-std::bit_cast<T>(b));
  };
  const Bits infinity = bits(std::numeric_limits<T>::infinity());
  for (Bits b = 0; b < infinity; b += F::kCoarse) add(b);
  for (Bits b = bits(F::kFineFrom); b < bits(F::kFineTo); b += F::kFine) add(b);
  // Where the reduction of exp(x) or exp(2x) passes on to the next power of two, and around 0.
  for (int i = 0; i < 4400; ++i)
    for (int side = 0; side < 5; ++side)
      add(bits(T(i * (std::numbers::ln2 / 4))) + Bits(i == 0 ? side : side - 2));
  for (Bits b = 0; b < 8; ++b) add(infinity - b);  // the largest numbers and infinity
  return points;
}

template <class T>
Wide<T> exact_sigmoid(Wide<T> x) {
  return 1 / (1 + std::exp(-x));
}
template <class T>
Wide<T> exact_tanh(Wide<T> x) {
  return std::tanh(x);
}

// Distance between neighbours of T at x: a unit in the last place, that of the smallest normal
// number in the range below it.
template <class T>
Wide<T> ulp(Wide<T> x) {
  constexpr int kLeast = std::numeric_limits<T>::min_exponent - 1;
  const int exponent = x == 0 ? kLeast : std::max(std::ilogb(x), kLeast);
  return std::ldexp(Wide<T>(1), exponent - Format<T>::kMantissaBits);
}

template <class T>
struct Function {
  const char* name;
  Wide<T> (*exact)(Wide<T>);
  void (*KernelsOf<T>::*vectorized)(const T*, T*, int64_t);
};
template <class T>
constexpr Function<T> kFunctions[] = {{"sigmoid", exact_sigmoid<T>, &KernelsOf<T>::sigmoid},
                                      {"tanh", exact_tanh<T>, &KernelsOf<T>::tanh}};

// Calls f(function, apply) for both functions of every instruction set; apply(x) is a vector.
template <class T, class F>
void for_each_function(F&& f) {
  const std::string selected = current_kernels().name;
  for (const Function<T>& function : kFunctions<T>) {
    for (const std::string& isa : available_isas()) {
      check::Scope scope(isa, " ", function.name);
      CHECK(select_isa(isa));
      f(function, [&](const std::vector<T>& x) {
        std::vector<T> y(x.size(), T(-7));
        (current_kernels().of<T>().*function.vectorized)(x.data(), y.data(), int64_t(x.size()));
        return y;
      });
    }
  }
  CHECK(select_isa(selected));
}

// Limits on the error: relative, of normal results; in units of the last place (ulp), which covers
// denormal ones too; in ulp where tanh saturates, from 1/2 on. The derivative 1 - tanh^2 is
// computed from the result and magnifies the last.
struct Accuracy {
  double relative, ulp, saturated_ulp;
};

template <class T>
void check_accuracy(const Accuracy& limits) {
  const std::vector<T> x = sweep<T>();
  const char* name = "";
  std::vector<Wide<T>> exact(x.size());
  for_each_function<T>([&](const Function<T>& function, auto&& apply) {
    if (name != function.name) {  // the same for every instruction set, and slow
      for (size_t i = 0; i < x.size(); ++i) exact[i] = function.exact(x[i]);
      name = function.name;
    }
    const std::vector<T> y = apply(x);
    double worst_ulp = 0, worst_relative = 0, worst_saturated = 0;
    T worst_at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const Wide<T> distance = std::abs(Wide<T>(y[i]) - exact[i]);
      const double in_ulp = double(distance / ulp<T>(exact[i]));
      if (!(in_ulp <= worst_ulp)) {
        worst_ulp = in_ulp;
        worst_at = x[i];
      }
      if (std::abs(exact[i]) >= Wide<T>(0.5)) worst_saturated = std::max(worst_saturated, in_ulp);
      if (std::abs(exact[i]) >= Wide<T>(std::numeric_limits<T>::min()))
        worst_relative = std::max(worst_relative, double(distance / std::abs(exact[i])));
      if (std::isnan(in_ulp)) break;
    }
    std::printf("  %s: %.2f ulp at %.9g, %.2f from 1/2 on, relative %.2g, of %zu points\n",
                check::context.c_str(), worst_ulp, double(worst_at), worst_saturated,
                worst_relative, x.size());
    CHECK_NEAR(worst_relative, 0, limits.relative);
    CHECK_NEAR(worst_ulp, 0, limits.ulp);
    if (function.name == std::string("tanh")) CHECK_NEAR(worst_saturated, 0, limits.saturated_ulp);
  });
}

template <class T>
void check_special_values() {
  using Limits = std::numeric_limits<T>;
  const T infinity = Limits::infinity(), nan = Limits::quiet_NaN();
  for_each_function<T>([&](const Function<T>& function, auto&& apply) {
    const bool tanh = function.name == std::string("tanh");
    const std::vector<T> y = apply({infinity, -infinity, T(0), T(-0.0), nan, -nan, Limits::max(),
                                    Limits::lowest(), Limits::denorm_min(), -Limits::denorm_min()});
    CHECK_EQ(y[0], T(1));
    CHECK_EQ(y[1], tanh ? T(-1) : T(0));
    CHECK_EQ(y[2], tanh ? T(0) : T(0.5));
    CHECK_EQ(y[3], tanh ? T(0) : T(0.5));
    CHECK(!std::signbit(y[2]));
    CHECK_EQ(std::signbit(y[3]), tanh);
    CHECK(std::isnan(y[4]));
    CHECK(std::isnan(y[5]));
    CHECK_EQ(y[6], T(1));
    CHECK_EQ(y[7], tanh ? T(-1) : T(0));
    CHECK_EQ(y[8], tanh ? Limits::denorm_min() : T(0.5));
    CHECK_EQ(y[9], tanh ? -Limits::denorm_min() : T(0.5));
  });
}

// A NaN stays one whatever its payload, which lies in the bits that exponents are computed in.
template <class T>
void check_nan_payloads() {
  using Bits = typename Format<T>::Bits;
  const Bits infinity = std::bit_cast<Bits>(std::numeric_limits<T>::infinity());
  std::vector<T> x;
  for (int i = 0; i < Format<T>::kMantissaBits; ++i) {  // all but the last are signaling
    x.push_back(std::bit_cast<T>(infinity | Bits(1) << i));
    x.push_back(-x.back());
  }
  x.push_back(std::bit_cast<T>(infinity | (infinity - 1)));
  for_each_function<T>([&](const Function<T>&, auto&& apply) {
    for (const T y : apply(x)) CHECK(std::isnan(y));
  });
}

// tanh(x) is x where x is denormal, and sigmoid(x) is rounded once where it gets that small.
template <class T>
void check_denormals() {
  using Limits = std::numeric_limits<T>;
  std::vector<T> tiny, low;
  for (T x = Limits::min(); x > 0; x = x * T(0.7) - Limits::denorm_min()) {
    tiny.push_back(x);
    tiny.push_back(-x);
  }
  const T from = std::log(Limits::min() / 16), to = std::log(Limits::denorm_min()) - 1;
  for (int i = 0; i <= 1000; ++i) low.push_back(from + (to - from) * T(i) / 1000);
  for_each_function<T>([&](const Function<T>& function, auto&& apply) {
    if (function.name == std::string("tanh")) {
      CHECK(apply(tiny) == tiny);
      return;
    }
    const std::vector<T> y = apply(low);
    for (size_t i = 0; i < y.size(); ++i)
      CHECK_NEAR(double((y[i] - function.exact(low[i])) / Limits::denorm_min()), 0, 0.6);
  });
}

// Never outside their bounds, and tanh is odd to the last bit.
template <class T>
void check_bounds() {
  const std::vector<T> x = sweep<T>();
  for_each_function<T>([&](const Function<T>& function, auto&& apply) {
    const bool tanh = function.name == std::string("tanh");
    const std::vector<T> y = apply(x);
    size_t outside = 0, uneven = 0;
    for (size_t i = 0; i < x.size(); ++i) outside += !(y[i] >= (tanh ? -1 : 0) && y[i] <= 1);
    if (tanh)
      for (size_t i = 0; i < x.size(); i += 2) uneven += y[i] != -y[i + 1];
    CHECK_EQ(outside, 0u);
    CHECK_EQ(uneven, 0u);
  });
}

// Every length gives each element what it gets in a long array, whatever lane it falls in.
template <class T>
void check_lengths() {
  constexpr size_t kLongest = 67;
  std::vector<T> x;
  for (size_t i = 0; i < kLongest; ++i) x.push_back(T(i) / 8 - 4);
  for_each_function<T>([&](const Function<T>&, auto&& apply) {
    const std::vector<T> all = apply(x);
    for (size_t n = 0; n < kLongest; ++n) {
      check::Scope scope("length ", n);
      const std::vector<T> first = apply(std::vector<T>(x.begin(), x.begin() + int64_t(n)));
      const std::vector<T> last = apply(std::vector<T>(x.end() - int64_t(n), x.end()));
      CHECK(std::equal(first.begin(), first.end(), all.begin()));
      CHECK(std::equal(last.begin(), last.end(), all.end() - int64_t(n)));
    }
  });
}

}  // namespace

TEST(float_accuracy) { check_accuracy<float>({1.5 * 0x1p-23, 2.0, 1.25}); }
TEST(double_accuracy) { check_accuracy<double>({1e-15, 2.25, 1.5}); }
TEST(float_special_values) { check_special_values<float>(); }
TEST(double_special_values) { check_special_values<double>(); }
TEST(float_nan_payloads) { check_nan_payloads<float>(); }
TEST(double_nan_payloads) { check_nan_payloads<double>(); }
TEST(float_denormals) { check_denormals<float>(); }
TEST(double_denormals) { check_denormals<double>(); }
TEST(float_bounds) { check_bounds<float>(); }
TEST(double_bounds) { check_bounds<double>(); }
TEST(float_lengths) { check_lengths<float>(); }
TEST(double_lengths) { check_lengths<double>(); }
