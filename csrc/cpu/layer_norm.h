// Layer normalization inside the cell, both ways: the second part of each step, by rows, since
// statistics need all of a row's products (Features::norm_ih in sequence.h). A member that has a
// part of the batch for itself waits for nobody in between (plan.h, shares).
#pragma once

#include "backward.h"
#include "cell_rows.h"
#include "forward.h"
#include "pair.h"

namespace rnn_ext::RNN_EXT_ISA {

// The sum of all lanes of some vectors, in every lane. Several, because one sum after the other
// would wait for each addition.
template <class T, class V, int kCount>
RNN_EXT_INLINE V sum_of_all(const V (&parts)[kCount]) {
  V sum = parts[0];
#pragma GCC unroll 4
  for (int i = 1; i < kCount; ++i) sum = sum + parts[i];
  return each([](Vec<T> v) { return sum_of_lanes<T>(v); }, sum);
}

// 1 / standard deviation of n values in every lane, from the sum of their squared distances to the
// mean.
template <class T, class V>
RNN_EXT_INLINE V inverse_deviation(V squares, int64_t n, double eps) {
  return each(
      [=](Vec<T> sum) { return splat<T>(T(1 / __builtin_sqrt(double(sum[0]) / double(n) + eps))); },
      squares);
}

template <class T, class V>
RNN_EXT_INLINE V first_lanes_of_each(V v, int64_t n) {
  return each([=](Vec<T> row) { return first_lanes<T>(row, n); }, v);
}

// A row of one side's products (in panel order), or two rows, become gain * x + bias, where x has
// mean 0 and deviation 1; x goes to `kept` (G, padded(H)), null in inference. Returns
// 1 / deviation.
template <class P, class Cell>
template <class V>
RNN_EXT_INLINE V ForwardPass<P, Cell>::normalize(T* row, int64_t stride,
                                                 const typename Direction::Norm& to, T* kept,
                                                 int64_t kept_stride) const {
  const int64_t H = shape.hidden_size, hidden = padded(H);
  // visit(vector of the row, gate, unit): panels of several gates hold one vector of each.
  const auto for_vectors = [&](auto&& visit) {
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) visit(unit * kGates + g * kLanes<T>, g, unit);
    }
  };
  V sum[kGates] = {}, squares[kGates] = {};
  for_vectors([&](int64_t i, int g, int64_t) {  // 0 where no unit is
    sum[g] = sum[g] + load_rows<V>(row + i, stride);
  });
  const V mean = sum_of_all<T>(sum) / T(kGates * H);
  for_vectors([&](int64_t i, int g, int64_t unit) {
    const V v = first_lanes_of_each<T>(load_rows<V>(row + i, stride) - mean, H - unit);
    squares[g] = squares[g] + v * v;
  });
  const V by = inverse_deviation<T>(sum_of_all<T>(squares), kGates * H, features.norm_eps);
  for_vectors([&](int64_t i, int g, int64_t unit) {
    const V x = first_lanes_of_each<T>((load_rows<V>(row + i, stride) - mean) * by, H - unit);
    if (kept) store_rows(kept + g * hidden + unit, kept_stride, x);
    const Vec<T> gain = load(to.gain + i), bias = load(to.bias + i);
    store_rows(row + i, stride, each([=](Vec<T> x) { return x * gain + bias; }, x));
  });
  return by;
}

// The second part of a step for some rows. `gx_row`: of the step's first row.
template <class P, class Cell>
void ForwardPass<P, Cell>::norm_rows(int d, int64_t s, int64_t t, const BatchRows& rows,
                                     int64_t gx_row) const {
  int64_t r = 0;
  if constexpr (kValuesAreOperands) {
    if (simple_rows && !any_starts_anew(d, t, rows)) {
      const SimpleRows at = simple_rows_from(d, s, t, rows);
      if constexpr (kVectorRegisters >= 32)
        for (; r + 2 <= rows.count; r += 2) norm_row<Pair<T>>(d, s, t, rows, gx_row, &at, r);
      for (; r < rows.count; ++r) norm_row<Vec<T>>(d, s, t, rows, gx_row, &at, r);
    }
  }
  for (; r < rows.count; ++r) norm_row<Vec<T>>(d, s, t, rows, gx_row, nullptr, r);
}

