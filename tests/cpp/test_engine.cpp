// Forward and backward of every cell, type and instruction set against the scalar reference.
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "layers.h"
#include "reference.h"

using namespace rnn_ext;
using namespace rnn_ext::testing;

namespace {

struct Case {
  const char* name;
  Sizes sizes;
  Setting setting = {};
};

// Sizes beside a vector, a tile, a block and a chunk, on both sides.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"all ones", {.T = 1, .B = 1, .I = 1, .H = 1}},
      {"all ones, unpacked", {.T = 1, .B = 1, .I = 1, .H = 1}, {.packed_weights = 0}},
      {"one step", {.T = 1, .B = 1, .I = 3, .H = 5}},
      {"one step, wide batch", {.T = 1, .B = 51, .I = 3, .H = 5}},
      {"one step, states in place", {.T = 1, .B = 5, .I = 16, .H = 32, .D = 2}},
      {"one step, states in place, rows apart", {.T = 1, .B = 51, .I = 7, .H = 16}, {.gap = 3}},
      {"one step, no state", {.T = 1, .B = 5, .I = 16, .H = 32, .initial_state = false}},
      {"one row", {.T = 5, .B = 1, .I = 7, .H = 33}},
      {"one row, no state", {.T = 6, .B = 1, .I = 4, .H = 3, .initial_state = false}},
      {"whole vectors", {.T = 4, .B = 3, .I = 32, .H = 64}},
      {"two directions", {.T = 4, .B = 3, .I = 5, .H = 17, .D = 2}},
      {"batch of two row blocks", {.T = 3, .B = 49, .I = 4, .H = 19}},
      {"batch of three row blocks",
       {.T = 3, .B = 100, .I = 6, .H = 21, .D = 2},
       {.chunk_steps = 1}},
      {"input projected at its step",
       {.T = 5, .B = 9, .I = 7, .H = 33, .D = 2},
       {.batch_first = true,
        .gap = 3,
        .chunk_steps = 2,
        .row_block = 4,
        .packed_weights = 1,
        .project_in_step = 1}},
      {"input projected at its step, planned", {.T = 5, .B = 37, .I = 20, .H = 21}},
      {"small row blocks", {.T = 3, .B = 13, .I = 6, .H = 9, .D = 2}, {.row_block = 5}},
      {"groups of rows", {.T = 5, .B = 13, .I = 6, .H = 19}, {.row_block = 4, .groups = 2}},
      {"groups of rows, chunks",
       {.T = 7, .B = 18, .I = 66, .H = 21},
       {.batch_first = true, .gap = 3, .chunk_steps = 3, .row_block = 4, .groups = 4}},
      {"reserve past the caches",
       {.T = 7, .B = 19, .I = 20, .H = 37, .D = 2},
       {.chunk_steps = 3, .streams_reserve = true}},
      {"reserve past the caches, packed data",
       {.I = 5, .H = 33, .batch_sizes = {9, 4, 4, 1}},
       {.gap = 2, .streams_reserve = true}},
      {"groups of rows, planned", {.T = 12, .B = 37, .I = 20, .H = 21}},
      {"no bias, no state",
       {.T = 4, .B = 2, .I = 5, .H = 6, .bias = false, .initial_state = false}},
      {"deep products", {.T = 2, .B = 9, .I = 300, .H = 270}},
      {"batch first", {.T = 4, .B = 5, .I = 6, .H = 7, .D = 2}, {.batch_first = true}},
      {"batch first, gaps",
       {.T = 5, .B = 3, .I = 6, .H = 18, .D = 2},
       {.batch_first = true, .gap = 3}},
      {"batch first, one row", {.T = 5, .B = 1, .I = 6, .H = 18}, {.batch_first = true, .gap = 3}},
      {"batch first, one step", {.T = 1, .B = 5, .I = 6, .H = 18}, {.batch_first = true, .gap = 3}},
      {"gaps", {.T = 3, .B = 4, .I = 9, .H = 15}, {.gap = 5}},
      {"many chunks", {.T = 11, .B = 3, .I = 4, .H = 6, .D = 2}, {.chunk_steps = 2}},
      {"chunk of one", {.T = 5, .B = 2, .I = 4, .H = 6, .D = 2}, {.chunk_steps = 1}},
      {"one chunk too long", {.T = 5, .B = 2, .I = 4, .H = 6, .D = 2}, {.chunk_steps = 9}},
      {"many chunks, batch first",
       {.T = 7, .B = 3, .I = 4, .H = 6, .D = 2},
       {.batch_first = true, .gap = 1, .chunk_steps = 3}},
      {"unpacked", {.T = 3, .B = 2, .I = 65, .H = 70, .D = 2}, {.gap = 2, .packed_weights = 0}},
      {"unpacked, batch first",
       {.T = 3, .B = 2, .I = 5, .H = 6, .bias = false, .initial_state = false},
       {.batch_first = true, .gap = 1, .chunk_steps = 2, .packed_weights = 0}},
      {"only W_hh unpacked, one chunk",
       {.T = 5, .B = 2, .I = 33, .H = 70, .D = 2},
       {.packed_weights = 1, .packed_recurrent = 0}},
      {"only W_hh unpacked, several chunks",
       {.T = 5, .B = 1, .I = 33, .H = 70},
       {.gap = 1, .chunk_steps = 2, .packed_weights = 1, .packed_recurrent = 0}},
      {"unpacked, wide batch", {.T = 2, .B = 50, .I = 5, .H = 6}, {.packed_weights = 0}},
      {"packed data", {.I = 5, .H = 7, .batch_sizes = {5, 5, 3, 2, 2, 1}}},
      {"packed data, two directions",
       {.I = 5, .H = 18, .D = 2, .batch_sizes = {5, 4, 3, 2, 2, 1}},
       {.gap = 2, .chunk_steps = 2}},
      {"packed data, no state",
       {.I = 2, .H = 3, .D = 2, .batch_sizes = {3, 1, 1, 1}, .initial_state = false},
       {.chunk_steps = 3}},
      {"packed data, row blocks",
       {.I = 3, .H = 5, .D = 2, .batch_sizes = {60, 50, 49, 48, 10, 1}},
       {.chunk_steps = 4}},
      {"packed data, dealt out, steps of many and of few rows",
       {.I = 20, .H = 21, .batch_sizes = {40, 40, 39, 38, 20, 9, 9, 2, 1, 1}},
       {.gap = 2, .chunk_steps = 3}},
      {"packed data, dealt out, two directions",
       {.I = 5, .H = 18, .D = 2, .batch_sizes = {13, 11, 9, 4, 1}},
       {.chunk_steps = 2, .row_block = 4, .groups = 1, .deal_rows = 1}},
      {"packed data, dealt out, groups",
       {.I = 66, .H = 19, .batch_sizes = {13, 11, 9, 9, 4, 2, 1}},
       {.gap = 1, .chunk_steps = 3, .row_block = 4, .groups = 4, .deal_rows = 1}},
      {"packed data, dealt out, more groups than rows at some steps",
       {.I = 3, .H = 5, .batch_sizes = {10, 3, 2, 2, 1, 1}},
       {.chunk_steps = 2, .row_block = 3, .groups = 4, .deal_rows = 1}},
      {"packed data, unpacked weights",
       {.I = 3, .H = 5, .D = 2, .batch_sizes = {4, 4, 1}},
       {.packed_weights = 0}},
      {"packed data, one row", {.I = 3, .H = 5, .batch_sizes = {1, 1}}},
      {"linear", {.T = 30, .B = 2, .I = 5, .H = 9, .D = 2, .linear = true}, {.chunk_steps = 7}},
  };
  return all;
}

