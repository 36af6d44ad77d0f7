// Layer normalization inside the cell, both ways: a phase of its own in each step, by rows, since
// statistics need all of a row's products (Features::norm_hh in sequence.h).
#pragma once

#include "backward.h"
#include "forward.h"

namespace rnn_ext::RNN_EXT_ISA {

// Layer normalization of a row's products with W_hh, then the cell.
template <class P, class Cell>
void ForwardPass<P, Cell>::norm_row(int d, int64_t s, int64_t t, int64_t b, int64_t gx_row) const {
  const Direction& w = directions[d];
  const int64_t H = shape.hidden_size, hidden = padded(H), width = columns.width();
  T* const gh = w.gh + b * width;
  T* reserve = reserve_row(d, t, b);
  if (reserve) reserve += features.kept_of_cell(shape.cell) * hidden;
  // visit(vector of the row, gate, unit)
  const auto for_vectors = [&](auto&& visit) {
    for (int64_t panel = 0; panel < columns.panels(); ++panel)
      for (int g = 0; g < kGates; ++g)
        for (int u = 0; u < columns.unit_vectors(panel); ++u)
          visit(columns.column(panel) + (g * columns.unit_vectors(panel) + u) * kLanes<T>, g,
                columns.first_unit(panel) + u * kLanes<T>);
  };
  Vec<T> sum = {}, squares = {};
  for (int64_t i = 0; i < width; i += kLanes<T>) sum += load(gh + i);  // zeros where no unit is
  const Vec<T> mean = splat<T>(sum_of_lanes<T>(sum) / T(kGates * H));
  for_vectors([&](int64_t i, int, int64_t unit) {
    const Vec<T> v = first_lanes<T>(load(gh + i) - mean, H - unit);
    squares += v * v;
  });
  const T deviation = inverse_deviation(sum_of_lanes<T>(squares), kGates * H, features.norm_eps);
  for_vectors([&](int64_t i, int g, int64_t unit) {
    const Vec<T> v = first_lanes<T>((load(gh + i) - mean) * splat<T>(deviation), H - unit);
    if (reserve) store(reserve + g * hidden + unit, v);
    store(gh + i, v * load(w.gain + i) + load(w.norm_bias + i));
  });
  if (reserve)
    for (int64_t unit = 0; unit < hidden; unit += kLanes<T>)
      store(reserve + kGates * hidden + unit, splat<T>(deviation));
  for (int64_t panel = 0; panel < columns.panels(); ++panel)
    cell_row(d, panel, s, t, b, w.gx + gx_row * columns.width() + columns.column(panel),
             gh + columns.column(panel));
  if constexpr (Cell::kHasCellState) norm_output(d, s, t, b);
}

// h_t = o * tanh(normalized c_t)
template <class P, class Cell>
void ForwardPass<P, Cell>::norm_output(int d, int64_t s, int64_t t, int64_t b) const {
  const Direction& w = directions[d];
  const VectorMath<T> math{call.linear_activations};
  const int64_t H = shape.hidden_size, hidden = padded(H);
  const T* const o = w.unnormalized + b * 2 * hidden;
  const T* const c = o + hidden;
  Vec<T> sum = {}, squares = {};
  for (int64_t unit = 0; unit < H; unit += kLanes<T>) sum += load(c + unit);
  const Vec<T> mean = splat<T>(sum_of_lanes<T>(sum) / T(H));
  for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
    const Vec<T> v = first_lanes<T>(load(c + unit) - mean, H - unit);
    squares += v * v;
  }
  const Vec<T> deviation =
      splat<T>(inverse_deviation(sum_of_lanes<T>(squares), H, features.norm_eps));
  const T* h_prev = w.h[s & 1] + b * padded(shape.state_size());
  const Beyond beyond = beyond_plain(d, t, b);
  T* y = call.y.at(shape, t, b) + d * H;
  for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
    const Vec<T> v = (load(c + unit) - mean) * deviation;
    const Vec<T> h = load(o + unit) * math.tanh(v * row_vector(features.norm_c[d], unit, H) +
                                                row_vector(features.norm_c_bias[d], unit, H));
    emit_h(d, s, b, unit, beyond.next_h(h, load(h_prev + unit), unit, H), beyond, y);
  }
}