// Normalization of the r-th row's products on both sides, or two rows', then the cell. `simple`:
// where the values of simple rows are; null: the row may have more to do.
template <class P, class Cell>
template <class V>
void ForwardPass<P, Cell>::norm_row(int d, int64_t s, int64_t t, const BatchRows& rows,
                                    int64_t gx_row, const SimpleRows* simple, int64_t r) const {
  const Direction& w = directions[d];
  const BatchRow of = rows[r];
  const int64_t hidden = padded(shape.hidden_size), width = columns.width();
  T *const gh = w.gh + of.place * width, *const gx = w.gx + (gx_row + of.b) * width;
  T* const reserve = reserve_row(d, t, of.b);
  T* const of_h = reserve ? reserve + features.kept_of_cell(shape.cell) * hidden : nullptr;
  T* const of_x = reserve ? of_h + kGates * hidden : nullptr;
  V by_h = normalize<V>(gh, width, w.norm_hh, of_h, reserve_step);
  V by_x = normalize<V>(gx, gx_step, w.norm_ih, of_x, reserve_step);
  T* const kept = reserve ? of_x + kGates * hidden : nullptr;
  if (kept) {
    for_each_vector(by_h, [&](int i, Vec<T>& by) {
      zero_row(kept + i * reserve_step, hidden);
      kept[i * reserve_step] = by[0];
    });
    for_each_vector(by_x, [&](int i, Vec<T>& by) { kept[i * reserve_step + 1] = by[0]; });
  }
  for (int64_t panel = 0; panel < columns.panels(); ++panel) {
    const int64_t column = columns.column(panel);
    if constexpr (kValuesAreOperands) {
      if (simple) {
        simple_cell<true, V>(*simple, panel, r, gx + column, gx_step, gh + column, width);
        continue;
      }
    }
    cell_row<true>(d, panel, s, t, of, gx + column, gh + column);
  }
  if constexpr (Cell::kHasCellState) norm_output<V>(d, s, t, rows, kept, simple, r);
}

// h_t = o * tanh(normalized c_t); its mean and 1 / deviation go to kept[2], kept[3].
template <class P, class Cell>
template <class V>
RNN_EXT_INLINE void ForwardPass<P, Cell>::norm_output(int d, int64_t s, int64_t t,
                                                      const BatchRows& rows, T* kept,
                                                      const SimpleRows* simple, int64_t r) const {
  const Direction& w = directions[d];
  const VectorMath<T, V> math{call.linear_activations};
  const BatchRow of = rows[r];
  const int64_t H = shape.hidden_size, hidden = padded(H), stride = 2 * hidden;
  const T* const o = w.unnormalized + of.place * stride;
  const T* const c = o + hidden;
  V sum[1] = {}, squares[1] = {};
  for (int64_t unit = 0; unit < H; unit += kLanes<T>)
    sum[0] = sum[0] + load_rows<V>(c + unit, stride);
  V mean = sum_of_all<T>(sum) / T(H);
  for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
    const V v = first_lanes_of_each<T>(load_rows<V>(c + unit, stride) - mean, H - unit);
    squares[0] = squares[0] + v * v;
  }
  V by = inverse_deviation<T>(sum_of_all<T>(squares), H, features.norm_eps);
  if (kept) {
    for_each_vector(mean, [&](int i, Vec<T>& of_row) { kept[i * reserve_step + 2] = of_row[0]; });
    for_each_vector(by, [&](int i, Vec<T>& of_row) { kept[i * reserve_step + 3] = of_row[0]; });
  }
  const T* h_prev = w.h[s & 1] + of.place * padded(shape.state_size());
  const Beyond beyond = simple ? Beyond{} : beyond_plain(d, t, of.b);
  T* y = simple ? nullptr : call.y.at(shape, t, of.b) + d * H;
  for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
    const V v = (load_rows<V>(c + unit, stride) - mean) * by;
    const Vec<T> gain = row_vector(features.norm_c[d], unit, H),
                 bias = row_vector(features.norm_c_bias[d], unit, H);
    V h = load_rows<V>(o + unit, stride) *
          math.tanh(each([=](Vec<T> x) { return x * gain + bias; }, v));
    if (simple) {
      simple_output(*simple, r, unit, h);
      continue;
    }
    for_each_vector(h, [&](int, Vec<T>& of_row) {
      emit_h(d, s, of, unit, beyond.next_h(of_row, load(h_prev + unit), unit, H), beyond, y);
    });
  }
}

