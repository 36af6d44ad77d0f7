// Random layers, and running the engine on them with every array in an allocation of exactly its
// size (so that AddressSanitizer sees one element too far) and NaN in all memory that the engine
// must not read: gaps between rows, the workspace, outputs not yet written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/engine.h"
#include "reference.h"

namespace rnn_ext::testing {

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What a test asks for, in the letters of sequence.h; the strides and the plan of a run are in
// Setting.
struct Sizes {
  int64_t T = 1, B = 1, I = 1, H = 1, P = 0;
  int D = 1;
  std::vector<int64_t> batch_sizes = {};  // packed data if not empty; T and B follow
  bool bias = true, initial_state = true, linear = false;
};

class RandomLayer : public Layer {
 public:
  RandomLayer(CellKind cell, const Sizes& sizes) : batch_sizes_(sizes.batch_sizes) {
    linear = sizes.linear;
    shape = {cell, sizes.T, sizes.B, sizes.I, sizes.H, sizes.P, sizes.D};
    if (!batch_sizes_.empty()) {
      offsets_.push_back(0);
      for (int64_t rows : batch_sizes_) offsets_.push_back(offsets_.back() + rows);
      shape.steps = int64_t(batch_sizes_.size());
      shape.batch = batch_sizes_.front();
      shape.batch_sizes = batch_sizes_.data();
      shape.offsets = offsets_.data();
    }
    // A relu unit so near 0 that a rounding decides its derivative would compare nothing.
    do fill(sizes);
    while (Reference(*this).nearest_kink < 1e-5);
  }
  RandomLayer(const RandomLayer&) = delete;
  RandomLayer& operator=(const RandomLayer&) = delete;

 private:
  std::vector<int64_t> batch_sizes_, offsets_;
  uint64_t state_ = 1;

  double uniform() {  // in (-1, 1), exact in float
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state_ >> 41) - (1 << 22)) / (1 << 22);
  }
  void fill(Array& array, int64_t size, double scale = 1) {
    array.resize(size_t(size));
    for (double& a : array) a = float(scale * uniform());
  }
  void fill(const Sizes& sizes) {
    const int64_t gate_rows = num_gates(shape.cell) * shape.hidden_size, R = shape.state_size();
    const double scale = 1 / std::sqrt(double(shape.hidden_size));
    fill(x, shape.rows() * shape.input_size);
    fill(dy, shape.rows() * shape.directions * R);
    for (int d = 0; d < shape.directions; ++d) {
      Direction& w = directions[d];
      fill(w.w_ih, gate_rows * shape.input_size, scale);
      fill(w.w_hh, gate_rows * R, scale);
      fill(w.w_hr, shape.proj_size * shape.hidden_size, scale);
      fill(w.dh_n, shape.batch * R);
      if (sizes.bias) {
        fill(w.b_ih, gate_rows, scale);
        fill(w.b_hh, gate_rows, scale);
      }
      if (sizes.initial_state) fill(w.h_0, shape.batch * R);
      if (shape.cell == CellKind::kLstm) {
        fill(w.dc_n, shape.batch * shape.hidden_size);
        if (sizes.initial_state) fill(w.c_0, shape.batch * shape.hidden_size);
      }
    }
  }
};

// How a layer is run: memory layout and plan.
struct Setting {
  bool batch_first = false;
  int64_t gap = 0;                                     // elements between rows, in data and weights
  int64_t chunk_steps = 0, row_block = 0, groups = 0;  // 0: as planned
  int packed_weights = -1;                             // -1: as planned
  int packed_recurrent = -1;                           // likewise
  int threads = 1;
  Runner runner = nullptr;
  bool training = true;  // keep the reserve
  Rounding rounding = Rounding::kNone;
  bool bf16_products = false;
  int64_t shares = 0;
  int project_in_step = -1;  // -1: as planned
  int deal_rows = -1;
  bool directions_in_turn = false;
  bool streams_reserve = false;  // true: however little it is
};

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Arrays that the engine only reads.
template <class T>
class Inputs {
 public:
  // (rows, columns) with a leading dimension of columns + gap, NaN in the gaps; null if absent.
  const T* add(const Array& values, int64_t columns, int64_t gap = 0) {
    if (values.empty()) return nullptr;
    const int64_t rows = int64_t(values.size()) / columns;
    std::vector<T> array(size_t((rows - 1) * (columns + gap) + columns), T(kNaN));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k)
        array[size_t(r * (columns + gap) + k)] = T(values[size_t(r * columns + k)]);
    return add(std::move(array));
  }
  const T* add(std::vector<T> array) {
    before_.push_back(array);
    arrays_.push_back(std::move(array));
    return arrays_.back().data();
  }
  void check_unmodified() const {
    for (size_t i = 0; i < arrays_.size(); ++i) CHECK(same_bits(arrays_[i], before_[i]));
  }

 private:
  std::deque<std::vector<T>> arrays_, before_;
};