const std::vector<Case>& projected_cases() {
  static const std::vector<Case> all = {
      {"projected to one", {.T = 3, .B = 1, .I = 2, .H = 4, .P = 1}},
      {"projected", {.T = 4, .B = 3, .I = 5, .H = 10, .P = 3, .D = 2}},
      {"projected, unpacked",
       {.T = 3, .B = 2, .I = 5, .H = 10, .P = 3, .D = 2},
       {.gap = 1, .packed_weights = 0}},
      {"projected, no bias, no state",
       {.T = 3, .B = 2, .I = 5, .H = 33, .P = 17, .bias = false, .initial_state = false},
       {.batch_first = true}},
      {"projected, wide",
       {.T = 3, .B = 50, .I = 4, .H = 70, .P = 66, .D = 2},
       {.gap = 3, .chunk_steps = 2}},
      {"projected to nearly all", {.T = 6, .B = 2, .I = 3, .H = 9, .P = 8}, {.chunk_steps = 4}},
      {"projected, packed data",
       {.I = 3, .H = 20, .P = 5, .D = 2, .batch_sizes = {50, 49, 7, 7, 1}},
       {.chunk_steps = 2}},
      {"projected, linear",
       {.T = 30, .B = 2, .I = 5, .H = 9, .P = 4, .D = 2, .linear = true},
       {.chunk_steps = 7}},
  };
  return all;
}

