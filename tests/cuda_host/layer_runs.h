// Runs layers through the CUDA engine on the host executor: every array in a device allocation of
// exactly its size, nothing written but what the host has to write.
#pragma once

#include <memory>
#include <optional>

#include "../cpp/layers.h"
#include "cuda/engine.h"
#include "cuda/portable.h"
#include "executor.h"

namespace rnn_ext::cuda::testing {

using rnn_ext::testing::Array;
using rnn_ext::testing::Gradients;
using rnn_ext::testing::Layer;
using rnn_ext::testing::Outputs;

template <class T>
T narrowed(double value) {
  return from_compute<T>(Compute<T>(value));
}
template <class T>
double widened(T value) {
  return double(to_compute(value));
}

// The layer as it is once its values have been rounded to T: what a reference has to be made of.
template <class T>
void round_layer(Layer& layer) {
  const auto round = [](Array& array) {
    for (double& a : array) a = widened(narrowed<T>(a));
  };
  for (Array* a : {&layer.x, &layer.dy}) round(*a);
  for (Layer::Direction& w : layer.directions)
    for (Array* a : {&w.w_ih, &w.w_hh, &w.b_ih, &w.b_hh, &w.w_hr, &w.h_0, &w.c_0, &w.dh_n, &w.dc_n})
      round(*a);
}

// Memory layout and plan of a run.
struct Way {
  Method method = Method::kPersistent;
  Device device = *find_device("h100");
  bool batch_first = false;
  int64_t gap = 0;          // elements between rows
  int64_t chunk_steps = 0;  // forward; 0: as planned
  bool training = true;
  bool allow_tf32 = false;
  // Persistent: the cut, where the engine has it for the call; else as planned.
  std::optional<Cut> cut = {};
  int cluster = 0;  // blocks of a cluster; 0: as planned
};

// The device memory of one run.
template <class T>
class Memory {
 public:
  const T* input(const Array& values, const char* name) {
    if (values.empty()) return nullptr;
    std::vector<T> array;
    for (double v : values) array.push_back(narrowed<T>(v));
    arrays_.push_back(std::make_unique<host::Buffer<T>>(array, name));
    return arrays_.back()->data();
  }
  T* output(int64_t size, const char* name) {
    if (size == 0) return nullptr;
    arrays_.push_back(std::make_unique<host::Buffer<T>>(size_t(size), name));
    return arrays_.back()->data();
  }

 private:
  std::vector<std::unique_ptr<host::Buffer<T>>> arrays_;
};

template <class T>
Array widened(const T* from, int64_t count) {
  Array array;
  for (int64_t i = 0; from && i < count; ++i) array.push_back(widened(from[i]));
  return array;
}

// A (T, B, width) view; what lies between its rows stays unwritten.
template <class T>
class View {
 public:
  View(const SequenceShape& shape, const Way& way, int64_t width, const char* name)
      : shape_(shape), width_(width) {
    const int64_t row = width + way.gap;
    rows_.row_stride = way.batch_first && !shape.offsets ? shape.steps * row : row;
    rows_.step_stride = way.batch_first ? row : shape.batch * row;
    const int64_t last = shape.offsets ? (shape.rows() - 1) * rows_.row_stride
                                       : (shape.steps - 1) * rows_.step_stride +
                                             (shape.batch - 1) * rows_.row_stride;
    buffer_ = std::make_unique<host::Buffer<T>>(size_t(last + width), name);
    rows_.data = buffer_->data();
  }
  void fill(const Array& dense) {
    for_rows([&](T* row, int64_t first) {
      for (int64_t k = 0; k < width_; ++k) row[k] = narrowed<T>(dense[size_t(first + k)]);
      host::mark_written(row, size_t(width_) * sizeof(T));
    });
  }
  Array dense() const {
    Array values(size_t(shape_.rows() * width_));
    for_rows([&](T* row, int64_t first) {
      for (int64_t k = 0; k < width_; ++k) values[size_t(first + k)] = widened(row[k]);
    });
    return values;
  }
  StepRows<T> rows() const { return rows_; }
  StepRows<const T> const_rows() const { return {rows_.data, rows_.step_stride, rows_.row_stride}; }