// One side of a row on the way back through its normalization.
template <class P, class Cell>
struct BackwardPass<P, Cell>::NormSide {
  const T *dy, *gain;  // (G*H)
  const T* x;          // (G, padded(H)), as forward kept it
  T by;                // 1 / deviation
  T *dgain, *dbias;    // (G*H) sums to add to; no bias where the other side has the same sum
  T* dv;               // (G*H)
  Element* operand;    // the same as operands
};

// y = gain * x + bias, x = (v - mean) * by:
//   dv = (dx - mean(dx) - x * mean(dx * x)) * by   with dx = gain * dy
template <class P, class Cell>
void BackwardPass<P, Cell>::normalize_backward(const NormSide& side) const {
  const int64_t H = shape.hidden_size, hidden = padded(H);
  // visit(column, gate, x, lanes that there are)
  const auto for_vectors = [&](auto&& visit) {
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g)
        visit(g * H + unit, g, load(side.x + g * hidden + unit), H - unit);
    }
  };
  const auto add = [](T* to, Vec<T> v, int64_t rest) {
    store_upto(to, load_upto(to, rest) + v, rest);
  };
  Vec<T> sum[kGates] = {}, product[kGates] = {};
  for_vectors([&](int64_t column, int g, Vec<T> x, int64_t rest) {
    const Vec<T> dy = load_upto(side.dy + column, rest);
    const Vec<T> gain = load_upto(side.gain + column, rest);
    add(side.dgain + column, dy * x, rest);
    if (side.dbias) add(side.dbias + column, dy, rest);
    sum[g] += dy * gain;
    product[g] += dy * gain * x;
  });
  const Vec<T> mean = sum_of_all<T>(sum) / T(kGates * H);
  const Vec<T> slope = sum_of_all<T>(product) / T(kGates * H);
  for_vectors([&](int64_t column, int, Vec<T> x, int64_t rest) {
    const Vec<T> dx = load_upto(side.dy + column, rest) * load_upto(side.gain + column, rest);
    const Vec<T> dv = (dx - mean - x * slope) * side.by;
    store_upto(side.dv + column, dv, rest);
    if constexpr (!kValuesAreOperands) P::store(side.operand, column, dv, rest);
  });
}