std::vector<Case> cases_of(CellKind cell) {
  std::vector<Case> all = cases();
  if (cell == CellKind::kLstm)
    all.insert(all.end(), projected_cases().begin(), projected_cases().end());
  return all;
}

// Room for rounding and nothing else: of products with up to 810 terms. In double the reference
// rounds as much as the engine does. The worst seen is two thirds of this.
template <class T>
constexpr double kForwardTolerance =
    (std::is_same_v<T, double> ? 16 : 8) * std::numeric_limits<T>::epsilon();
template <class T>
constexpr double kBackwardTolerance = 2 * kForwardTolerance<T>;

template <class T>
void compare(const Layer& layer, const Setting& setting, const Outputs& outputs,
             const Gradients& gradients) {
  check::Scope scope(std::is_same_v<T, float> ? "float" : "double");
  for_each_isa([&] {
    const Forward<T> forward = run_forward<T>(layer, setting);
    check_near(forward.outputs, outputs, kForwardTolerance<T>);
    Setting inference = setting;
    inference.training = false;
    check_same(run_forward<T>(layer, inference).outputs, forward.outputs);
    check_near(run_backward<T>(layer, forward, setting), gradients, kBackwardTolerance<T>);
  });
}

void compare_all(CellKind cell) {
  for (const Case& c : cases_of(cell)) {
    check::Scope scope(c.name);
    const RandomLayer layer(cell, c.sizes);
    const Reference reference(layer);
    const Gradients gradients = reference.backward();
    compare<float>(layer, c.setting, reference.outputs, gradients);
    compare<double>(layer, c.setting, reference.outputs, gradients);
  }
}

constexpr std::array<CellKind, kNumCellKinds> kCells = {CellKind::kRnnTanh, CellKind::kRnnRelu,
                                                        CellKind::kLstm, CellKind::kGru};

// Calls f(cell) for every cell, named in failures.
template <class F>
void for_each_cell(F&& f) {
  for (CellKind cell : kCells) {
    check::Scope scope("cell ", int(cell));
    f(cell);
  }
}

// A layer with everything: two directions, several chunks, LSTM with projection.
Sizes general(CellKind cell) {
  return {.I = 6,
          .H = 18,
          .P = cell == CellKind::kLstm ? 7 : 0,
          .D = 2,
          .batch_sizes = {5, 4, 4, 2, 1}};
}

double loss(const Layer& layer) {
  const Outputs outputs = Reference(layer).outputs;
  double sum = 0;
  const auto add = [&](const Array& values, const Array& gradient) {
    for (size_t i = 0; i < gradient.size(); ++i) sum += values[i] * gradient[i];
  };
  add(outputs.y, layer.dy);
  for (int d = 0; d < layer.shape.directions; ++d) {
    add(outputs.h_n[d], layer.directions[d].dh_n);
    add(outputs.c_n[d], layer.directions[d].dc_n);
  }
  return sum;
}

}  // namespace

