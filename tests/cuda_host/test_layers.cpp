// Layers of all cells and types through the CUDA engine, both ways, on the host executor.
#include "layer_runs.h"

using namespace rnn_ext;                 // NOLINT
using namespace rnn_ext::cuda;           // NOLINT
using namespace rnn_ext::cuda::testing;  // NOLINT
using rnn_ext::testing::check_near;
using rnn_ext::testing::RandomLayer;
using rnn_ext::testing::Reference;
using rnn_ext::testing::Sizes;

namespace {

// A rounding of T, and of what is computed in between.
template <class T>
constexpr double kEpsilon = std::is_same_v<T, BFloat16>  ? 0x1p-8
                            : std::is_same_v<T, Float16> ? 0x1p-11
                            : sizeof(T) == 4             ? 0x1p-22
                                                         : 0x1p-50;

void no_reports() {
  for (const host::Report& report : host::take_reports()) CHECK_EQ(report.text, "");
}

template <class T>
void check_layer(CellKind cell, const Sizes& sizes, const Way& way) {
  check::Scope scope("cell ", int(cell), " bytes ", int(sizeof(T)), " T ", sizes.T, " B ", sizes.B,
                     " I ", sizes.I, " H ", sizes.H, " P ", sizes.P, " D ", sizes.D, " method ",
                     int(way.method), " epsilon ", kEpsilon<T>);
  RandomLayer layer(cell, sizes);
  round_layer<T>(layer);
  const Reference reference(layer);
  const Results results = run_layer<T>(layer, way);
  no_reports();
  check_near(results.outputs, reference.outputs, 8 * kEpsilon<T>);
  if (way.training) check_near(results.gradients, reference.backward(), 24 * kEpsilon<T>);
}

template <class F>
void for_types(F&& f) {
  f(float{});
  f(double{});
  f(Float16{});
  f(BFloat16{});
}

void check_all(const Sizes& sizes, Way way) {
  for (CellKind cell : {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm, CellKind::kGru}) {
    if (sizes.P > 0 && cell != CellKind::kLstm) continue;
    for_types([&](auto type) { check_layer<decltype(type)>(cell, sizes, way); });
  }
}

}  // namespace

TEST(stepwise) {
  Way way{.method = Method::kStepwise};
  check_all({.T = 3, .B = 2, .I = 3, .H = 5}, way);
  check_all({.T = 2, .B = 3, .I = 4, .H = 8, .D = 2}, way);
  check_all({.I = 3, .H = 5, .D = 2, .batch_sizes = {3, 3, 1}}, way);
  check_all({.T = 3, .B = 2, .I = 3, .H = 5, .P = 2, .D = 2}, way);
  check_all({.I = 3, .H = 8, .P = 4, .D = 2, .batch_sizes = {3, 2, 1}}, way);
  way.batch_first = true;
  way.gap = 3;
  way.chunk_steps = 2;
  check_all({.T = 3, .B = 2, .I = 3, .H = 5, .D = 2}, way);
}

TEST(persistent) {
  Way way{.method = Method::kPersistent};
  check_all({.T = 3, .B = 2, .I = 3, .H = 5}, way);
  check_all({.T = 2, .B = 3, .I = 4, .H = 33, .D = 2}, way);
  check_all({.I = 3, .H = 9, .D = 2, .batch_sizes = {11, 10, 9, 3, 1}}, way);
  way.batch_first = true;
  way.gap = 3;
  way.chunk_steps = 2;
  check_all({.T = 3, .B = 2, .I = 3, .H = 17, .D = 2}, way);
}

TEST(cluster) {
  Way way{.method = Method::kCluster};
  check_all({.T = 3, .B = 2, .I = 3, .H = 5}, way);
  way.cluster = 8;
  check_all({.T = 2, .B = 3, .I = 4, .H = 33}, way);
  way.cluster = 4;
  check_all({.I = 3, .H = 60, .batch_sizes = {34, 33, 3}}, way);
  way.cluster = 2;
  way.batch_first = true;
  way.gap = 3;
  way.chunk_steps = 2;
  check_all({.T = 3, .B = 2, .I = 3, .H = 17, .D = 2}, way);
}
