// Queues the kernels and products of a call. Included by engine.cu, which is compiled once for each
// storage type, and by the host executor's tests.
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

// Queues work until something fails.
struct Queue {
  const Multiplier& multiplier;
  Stream stream;
  Status error = kSuccess;

  template <class... Parameters>
  void launch(int64_t blocks, void (*kernel)(Parameters...),
              std::type_identity_t<Parameters>... arguments) {
    start({unsigned(blocks), kThreads, 0, stream, false}, kernel, arguments...);
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
                             shape.hidden_size, plan.group_rows);
    g.unit_blocks = plan.unit_blocks;
    g.groups = plan.groups;
    g.first_direction = first_direction;
    g.group_rows = plan.group_rows;
    g.linear = call.linear_activations;
    g.counters = at<uint32_t>(w.counters);
    return g;
  }

  template <class Cell, bool kBackward>
  void prepare_exchange(const T* const* h_0) {
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
    using Product = typename BlockShape<Cell, T, kBackward>::Product;
    queue.launch_over(w.exchange_bytes / int64_t(sizeof(T)), prepare_exchange_kernel<Product, T>,
                      p);
  }

  LaunchConfig persistent_config(const GroupLayout& g) const {
    return {unsigned(plan.grid), kThreads, size_t(g.shared.bytes), queue.stream, true};
  }
};

template <class T>
struct ForwardRun : LayerRun<T, Forward<T>> {
  using Base = LayerRun<T, Forward<T>>;
  using C = Compute<T>;
  using Base::Base, Base::call, Base::shape, Base::plan, Base::w, Base::queue, Base::gate_rows,
      Base::project, Base::device_shape;

  Status run() {
    with_cell(shape.cell, [&](auto cell) {
      using Cell = decltype(cell);
      if (plan.method == Method::kPersistent)
        persistent<Cell>();
      else
        for (int d = 0; d < shape.directions; ++d) stepwise<Cell>(d);
    });
    return queue.error;
  }

 private:
  // Steps of the positions [begin, end).
  struct Steps {
    int64_t begin, end;
  };
  Steps steps_of(int d, int64_t begin, int64_t end) const {
    return d == 0 ? Steps{begin, end} : Steps{shape.steps - end, shape.steps - begin};
  }

  C* gates_x(int d) const {
    const int64_t chunk = plan.chunk_steps * shape.batch, rows = shape.rows();
    return this->template at<C>(w.gates_x, d * (chunk < rows ? chunk : rows) * gate_rows);
  }

  // Returns the first row of the chunk.
  int64_t project_input(int d, int64_t begin, int64_t end) {
    const Steps steps = steps_of(d, begin, end);
    const int64_t first = shape.first_row(steps.begin);
    const auto x = this->rows_of_x(steps.begin, steps.end);
    Gemm product;
    product.m = shape.first_row(steps.end) - first;
    product.n = gate_rows;
    product.k = shape.input_size;
    product.a = x.data;
    product.lda = x.stride;
    product.b = call.weights[d].w_ih;
    product.ldb = call.weights[d].ld_ih;
    product.transpose_b = true;
    product.c = gates_x(d);
    product.ldc = gate_rows;
    product.type = dtype_of<T>();
    product.wide = true;
    queue.multiply(product);
    return first;
  }

  int64_t chunk_end(int64_t begin) const {
    const int64_t end = begin + plan.chunk_steps;
    return end < shape.steps ? end : shape.steps;
  }

