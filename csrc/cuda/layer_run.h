// What both ways through a layer, forward and backward, share: the queue of kernels and products,
// the workspace, what is prepared for a persistent kernel.
#pragma once

#include <type_traits>

#include "engine.h"
#include "persistent.h"
#include "stepwise.h"

namespace rnn_ext::cuda {
namespace {

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, double>    ? DType::kFloat64
         : std::is_same_v<T, float>   ? DType::kFloat32
         : std::is_same_v<T, Float16> ? DType::kFloat16
                                      : DType::kBFloat16;
}

// Are the rows of all steps evenly spaced in time order, so that they are one matrix?
template <class T>
bool is_matrix(const SequenceShape& shape, const StepRows<T>& rows) {
  return !rows.data || shape.offsets || shape.steps == 1 ||
         rows.step_stride == shape.batch * rows.row_stride;
}

// Calls f(Cell{}).
template <class F>
void with_cell(CellKind cell, F&& f) {
  switch (cell) {
    case CellKind::kRnnTanh:
      return f(RnnCell<false>{});
    case CellKind::kRnnRelu:
      return f(RnnCell<true>{});
    case CellKind::kLstm:
      return f(LstmCell{});
    case CellKind::kGru:
      return f(GruCell{});
  }
}

// Calls f with the cut as a type, of those that the engine has.
template <class Cell, class T, bool kBackward, class F>
void with_cut(Cut cut, F&& f) {
  const auto try_one = [&](auto one) {
    if constexpr (has_cut(dtype_of<T>(), Cell::kNumGates, kBackward, decltype(one)::value))
      if (cut == decltype(one)::value) f(one);
  };
  try_one(std::integral_constant<Cut, Cut::kLanes>{});
  try_one(std::integral_constant<Cut, Cut::kTensorCores>{});
  try_one(std::integral_constant<Cut, Cut::kWide>{});
}

// The same with the exchange.
template <class F>
void with_exchange(Method method, F&& f) {
  if (method == Method::kPersistent)
    f(std::integral_constant<Exchange, Exchange::kMemory>{});
  else if (method == Method::kCluster)
    f(std::integral_constant<Exchange, Exchange::kCluster>{});
}

// Queues work until something fails.
struct Queue {
  const Multiplier& multiplier;
  Stream stream;
  Status error = kSuccess;

  template <class... Parameters>
  void launch(int64_t blocks, void (*kernel)(Parameters...),
              std::type_identity_t<Parameters>... arguments) {
    start({unsigned(blocks), kThreads, 0, stream}, kernel, arguments...);
  }
  // Enough blocks for `count` threads: kernels stride over what is left.
  template <class... Parameters>
  void launch_over(int64_t count, void (*kernel)(Parameters...),
                   std::type_identity_t<Parameters>... arguments) {
    constexpr int64_t kMaxBlocks = 1 << 14;
    const int64_t blocks = blocks_of(count, kThreads);
    if (blocks > 0) launch(blocks < kMaxBlocks ? blocks : kMaxBlocks, kernel, arguments...);
  }
  template <class... Parameters>
  void start(const LaunchConfig& config, void (*kernel)(Parameters...),
             std::type_identity_t<Parameters>... arguments) {
    if (error == kSuccess) error = Status(cuda::launch(config, kernel, arguments...));
  }
  void multiply(const Gemm& product) {
    if (error == kSuccess) error = multiplier.multiply(multiplier.context, product, stream);
  }
};

// Can rows be read kVector elements at a time?
template <int kVector, class T>
bool is_aligned(const T* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % (kVector * sizeof(T)) == 0 && stride % kVector == 0;
}

// What the two ways through a layer share.
template <class T, class Call>
struct LayerRun {
  using C = Compute<T>;
  const Call& call;
  const SequenceShape& shape;
  const PlanInput& input;
  const Plan& plan;
  const Workspace w;
  char* const memory;
  Queue queue;
  const int64_t gate_rows;  // G*H
  const bool project;
  SequenceShape device_shape;  // the same with tables in the device's memory
  int64_t rounds = 0;          // of the grid barriers so far

  LayerRun(const Call& c, const PlanInput& in, const Plan& p, void* workspace_memory,
           const Multiplier& multiplier, Stream stream)
      : call(c),
        shape(c.shape),
        input(in),
        plan(p),
        w(workspace(in, p)),
        memory(static_cast<char*>(workspace_memory)),
        queue{multiplier, stream},
        gate_rows(num_gates(c.shape.cell) * c.shape.hidden_size),
        project(c.shape.proj_size > 0),
        device_shape(c.shape) {
    if (!shape.offsets) return;
    device_shape.batch_sizes = upload(shape.batch_sizes, shape.steps, w.batch_sizes);
    device_shape.offsets = upload(shape.offsets, shape.steps + 1, w.offsets);
  }

