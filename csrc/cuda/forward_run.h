// What is queued for a forward call.
#pragma once

#include "layer_run.h"

namespace rnn_ext::cuda {
namespace {

template <class T>
struct ForwardRun : LayerRun<T, Forward<T>> {
  using Base = LayerRun<T, Forward<T>>;
  using C = Compute<T>;
  using Base::Base, Base::call, Base::shape, Base::plan, Base::w, Base::queue, Base::gate_rows,
      Base::project, Base::device_shape;

  Status run() {
    with_cell(shape.cell, [&](auto cell) {
      using Cell = decltype(cell);
      with_exchange(plan.method, [&](auto exchange) {
        with_cut<Cell, T, false>(plan.cut, [&](auto cut) {
          persistent<Cell, decltype(cut)::value, decltype(exchange)::value>();
        });
      });
      if (plan.method == Method::kStepwise)
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

  template <class Cell, Cut kCut, Exchange kExchange>
  void persistent() {
    this->template prepare_exchange<Cell, false, kCut>(call.h_0);
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
      this->launch_persistent(false, persistent_forward_kernel<Cell, T, kCut, kExchange>, p);
      this->rounds += p.end - p.begin - 1;
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

}  // namespace
}  // namespace rnn_ext::cuda
