// What is queued for a backward call: the gate gradients of all steps, then those of the weights.
#pragma once

#include "layer_run.h"

namespace rnn_ext::cuda {
namespace {

template <class T>
struct BackwardRun : LayerRun<T, Backward<T>> {
  using Base = LayerRun<T, Backward<T>>;
  using C = Compute<T>;
  using Base::Base, Base::call, Base::shape, Base::plan, Base::w, Base::queue, Base::gate_rows,
      Base::project, Base::device_shape, Base::input;

  Status run() {
    with_cell(shape.cell, [&](auto cell) {
      using Cell = decltype(cell);
      with_exchange(plan.method, [&](auto exchange) {
        with_cut<Cell, T, true>(plan.cut, [&](auto cut) {
          persistent<Cell, decltype(cut)::value, decltype(exchange)::value>();
        });
      });
      for (int d = 0; d < shape.directions; ++d) {
        if (plan.method == Method::kStepwise) stepwise<Cell>(d);
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

  template <class Cell, Cut kCut, Exchange kExchange>
  void persistent() {
    this->template prepare_exchange<Cell, true, kCut>(nullptr);
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
    this->launch_persistent(true, persistent_backward_kernel<Cell, T, kCut, kExchange>, p);
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
}  // namespace rnn_ext::cuda
