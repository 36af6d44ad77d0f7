// Truncated backpropagation over a window: every cell, type and instruction set against the literal
// double loop over the scalar reference.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "check.h"
#include "layers.h"
#include "reference.h"

using namespace rnn_ext;
using namespace rnn_ext::testing;

namespace {

// Positions [first, first + count) of one direction as a layer of one direction, without gradients.
Layer part_of(const Layer& layer, int d, int64_t first, int64_t count) {
  const SequenceShape& s = layer.shape;
  Layer part;
  part.shape = s;
  part.shape.directions = 1;
  part.shape.steps = count;
  part.linear = layer.linear;
  const int64_t size = s.batch * s.input_size;
  for (int64_t position = first; position < first + count; ++position) {
    const int64_t t = d == 0 ? position : s.steps - 1 - position;
    part.x.insert(part.x.end(), layer.x.begin() + t * size, layer.x.begin() + (t + 1) * size);
  }
  part.directions[0] = layer.directions[d];
  part.directions[0].dh_n.clear();
  part.directions[0].dc_n.clear();
  return part;
}

void add(Array& to, const Array& from, int64_t at = 0) {
  if (to.empty()) to.assign(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[size_t(at) + i] += from[i];
}

Gradients double_loop(const Layer& layer, int64_t window) {
  const SequenceShape& s = layer.shape;
  const int64_t R = s.state_size(), size = s.batch * s.input_size;
  Gradients sums;
  sums.dx.assign(layer.x.size(), 0);
  for (int d = 0; d < s.directions; ++d) {
    Gradients::Direction& sum = sums.directions[d];
    for (int64_t end = 1; end <= s.steps; ++end) {  // the loss at position end - 1
      const int64_t start = std::max<int64_t>(0, end - window);
      Layer part = part_of(layer, d, start, end - start);
      if (start > 0) {
        const Outputs before = Reference(part_of(layer, d, 0, start)).outputs;
        part.directions[0].h_0 = before.h_n[0];
        part.directions[0].c_0 = before.c_n[0];
      }
      part.dy.assign(size_t((end - start) * s.batch * R), 0);
      const int64_t t = d == 0 ? end - 1 : s.steps - end;
      for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t j = 0; j < R; ++j)
          part.dy[size_t(((end - start - 1) * s.batch + b) * R + j)] =
              layer.dy[size_t(((t * s.batch + b) * s.directions + d) * R + j)];
      if (end == s.steps) {
        part.directions[0].dh_n = layer.directions[d].dh_n;
        part.directions[0].dc_n = layer.directions[d].dc_n;
      }
      const Gradients found = Reference(part).backward();
      const Gradients::Direction& g = found.directions[0];
      for (int64_t i = 0; i < end - start; ++i) {
        const int64_t step = d == 0 ? start + i : s.steps - 1 - start - i;
        const auto row = found.dx.begin() + i * size;
        add(sums.dx, Array(row, row + size), step * size);
      }
      add(sum.w_ih, g.w_ih);
      add(sum.w_hh, g.w_hh);
      add(sum.b_ih, g.b_ih);
      add(sum.b_hh, g.b_hh);
      add(sum.w_hr, g.w_hr);
      if (start > 0) continue;
      add(sum.h_0, g.h_0);
      add(sum.c_0, g.c_0);
    }
  }
  return sums;
}

struct Cut {
  int64_t tile_rows = 0, block_tiles = 0;  // 0: as planned
};

// The engine's, with every array in an allocation of its size and NaN in what it must not read.
template <class T>
Gradients run_window(const Layer& layer, const Forward<T>& forward, const Setting& setting,
                     int64_t window, Cut cut = {}) {
  const SequenceShape& s = layer.shape;
  const int64_t R = s.state_size(), H = s.hidden_size, gate_rows = num_gates(s.cell) * H;
  Inputs<T> inputs;
  DirectionWeights<T> weights[kMaxDirections];
  set_weights(layer, setting, inputs, weights);
  View<T> y(s, setting, s.directions * R, forward.outputs.y),
      dy(s, setting, s.directions * R, layer.dy);
  const T* const y_data = inputs.add(y.data);
  const T* const dy_data = inputs.add(dy.data);
  std::vector<T> dgx[kMaxDirections], dgh[kMaxDirections], dh[kMaxDirections], dh_0[kMaxDirections],
      dc_0[kMaxDirections];
  KnownGradients<T> known[kMaxDirections];
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    WindowLayer<T> l;
    l.weights = weights[d];
    if (num_saved(s.cell) > 0) l.reserve = inputs.add(forward.reserve[d]);
    l.y = {y_data + d * R, y.step_stride, y.row_stride};
    l.h_0 = inputs.add(w.h_0, R);
    l.dh_n = inputs.add(w.dh_n, R);
    l.dc_n = inputs.add(w.dc_n, H);
    l.dgx = allocate(dgx[d], s.rows() * gate_rows);
    l.dgh = s.cell == CellKind::kGru ? allocate(dgh[d], s.rows() * gate_rows) : l.dgx;
    if (s.proj_size > 0) l.dh = allocate(dh[d], s.rows() * R);
    l.dh_0 = allocate(dh_0[d], s.batch * R);
    if (s.cell == CellKind::kLstm) l.dc_0 = allocate(dc_0[d], s.batch * H);
    WindowCall<T> call;
    call.shape = s;
    call.shape.directions = 1;
    call.reversed = d == 1;
    call.window = window;
    call.linear_activations = layer.linear;
    call.layers = &l;
    call.dy = {dy_data + d * R, dy.step_stride, dy.row_stride};
    WindowPlan plan = plan_window(call, 1);
    plan.threads = setting.threads;
    if (cut.tile_rows) plan.tile_rows = cut.tile_rows;
    if (cut.tile_rows) plan.block_rows = cut.tile_rows * cut.block_tiles;
    const size_t bytes = workspace_bytes(call, plan);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    const std::unique_ptr<void, void (*)(void*)> workspace(memory, std::free);
    std::memset(memory, 0xff, bytes);
    run(call, plan, memory, setting.runner);
    known[d] = {l.dgx, l.dgh, l.dh};
  }
  inputs.check_unmodified();
  // Those of h_0 and c_0 are not what is left to do.
  unsigned wanted = kAllGradients;
  for (unsigned d = 0; d < 2; ++d) wanted &= ~(3u << (d * kMembers + 5));
  Gradients result = run_backward<T>(layer, forward, setting, wanted, known);
  for (int d = 0; d < s.directions; ++d) {
    result.directions[d].h_0.assign(dh_0[d].begin(), dh_0[d].end());
    result.directions[d].c_0.assign(dc_0[d].begin(), dc_0[d].end());
  }
  return result;
}