  template <class Cell>
  void persistent() {
    this->template prepare_exchange<Cell, false>(call.h_0);
    for (int64_t begin = 0; begin < shape.steps; begin = chunk_end(begin)) {
      PersistentForward<T> p;
      p.y = call.y;
      p.exchange = this->template at<T>(w.exchange);
      p.begin = begin;
      p.end = chunk_end(begin);
      for (int d = 0; d < shape.directions; ++d)
        p.directions[d] = {
            call.weights[d], call.h_0[d], call.c_0[d], call.h_n[d],
            call.c_n[d],     state(d),    gates_x(d),  project_input(d, p.begin, p.end),
            call.reserve[d]};
      for (int d = 0; d < shape.directions; d += plan.directions_at_once) {
        p.group = this->group_layout(false, d);
        queue.start(this->persistent_config(p.group), persistent_forward_kernel<Cell, T>, p);
      }
    }
  }

  C* state(int d) const {
    return this->template at<C>(w.state, d * shape.batch * shape.hidden_size);
  }

  // h_n holds h from step to step: rows that have come to their end keep theirs.
  template <class Cell>
  void stepwise(int d) {
    const int64_t H = shape.hidden_size, R = shape.state_size(), B = shape.batch;
    this->convert(call.h_n[d], call.h_0[d], B * R);
    if (Cell::kHasCellState) this->convert(state(d), call.c_0[d], B * H);
    for (int64_t begin = 0; begin < shape.steps; begin = chunk_end(begin)) {
      const int64_t first_row = project_input(d, begin, chunk_end(begin));
      for (int64_t s = begin; s < chunk_end(begin); ++s)
        step<Cell>(d, step_at(shape, d, s), first_row);
    }
    if (Cell::kHasCellState) this->convert(call.c_n[d], state(d), B * H);
  }

  template <class Cell>
  void step(int d, int64_t t, int64_t first_row) {
    const int64_t H = shape.hidden_size, R = shape.state_size(), rows = shape.active(t);
    const DirectionWeights<T>& weights = call.weights[d];
    CellForward<T> p;
    p.rows = rows;
    p.hidden_size = H;
    p.gates_x = gates_x(d) + (shape.first_row(t) - first_row) * gate_rows;
    p.gates_h = this->template at<C>(w.gates_h);
    p.b_ih = weights.b_ih;
    p.b_hh = weights.b_hh;
    p.state = Cell::kHasCellState ? state(d) : nullptr;
    p.h = project ? this->template at<T>(w.hidden) : call.h_n[d];
    p.has_h = !project;
    p.y = project ? nullptr : call.y.at(shape, t, 0) + d * R;
    p.y_stride = call.y.row_stride;
    if (call.reserve[d])
      p.reserve = call.reserve[d] + shape.first_row(t) * Cell::kNumSaved * padded(H);
    p.linear = call.linear_activations;

    Gemm product;
    product.m = rows;
    product.n = gate_rows;
    product.k = R;
    product.a = call.h_n[d];
    product.lda = R;
    product.b = weights.w_hh;
    product.ldb = weights.ld_hh;
    product.transpose_b = true;
    product.c = this->template at<C>(w.gates_h);
    product.ldc = gate_rows;
    product.type = dtype_of<T>();
    product.wide = true;
    queue.multiply(product);

    constexpr int kVector = kUnitVector<T>;
    const bool aligned = H % kVector == 0 && is_aligned<kVector>(p.gates_x) &&
                         is_aligned<kVector>(p.b_ih) && is_aligned<kVector>(p.b_hh) &&
                         is_aligned<kVector>(p.h) && is_aligned<kVector>(p.y, p.y_stride) &&
                         is_aligned<kVector>(p.reserve);
    if (aligned)
      queue.launch_over(rows * (H / kVector), cell_forward_kernel<Cell, T, kVector>, p);
    else
      queue.launch_over(rows * H, cell_forward_kernel<Cell, T, 1>, p);
    if (!project) return;

    product = {};
    product.m = rows;
    product.n = R;
    product.k = H;
    product.a = p.h;
    product.lda = H;
    product.b = weights.w_hr;
    product.ldb = weights.ld_hr;
    product.transpose_b = true;
    product.c = call.h_n[d];
    product.ldc = R;
    product.type = dtype_of<T>();
    queue.multiply(product);
    MoveRows<T> move;
    move.shape = device_shape;
    move.begin = t;
    move.end = t + 1;
    move.width = R;
    move.to = call.y;
    move.to.data += d * R;
    move.dense = call.h_n[d];
    queue.launch_over(shape.batch * R, move_rows_kernel<T>, move);
  }
};

