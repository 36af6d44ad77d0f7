// The GRU whose reset gate stands before the product, both ways: two stages a step, since what the
// second product reads is known only after the first (GruResetBefore in cells/gru.h).
#pragma once

#include "backward.h"
#include "forward.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class P, class Cell>
void ForwardPass<P, Cell>::place_stages(int d, bool packed, Arena& arena) {
  Direction& w = directions[d];
  const DirectionWeights<T>& from = call.weights[d];
  const int64_t H = shape.hidden_size, depth = elements<P>(H);
  const GateColumns<T, 2> gates{H};
  const GateColumns<T, 1> candidates{H};
  w.first = {gates, H, from.w_hh, from.ld_hh, arena.take<T>(gates.width())};
  w.second = {candidates, H, from.w_hh + 2 * H * from.ld_hh, from.ld_hh,
              arena.take<T>(candidates.width())};
  w.w_first = packed ? arena.take<Element>(gates.width() * depth) : nullptr;
  w.w_second = packed ? arena.take<Element>(candidates.width() * depth) : nullptr;
  w.gates = arena.take<T>(row_blocks.places() * 2 * padded(H));
  w.reset_h = arena.take<Element>(row_blocks.places() * state_stride());
}

// The i-th panels of both stages, as far as they go.
template <class P, class Cell>
void ForwardPass<P, Cell>::prepare_stages(int d, int64_t i) const {
  const Direction& w = directions[d];
  const T* const bias = call.weights[d].b_hh;
  if (i < w.first.columns.panels()) {
    w.first.load_row(i, bias, w.first.bias);
    if (w.w_first) w.first.pack(i, w.w_first + w.first.panel_offset(i));
  }
  if (i < w.second.columns.panels()) {
    w.second.load_row(i, bias ? bias + 2 * shape.hidden_size : nullptr, w.second.bias);
    if (w.w_second) w.second.pack(i, w.w_second + w.second.panel_offset(i));
  }
  if (i == 0)  // what lies beyond H stays zero
    for (int64_t place = 0; place < row_blocks.places(); ++place)
      store_row<P>(w.reset_h + place * state_stride(), nullptr, shape.hidden_size);
}

// Where a vector of units finds its gate in a row of gx.
template <class P, class Cell>
int64_t ForwardPass<P, Cell>::gx_column(int gate, int64_t unit) const {
  return unit * kGates + gate * kLanes<T>;  // panels of several gates hold one vector of each
}

// r, z and r * h_{t-1}.
template <class P, class Cell>
void ForwardPass<P, Cell>::first_stage(int d, int64_t panel, int64_t s, int64_t t, int64_t block,
                                       int64_t gx_row) const {
  const Direction& w = directions[d];
  const BatchRows rows = row_blocks.rows(block, shape.active(t));
  if (rows.count == 0) return;
  const VectorMath<T> math{call.linear_activations};
  const int64_t H = shape.hidden_size, hidden = padded(H), unit = w.first.columns.first_unit(panel);
  alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
  constexpr int64_t kWidth = 2 * kLanes<T>;
  w.first.multiply(panel, w.w_first ? w.w_first + w.first.panel_offset(panel) : nullptr, rows.count,
                   w.h_operand[s & 1] + rows.place * state_stride(), state_stride(), tile, kWidth);
  for (int64_t r = 0; r < rows.count; ++r) {
    const BatchRow of = rows[r];
    const T* gx = w.gx + (gx_row + of.b) * columns.width();
    const Vec<T> x[2] = {load(gx + gx_column(0, unit)), load(gx + gx_column(1, unit))};
    const Vec<T> h[2] = {load(tile + r * kWidth), load(tile + r * kWidth + kLanes<T>)};
    Vec<T> saved[2];
    const Vec<T> read = GruResetBefore::gates(
        math, x, h, load(w.h[s & 1] + of.place * padded(shape.state_size()) + unit), saved);
    T* const gates = w.gates + of.place * 2 * hidden + unit;
    store(gates, saved[0]);
    store(gates + hidden, saved[1]);
    store_operand(d, w.reset_h, of, unit, first_lanes<T>(read, H - unit));
  }
}