struct Case {
  const char* name;
  Sizes sizes;
  int64_t window;
  Setting setting = {};
  Cut cut = {};
};

// Tiles and blocks that end inside a step, windows beside the number of steps, on both sides.
std::vector<Case> cases_of(CellKind cell) {
  std::vector<Case> cases = {
      {"all ones", {.T = 1, .B = 1, .I = 1, .H = 1}, 1},
      {"one step back", {.T = 5, .B = 3, .I = 4, .H = 7}, 1},
      {"one row", {.T = 9, .B = 1, .I = 3, .H = 33}, 4},
      {"no bias, no state",
       {.T = 6, .B = 2, .I = 3, .H = 5, .bias = false, .initial_state = false},
       3},
      {"a step less", {.T = 6, .B = 3, .I = 4, .H = 17, .D = 2}, 5},
      {"all steps", {.T = 6, .B = 3, .I = 4, .H = 17, .D = 2}, 6},
      {"more than all steps", {.T = 6, .B = 3, .I = 4, .H = 17, .D = 2}, 9},
      {"gaps, batch first",
       {.T = 5, .B = 4, .I = 6, .H = 18, .D = 2},
       3,
       {.batch_first = true, .gap = 3}},
      {"whole tiles", {.T = 6, .B = 48, .I = 3, .H = 16}, 3},
      {"odd tiles", {.T = 7, .B = 11, .I = 3, .H = 9, .D = 2}, 3, {}, {5, 2}},
      {"tiles of one, blocks of one", {.T = 5, .B = 2, .I = 3, .H = 9}, 3, {}, {1, 1}},
      {"chunks", {.T = 9, .B = 3, .I = 4, .H = 6, .D = 2}, 4, {.chunk_steps = 2}, {4, 2}},
      {"linear", {.T = 6, .B = 2, .I = 2, .H = 3, .linear = true}, 3},
  };
  if (cell == CellKind::kLstm) {
    cases.push_back(
        {"projection", {.T = 6, .B = 5, .I = 4, .H = 21, .P = 9, .D = 2}, 3, {.gap = 1}});
    cases.push_back({"projection to one", {.T = 4, .B = 2, .I = 4, .H = 5, .P = 1}, 2});
  }
  return cases;
}

// As in test_engine.cpp, for sums of up to nine times as many terms.
template <class T>
constexpr double kTolerance =
    (std::is_same_v<T, double> ? 64 : 32) * std::numeric_limits<T>::epsilon();

template <class T>
void compare(const Layer& layer, const Case& c, const Gradients& expected) {
  check::Scope scope(std::is_same_v<T, float> ? "float" : "double");
  for_each_isa([&] {
    const Forward<T> forward = run_forward<T>(layer, c.setting);
    const Gradients found = run_window<T>(layer, forward, c.setting, c.window, c.cut);
    check_near(found, expected, kTolerance<T>);
    Setting team = c.setting;
    team.threads = 3;
    team.runner = [](int members, void (*body)(int, void*), void* context) {
      for (int i = members - 1; i >= 0; --i) body(i, context);
    };
    check_same(run_window<T>(layer, forward, team, c.window, c.cut), found);
  });
}

void compare_all(CellKind cell) {
  for (const Case& c : cases_of(cell)) {
    check::Scope scope(c.name);
    const RandomLayer layer(cell, c.sizes);
    const Gradients expected = double_loop(layer, c.window);
    compare<float>(layer, c, expected);
    compare<double>(layer, c, expected);
  }
}

}  // namespace

// The double loop against the reference: with all steps they are the same, with fewer not.
TEST(reference) {
  for (CellKind cell : {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm, CellKind::kGru}) {
    const RandomLayer layer(cell, {.T = 5, .B = 2, .I = 3, .H = 4, .D = 2});
    const Gradients full = Reference(layer).backward();
    check_near(double_loop(layer, 5), full, 1e-14);
    CHECK(distance(double_loop(layer, 4).directions[0].w_hh, full.directions[0].w_hh) > 1e-6);
  }
}

TEST(rnn_tanh) { compare_all(CellKind::kRnnTanh); }
TEST(rnn_relu) { compare_all(CellKind::kRnnRelu); }
TEST(lstm) { compare_all(CellKind::kLstm); }
TEST(gru) { compare_all(CellKind::kGru); }
