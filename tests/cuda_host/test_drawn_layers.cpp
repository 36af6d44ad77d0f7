// The engine's kernels on the host executor: drawn layers, forward and backward, for every method,
// cell and type. Each is run under three schedules, which must find nothing, give the same bits,
// and agree with the reference.
//
// RNN_EXT_DRAWS: layers for each method, cell and type instead of kDraws.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "layer_runs.h"

using namespace rnn_ext;           // NOLINT
using namespace rnn_ext::testing;  // NOLINT
using rnn_ext::cuda::BFloat16;
using rnn_ext::cuda::Device;
using rnn_ext::cuda::Float16;
using rnn_ext::cuda::Method;
using rnn_ext::cuda::testing::Results;
using rnn_ext::cuda::testing::Way;
namespace host = rnn_ext::cuda::host;

namespace {

constexpr int kDraws = 10;  // 4 cells x (3 methods x 4 types and twice tf32): 560 layers

struct Drawn {
  Sizes sizes;
  Way way;
};

// How the persistent kernels multiply: as the storage type does, or float rounded to tf32.
enum class Math { kOwn, kTf32 };

Drawn draw(CellKind cell, Method method, Math math, bool narrow, int index, std::mt19937& random) {
  const auto below = [&](int n) { return int(random() % unsigned(n)); };
  const auto one_in = [&](int n) { return below(n) == 0; };
  Drawn d;
  Sizes& s = d.sizes;
  s.T = one_in(4) ? 1 : 2 + below(4);
  s.B = one_in(4) ? 1 : 2 + below(10);
  s.I = 1 + below(7);
  s.H = 1 + below(36);
  s.D = 1 + below(2);
  Way& way = d.way;
  // So few multiprocessors that directions take turns.
  if (s.D == 2 && one_in(3)) way.device.sms = 1 + int((s.H + 7) / 8);
  if (index % 4 == 1) {  // one block for all rows: more than one pass over them
    s.T = 1 + below(3);
    s.B = 33 + below(int(cuda::kMaxGroupRows) - 32);
    s.H = 1 + below(8);
    way.device.sms = 1;
  }
  if (method == Method::kCluster) {
    way.device = *cuda::find_device("h100");
    way.cluster = 1 << below(3);
    // So many passes over at least 8 units each as a block can take.
    while (s.H > way.cluster * 8 * cuda::kMaxPasses) way.cluster *= 2;
    way.device.sms = way.cluster;  // no faster with more groups: as few as can be
  }
  s.bias = !one_in(4);
  s.initial_state = !one_in(3);
  s.linear = one_in(4);
  if (one_in(3)) {
    for (int64_t t = 0, rows = s.B; t < s.T; ++t) {
      s.batch_sizes.push_back(rows);
      if (one_in(2)) rows = 1 + below(int(rows));
    }
  }
  way.method = method;
  way.batch_first = one_in(3);
  way.gap = one_in(2) ? 0 : 1 + below(4);
  way.chunk_steps = one_in(2) ? 0 : 1 + below(int(s.T));
  if (method == Method::kStepwise && cell == CellKind::kLstm && s.H > 1 && one_in(3))
    s.P = 1 + below(int(s.H) - 1);
  way.allow_tf32 = math == Math::kTf32;
  // Each cut that the engine has: which one the plan would take is not the question here.
  way.cut = math == Math::kTf32 ? cuda::Cut::kTensorCores
            : one_in(2)         ? cuda::Cut::kWide
            : narrow            ? cuda::Cut::kTensorCores
                                : cuda::Cut::kLanes;
  if (math == Math::kTf32 && one_in(3)) {
    s.T = 1;
    if (!s.batch_sizes.empty()) s.batch_sizes = {s.B};
  }
  return d;
}

host::Schedule schedule(int i, uint64_t seed) {
  const host::Order orders[] = {host::Order::kForward, host::Order::kReverse, host::Order::kRandom};
  return {.order = orders[i], .seed = seed, .preempt_every = 20 + int(seed % 100)};
}

// Relative to the largest value: h is rounded to T after every step, gate gradients before they are
// multiplied, and sums are kept in at least float. The largest of 1280 layers (RNN_EXT_DRAWS=40):
// 2e-15, 6e-7, 2.9e-3, 1.1e-2.
template <class T>
constexpr double kTolerance = 0;
template <>
constexpr double kTolerance<double> = 4e-15;
template <>
constexpr double kTolerance<float> = 1.2e-6;
template <>
constexpr double kTolerance<Float16> = 3e-3;
template <>
constexpr double kTolerance<BFloat16> = 2e-2;

// With products of tf32 the reference rounds the same operands: what is left is float32's own
// error, as long as no operand is so near the middle between two tf32 numbers that an error of
// float32's size sends it to the other one. W_hh and h_0 are given, so the outputs of one step are
// as exact as without tf32. Later h and all gate gradients are results: one in some thousand goes
// the other way, by 2^-10 of itself at most, and is one of H terms of a sum. That is a float16's
// step; the largest of 80 layers was 2.2e-4.
constexpr double kTf32Steps = 5e-4;

double tf32(double value) { return double(__builtin_bit_cast(float, cuda::to_tf32(float(value)))); }

double largest = 0;  // distance from the reference, in tolerances

template <class Result>
void compare(const Result& result, const Result& reference, double tolerance) {
  check_near(result, reference, tolerance);
  for_arrays(result, reference, [&](const char*, const Array& a, const Array& b) {
    if (a.size() == b.size()) largest = std::max(largest, distance(a, b) / tolerance);
  });
}

template <class T>
void run_drawn(CellKind cell, Method method, Math math, int index) {
  const uint32_t seed =
      uint32_t(index) * 64 + uint32_t(cell) * 16 + uint32_t(method) * 4 + uint32_t(sizeof(T));
  std::mt19937 random(seed);
  const Drawn drawn = draw(cell, method, math, sizeof(T) == 2, index, random);
  const Sizes& s = drawn.sizes;
  const check::Scope scope("cell ", int(cell),
                           method == Method::kStepwise  ? " stepwise"
                           : method == Method::kCluster ? " cluster"
                                                        : " persistent",
                           " draw ", index, " T", s.T, " B", s.B, " I", s.I, " H", s.H, " P", s.P,
                           " D", s.D, s.batch_sizes.empty() ? "" : " packed");
  RandomLayer layer(cell, s);
  cuda::testing::round_layer<T>(layer);
  if (math == Math::kTf32) layer.recurrent_operand = tf32;
  const double tolerance = math == Math::kTf32 ? kTf32Steps : kTolerance<T>;
  const Reference reference(layer);
  Results first;
  for (int i = 0; i < 3; ++i) {
    const check::Scope order("schedule ", i);
    host::set_schedule(schedule(i, seed));
    const Results results = cuda::testing::run_layer<T>(layer, drawn.way);
    for (const host::Report& report : host::take_reports()) CHECK_EQ(report.text, "");
    if (i == 0) {
      first = results;
      compare(first.outputs, reference.outputs, s.T == 1 ? kTolerance<T> : tolerance);
      // A pre-activation that rounds to the other side of relu's kink has another derivative: no
      // tolerance tells that from a mistake. tests/test_cuda_emulated.py judges these by torch's.
      if (cell == CellKind::kRnnRelu && (sizeof(T) == 2 || math == Math::kTf32)) continue;
      Gradients expected = reference.backward();
      for (Gradients::Direction& d : expected.directions)
        if (!s.bias) d.b_ih = d.b_hh = {};
      compare(first.gradients, expected, tolerance);
    } else {
      check_same(results.outputs, first.outputs);
      check_same(results.gradients, first.gradients);
    }
  }
}

template <class T>
void run_all(Method method, Math math = Math::kOwn) {
  const char* const draws = std::getenv("RNN_EXT_DRAWS");
  largest = 0;
  for (int cell = 0; cell < kNumCellKinds; ++cell)
    for (int i = 0; i < (draws ? std::atoi(draws) : kDraws); ++i)
      run_drawn<T>(CellKind(cell), method, math, i);
  std::printf("largest error: %.2f of what is tolerated\n", largest);
}

}  // namespace

TEST(persistent_f32) { run_all<float>(Method::kPersistent); }
TEST(persistent_tf32) { run_all<float>(Method::kPersistent, Math::kTf32); }
TEST(persistent_f64) { run_all<double>(Method::kPersistent); }
TEST(persistent_f16) { run_all<Float16>(Method::kPersistent); }
TEST(persistent_bf16) { run_all<BFloat16>(Method::kPersistent); }
TEST(cluster_f32) { run_all<float>(Method::kCluster); }
TEST(cluster_tf32) { run_all<float>(Method::kCluster, Math::kTf32); }
TEST(cluster_f64) { run_all<double>(Method::kCluster); }
TEST(cluster_f16) { run_all<Float16>(Method::kCluster); }
TEST(cluster_bf16) { run_all<BFloat16>(Method::kCluster); }
TEST(stepwise_f32) { run_all<float>(Method::kStepwise); }
TEST(stepwise_f64) { run_all<double>(Method::kStepwise); }
TEST(stepwise_f16) { run_all<Float16>(Method::kStepwise); }
TEST(stepwise_bf16) { run_all<BFloat16>(Method::kStepwise); }