// The reference against itself: its gradients are those of its forward.
TEST(reference_gradients) {
  for_each_cell([](CellKind cell) {
    RandomLayer layer(
        cell,
        {.I = 2, .H = 3, .P = cell == CellKind::kLstm ? 2 : 0, .D = 2, .batch_sizes = {2, 2, 1}});
    const Gradients gradients = Reference(layer).backward();
    const auto compare = [&](const char* name, Array& array, const Array& gradient) {
      check::Scope scope(name);
      CHECK_EQ(array.size(), gradient.size());
      for (size_t i = 0; i < array.size(); ++i) {
        const double value = array[i], step = 1e-6;
        array[i] = value + step;
        const double above = loss(layer);
        array[i] = value - step;
        const double below = loss(layer);
        array[i] = value;
        CHECK_NEAR((above - below) / (2 * step), gradient[i], 1e-8);
      }
    };
    compare("x", layer.x, gradients.dx);
    for (int d = 0; d < 2; ++d) {
      Layer::Direction& w = layer.directions[d];
      const Gradients::Direction& g = gradients.directions[d];
      compare("w_ih", w.w_ih, g.w_ih);
      compare("w_hh", w.w_hh, g.w_hh);
      compare("b_ih", w.b_ih, g.b_ih);
      compare("b_hh", w.b_hh, g.b_hh);
      compare("w_hr", w.w_hr, g.w_hr);
      compare("h_0", w.h_0, g.h_0);
      compare("c_0", w.c_0, g.c_0);
    }
  });
}

TEST(rnn_tanh) { compare_all(CellKind::kRnnTanh); }
TEST(rnn_relu) { compare_all(CellKind::kRnnRelu); }
TEST(lstm) { compare_all(CellKind::kLstm); }
TEST(gru) { compare_all(CellKind::kGru); }

// Products of bfloat16 operands: near the full product, not equal to it, and the same for any team.
TEST(bfloat16_products) {
  const auto near = [](const auto& narrow, const auto& full) {
    bool same = true;
    for_arrays(narrow, full, [&](const char* name, const Array& a, const Array& b) {
      check::Scope scope(name);
      double error = 0, size = 0;
      CHECK_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); ++i) {
        error += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
      }
      CHECK(error <= 1e-4 * size);  // 2^-8 is the precision of a bfloat16
      same = same && error == 0;
    });
    return !same;
  };
  int runs = 0;
  for_each_isa([&] {
    if (!current_kernels().bf16_products) return;
    for (CellKind cell :
         {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm, CellKind::kGru}) {
      const int64_t P = cell == CellKind::kLstm ? 11 : 0;
      for (const Sizes& sizes :
           {Sizes{.T = 6, .B = 9, .I = 7, .H = 33, .D = 2}, Sizes{.T = 50, .B = 1, .I = 1, .H = 5},
            Sizes{.T = 3, .B = 50, .I = 64, .H = 48},
            Sizes{.I = 5, .H = 21, .P = P, .D = 2, .batch_sizes = {25, 13, 6, 1}}}) {
        const RandomLayer layer(cell, sizes);
        for (int64_t chunk_steps : {0, 2}) {
          Setting setting{.gap = 3, .chunk_steps = chunk_steps};
          const Forward<float> full = run_forward<float>(layer, setting);
          const Gradients gradients = run_backward(layer, full, setting);
          setting.bf16_products = true;
          const Forward<float> narrow = run_forward<float>(layer, setting);
          CHECK(near(narrow.outputs, full.outputs));
          const Gradients narrow_gradients = run_backward(layer, full, setting);
          CHECK(near(narrow_gradients, gradients));
          setting.threads = 3;
          setting.runner = [](int members, void (*body)(int, void*), void* context) {
            for (int i = members - 1; i >= 0; --i) body(i, context);
          };
          check_same(run_forward<float>(layer, setting).outputs, narrow.outputs);
          check_same(run_backward(layer, full, setting), narrow_gradients);
          ++runs;
        }
      }
    }
  });
  std::printf("  %d runs\n", runs);
}

// Laying out a workspace and telling its size see the same: W_ih, packed once for several chunks,
// needs no panel for each member as well.
TEST(size_of_the_workspace) {
  float value = 0;
  BackwardCall<float> call;
  call.shape = {CellKind::kLstm, 20, 3, 40, 40};
  call.dx.data = &value;
  Plan plan = plan_call<float>(call.shape, true, 1, false);
  plan.chunk_steps = 5;
  const size_t bytes = workspace_bytes(call, plan);
  plan.threads = 2;
  CHECK_EQ(workspace_bytes(call, plan), bytes);
  plan.chunk_steps = 20;  // packed panel by panel, by each member
  const size_t of_two = workspace_bytes(call, plan);
  plan.threads = 1;
  CHECK(workspace_bytes(call, plan) < of_two);
}