  template <class V>
  V* at(int64_t offset, int64_t element = 0) const {
    return reinterpret_cast<V*>(memory + offset) + element;
  }

  int64_t* upload(const int64_t* table, int64_t count, int64_t offset) {
    int64_t* const to = at<int64_t>(offset);
    for (int64_t i = 0; i < count; i += kTableEntries) {
      TableEntries<int64_t> entries;
      entries.to = to + i;
      entries.count = int(count - i < kTableEntries ? count - i : kTableEntries);
      for (int k = 0; k < kTableEntries; ++k)
        entries.values[k] = k < entries.count ? table[i + k] : 0;
      queue.launch(1, fill_table_kernel<int64_t>, entries);
    }
    return to;
  }

  template <class To, class From>
  void convert(To* to, const From* from, int64_t count) {
    queue.launch_over(count, convert_kernel<To, From>, Convert<To, From>{to, from, count});
  }

  // x of the steps [begin, end) as one matrix.
  struct Rows {
    const T* data;
    int64_t stride;
  };
  Rows rows_of_x(int64_t begin, int64_t end) {
    if (!input.copy_x) return {call.x.at(shape, begin, 0), call.x.row_stride};
    MoveRows<T> move;
    move.shape = device_shape;
    move.begin = begin;
    move.end = end;
    move.width = shape.input_size;
    move.from = call.x;
    move.dense = at<T>(w.x);
    queue.launch_over((end - begin) * shape.batch * move.width, move_rows_kernel<T>, move);
    return {move.dense, move.width};
  }

  GroupLayout group_layout(bool backward, int first_direction) const {
    GroupLayout g;
    g.shape = device_shape;
    g.shared = shared_layout(num_gates(shape.cell), num_saved(shape.cell), backward, dtype_of<T>(),
                             plan.cut, exchange_of(plan.method), plan.unit_passes,
                             shape.hidden_size, plan.group_rows);
    g.unit_blocks = plan.unit_blocks;
    g.groups = plan.groups;
    g.unit_passes = plan.unit_passes;
    g.first_direction = first_direction;
    g.group_rows = plan.group_rows;
    g.linear = call.linear_activations;
    g.counters = at<uint32_t>(w.counters);
    g.rounds = rounds;
    return g;
  }

  template <class Cell, bool kBackward, Cut kCut>
  void prepare_exchange(const T* const* h_0) {
    if (plan.method == Method::kCluster) return;  // each block fills its own
    PrepareExchange<T> p;
    p.exchange = at<T>(w.exchange);
    p.counters = at<uint32_t>(w.counters);
    p.counter_words = w.counters_bytes / int64_t(sizeof(uint32_t));
    p.directions = shape.directions;
    p.groups = plan.groups;
    p.group_rows = plan.group_rows;
    p.batch = shape.batch;
    p.hidden_size = shape.hidden_size;
    p.slot = exchange_slot(Cell::kNumGates, kBackward, shape.hidden_size, plan.group_rows);
    p.blocks = depth(Cell::kNumGates, kBackward, shape.hidden_size) / kDepthBlock;
    for (int d = 0; h_0 && d < shape.directions; ++d) p.h_0[d] = h_0[d];
    using Product = typename BlockShape<Cell, T, kBackward, kCut>::Product;
    queue.launch_over(w.exchange_bytes / int64_t(sizeof(T)), prepare_exchange_kernel<Product, T>,
                      p);
  }

  // One launch for all directions, or one for each. Clusters are resident as a whole and never wait
  // for each other; other groups' blocks all have to be resident.
  template <class Kernel, class Parameters>
  void launch_persistent(bool backward, Kernel kernel, Parameters& p) {
    for (int d = 0; d < shape.directions; d += plan.directions_at_once) {
      p.group = group_layout(backward, d);
      LaunchConfig config{unsigned(plan.grid), kThreads, size_t(p.group.shared.bytes),
                          queue.stream};
      if (plan.method == Method::kCluster)
        config.cluster = unsigned(plan.unit_blocks);
      else
        config.cooperative = true;
      queue.start(config, kernel, p);
    }
  }
};

}  // namespace
}  // namespace rnn_ext::cuda