// The memory behind a StepRows.
template <class T>
struct View {
  const SequenceShape& shape;
  int64_t width;
  int64_t step_stride, row_stride;
  std::vector<T> data;

  View(const SequenceShape& s, const Setting& setting, int64_t columns) : shape(s), width(columns) {
    const int64_t row = width + setting.gap;
    row_stride = setting.batch_first ? s.steps * row : row;
    step_stride = setting.batch_first ? row : s.batch * row;
    const int64_t last = s.offsets ? (s.rows() - 1) * row_stride
                                   : (s.steps - 1) * step_stride + (s.batch - 1) * row_stride;
    data.assign(size_t(last + width), T(kNaN));
  }
  View(const SequenceShape& s, const Setting& setting, int64_t columns, const Array& dense)
      : View(s, setting, columns) {
    for_elements([&](T& to, size_t i) { to = T(dense[i]); });
  }

  StepRows<T> rows() { return {data.data(), step_stride, row_stride}; }

  Array dense() {  // (N, width); what lies between the rows must be as it was
    Array values(size_t(shape.rows() * width));
    std::vector<T> rest = data;
    for_elements([&](T& from, size_t i) { values[i] = from; });
    data.swap(rest);
    for_elements([&](T& value, size_t) { value = T(kNaN); });
    for (T value : data) CHECK(value != value);
    data.swap(rest);
    return values;
  }

 private:
  template <class Visit>
  void for_elements(Visit&& visit) {
    for (int64_t t = 0; t < shape.steps; ++t)
      for (int64_t b = 0; b < shape.active(t); ++b)
        for (int64_t k = 0; k < width; ++k)
          visit(rows().at(shape, t, b)[k], size_t((shape.first_row(t) + b) * width + k));
  }
};

// Runs a call in a workspace of exactly the bytes it asks for, full of NaN.
template <class T, class Call>
void run_call(const Call& call, bool backward, const Setting& setting) {
  Plan plan = plan_call<T>(call.shape, backward, 1, setting.bf16_products);
  plan.threads = setting.threads;
  if (setting.chunk_steps) plan.chunk_steps = setting.chunk_steps;
  plan.shares = setting.shares;
  plan.directions_in_turn = setting.directions_in_turn;
  if (setting.row_block) plan.row_block = setting.row_block;
  if (setting.groups) plan.groups = setting.groups;
  if (setting.deal_rows >= 0) plan.deal_rows = setting.deal_rows != 0;
  if (setting.packed_weights >= 0) plan.packed_weights = setting.packed_weights != 0;
  if (setting.project_in_step >= 0)
    plan.project_in_step_rows = setting.project_in_step != 0 ? 0 : INT64_MAX;
  if (!plan.packed_weights) plan.project_in_step_rows = INT64_MAX;
  if (setting.streams_reserve) plan.streamed_reserve_bytes = 0;
  if (setting.packed_recurrent >= 0) plan.packed_recurrent = setting.packed_recurrent != 0;
  const size_t bytes = workspace_bytes(call, plan);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
  const std::unique_ptr<void, void (*)(void*)> workspace(memory, std::free);
  std::memset(memory, 0xff, bytes);
  run(call, plan, memory, setting.runner);
}

template <class T>
void set_weights(const Layer& layer, const Setting& setting, Inputs<T>& inputs,
                 DirectionWeights<T> (&weights)[kMaxDirections]) {
  const SequenceShape& s = layer.shape;
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    const int64_t gap = setting.gap, R = s.state_size();
    weights[d] = {inputs.add(w.w_ih, s.input_size, gap),
                  inputs.add(w.w_hh, R, gap),
                  inputs.add(w.b_ih, 1),
                  inputs.add(w.b_hh, 1),
                  inputs.add(w.w_hr, s.hidden_size, gap),
                  s.input_size + gap,
                  R + gap,
                  s.hidden_size + gap};
  }
}