// The cell's backward for a row whose dL/dh is complete, then that of the normalization.
template <class P, class Cell>
void BackwardPass<P, Cell>::norm_row(int d, int64_t s, const BatchRow& of, int64_t group) const {
  const Direction& w = directions[d];
  const int64_t t = step_at(shape, reversed(d), s), row = chunk_row(d, s, of.b);
  const int64_t H = shape.hidden_size, hidden = padded(H), n = gate_rows;
  const T* const dh = w.dh + of.place * hidden;
  const T* const of_h = reserve_row(d, t, of.b) + features.kept_of_cell(shape.cell) * hidden;
  const T* const of_x = of_h + kGates * hidden;
  const T* const kept = of_x + kGates * hidden;
  if constexpr (Cell::kHasCellState) norm_output(d, t, of, group, dh, kept);
  for (int64_t unit = 0; unit < H; unit += kLanes<T>)
    store(w.carry + of.place * hidden + unit,
          unit_backward<true>(d, s, t, of, row, unit, gate_rows_of(d), load(dh + unit)));
  const T* const dx = w.dnormal + of.place * 2 * n;
  constexpr bool kSplits = Cell::kSplitsGradient;
  normalize_backward({kSplits ? dx + n : dx, features.norm_hh[d], of_h, kept[0],
                      w.sums.hh + group * n, kSplits ? w.sums.b_hh + group * n : nullptr,
                      w.dgh + row * n, w.dgh_operand + row * gate_depth()});
  normalize_backward({dx, features.norm_ih[d], of_x, kept[1], w.sums.ih + group * n,
                      w.sums.b_ih + group * n, w.dgx + row * n,
                      w.dgx_operand + row * gate_depth()});
}

// dL/dc_t and the gradient of o's gate that come from h~_t = o * tanh(c normalized).
template <class P, class Cell>
void BackwardPass<P, Cell>::norm_output(int d, int64_t t, const BatchRow& of, int64_t group,
                                        const T* dh, const T* kept) const {
  if constexpr (Cell::kHasCellState) {
    const Direction& w = directions[d];
    const VectorMath<T> math{call.linear_activations};
    const int64_t H = shape.hidden_size, hidden = padded(H);
    const T* const reserve = reserve_row(d, t, of.b);
    T* const dc = w.dc_row + of.place * 3 * hidden;
    T *const do_gate = dc + hidden, *const x = do_gate + hidden;
    const T* const past =
        features.zoneout_h.data ? features.zoneout_h.at(shape, t, of.b) + d * H : nullptr;
    const auto for_units = [&](auto&& visit) {
      for (int64_t unit = 0; unit < H; unit += kLanes<T>) visit(unit, H - unit);
    };
    const T mean = kept[2], by = kept[3];
    Vec<T> dx_sum = {}, product = {};
    for_units([&](int64_t unit, int64_t rest) {
      Vec<T> saved[kSaved];
#pragma GCC unroll 8
      for (int i = 0; i < kSaved; ++i) saved[i] = load(reserve + i * hidden + unit);
      const Vec<T> normal = first_lanes<T>((Cell::next_c(math, saved) - mean) * by, rest);
      const Vec<T> gain = load_upto(features.norm_c[d] + unit, rest);
      const Vec<T> tanh_c =
          math.tanh(normal * gain + load_upto(features.norm_c_bias[d] + unit, rest));
      const Vec<T> o = saved[3];
      Vec<T> dh_cell = load(dh + unit);
      if (past) dh_cell -= dh_cell * load_upto(past + unit, rest);
      const Vec<T> dy = dh_cell * o * math.tanh_grad(tanh_c);
      store(x + unit, normal);
      store(do_gate + unit, dh_cell * tanh_c * math.sigmoid_grad(o));
      T *const dgain = w.sums.c + group * H + unit, *const dbias = w.sums.c_bias + group * H + unit;
      store_upto(dgain, load_upto(dgain, rest) + dy * normal, rest);
      store_upto(dbias, load_upto(dbias, rest) + dy, rest);
      const Vec<T> dx = first_lanes<T>(dy * gain, rest);
      store(dc + unit, dx);
      dx_sum += dx;
      product += dx * normal;
    });
    const Vec<T> dx_mean = sum_of_lanes<T>(dx_sum) / T(H);
    const Vec<T> slope = sum_of_lanes<T>(product) / T(H);
    for_units([&](int64_t unit, int64_t) {
      store(dc + unit, (load(dc + unit) - dx_mean - load(x + unit) * slope) * by);
    });
  }
}

}  // namespace rnn_ext::RNN_EXT_ISA
