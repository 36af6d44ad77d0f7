// The cell's backward applied to the rows of a tile: the innermost loop of the way back.
#pragma once

#include "backward.h"

namespace rnn_ext::RNN_EXT_ISA {

// False where rows do not follow each other: in direction 1 of packed data some begin at a step to
// which others come from the one before.
template <class P, class Cell>
bool BackwardPass<P, Cell>::simple_rows_from(int d, int64_t s, int64_t t, int64_t begin,
                                             int64_t rows, SimpleRows* at) const {
  if (!simple_rows) return false;
  const int64_t H = shape.hidden_size, hidden = padded(H), row = chunk_row(d, s, begin);
  const GateRows gates = gate_rows_of(d, s);
  *at = {};
  at->hidden = hidden;
  if constexpr (kSaved > 0) at->reserve = reserve_row(d, t, begin);
  if constexpr (Cell::kReadsOutput) {
    at->y = call.y.at(shape, t, begin) + d * H;
    at->y_stride = call.y.row_stride;
  }
  if constexpr (Cell::kReadsPreviousOutput) {
    const int64_t previous = active_at(d, s + 1);
    if (begin < previous && begin + rows > previous) return false;
    at->h_prev = previous_h(d, t, begin);
    at->h_prev_stride = begin < previous ? call.y.row_stride : H;
  }
  if constexpr (Cell::kHasCellState) at->dc = directions[d].dc + begin * hidden;
  at->dgx = gates.dgx + row * gate_rows;
  at->dgh = gates.dgh + row * gate_rows;
  return true;
}

template <class P, class Cell>
template <class V>
RNN_EXT_INLINE V BackwardPass<P, Cell>::simple_unit(const SimpleRows& at, int64_t r, int64_t unit,
                                                    V dh) const {
  const VectorMath<T, V> math{call.linear_activations};
  const int64_t H = shape.hidden_size, rest = H - unit, own = r * at.hidden + unit;
  V saved[kSaved + 1], dx[kGates], dg[kGates];
#pragma GCC unroll 8
  for (int i = 0; i < kSaved; ++i)
    saved[i] = load_rows<V>(at.reserve + kSaved * r * at.hidden + i * at.hidden + unit,
                            kSaved * at.hidden);
  UnitBackward<V> u = {};
  u.dh = dh;
  if constexpr (Cell::kReadsOutput)
    u.h = load_rows_upto<V>(at.y + r * at.y_stride + unit, at.y_stride, rest);
  if constexpr (Cell::kReadsPreviousOutput) {
    if (at.h_prev)
      u.h_prev = load_rows_upto<V>(at.h_prev + r * at.h_prev_stride + unit, at.h_prev_stride, rest);
  }
  if constexpr (Cell::kHasCellState) u.dc = load_rows<V>(at.dc + own, at.hidden);
  Cell::backward(math, saved, u, dx, dg);
  if constexpr (Cell::kHasCellState) store_rows(at.dc + own, at.hidden, u.dc);
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) {
    const int64_t column = r * gate_rows + g * H + unit;
    store_rows_upto(at.dgx + column, gate_rows, dx[g], rest);
    if constexpr (Cell::kSplitsGradient) store_rows_upto(at.dgh + column, gate_rows, dg[g], rest);
  }
  return u.dh_prev;
}

template <class P, class Cell>
template <bool kNorm>
RNN_EXT_INLINE Vec<typename P::Value> BackwardPass<P, Cell>::unit_backward(
    int d, int64_t s, int64_t t, int64_t b, int64_t row, int64_t unit, const GateRows& gates,
    Vec<T> dh) const {
  if constexpr (kGates == 3) {
    if (two_stages) return second_stage(d, s, t, b, unit, dh);
  }
  const Direction& w = directions[d];
  const VectorMath<T> math{call.linear_activations};
  const int64_t H = shape.hidden_size, hidden = padded(H), rest = H - unit;
  Vec<T> saved[kSaved + 1], dx[kGates], dg[kGates];
  const T* reserve =
      kSaved > 0 || features.kept(shape.cell) > 0 ? reserve_row(d, t, b) + unit : nullptr;
  if constexpr (kSaved > 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kSaved; ++i) saved[i] = load(reserve + i * hidden);
    if constexpr (Cell::kHasCellState) {
      if (w.output)
        store(w.output + row * hidden + unit,
              Cell::template output<VectorMath<T>, Vec<T>>(math, saved));
    }
  }
  UnitBackward<Vec<T>> u = {};
  u.dh = dh;
  if constexpr (Cell::kReadsOutput) u.h = load_upto(call.y.at(shape, t, b) + d * H + unit, rest);
  if constexpr (Cell::kReadsPreviousOutput) {
    const T* h_prev = previous_h(d, t, b);
    if (h_prev) u.h_prev = load_upto(h_prev + unit, rest);
  }
  if constexpr (Cell::kHasCellState) {
    u.dc = load(w.dc + b * hidden + unit);
    if (call.dcells.data) u.dc += load_upto(call.dcells.at(shape, t, b) + d * H + unit, rest);
  }
  // Zoneout: what goes to the state before, past the cell.
  Vec<T> dh_past = {}, dc_past = {};
  if (features.zoneout_h.data) {
    const Vec<T> z = load_upto(features.zoneout_h.at(shape, t, b) + d * H + unit, rest);
    dh_past = u.dh * z;
    u.dh -= dh_past;
    if constexpr (Cell::kReadsOutput) u.h = load(reserve);
  }
  if constexpr (Cell::kHasCellState) {
    if (features.zoneout_c.data) {
      const Vec<T> z = load_upto(features.zoneout_c.at(shape, t, b) + d * H + unit, rest);
      dc_past = u.dc * z;
      u.dc -= dc_past;
    }
  }
  if constexpr (kNorm && Cell::kHasCellState) {  // what goes through the output is known already
    const T* known = w.dc_row + b * 3 * hidden + unit;
    u.dc = Cell::backward_state(math, saved, u.dc + load(known), dx);
    u.dh_prev = Vec<T>{};
    dx[kGates - 1] = load(known + hidden);  // the gates end with o
  } else {
    Cell::backward(math, saved, u, dx, dg);
  }
  u.dh_prev += dh_past;
  if constexpr (Cell::kHasCellState) {
    u.dc += dc_past;
    if (cuts()) {
      const Cut cut = cut_before(d, t, b);
      if (cut == Cut::kReset) {
        T dc[kLanes<T>];
        store(dc, u.dc);
        add_to(state_row(call.gradients[d].reset_c, shape, b, H), unit, kLanes<T>, H, dc);
      }
      if (cut != Cut::kNone) u.dc = Vec<T>{};
    }
    store(w.dc + b * hidden + unit, u.dc);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGates; ++g) {
    const int64_t column = g * H + unit;
    if constexpr (kNorm) {
      T* const by_side = w.dnormal + b * 2 * gate_rows + column;
      store_upto(by_side, dx[g], rest);
      if (Cell::kSplitsGradient) store_upto(by_side + gate_rows, dg[g], rest);
      continue;
    }
    store_upto(gates.dgx + row * gate_rows + column, dx[g], rest);
    if constexpr (!kValuesAreOperands)
      P::store(gates.dgx_operand + row * gate_depth(), column, dx[g], rest);
    if constexpr (Cell::kSplitsGradient) {
      store_upto(gates.dgh + row * gate_rows + column, dg[g], rest);
      if constexpr (!kValuesAreOperands)
        P::store(gates.dgh_operand + row * gate_depth(), column, dg[g], rest);
    }
  }
  return u.dh_prev;
}

}  // namespace rnn_ext::RNN_EXT_ISA