// A gradient does not depend on which others are asked for.
TEST(selected_gradients) {
  for_each_cell([](CellKind cell) {
    const RandomLayer layer(cell, general(cell));
    const Setting setting = {.chunk_steps = 2};
    for_each_isa([&] {
      const Forward<float> forward = run_forward<float>(layer, setting);
      const Gradients all = run_backward(layer, forward, setting);
      for (unsigned bit = 1; bit <= kInputGradient; bit <<= 1) {
        check::Scope scope("gradients ", bit);
        check_same(run_backward(layer, forward, setting, bit), all);
        check_same(run_backward(layer, forward, setting, kAllGradients & ~bit), all);
      }
      check_same(run_backward(layer, forward, setting, 0), all);
    });
  });
}

// Absent dy, dh_n and dc_n are zeros.
TEST(missing_output_gradients) {
  for_each_cell([](CellKind cell) {
    for (int present = 0; present < 4; ++present) {
      check::Scope scope("present ", present);
      RandomLayer layer(cell, general(cell));
      if (present != 1) layer.dy.clear();
      for (Layer::Direction& w : layer.directions) {
        if (present != 2) w.dh_n.clear();
        if (present != 3) w.dc_n.clear();
      }
      const Gradients gradients = Reference(layer).backward();
      for_each_isa([&] {
        const Forward<double> forward = run_forward<double>(layer);
        check_near(run_backward(layer, forward), gradients, kBackwardTolerance<double>);
      });
    }
  });
}

// A reserve written under one instruction set is readable under another.
TEST(reserve_between_instruction_sets) {
  for_each_cell([](CellKind cell) {
    const RandomLayer layer(cell, general(cell));
    const Gradients gradients = Reference(layer).backward();
    for_each_isa([&] {
      const Forward<float> forward = run_forward<float>(layer);
      for_each_isa(
          [&] { check_near(run_backward(layer, forward), gradients, kBackwardTolerance<float>); });
    });
  });
}

// What is not finite stays in its own row of the batch, and the padding of an array does not turn
// an infinity into NaN.
TEST(not_finite) {
  for_each_cell([](CellKind cell) {
    for (int packed_weights = 0; packed_weights < 2; ++packed_weights) {
      check::Scope scope(packed_weights ? "packed weights" : "unpacked weights");
      RandomLayer layer(cell, {.T = 3, .B = 3, .I = 5, .H = 7, .D = 2});
      const Setting setting = {.packed_weights = packed_weights};
      const auto input = [&](int64_t t, int64_t b) -> double& {
        return layer.x[size_t((t * 3 + b) * 5 + 1)];
      };
      for_each_isa([&] {
        const Outputs finite = run_forward<float>(layer, setting).outputs;
        input(1, 0) = kNaN;
        input(1, 2) = std::numeric_limits<double>::infinity();
        const Outputs expected = Reference(layer).outputs;
        const Outputs outputs = run_forward<float>(layer, setting).outputs;
        input(1, 0) = input(1, 2) = 0.5;
        for (size_t i = 0; i < outputs.y.size(); ++i) {
          const size_t b = i / 14 % 3;
          if (b == 1)
            CHECK_EQ(outputs.y[i], finite.y[i]);
          else if (std::isfinite(expected.y[i]))
            CHECK_NEAR(outputs.y[i], expected.y[i], kForwardTolerance<float>);
          else if (std::isnan(expected.y[i]))
            CHECK(std::isnan(outputs.y[i]));
          else
            CHECK_EQ(outputs.y[i], expected.y[i]);
        }
      });
    }
  });
}