template <class T>
struct BackwardRun : LayerRun<T, Backward<T>> {
  using Base = LayerRun<T, Backward<T>>;
  using C = Compute<T>;
  using Base::Base, Base::call, Base::shape, Base::plan, Base::w, Base::queue, Base::gate_rows,
      Base::project, Base::device_shape, Base::input;

  Status run() {
    with_cell(shape.cell, [&](auto cell) {
      using Cell = decltype(cell);
      if (plan.method == Method::kPersistent) persistent<Cell>();
      for (int d = 0; d < shape.directions; ++d) {
        if (plan.method != Method::kPersistent) stepwise<Cell>(d);
        weight_gradients<Cell>(d);
      }
    });
    if (call.dx.data && input.copy_dx) {
      MoveRows<T> move;
      move.shape = device_shape;
      move.end = shape.steps;
      move.width = shape.input_size;
      move.to = call.dx;
      move.dense = this->template at<T>(w.dx);
      queue.launch_over(shape.steps * shape.batch * move.width, move_rows_kernel<T>, move);
    }
    return queue.error;
  }

 private:
  T* dgates_x(int d) const {
    return this->template at<T>(w.dgates_x, d * shape.rows() * gate_rows);
  }
  T* dgates_h(int d) const {
    return this->template at<T>(w.dgates_h, d * shape.rows() * gate_rows);
  }

  template <class Cell>
  void persistent() {
    this->template prepare_exchange<Cell, true>(nullptr);
    PersistentBackward<T> p;
    p.y = call.y;
    p.dy = call.dy;
    p.exchange = this->template at<T>(w.exchange);
    for (int d = 0; d < shape.directions; ++d)
      p.directions[d] = {call.weights[d].w_hh,  call.weights[d].ld_hh,
                         call.reserve[d],       call.h_0[d],
                         call.dh_n[d],          call.dc_n[d],
                         call.gradients[d].h_0, call.gradients[d].c_0,
                         dgates_x(d),           dgates_h(d)};
    for (int d = 0; d < shape.directions; d += plan.directions_at_once) {
      p.group = this->group_layout(true, d);
      queue.start(this->persistent_config(p.group), persistent_backward_kernel<Cell, T>, p);
    }
  }

  int64_t step_of(int d, int64_t s) const { return step_at(shape, 1 - d, s); }

  template <class Cell>
  void stepwise(int d) {
    const int64_t H = shape.hidden_size, R = shape.state_size(), B = shape.batch;
    C* const carry = this->template at<C>(w.carry, d * B * R);
    C* const dc = this->template at<C>(w.state, d * B * H);
    this->convert(carry, call.dh_n[d], B * R);
    if (Cell::kHasCellState) this->convert(dc, call.dc_n[d], B * H);
    for (int64_t s = 0; s <= shape.steps; ++s) {
      CellBackward<T> p;
      p.hidden_size = H;
      p.state_size = R;
      p.carry = carry;
      p.product = this->template at<C>(w.product);
      p.dc = dc;
      p.linear = call.linear_activations;
      if (s > 0) multiply_back(d, step_of(d, s - 1), p);
      if (s < shape.steps)
        step<Cell>(d, step_of(d, s), p);
      else
        finish_state(p);
    }
    const DirectionGradients<T>& g = call.gradients[d];
    if (g.h_0) this->convert(g.h_0, static_cast<const C*>(carry), B * R);
    if (Cell::kHasCellState && g.c_0) this->convert(g.c_0, static_cast<const C*>(dc), B * H);
  }