template <class T>
T* allocate(std::vector<T>& array, int64_t size) {
  array.assign(size_t(size), T(kNaN));
  return array.data();
}

// As aligned as the engine's memory, which it may make use of.
template <class T>
T* allocate_aligned(std::vector<T>& array, int64_t size) {
  constexpr size_t kAlignment = 64;
  void* at = allocate(array, size + int64_t(kAlignment / sizeof(T)));
  size_t space = array.size() * sizeof(T);
  return static_cast<T*>(std::align(kAlignment, size_t(size) * sizeof(T), at, space));
}

template <class T>
struct Forward {
  Outputs outputs;
  std::vector<T> reserve[kMaxDirections];
};

template <class T>
Forward<T> run_forward(const Layer& layer, const Setting& setting = {}) {
  const SequenceShape& s = layer.shape;
  const int64_t R = s.state_size();
  Forward<T> result;
  Inputs<T> inputs;
  ForwardCall<T> call;
  call.shape = s;
  call.rounding = setting.rounding;
  call.bf16_products = setting.bf16_products;
  call.linear_activations = layer.linear;
  set_weights(layer, setting, inputs, call.weights);
  View<T> x(s, setting, s.input_size, layer.x), y(s, setting, s.directions * R);
  call.x = {inputs.add(x.data), x.step_stride, x.row_stride};
  call.y = y.rows();
  std::vector<T> h_n[kMaxDirections], c_n[kMaxDirections], reserve[kMaxDirections];
  const int64_t saved = s.rows() * num_saved(s.cell) * padded(s.hidden_size);
  for (int d = 0; d < s.directions; ++d) {
    call.h_0[d] = inputs.add(layer.directions[d].h_0, R);
    call.c_0[d] = inputs.add(layer.directions[d].c_0, s.hidden_size);
    call.h_n[d] = allocate(h_n[d], s.batch * R);
    if (s.cell == CellKind::kLstm) call.c_n[d] = allocate(c_n[d], s.batch * s.hidden_size);
    if (setting.training && saved > 0) call.reserve[d] = allocate_aligned(reserve[d], saved);
  }
  run_call<T>(call, false, setting);
  for (int d = 0; d < s.directions; ++d)
    if (call.reserve[d]) result.reserve[d].assign(call.reserve[d], call.reserve[d] + saved);
  inputs.check_unmodified();
  result.outputs.y = y.dense();
  for (int d = 0; d < s.directions; ++d) {
    result.outputs.h_n[d].assign(h_n[d].begin(), h_n[d].end());
    result.outputs.c_n[d].assign(c_n[d].begin(), c_n[d].end());
  }
  return result;
}

// Which gradients are asked for: a bit of DirectionGradients' members in their order, seven bits a
// direction, then one for dx.
inline constexpr unsigned kMembers = 7, kAllGradients = (1u << (2 * kMembers + 1)) - 1;
inline constexpr unsigned kInputGradient = 1u << (2 * kMembers);