// The cell's backward for a row whose dL/dh is complete, then that of the layer normalization.
template <class P, class Cell>
void BackwardPass<P, Cell>::norm_row(int d, int64_t s, int64_t b) const {
  const Direction& w = directions[d];
  const int64_t t = step_at(shape, reversed(d), s), row = chunk_row(d, s) + b;
  const int64_t H = shape.hidden_size, hidden = padded(H), n = gate_rows;
  const T* const dh = w.dh + row * hidden;
  if constexpr (Cell::kHasCellState) norm_output(d, t, b, row, dh);
  for (int64_t unit = 0; unit < H; unit += kLanes<T>)
    store(w.carry + b * hidden + unit, unit_backward(d, s, t, b, unit, load(dh + unit)));
  // y = gain * x, x = (v - mean) / deviation:
  //   dv = (dx - mean(dx) - x * mean(dx * x)) / deviation with dx = gain * dy
  const T* const kept = reserve_row(d, t, b) + features.kept_of_cell(shape.cell) * hidden;
  const T* const dy = w.dnormal + row * n;
  const auto for_vectors = [&](auto&& visit) {
    for (int g = 0; g < kGates; ++g)
      for (int64_t unit = 0; unit < H; unit += kLanes<T>)
        visit(g * H + unit, load(kept + g * hidden + unit), H - unit);
  };
  Vec<T> sum = {}, product = {};
  for_vectors([&](int64_t column, Vec<T> x, int64_t rest) {
    const Vec<T> by_gain = load_upto(dy + column, rest) * x;
    store_upto(w.dnormal_hh + row * n + column, by_gain, rest);
    const Vec<T> gain = load_upto(features.norm_hh[d] + column, rest);
    sum += load_upto(dy + column, rest) * gain;
    product += by_gain * gain;
  });
  const Vec<T> mean = splat<T>(sum_of_lanes<T>(sum) / T(n));
  const Vec<T> slope = splat<T>(sum_of_lanes<T>(product) / T(n));
  const Vec<T> deviation = load(kept + kGates * hidden);
  for_vectors([&](int64_t column, Vec<T> x, int64_t rest) {
    const Vec<T> dx = load_upto(dy + column, rest) * load_upto(features.norm_hh[d] + column, rest);
    const Vec<T> dv = (dx - mean - x * slope) * deviation;
    store_upto(w.dgh[slot(s)] + row * n + column, dv, rest);
    if constexpr (!kValuesAreOperands)
      P::store(w.dgh_operand[slot(s)] + row * gate_depth(), column, dv, rest);
  });
}

// dL/dc_t and the gradient of o's gate that come from h~_t = o * tanh(c normalized).
template <class P, class Cell>
void BackwardPass<P, Cell>::norm_output(int d, int64_t t, int64_t b, int64_t row,
                                        const T* dh) const {
  if constexpr (Cell::kHasCellState) {
    const Direction& w = directions[d];
    const VectorMath<T> math{call.linear_activations};
    const int64_t H = shape.hidden_size, hidden = padded(H);
    const T* const reserve = reserve_row(d, t, b);
    T* const dc = w.dc_row + b * 3 * hidden;
    T *const do_gate = dc + hidden, *const x = do_gate + hidden;
    const T* const past =
        features.zoneout_h.data ? features.zoneout_h.at(shape, t, b) + d * H : nullptr;
    const auto for_units = [&](auto&& visit) {
      for (int64_t unit = 0; unit < H; unit += kLanes<T>) visit(unit, H - unit);
    };
    Vec<T> sum = {}, squares = {};
    for_units([&](int64_t unit, int64_t rest) {
      Vec<T> saved[kSaved];
#pragma GCC unroll 8
      for (int i = 0; i < kSaved; ++i) saved[i] = load(reserve + i * hidden + unit);
      const Vec<T> c = first_lanes<T>(Cell::next_c(saved), rest);
      store(x + unit, c);
      sum += c;
    });
    const Vec<T> mean = splat<T>(sum_of_lanes<T>(sum) / T(H));
    for_units([&](int64_t unit, int64_t rest) {
      const Vec<T> v = first_lanes<T>(load(x + unit) - mean, rest);
      store(x + unit, v);
      squares += v * v;
    });
    const Vec<T> deviation =
        splat<T>(inverse_deviation(sum_of_lanes<T>(squares), H, features.norm_eps));
    Vec<T> dx_sum = {}, product = {};
    for_units([&](int64_t unit, int64_t rest) {
      const Vec<T> normal = load(x + unit) * deviation;
      const Vec<T> gain = load_upto(features.norm_c[d] + unit, rest);
      const Vec<T> tanh_c =
          math.tanh(normal * gain + load_upto(features.norm_c_bias[d] + unit, rest));
      const Vec<T> o = load(reserve + 3 * hidden + unit);
      Vec<T> dh_cell = load(dh + unit);
      if (past) dh_cell -= dh_cell * load_upto(past + unit, rest);
      const Vec<T> dy = dh_cell * o * math.tanh_grad(tanh_c);
      store(x + unit, normal);
      store(do_gate + unit, dh_cell * tanh_c * math.sigmoid_grad(o));
      store_upto(w.dc_out + row * H + unit, dy, rest);
      store_upto(w.dc_gain + row * H + unit, dy * normal, rest);
      const Vec<T> dx = first_lanes<T>(dy * gain, rest);
      store(dc + unit, dx);
      dx_sum += dx;
      product += dx * normal;
    });
    const Vec<T> dx_mean = splat<T>(sum_of_lanes<T>(dx_sum) / T(H));
    const Vec<T> slope = splat<T>(sum_of_lanes<T>(product) / T(H));
    for_units([&](int64_t unit, int64_t) {
      store(dc + unit, (load(dc + unit) - dx_mean - load(x + unit) * slope) * deviation);
    });
  }
}

}  // namespace rnn_ext::RNN_EXT_ISA
