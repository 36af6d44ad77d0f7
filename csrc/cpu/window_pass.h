// Window-style truncated backpropagation through time of a stack of layers.
//
// The chains that start at different steps are independent of each other. A chain is known by the
// row (t*B + b) at which it starts; at depth d it has reached row - d*B. So at every depth all
// chains are rows of one product, and those that are still under way are the ones from row d*B on.
//
// Chains go in blocks through all depths, so that what they carry, the reserve they read and the
// sums they add to stay in the caches. A job takes a tile of chains one step back, through all
// layers from the top down: what it needs of other rows was there before. Gate gradients are not
// kept but added, depth by depth in a fixed order, to the sums of the row that the chain has
// reached: no two chains are at the same row at the same depth.
#pragma once

#include "backward.h"
#include "window.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class T, class Cell>
struct WindowPass {
  using P = FullPrecision<T>;
  static constexpr int kGates = Cell::kNumGates;
  static constexpr int kSaved = Cell::kNumSaved;

  // Of one member of the team, for the rows of a tile.
  struct Scratch {
    T* dh;       // (padded(R)): dL/dh of the layer
    T* dm;       // (padded(H)): the same before the projection
    T* dgx;      // (G*H)
    T* dgh;      // (G*H); dgx itself unless the cell tells them apart
    T* product;  // (padded(R))
    T* above;    // (padded(R)): dL/dx of the layer above
  };

  const WindowCall<T>& call;
  const SequenceShape& shape;
  const WindowPlan& plan;
  const int64_t B, H, R, gate_rows;
  const bool project;
  const Columns<T> state_columns, hidden_columns;
  T *w_hh, *w_ih, *w_hr;  // panels, layer after layer (w_ih: from the second layer on)
  T* carry;               // (layers, block rows, padded(R)): dL/dh on its way to the next depth
  T* dc;                  // (layers, block rows, padded(H))
  Scratch scratch;        // of the first member
  size_t workspace_bytes;

  WindowPass(const WindowCall<T>& c, const WindowPlan& p, void* workspace)
      : call(c),
        shape(c.shape),
        plan(p),
        B(c.shape.batch),
        H(c.shape.hidden_size),
        R(c.shape.state_size()),
        gate_rows(kGates * c.shape.hidden_size),
        project(c.shape.proj_size > 0),
        state_columns{R},
        hidden_columns{H} {
    Arena arena(workspace);
    const auto take = [&](int64_t count, bool wanted = true) {
      return wanted ? arena.take<T>(count) : nullptr;
    };
    w_hh = take(call.num_layers * recurrent_size());
    w_ih = take((call.num_layers - 1) * recurrent_size(), call.num_layers > 1);
    w_hr = take(call.num_layers * projection_size(), project);
    carry = take(call.num_layers * plan.block_rows * padded(R));
    dc = take(call.num_layers * plan.block_rows * padded(H), Cell::kHasCellState);
    const int64_t rows = plan.threads * plan.tile_rows;
    scratch.dh = take(rows * padded(R));
    scratch.dm = take(rows * padded(H), project);
    scratch.dgx = take(rows * gate_rows);
    scratch.dgh = Cell::kSplitsGradient ? take(rows * gate_rows) : scratch.dgx;
    scratch.product = take(rows * padded(R));
    scratch.above = take(rows * padded(R), call.num_layers > 1);
    workspace_bytes = arena.bytes();
  }