// n and h_t.
template <class P, class Cell>
void ForwardPass<P, Cell>::second_stage(int d, int64_t panel, int64_t s, int64_t t, int64_t block,
                                        int64_t gx_row) const {
  const Direction& w = directions[d];
  const BatchRows rows = row_blocks.rows(block, shape.active(t));
  if (rows.count == 0) return;
  const VectorMath<T> math{call.linear_activations};
  const int64_t H = shape.hidden_size, hidden = padded(H);
  const int64_t width = w.second.columns.vectors(panel) * kLanes<T>;
  alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
  w.second.multiply(panel, w.w_second ? w.w_second + w.second.panel_offset(panel) : nullptr,
                    rows.count, w.reset_h + rows.place * state_stride(), state_stride(), tile,
                    width);
  for (int64_t r = 0; r < rows.count; ++r) {
    const BatchRow of = rows[r];
    const T* gx = w.gx + (gx_row + of.b) * columns.width();
    const T* h_prev = w.h[s & 1] + of.place * padded(shape.state_size());
    T* const y = call.y.at(shape, t, of.b) + d * H;
    T* const reserve = reserve_row(d, t, of.b);
    const Beyond beyond = beyond_plain(d, t, of.b);
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      const int64_t unit = w.second.columns.first_unit(panel) + i;
      const T* gates = w.gates + of.place * 2 * hidden + unit;
      const Vec<T> previous = load(h_prev + unit);
      Vec<T> saved[4] = {load(gates), load(gates + hidden)};
      const Vec<T> h = GruResetBefore::candidate(math, load(gx + gx_column(2, unit)),
                                                 load(tile + r * width + i), previous, saved);
      saved[3] = saved[0] * previous;
      if (reserve)
        for (int k = 0; k < 4; ++k) store(reserve + k * hidden + unit, saved[k]);
      emit_h(d, s, of, unit, beyond.next_h(h, previous, unit, H), beyond, y);
    }
  }
}

// With the reset gate before the product, the way back through h_t and n; returns what of
// dL/dh_{t-1} passes neither r nor a product.
template <class P, class Cell>
Vec<Value<P>> BackwardPass<P, Cell>::second_stage(int d, int64_t s, int64_t t, const BatchRow& of,
                                                  int64_t unit, Vec<T> dh) const {
  const int64_t b = of.b;
  const Direction& w = directions[d];
  const VectorMath<T> math{call.linear_activations};
  const int64_t H = shape.hidden_size, hidden = padded(H), rest = H - unit;
  const T* const reserve = reserve_row(d, t, b) + unit;
  const Vec<T> saved[] = {load(reserve), load(reserve + hidden), load(reserve + 2 * hidden)};
  UnitBackward<Vec<T>> u = {};
  Vec<T> dh_past = {}, dx[kGates] = {};
  u.dh = dh;
  if (features.zoneout_h.data) {
    dh_past = dh * load_upto(features.zoneout_h.at(shape, t, b) + d * H + unit, rest);
    u.dh -= dh_past;
  }
  if (const T* h_prev = previous_h(d, t, b)) u.h_prev = load_upto(h_prev + unit, rest);
  GruResetBefore::backward_candidate(math, saved, u, dx);
  store_gate(d, s, b, 1, unit, dx[1]);
  store_gate(d, s, b, 2, unit, dx[2]);
  P::store(w.dn + of.place * elements<P>(hidden), unit, first_lanes<T>(dx[2], rest), kLanes<T>);
  return u.dh_prev + dh_past;
}

// ... and through r * h_{t-1}.
template <class P, class Cell>
void BackwardPass<P, Cell>::first_stage(int d, int64_t panel, int64_t s, int64_t block) const {
  const Direction& w = directions[d];
  const VectorMath<T> math{call.linear_activations};
  const BatchRows rows = row_blocks.rows(block, active_at(d, s));
  if (rows.count == 0) return;
  const int64_t H = shape.hidden_size, hidden = padded(H), t = step_at(shape, reversed(d), s);
  const int64_t depth = elements<P>(H), stride = elements<P>(hidden);
  const int64_t first = state_columns.first(panel);
  const int vectors = state_columns.vectors(panel);
  const int64_t width = vectors * kLanes<T>;
  alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
  multiply_panel<P>(vectors, rows.count, depth, {w.dn + rows.place * stride, stride},
                    w.w_second + state_columns.offset(panel, depth), nullptr, 0, tile, width);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t b = rows[r].b;
    const T* const h_prev = previous_h(d, t, b);
    const T* const mask = state_row(features.hidden_mask[d], shape, b, H);
    for (int64_t unit = first; unit < first + width; unit += kLanes<T>) {
      const int64_t rest = H - unit;
      Vec<T> drh = load(tile + r * width + unit - first), dx[1] = {};
      if (mask) drh *= load_upto(mask + unit, rest);
      const T* const reserve = reserve_row(d, t, b) + unit;
      const Vec<T> saved[] = {load(reserve)};
      if (w.reset_h)
        store(w.reset_h + chunk_row(d, s, b) * hidden + unit, load(reserve + 3 * hidden));
      T* const carry = w.carry + rows[r].place * hidden + unit;
      store(carry, load(carry) + GruResetBefore::backward_gates(
                                     math, saved,
                                     h_prev ? load_upto(h_prev + unit, rest) : Vec<T>{}, drh, dx));
      store_gate(d, s, b, 0, unit, dx[0]);
    }
  }
}

template <class P, class Cell>
void BackwardPass<P, Cell>::store_gate(int d, int64_t s, int64_t b, int gate, int64_t unit,
                                       Vec<T> value) const {
  const Direction& w = directions[d];
  const int64_t H = shape.hidden_size, row = chunk_row(d, s, b), column = gate * H + unit;
  store_upto(w.dgx + row * gate_rows + column, value, H - unit);
  if constexpr (!kValuesAreOperands)
    P::store(w.dgx_operand + row * gate_depth(), column, value, H - unit);
}

}  // namespace rnn_ext::RNN_EXT_ISA