namespace {

// Spacing of the values of a format with that many significant bits near x.
double spacing(double x, int bits, int least_exponent) {
  const int exponent = x == 0 ? least_exponent : std::ilogb(x);
  return std::ldexp(1.0, std::max(exponent, least_exponent) - bits + 1);
}

// Checks a run whose every h is rounded: step t of it, recomputed in double from its own h_{t-1}
// and c_{t-1}, lies within half a spacing.
void check_rounding(CellKind cell, Rounding rounding, int bits, int least_exponent) {
  const RandomLayer layer(cell,
                          {.T = 6, .B = 3, .I = 4, .H = 19, .P = cell == CellKind::kLstm ? 5 : 0});
  const SequenceShape& s = layer.shape;
  const int64_t H = s.hidden_size, R = s.state_size();
  const Forward<float> forward = run_forward<float>(layer, {.rounding = rounding});
  const Array& y = forward.outputs.y;
  const int64_t last = (s.steps - 1) * s.batch * R;
  CHECK(same_bits(forward.outputs.h_n[0], Array(y.begin() + last, y.end())));
  for (int64_t t = 1; t < s.steps; ++t) {
    Layer one;
    one.shape = s;
    one.shape.steps = 1;
    one.directions[0] = layer.directions[0];
    const auto step = [&](const Array& all, int64_t at, int64_t width) {
      return Array(all.begin() + at * s.batch * width, all.begin() + (at + 1) * s.batch * width);
    };
    one.x = step(layer.x, t, s.input_size);
    one.directions[0].h_0 = step(y, t - 1, R);
    if (cell == CellKind::kLstm)
      for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t j = 0; j < H; ++j)
          one.directions[0].c_0[size_t(b * H + j)] =
              forward.reserve[0][size_t(((t * s.batch + b) * 5 + 4) * padded(H) + j)];
    const Array exact = Reference(one).outputs.y, rounded = step(y, t, R);
    for (size_t i = 0; i < exact.size(); ++i) {
      const double unit = spacing(exact[i], bits, least_exponent);
      CHECK_EQ(rounded[i] / unit, std::nearbyint(rounded[i] / unit));
      CHECK_NEAR(rounded[i], exact[i], unit / 2 + kForwardTolerance<float>);
    }
  }
}

}  // namespace

TEST(rounded_state) {
  for_each_cell([](CellKind cell) {
    for_each_isa([&] {
      check_rounding(cell, Rounding::kBFloat16, 8, -126);
      check_rounding(cell, Rounding::kFloat16, 11, -14);
    });
  });
}

// Half to even, into the denormal range and out of the range altogether: one unit that passes its
// input through.
TEST(rounding_ties) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  struct Row {
    double x, bf16, f16;
  };
  const Row rows[] = {
      {1 + 0x1p-8, 1, 1 + 0x1p-8},
      {1 + 0x3p-8, 1 + 0x1p-6, 1 + 0x3p-8},
      {-1 - 0x3p-8, -1 - 0x1p-6, -1 - 0x3p-8},
      {1 + 0x1p-8 + 0x1p-20, 1 + 0x1p-7, 1 + 0x1p-8},
      {1 + 0x1p-11, 1, 1},
      {1 + 0x3p-11, 1, 1 + 0x1p-9},
      {65519, 65536, 65504},
      {65520, 65536, kInfinity},
      {0x1p-25, 0x1p-25, 0},
      {0x3p-25, 0x3p-25, 0x1p-23},
      {std::numeric_limits<float>::max(), kInfinity, kInfinity},
      {-kInfinity, -kInfinity, -kInfinity},
      {kNaN, kNaN, kNaN},
      {std::bit_cast<double>(~uint64_t(0) >> 1), kNaN, kNaN},  // all bits of the payload set
  };
  Layer layer;
  layer.shape = {CellKind::kRnnTanh, 1, int64_t(std::size(rows)), 1, 1};
  layer.linear = true;  // tanh(x) is x
  layer.directions[0].w_ih = {1};
  layer.directions[0].w_hh = {0};
  for (const Row& row : rows) layer.x.push_back(row.x);
  for_each_isa([&] {
    for (Rounding rounding : {Rounding::kBFloat16, Rounding::kFloat16}) {
      const Array y = run_forward<float>(layer, {.rounding = rounding}).outputs.y;
      for (size_t i = 0; i < y.size(); ++i) {
        check::Scope scope("rounding ", int(rounding), ", x=", rows[i].x);
        const double expected = rounding == Rounding::kBFloat16 ? rows[i].bf16 : rows[i].f16;
        if (std::isnan(expected))
          CHECK(std::isnan(y[i]));
        else
          CHECK_EQ(y[i], expected);
      }
    }
  });
}