  void run(Member& team) const {
    prepare(team);
    const int64_t rows = shape.rows();
    for (int64_t begin = 0; begin < rows; begin += plan.block_rows) {
      const int64_t end = smaller(begin + plan.block_rows, rows);
      for (int64_t depth = 0; depth < call.window && depth * B < end; ++depth) {
        const int64_t first = larger_of(begin, depth * B);  // the chains before have ended
        const int64_t tile = first / plan.tile_rows;
        team.for_each(blocks_of(end, plan.tile_rows) - tile, [&](int64_t i) {
          const int64_t from = (tile + i) * plan.tile_rows;
          step_back(scratch_of(team.id()), depth, begin, larger_of(from, first),
                    smaller(from + plan.tile_rows, end));
        });
      }
    }
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

  int64_t recurrent_size() const { return state_columns.size(gate_rows); }
  int64_t projection_size() const { return hidden_columns.size(shape.proj_size); }

  Scratch scratch_of(int member) const {
    const int64_t row = member * plan.tile_rows;
    Scratch s = scratch;
    s.dh += row * padded(R);
    s.dm += project ? row * padded(H) : 0;
    s.dgx += row * gate_rows;
    s.dgh += row * gate_rows;
    s.product += row * padded(R);
    s.above += s.above ? row * padded(R) : 0;
    return s;
  }

  void prepare(Member& team) const {
    using Backward = BackwardPass<P, Cell>;
    const int64_t states = state_columns.panels();
    const int64_t hiddens = project ? hidden_columns.panels() : 0;
    const int64_t jobs = 2 * states + hiddens + 1;
    team.for_each(call.num_layers * jobs, [&](int64_t job) {
      const int64_t layer = job / jobs;
      int64_t i = job % jobs;
      const WindowLayer<T>& l = call.layers[layer];
      const DirectionWeights<T>& from = l.weights;
      if (i < states)
        return Backward::pack(from.w_hh, from.ld_hh, gate_rows, state_columns, i,
                              w_hh + layer * recurrent_size());
      i -= states;
      if (i < states) {
        if (layer > 0)
          Backward::pack(from.w_ih, from.ld_ih, gate_rows, state_columns, i,
                         w_ih + (layer - 1) * recurrent_size());
        return;
      }
      i -= states;
      if (i < hiddens)
        return Backward::pack(from.w_hr, from.ld_hr, shape.proj_size, hidden_columns, i,
                              w_hr + layer * projection_size());
      if (l.dh_0) zero_row(l.dh_0, B * R);
      if (l.dc_0) zero_row(l.dc_0, B * H);
    });
  }

  // Where a row stands whose position in the direction's own order is given.
  struct Place {
    int64_t t, b;
  };
  Place place(int64_t row) const {
    const int64_t position = row / B;
    return {call.reversed ? shape.steps - 1 - position : position, row % B};
  }

  void multiply(int64_t rows, const T* left, int64_t stride, int64_t depth, const T* panels,
                Columns<T> columns, T* out, int64_t out_stride) const {
    for (int64_t panel = 0; panel < columns.panels(); ++panel)
      multiply_panel<P>(columns.vectors(panel), rows, depth, {left, stride},
                        panels + columns.offset(panel, depth), nullptr, 0,
                        out + columns.first(panel), out_stride);
  }

  // Takes chains [from, to) of the block that begins at `block` from depth to depth + 1.
  void step_back(const Scratch& s, int64_t depth, int64_t block, int64_t from, int64_t to) const {
    for (int64_t layer = call.num_layers - 1; layer >= 0; --layer) {
      const WindowLayer<T>& l = call.layers[layer];
      const bool top = layer == call.num_layers - 1;
      T* carried = carry + (layer * plan.block_rows + from - block) * padded(R);
      T* cells = dc ? dc + (layer * plan.block_rows + from - block) * padded(H) : nullptr;
      if (depth == 0) start(l, from, to, carried, cells);
      for (int64_t chain = from; chain < to; ++chain) {
        const int64_t r = chain - from;
        const Place at = place(chain - depth * B);
        gather(l, top, depth, at, carried + r * padded(R), s.above + r * padded(R),
               s.dh + r * padded(R));
        if (project) add_row(depth, s.dh + r * padded(R), row_of(l.dh, at, R), R);
      }
      if (project)
        multiply(to - from, s.dh, padded(R), R, w_hr + layer * projection_size(), hidden_columns,
                 s.dm, padded(H));
      for (int64_t chain = from; chain < to; ++chain) {
        const int64_t r = chain - from;
        cell_backward(l, s, depth, chain - depth * B, r, carried + r * padded(R),
                      cells + r * padded(H));
      }
      // On to the step before: chains with a depth left, and those whose step before is h_0.
      const int64_t first_step = smaller(to, (depth + 1) * B);  // of the chains: up to here
      const int64_t onward = (depth + 1 < call.window ? to : first_step) - from;
      if (onward > 0) {
        multiply(onward, s.dgh, gate_rows, gate_rows, w_hh + layer * recurrent_size(),
                 state_columns, s.product, padded(R));
        for (int64_t i = 0; i < onward * padded(R); i += kLanes<T>)
          store(carried + i, load(carried + i) + load(s.product + i));
      }
      for (int64_t chain = from; chain < first_step; ++chain) {
        const int64_t r = chain - from, b = chain - depth * B;
        if (l.dh_0) add_row(1, carried + r * padded(R), l.dh_0 + b * R, R);
        if (l.dc_0) add_row(1, cells + r * padded(H), l.dc_0 + b * H, H);
      }
      if (layer > 0)
        multiply(to - from, s.dgx, gate_rows, gate_rows, w_ih + (layer - 1) * recurrent_size(),
                 state_columns, s.above, padded(R));
    }
  }

  // What a chain carries at depth 0: nothing, or what comes from the final state.
  void start(const WindowLayer<T>& l, int64_t from, int64_t to, T* carried, T* cells) const {
    const int64_t last = (shape.steps - 1) * B;  // row at which the chains of the last step start
    for (int64_t chain = from; chain < to; ++chain) {
      zero_row(carried, padded(R));
      if (chain >= last && l.dh_n) copy_row(carried, l.dh_n + (chain - last) * R, R);
      carried += padded(R);
      if (!cells) continue;
      zero_row(cells, padded(H));
      if (chain >= last && l.dc_n) copy_row(cells, l.dc_n + (chain - last) * H, H);
      cells += padded(H);
    }
  }

  T* row_of(T* rows, const Place& at, int64_t width) const {
    return rows + (at.t * B + at.b) * width;
  }

  // to[i] = from[i] at depth 0, which comes first for every row, else to[i] += from[i].
  static void add_row(int64_t depth, const T* from, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store_upto(to + i, depth == 0 ? load(from + i) : load_upto(to + i, n - i) + load(from + i),
                 n - i);
  }

  // dL/dh of one row: from the step after, from the loss or from the layer above.
  void gather(const WindowLayer<T>& l, bool top, int64_t depth, const Place& at, const T* carried,
              const T* above, T* dh) const {
    const T* dy = top && depth == 0 && call.dy.data ? call.dy.at(shape, at.t, at.b) : nullptr;
    const T* mask = l.mask ? l.mask + (at.t * B + at.b) * R : nullptr;
    for (int64_t i = 0; i < R; i += kLanes<T>) {
      Vec<T> sum = load(carried + i);
      if (dy) sum += load_upto(dy + i, R - i);
      if (!top) {
        const Vec<T> dx = load(above + i);
        sum += mask ? dx * load_upto(mask + i, R - i) : dx;
      }
      store(dh + i, sum);
    }
  }

  // The cell's backward of one row, which stands at `row` in the direction's own order.
  void cell_backward(const WindowLayer<T>& l, const Scratch& s, int64_t depth, int64_t row,
                     int64_t r, T* carried, T* cells) const {
    const VectorMath<T> math{call.linear_activations};
    const Place at = place(row);
    const int64_t hidden = padded(H);
    const T* dh = project ? s.dm + r * hidden : s.dh + r * padded(R);
    const T* saved_row = kSaved > 0 ? l.reserve + (at.t * B + at.b) * kSaved * hidden : nullptr;
    const T* h = nullptr;
    if constexpr (Cell::kReadsOutput) h = l.y.at(shape, at.t, at.b);
    if constexpr (Cell::kReadsPreviousOutput) {
      if (row >= B)
        h = l.y.at(shape, call.reversed ? at.t + 1 : at.t - 1, at.b);
      else if (l.h_0)
        h = l.h_0 + at.b * R;
    }
    T* sums_x = row_of(l.dgx, at, gate_rows);
    T* sums_h = Cell::kSplitsGradient ? row_of(l.dgh, at, gate_rows) : nullptr;
    for (int64_t unit = 0; unit < H; unit += kLanes<T>) {
      const int64_t rest = H - unit;
      Vec<T> saved[kSaved + 1], dx[kGates], dg[kGates];
#pragma GCC unroll 8
      for (int i = 0; i < kSaved; ++i) saved[i] = load(saved_row + i * hidden + unit);
      UnitBackward<Vec<T>> u = {};
      u.dh = load(dh + unit);
      if constexpr (Cell::kReadsOutput) u.h = load_upto(h + unit, rest);
      if constexpr (Cell::kReadsPreviousOutput) {
        if (h) u.h_prev = load_upto(h + unit, rest);
      }
      if constexpr (Cell::kHasCellState) u.dc = load(cells + unit);
      Cell::backward(math, saved, u, dx, dg);
      if constexpr (Cell::kHasCellState) store(cells + unit, u.dc);
#pragma GCC unroll 4
      for (int g = 0; g < kGates; ++g) {
        const int64_t column = g * H + unit;
        put(s.dgx + r * gate_rows + column, sums_x + column, depth, dx[g], rest);
        if constexpr (Cell::kSplitsGradient)
          put(s.dgh + r * gate_rows + column, sums_h + column, depth, dg[g], rest);
      }
      if (!project) store(carried + unit, u.dh_prev);
    }
    if (project) zero_row(carried, padded(R));
  }

  static RNN_EXT_INLINE void put(T* to, T* sum, int64_t depth, Vec<T> v, int64_t rest) {
    store_upto(to, v, rest);
    store_upto(sum, depth == 0 ? v : load_upto(sum, rest) + v, rest);
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