template <class T>
Gradients run_backward(const Layer& layer, const Forward<T>& forward, const Setting& setting = {},
                       unsigned wanted = kAllGradients, const KnownGradients<T>* known = nullptr) {
  const SequenceShape& s = layer.shape;
  const int64_t R = s.state_size(), gate_rows = num_gates(s.cell) * s.hidden_size;
  Inputs<T> inputs;
  BackwardCall<T> call;
  call.shape = s;
  call.bf16_products = setting.bf16_products;
  call.linear_activations = layer.linear;
  set_weights(layer, setting, inputs, call.weights);
  View<T> x(s, setting, s.input_size, layer.x), dx(s, setting, s.input_size);
  View<T> y(s, setting, s.directions * R, forward.outputs.y);
  call.x = {inputs.add(x.data), x.step_stride, x.row_stride};
  call.y = {inputs.add(y.data), y.step_stride, y.row_stride};
  if (!layer.dy.empty()) {
    View<T> dy(s, setting, s.directions * R, layer.dy);
    call.dy = {inputs.add(dy.data), dy.step_stride, dy.row_stride};
  }
  if (wanted & kInputGradient) call.dx = dx.rows();
  std::vector<T> arrays[kMaxDirections][kMembers];
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    call.h_0[d] = inputs.add(w.h_0, R);
    call.dh_n[d] = inputs.add(w.dh_n, R);
    call.dc_n[d] = inputs.add(w.dc_n, s.hidden_size);
    if (num_saved(s.cell) > 0) call.reserve[d] = inputs.add(forward.reserve[d]);
    const bool lstm = s.cell == CellKind::kLstm;
    const int64_t sizes[kMembers] = {gate_rows * s.input_size,
                                     gate_rows * R,
                                     gate_rows,
                                     gate_rows,
                                     s.proj_size * s.hidden_size,
                                     s.batch * R,
                                     lstm ? s.batch * s.hidden_size : 0};
    T* pointers[kMembers] = {};
    for (unsigned i = 0; i < kMembers; ++i)
      if (sizes[i] > 0 && (wanted >> (unsigned(d) * kMembers + i) & 1))
        pointers[i] = allocate(arrays[d][i], sizes[i]);
    if (known) call.known[d] = known[d];
    call.gradients[d] = {pointers[0], pointers[1], pointers[2], pointers[3],
                         pointers[4], pointers[5], pointers[6]};
  }
  run_call<T>(call, true, setting);
  inputs.check_unmodified();
  Gradients result;
  if (wanted & kInputGradient) result.dx = dx.dense();
  for (int d = 0; d < s.directions; ++d) {
    Gradients::Direction& g = result.directions[d];
    Array* members[kMembers] = {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr, &g.h_0, &g.c_0};
    for (unsigned i = 0; i < kMembers; ++i)
      members[i]->assign(arrays[d][i].begin(), arrays[d][i].end());
  }
  return result;
}

// --- Comparing ----------------------------------------------------------------------------------

// Calls visit(name, array of a, array of b) for every array of two results.
template <class Visit>
void for_arrays(const Outputs& a, const Outputs& b, Visit&& visit) {
  visit("y", a.y, b.y);
  for (int d = 0; d < kMaxDirections; ++d) {
    visit("h_n", a.h_n[d], b.h_n[d]);
    visit("c_n", a.c_n[d], b.c_n[d]);
  }
}
template <class Visit>
void for_arrays(const Gradients& a, const Gradients& b, Visit&& visit) {
  visit("dx", a.dx, b.dx);
  for (int d = 0; d < kMaxDirections; ++d) {
    const Gradients::Direction &p = a.directions[d], &q = b.directions[d];
    visit("dw_ih", p.w_ih, q.w_ih);
    visit("dw_hh", p.w_hh, q.w_hh);
    visit("db_ih", p.b_ih, q.b_ih);
    visit("db_hh", p.b_hh, q.b_hh);
    visit("dw_hr", p.w_hr, q.w_hr);
    visit("dh_0", p.h_0, q.h_0);
    visit("dc_0", p.c_0, q.c_0);
  }
}

// The largest |a - b|, relative to the largest |b| if that is above 1. NaN is infinitely far.
inline double distance(const Array& a, const Array& b) {
  double largest = 0, scale = 1;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) < std::numeric_limits<double>::infinity()))
      return std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(a[i] - b[i]));
    scale = std::max(scale, std::abs(b[i]));
  }
  return largest / scale;
}

template <class Result>
void check_near(const Result& result, const Result& reference, double tolerance) {
  for_arrays(result, reference, [&](const char* name, const Array& a, const Array& b) {
    check::Scope scope(name);
    CHECK_EQ(a.size(), b.size());
    if (a.size() == b.size()) CHECK_NEAR(distance(a, b), 0, tolerance);
  });
}

// Bitwise the same; arrays that one of the two was not asked for are left out.
template <class Result>
void check_same(const Result& result, const Result& expected) {
  for_arrays(result, expected, [&](const char* name, const Array& a, const Array& b) {
    check::Scope scope(name);
    if (!a.empty() && !b.empty()) CHECK(same_bits(a, b));
  });
}

// --- Instruction sets ---------------------------------------------------------------------------

// Runs f under every instruction set of this machine, then restores the selected one.
template <class F>
void for_each_isa(F&& f) {
  const std::string selected = current_kernels().name;
  for (const std::string& isa : available_isas()) {
    check::Scope scope(isa);
    CHECK(select_isa(isa));
    f();
  }
  CHECK(select_isa(selected));
}

}  // namespace rnn_ext::testing
