// The cell applied to the rows of a tile: forward's innermost loop.
#pragma once

#include "forward.h"
#include "pair.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class P, class Cell>
template <bool kNorm, class V>
RNN_EXT_INLINE void ForwardPass<P, Cell>::simple_cell(const SimpleRows& at, int64_t panel,
                                                      int64_t r, const T* gx, int64_t gx_stride,
                                                      const T* gh, int64_t gh_stride) const {
  const VectorMath<T, V> math{call.linear_activations};
  const int unit_vectors = kGates > 1 ? 1 : columns.unit_vectors(panel);
  const int64_t before = r * at.hidden;
  for (int u = 0; u < unit_vectors; ++u) {
    const int64_t unit = columns.first_unit(panel) + u * kLanes<T>;
    V x[kGates], h[kGates], saved[kSaved + 1], c = {}, previous = {};
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
      x[g] = load_rows<V>(gx + (g * unit_vectors + u) * kLanes<T>, gx_stride);
      h[g] = load_rows<V>(gh + (g * unit_vectors + u) * kLanes<T>, gh_stride);
    }
    if constexpr (Cell::kHasCellState) c = load_rows<V>(at.c_prev + before + unit, at.hidden);
    if constexpr (Cell::kReadsPreviousOutput)
      previous = load_rows<V>(at.h_prev + before + unit, at.hidden);
    V out = Cell::forward(math, x, h, previous, c, saved);
    if constexpr (Cell::kHasCellState) store_rows(at.c + before + unit, at.hidden, c);
    if (at.reserve) {
      T* const reserve = at.reserve + r * at.reserve_stride + unit;
      if (kNorm && Cell::kReadsOutput) store_rows(reserve, at.reserve_stride, out);
#pragma GCC unroll 8
      for (int i = 0; i < kSaved; ++i)
        for_each_vector(saved[i], [&](int k, Vec<T>& row) {
          T* const to = reserve + i * at.hidden + k * at.reserve_stride;
          streams_reserve ? stream(to, row) : store(to, row);
        });
    }
    if constexpr (kNorm && Cell::kHasCellState) {
      T* const kept = at.unnormalized + 2 * before + unit;
      store_rows(kept, 2 * at.hidden, saved[3]);
      store_rows(kept + at.hidden, 2 * at.hidden,
                 each([&](Vec<T> v) { return first_lanes<T>(v, shape.hidden_size - unit); }, c));
    } else {
      simple_output(at, r, unit, out);
    }
  }
}

// h_t of one vector of units.
template <class P, class Cell>
template <class V>
RNN_EXT_INLINE void ForwardPass<P, Cell>::simple_output(const SimpleRows& at, int64_t r,
                                                        int64_t unit, V h) const {
  store_rows(at.h + r * at.hidden + unit, at.hidden, h);
  for_each_vector(h, [&](int i, Vec<T>& row) {
    store_upto(at.output(r + i) + unit, row, shape.hidden_size - unit);
  });
}

template <class P, class Cell>
template <bool kNorm>
RNN_EXT_INLINE void ForwardPass<P, Cell>::cell_row(int d, int64_t panel, int64_t s, int64_t t,
                                                   const BatchRow& of, const T* gx,
                                                   const T* gh) const {
  const Direction& w = directions[d];
  const VectorMath<T> math{call.linear_activations};
  const int64_t hidden = padded(shape.hidden_size);
  const int unit_vectors = columns.unit_vectors(panel);
  const T* h_prev = w.h[s & 1] + of.place * padded(shape.state_size());
  T* y = call.y.at(shape, t, of.b) + d * shape.state_size();
  T* reserve = reserve_row(d, t, of.b);
  const Beyond beyond = beyond_plain(d, t, of.b);
  for (int u = 0; u < unit_vectors; ++u) {
    const int64_t unit = columns.first_unit(panel) + u * kLanes<T>;
    Vec<T> x[kGates], h[kGates], saved[kSaved + 1], c = {}, previous = {};
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
      x[g] = load(gx + (g * unit_vectors + u) * kLanes<T>);
      h[g] = load(gh + (g * unit_vectors + u) * kLanes<T>);
    }
    if constexpr (Cell::kHasCellState) c = load(w.c_prev + of.place * hidden + unit);
    if (Cell::kReadsPreviousOutput || beyond.zoneout_h) previous = load(h_prev + unit);
    const Vec<T> c_prev = c;
    Vec<T> out = Cell::forward(math, x, h, previous, c, saved);
    if (Cell::kReadsOutput && reserve) store(reserve + unit, out);
    if constexpr (Cell::kHasCellState) {
      if constexpr (kNorm) {
        T* kept = w.unnormalized + of.place * 2 * hidden + unit;
        store(kept, saved[3]);
        store(kept + hidden, first_lanes<T>(c, shape.hidden_size - unit));
      }
      if (beyond.any) c = beyond.next_c(c, c_prev, unit, shape.hidden_size);
      store(w.c + of.place * hidden + unit,
            beyond.anew ? row_vector(beyond.reset_c, unit, shape.hidden_size) : c);
    }
    if (reserve) {
#pragma GCC unroll 8
      for (int i = 0; i < kSaved; ++i) store(reserve + i * hidden + unit, saved[i]);
    }
    if (shape.proj_size > 0)
      P::store(w.unprojected + of.place * hidden_stride(), unit, out, kLanes<T>);
    else if constexpr (!Cell::kHasCellState || !kNorm)
      emit_h(d, s, of, unit, beyond.next_h(out, previous, unit, shape.hidden_size), beyond, y);
  }
}

}  // namespace rnn_ext::RNN_EXT_ISA