  // p.product = dgates of step t by W_hh.
  void multiply_back(int d, int64_t t, CellBackward<T>& p) {
    p.earlier = shape.active(t);
    Gemm product;
    product.m = p.earlier;
    product.n = shape.state_size();
    product.k = gate_rows;
    product.a = dgates_h(d) + shape.first_row(t) * gate_rows;
    product.lda = gate_rows;
    product.b = call.weights[d].w_hh;
    product.ldb = call.weights[d].ld_hh;
    product.c = this->template at<C>(w.product);
    product.ldc = product.n;
    product.type = dtype_of<T>();
    product.wide = true;
    queue.multiply(product);
  }

  void finish_state(const CellBackward<T>& p) {
    constexpr int kVector = kUnitVector<T>;
    const int64_t rows = p.earlier > p.now ? p.earlier : p.now, R = p.state_size;
    const bool aligned = R % kVector == 0 && is_aligned<kVector>(p.carry) &&
                         is_aligned<kVector>(p.dy, p.dy_stride) && is_aligned<kVector>(p.dhidden);
    if (aligned)
      queue.launch_over(rows * (R / kVector), state_backward_kernel<T, kVector>, p);
    else
      queue.launch_over(rows * R, state_backward_kernel<T, 1>, p);
  }

  template <class Cell>
  void step(int d, int64_t t, CellBackward<T> p) {
    const int64_t H = p.hidden_size, R = p.state_size, row = shape.first_row(t);
    const int64_t before = d == 0 ? t - 1 : t + 1;
    const bool has_before = before >= 0 && before < shape.steps;
    p.now = shape.active(t);
    if (call.dy.data) p.dy = call.dy.at(shape, t, 0) + d * R;
    p.dy_stride = call.dy.row_stride;
    p.reserve = call.reserve[d] + row * Cell::kNumSaved * padded(H);
    p.y = call.y.at(shape, t, 0) + d * R;
    p.y_previous = has_before ? call.y.at(shape, before, 0) + d * R : nullptr;
    p.previous = has_before ? shape.active(before) : 0;
    p.y_stride = call.y.row_stride;
    p.h_0 = call.h_0[d];
    p.dgates_x = dgates_x(d) + row * gate_rows;
    p.dgates_h = dgates_h(d) + row * gate_rows;
    if (project) {
      p.dhidden = this->template at<T>(w.dhidden, row * R);
      finish_state(p);
      Gemm product;
      product.m = p.now;
      product.n = H;
      product.k = R;
      product.a = p.dhidden;
      product.lda = R;
      product.b = call.weights[d].w_hr;
      product.ldb = call.weights[d].ld_hr;
      product.c = this->template at<C>(w.product);
      product.ldc = H;
      product.type = dtype_of<T>();
      product.wide = true;
      queue.multiply(product);
      p.dh = this->template at<C>(w.product);
      p.hidden = this->template at<T>(w.hidden, row * H);
    }
    constexpr int kVector = kUnitVector<T>;
    const int64_t rows = !project && p.earlier > p.now ? p.earlier : p.now;
    const bool aligned = H % kVector == 0 && is_aligned<kVector>(p.reserve) &&
                         is_aligned<kVector>(p.dy, p.dy_stride) &&
                         is_aligned<kVector>(p.y, p.y_stride) &&
                         is_aligned<kVector>(p.y_previous) && is_aligned<kVector>(p.h_0) &&
                         is_aligned<kVector>(p.dgates_x) && is_aligned<kVector>(p.dgates_h) &&
                         is_aligned<kVector>(p.hidden);
    if (aligned)
      queue.launch_over(rows * (H / kVector), cell_backward_kernel<Cell, T, kVector>, p);
    else
      queue.launch_over(rows * H, cell_backward_kernel<Cell, T, 1>, p);
  }