 private:
  template <class Visit>
  void for_rows(Visit&& visit) const {
    for (int64_t t = 0; t < shape_.steps; ++t)
      for (int64_t b = 0; b < shape_.active(t); ++b)
        visit(rows_.at(shape_, t, b), (shape_.first_row(t) + b) * width_);
  }
  const SequenceShape& shape_;
  int64_t width_;
  StepRows<T> rows_;
  std::unique_ptr<host::Buffer<T>> buffer_;
};

// The products, as plain loops.
template <class T>
Status multiply(void* /*context*/, const Gemm& g, Stream /*stream*/) {
  const T *a = static_cast<const T*>(g.a), *b = static_cast<const T*>(g.b);
  const auto store = [&](auto* c) {
    for (int64_t i = 0; i < g.m; ++i) {
      for (int64_t j = 0; j < g.n; ++j) {
        double sum = g.accumulate ? widened(c[i * g.ldc + j]) : 0;
        for (int64_t k = 0; k < g.k; ++k)
          sum += widened(a[g.transpose_a ? k * g.lda + i : i * g.lda + k]) *
                 widened(b[g.transpose_b ? j * g.ldb + k : k * g.ldb + j]);
        c[i * g.ldc + j] = narrowed<std::remove_reference_t<decltype(*c)>>(sum);
      }
      host::mark_written(c + i * g.ldc, size_t(g.n) * sizeof(*c));
    }
  };
  if (g.wide)
    store(static_cast<Compute<T>*>(g.c));
  else
    store(static_cast<T*>(g.c));
  return kSuccess;
}

template <class T, class Call>
Plan run_call(const Call& call, const Way& way) {
  PlanInput input = plan_input<T>(call, way.device);
  input.allow_tf32 = way.allow_tf32;
  const bool cut =
      way.cut && has_cut(input.dtype, num_gates(call.shape.cell), input.backward, *way.cut);
  Plan plan = make_plan(input, way.method, cut ? &*way.cut : nullptr, way.cluster);
  CHECK(plan.method == way.method);
  if (plan.method != way.method) return plan;
  if (way.chunk_steps && !input.backward) plan.chunk_steps = way.chunk_steps;
  // Of the smallest type that is in it.
  host::Buffer<uint16_t> memory(size_t(workspace(input, plan).bytes) / 2, "workspace");
  const Status error = run<T>(call, input, plan, memory.data(), {multiply<T>, nullptr}, nullptr);
  CHECK_EQ(error, kSuccess);
  return plan;
}

struct Results {
  Outputs outputs;
  Gradients gradients;
  Plan forward, backward;
};

template <class T>
void set_weights(const Layer& layer, Memory<T>& memory, DirectionWeights<T>* weights) {
  const SequenceShape& s = layer.shape;
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    weights[d] = {memory.input(w.w_ih, "w_ih"),
                  memory.input(w.w_hh, "w_hh"),
                  memory.input(w.b_ih, "b_ih"),
                  memory.input(w.b_hh, "b_hh"),
                  memory.input(w.w_hr, "w_hr"),
                  s.input_size,
                  s.state_size(),
                  s.hidden_size};
  }
}

// Forward, and backward with way.training.
template <class T>
Results run_layer(const Layer& layer, const Way& way) {
  using C = Compute<T>;
  const SequenceShape& s = layer.shape;
  const int64_t R = s.state_size(), H = s.hidden_size, gate_rows = num_gates(s.cell) * H;
  const bool lstm = s.cell == CellKind::kLstm;
  Results results;
  Memory<T> memory;
  Memory<C> wide;
  View<T> x(s, way, s.input_size, "x"), y(s, way, s.directions * R, "y");
  x.fill(layer.x);
  Forward<T> forward;
  Backward<T> backward;
  forward.shape = backward.shape = s;
  forward.linear_activations = backward.linear_activations = layer.linear;
  set_weights(layer, memory, forward.weights);
  forward.x = x.const_rows();
  forward.y = y.rows();
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    forward.h_0[d] = backward.h_0[d] = memory.input(w.h_0, "h_0");
    forward.c_0[d] = memory.input(w.c_0, "c_0");
    forward.h_n[d] = memory.output(s.batch * R, "h_n");
    if (lstm) forward.c_n[d] = memory.output(s.batch * H, "c_n");
    if (way.training)
      backward.reserve[d] = forward.reserve[d] =
          wide.output(s.rows() * num_saved(s.cell) * padded(H), "reserve");
  }
  results.forward = run_call<T>(forward, way);
  results.outputs.y = y.dense();
  for (int d = 0; d < s.directions; ++d) {
    results.outputs.h_n[d] = widened<T>(forward.h_n[d], s.batch * R);
    results.outputs.c_n[d] = widened<T>(forward.c_n[d], s.batch * H);
  }
  if (!way.training) return results;

  View<T> dx(s, way, s.input_size, "dx"), dy(s, way, s.directions * R, "dy");
  for (int d = 0; d < s.directions; ++d) backward.weights[d] = forward.weights[d];
  backward.x = x.const_rows();
  backward.y = y.const_rows();
  backward.dx = dx.rows();
  if (!layer.dy.empty()) {
    dy.fill(layer.dy);
    backward.dy = dy.const_rows();
  }
  for (int d = 0; d < s.directions; ++d) {
    const Layer::Direction& w = layer.directions[d];
    backward.dh_n[d] = memory.input(w.dh_n, "dh_n");
    backward.dc_n[d] = memory.input(w.dc_n, "dc_n");
    const bool bias = !w.b_ih.empty();
    backward.gradients[d] = {memory.output(gate_rows * s.input_size, "dw_ih"),
                             memory.output(gate_rows * R, "dw_hh"),
                             memory.output(bias ? gate_rows : 0, "db_ih"),
                             memory.output(bias ? gate_rows : 0, "db_hh"),
                             memory.output(s.proj_size * H, "dw_hr"),
                             memory.output(s.batch * R, "dh_0"),
                             memory.output(lstm ? s.batch * H : 0, "dc_0")};
  }
  results.backward = run_call<T>(backward, way);
  results.gradients.dx = dx.dense();
  for (int d = 0; d < s.directions; ++d) {
    const DirectionGradients<T>& g = backward.gradients[d];
    Gradients::Direction& to = results.gradients.directions[d];
    to.w_ih = widened<T>(g.w_ih, gate_rows * s.input_size);
    to.w_hh = widened<T>(g.w_hh, gate_rows * R);
    to.b_ih = widened<T>(g.b_ih, gate_rows);
    to.b_hh = widened<T>(g.b_hh, gate_rows);
    to.w_hr = widened<T>(g.w_hr, s.proj_size * H);
    to.h_0 = widened<T>(g.h_0, s.batch * R);
    to.c_0 = widened<T>(g.c_0, s.batch * H);
  }
  return results;
}

}  // namespace rnn_ext::cuda::testing