  // to (m, n) = left^T right over all rows.
  void over_all_rows(T* to, int64_t m, int64_t n, const T* left, const T* right, int64_t ldb) {
    Gemm product;
    product.m = m;
    product.n = n;
    product.k = shape.rows();
    product.a = left;
    product.lda = m;
    product.transpose_a = true;
    product.b = right;
    product.ldb = ldb;
    product.c = to;
    product.ldc = n;
    product.type = dtype_of<T>();
    queue.multiply(product);
  }

  void sum_columns(const T* values, T* first, T* second) {
    if (!first && !second) return;
    ColumnSums<T> p;
    p.values = values;
    p.rows = shape.rows();
    p.columns = gate_rows;
    p.parts = p.rows < kSumParts ? p.rows : kSumParts;
    p.sums = this->template at<C>(w.sums);
    p.first = first;
    p.second = second;
    queue.launch_over(p.parts * p.columns, column_parts_kernel<T>, p);
    queue.launch_over(p.columns, column_totals_kernel<T>, p);
  }

  template <class Cell>
  void weight_gradients(int d) {
    const DirectionGradients<T>& g = call.gradients[d];
    const int64_t R = shape.state_size();
    if (Cell::kSplitsGradient) {
      sum_columns(dgates_x(d), g.b_ih, nullptr);
      sum_columns(dgates_h(d), g.b_hh, nullptr);
    } else {
      sum_columns(dgates_x(d), g.b_ih, g.b_hh);
    }
    if (g.w_ih) {
      const auto x = this->rows_of_x(0, shape.steps);
      over_all_rows(g.w_ih, gate_rows, shape.input_size, dgates_x(d), x.data, x.stride);
    }
    if (g.w_hh) {
      PreviousOutputs<T> p;
      p.shape = device_shape;
      p.direction = d;
      p.width = R;
      p.y = call.y;
      p.h_0 = call.h_0[d];
      p.previous = this->template at<T>(w.previous);
      queue.launch_over(shape.steps * shape.batch * R, previous_outputs_kernel<T>, p);
      over_all_rows(g.w_hh, gate_rows, R, dgates_h(d), p.previous, R);
    }
    if (g.w_hr)
      over_all_rows(g.w_hr, R, shape.hidden_size, this->template at<T>(w.dhidden),
                    this->template at<T>(w.hidden), shape.hidden_size);
    if (!call.dx.data) return;
    Gemm product;
    product.m = shape.rows();
    product.n = shape.input_size;
    product.k = gate_rows;
    product.a = dgates_x(d);
    product.lda = gate_rows;
    product.b = call.weights[d].w_ih;
    product.ldb = call.weights[d].ld_ih;
    product.c = input.copy_dx ? this->template at<T>(w.dx) : call.dx.at(shape, 0, 0);
    product.ldc = input.copy_dx ? shape.input_size : call.dx.row_stride;
    product.accumulate = d > 0;
    product.type = dtype_of<T>();
    queue.multiply(product);
  }
};

}  // namespace

template <class T>
PlanInput plan_input(const Forward<T>& call, const Device& device) {
  PlanInput in;
  in.shape = call.shape;
  in.dtype = dtype_of<T>();
  in.save_reserve = call.reserve[0] != nullptr;
  in.copy_x = !is_matrix(call.shape, call.x);
  in.device = device;
  return in;
}
template <class T>
PlanInput plan_input(const Backward<T>& call, const Device& device) {
  PlanInput in;
  in.shape = call.shape;
  in.dtype = dtype_of<T>();
  in.backward = true;
  in.copy_x = !is_matrix(call.shape, call.x);
  in.copy_dx = !is_matrix(call.shape, call.dx);
  in.device = device;
  return in;
}

template <class T>
Status run(const Forward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream) {
  return ForwardRun<T>(call, input, plan, workspace, multiplier, stream).run();
}
template <class T>
Status run(const Backward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream) {
  return BackwardRun<T>(call, input, plan, workspace, multiplier, stream).run();
}

}  // namespace rnn_ext::cuda
