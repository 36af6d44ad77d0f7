// One layer, one or both directions, forward over the whole sequence.
//
// Phases (team.h): pack; then for every chunk of steps the input projection gx = x W_ih^T + b_ih as
// one product, then for every step the recurrent product with the cell applied to each tile while
// it is in the L1 cache. Where the plan says so a tile projects its own input instead, and there is
// no gx. Both directions share the phases: direction 1 works on step T-1-s.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "activations.h"
#include "buffers.h"
#include "gate_matrix.h"
#include "product.h"
#include "team.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class P, class Cell>
struct ForwardPass {
  using T = typename P::Value;
  using Element = typename P::Element;
  static constexpr bool kValuesAreOperands = P::kPerElement == 1;
  static constexpr int kGates = Cell::kNumGates;
  static constexpr int kSaved = Cell::kNumSaved;
  using Matrix = GateMatrix<P, kGates>;

  struct Direction {
    Matrix input, recurrent;
    // Panels, a copy for each share where the plan says so:
    Element* w_ih;        // null where not packed once for all chunks
    Element* w_hh;        // null where not packed
    Element* projection;  // panels of W_hr^T
    Element* x;  // (chunk rows, padded(I)): gathered input; by places where a step gathers its own
    T* gx;       // (chunk rows, width)
    // By places (RowBlocks), as all that has a row for each of the batch:
    T* h[2];                // (B, padded(R)): h_{t-1} and h_t, alternating
    Element* h_operand[2];  // the same as operands
    T *c, *c_prev;          // (B, padded(H)): c_t and c_{t-1}, which may be one place
    Element* unprojected;   // (B, padded(H))
    // Only with layer normalization.
    T* gh;  // (B, width): products with W_hh
    struct Norm {
      T *gain, *bias;  // (width) in panel order
    } norm_ih, norm_hh;
    T* unnormalized;  // (B, 2, padded(H)): the LSTM's o and c
    // Only with the reset gate before the product: W_hr and W_hz, then W_hn.
    GateMatrix<P, 2> first;
    GateMatrix<P, 1> second;
    Element *w_first, *w_second;  // panels, null where not packed
    T* gates;                     // (B, 2, padded(H)): r and z
    Element* reset_h;             // (B, padded(H)): r * h_{t-1}
  };

  const ForwardCall<T>& call;
  const SequenceShape& shape;
  const Features<T>& features;
  const Plan& plan;
  const RowBlocks row_blocks;
  const bool plain;              // nothing beyond the cell at any step
  const bool separate_operands;  // does the product read something else than h itself?
  const bool norm;
  const bool two_stages;  // GruResetBefore
  // Does a row's step do nothing but the cell, unless an episode ends?
  const bool simple_rows;
  // A single step has the state it reads, and the one it leaves, in the tensors themselves.
  const bool state_in_place;
  // Is what is kept for the way back more than the caches would keep until then?
  bool streams_reserve;
  GateColumns<T, kGates> columns;
  Columns<T> projection_columns;
  int64_t x_stride = 0;  // of the rows of a chunk
  // From one row of a block to the next.
  int64_t gx_step, y_step, reserve_step;
  bool gather;
  // Where a chunk's steps have rows enough, a tile projects its own input: nothing is written for
  // another step, or another member, to read. Are there such chunks, and others?
  bool some_in_step, some_before;
  // With a single chunk every panel of W_ih is used once: packed when it is, one per member.
  bool one_chunk;
  Element* member_panels = nullptr;
  Direction directions[kMaxDirections];
  size_t workspace_bytes;

  ForwardPass(const ForwardCall<T>& c, const Plan& p, void* workspace)
      : call(c),
        shape(c.shape),
        features(c.features),
        plan(p),
        row_blocks(c.shape, p, padded(c.shape.state_size()) * int64_t(sizeof(T))),
        plain(!c.features.resets.data && !c.features.zoneout_h.data && !c.features.zoneout_c.data &&
              !c.cells.data),
        separate_operands(!kValuesAreOperands || c.features.hidden_mask[0]),
        norm(c.features.norm_ih[0]),
        two_stages(c.features.reset_before),
        simple_rows(!c.features.zoneout_h.data && !c.features.zoneout_c.data && !c.cells.data &&
                    !separate_operands && c.shape.proj_size == 0 && c.rounding == Rounding::kNone),
        state_in_place(can_keep_state_in_place()),
        columns{c.shape.hidden_size},
        projection_columns{c.shape.proj_size} {
    one_chunk = plan.chunk_steps >= shape.steps;
    streams_reserve = is_streamable(call.reserve[0]) &&
                      is_streamable(call.reserve[shape.directions - 1]) && !norm &&
                      reserve_bytes() >= plan.streamed_reserve_bytes;
    some_in_step = plan.project_in_step_rows <= shape.batch && !norm && !two_stages;
    some_before = !some_in_step || shape.batch_sizes;
    // Dot products read whole vectors of x.
    const bool whole_rows = plan.packed_weights || shape.input_size % kLanes<T> == 0;
    gather = !kValuesAreOperands || shape.order || !whole_rows ||
             (some_before && !evenly_spaced(shape, call.x, &x_stride));
    if (!some_before) x_stride = call.x.row_stride;
    if (gather) x_stride = elements<P>(padded(shape.input_size));
    const int64_t rows = max_chunk_rows(shape, plan), width = columns.width();
    gx_step = row_blocks.step * width;
    y_step = shape.order ? call.y.row_stride : row_blocks.step * call.y.row_stride;
    reserve_step = row_blocks.step * features.kept(shape.cell) * padded(shape.hidden_size);
    const int64_t places = row_blocks.places();
    Arena arena(workspace);
    for (int d = 0; d < shape.directions; ++d) {
      Direction& w = directions[d];
      const DirectionWeights<T>& from = call.weights[d];
      w.input = {columns, shape.input_size, from.w_ih, from.ld_ih, arena.take<T>(width)};
      w.recurrent = {columns, shape.state_size(), from.w_hh, from.ld_hh, arena.take<T>(width)};
      if (!plan.packed_weights && !norm && shape.hidden_size % kLanes<T> == 0) {
        w.input.plain_bias = from.b_ih;
        w.recurrent.plain_bias = from.b_hh;
      }
      w.w_ih = plan.packed_weights && (!one_chunk || some_in_step)
                   ? arena.take<Element>(copies() * w.input.size())
                   : nullptr;
      const bool packed = plan.packed_weights && plan.packed_recurrent;
      w.w_hh = packed && !two_stages ? arena.take<Element>(copies() * w.recurrent.size()) : nullptr;
      if constexpr (kGates == 3) {
        if (two_stages) place_stages(d, packed, arena);
      }
      w.x = gather ? arena.take<Element>((rows > places ? rows : places) * x_stride) : nullptr;
      w.gx = some_before ? arena.take<T>(rows * width) : nullptr;
      for (int i = 0; i < 2; ++i) {
        w.h[i] = state_in_place ? i == 0 ? const_cast<T*>(call.h_0[d]) : call.h_n[d]
                                : arena.take<T>(places * padded(shape.state_size()));
        if constexpr (kValuesAreOperands) w.h_operand[i] = w.h[i];
        if (separate_operands) w.h_operand[i] = arena.take<Element>(places * state_stride());
      }
      if (state_in_place) {
        w.c_prev = const_cast<T*>(call.c_0[d]);
        w.c = call.c_n[d];
      } else {
        w.c = Cell::kHasCellState ? arena.take<T>(places * padded(shape.hidden_size)) : nullptr;
        w.c_prev = w.c;
      }
      w.gh = norm ? arena.take<T>(places * width) : nullptr;
      for (T** p : {&w.norm_ih.gain, &w.norm_ih.bias, &w.norm_hh.gain, &w.norm_hh.bias})
        *p = norm ? arena.take<T>(width) : nullptr;
      w.unnormalized = norm && Cell::kHasCellState
                           ? arena.take<T>(places * 2 * padded(shape.hidden_size))
                           : nullptr;
      const bool project = shape.proj_size > 0;
      w.projection =
          project ? arena.take<Element>(projection_columns.size(hidden_depth())) : nullptr;
      w.unprojected = project ? arena.take<Element>(places * hidden_stride()) : nullptr;
    }
    if (plan.packed_weights && one_chunk && !some_in_step)
      member_panels = arena.take<Element>(plan.threads * member_panel_size());
    workspace_bytes = arena.bytes();
  }

  void run(Member& team) const {
    for (int64_t s = features.first_position; s < features.end(shape); s += plan.chunk_steps)
      run_chunk(team, s);
  }

  // The chunk that begins at position s. Chunks run in order; all that outlives one of them is in
  // the workspace.
  void run_chunk(Member& team, int64_t s) const {
    const int64_t last = features.end(shape);
    const int64_t end = s + plan.chunk_steps < last ? s + plan.chunk_steps : last;
    if (s == features.first_position) prepare(team);
    project_input(team, s, end);
    Chunk chunk;
    for (int d = 0; d < shape.directions; ++d) {
      const StepRange range = range_at(shape, d == 1, s, end);
      chunk.base[d] = range.base;
      chunk.in_step[d] = in_step(range);
      chunk.gathers[d] = gathers_in_step(range);
    }
    for_steps(team, shape, plan, s, end,
              [&](Member& member, const Part& part, int64_t i) { step(member, part, i, chunk); });
    if (streams_reserve) flush_streams();
    if (end == last && !state_in_place)
      team.for_each(shape.directions, [&](int64_t d) { finish(int(d)); });
  }

 private:
  // Rows of operands, in elements.
  int64_t state_stride() const { return elements<P>(padded(shape.state_size())); }
  int64_t hidden_stride() const { return elements<P>(padded(shape.hidden_size)); }
  int64_t hidden_depth() const { return elements<P>(shape.hidden_size); }
  int64_t member_panel_size() const {
    return kPanelVectors * kLanes<T> * elements<P>(shape.input_size);
  }

  // Of the packed weights.
  int64_t copies() const { return plan.own_weights ? plan.shares : 1; }
  const Element* own_copy(const Matrix& of, const Element* packed, const Part& part) const {
    return plan.own_weights && packed ? packed + part.number * of.size() : packed;
  }

  bool can_keep_state_in_place() const {
    if (shape.steps > 1 || !simple_rows || norm || two_stages || shape.order ||
        features.resets.data || shape.hidden_size % kPad != 0)
      return false;
    for (int d = 0; d < shape.directions; ++d)
      if (!call.h_0[d] || !call.h_n[d] || (Cell::kHasCellState && !(call.c_0[d] && call.c_n[d])))
        return false;
    return true;
  }

  int64_t reserve_bytes() const {
    const int64_t steps = features.end(shape) - features.first_position;
    return shape.directions * steps * shape.batch * features.kept(shape.cell) *
           padded(shape.hidden_size) * int64_t(sizeof(T));
  }

  void prepare(Member& team) const {
    if (state_in_place && directions[0].input.plain_bias && directions[0].recurrent.plain_bias)
      return;
    const int64_t panels = columns.panels(), projections = projection_columns.panels();
    const int64_t packers = plan.own_weights ? plan.shares : panels;
    const int64_t jobs = packers + projections + 1;
    team.for_each(shape.directions * jobs, [&](int64_t job) {
      const int d = int(job / jobs);
      const int64_t i = job % jobs;
      const Direction& w = directions[d];
      const DirectionWeights<T>& from = call.weights[d];
      if (i < packers) {
        if (!plan.own_weights) return prepare_panel(d, i, 0);
        for (int64_t panel = 0; panel < panels; ++panel) prepare_panel(d, panel, i);
      } else if (i < packers + projections) {
        pack_projection(w, from, i - packers);
      } else {
        if (!state_in_place) load_initial(d);
      }
    });
  }

  void prepare_panel(int d, int64_t i, int64_t share) const {
    const Direction& w = directions[d];
    const DirectionWeights<T>& from = call.weights[d];
    if (share == 0) {
      if (!w.input.plain_bias) w.input.load_row(i, norm ? nullptr : from.b_ih, w.input.bias);
      if (!w.recurrent.plain_bias)
        w.recurrent.load_row(i, norm ? nullptr : from.b_hh, w.recurrent.bias);
      if (norm) {
        w.input.load_row(i, features.norm_ih[d], w.norm_ih.gain);
        w.input.load_row(i, from.b_ih, w.norm_ih.bias);
        w.recurrent.load_row(i, features.norm_hh[d], w.norm_hh.gain);
        w.recurrent.load_row(i, from.b_hh, w.norm_hh.bias);
      }
    }
    if (w.w_ih) w.input.pack(i, w.w_ih + share * w.input.size() + w.input.panel_offset(i));
    if (w.w_hh)
      w.recurrent.pack(i, w.w_hh + share * w.recurrent.size() + w.recurrent.panel_offset(i));
    if constexpr (kGates == 3) {
      if (two_stages) prepare_stages(d, i);
    }
  }

  void load_initial(int d) const {
    const Direction& w = directions[d];
    const int64_t R = shape.state_size(), H = shape.hidden_size;
    const int64_t t = step_at(shape, d == 1, features.first_position);
    const auto anew = [&](int64_t b) {
      return b < shape.active(t) && features.starts_anew(shape, d, t, b);
    };
    for (T* h : w.h)
      load_state(h, row_blocks, R, [&](int64_t b) {
        return state_row(anew(b) ? features.reset_h[d] : call.h_0[d], shape, b, R);
      });
    if (separate_operands)
      row_blocks.for_each([&](const BatchRow& of) {
        for (int64_t unit = 0; unit < padded(R); unit += kLanes<T>)
          for (Element* h : w.h_operand)
            store_operand(d, h, of, unit, load(w.h[0] + of.place * padded(R) + unit));
      });
    if (w.c)
      load_state(w.c, row_blocks, H, [&](int64_t b) {
        return state_row(anew(b) ? features.reset_c[d] : call.c_0[d], shape, b, H);
      });
  }

  void pack_projection(const Direction& w, const DirectionWeights<T>& from, int64_t panel) const {
    const int vectors = projection_columns.vectors(panel);
    Element* to = w.projection + projection_columns.offset(panel, hidden_depth());
    for (int v = 0; v < vectors; ++v) {
      const int64_t row = projection_columns.first(panel) + v * kLanes<T>;
      const int64_t rest = shape.proj_size - row;
      pack_transposed<P>(from.w_hr + row * from.ld_hr, from.ld_hr, rest, shape.hidden_size,
                         to + v * kLanes<T>, vectors * kLanes<T>);
    }
  }

  // Are a chunk's inputs projected by the tiles of its steps?
  bool in_step(const StepRange& range) const {
    return some_in_step && range.rows >= plan.project_in_step_rows * (range.last - range.first);
  }
  // Does a member, whose rows nobody else reads, gather their inputs at their step? What it then
  // reads again for every panel is in the cache next to it.
  bool gathers_in_step(const StepRange& range) const {
    return gather && plan.shares > 0 && in_step(range);
  }
  struct Chunk {
    int64_t base[kMaxDirections];  // number of its first row
    bool in_step[kMaxDirections], gathers[kMaxDirections];
  };

  // In input_projection.h: what a chunk needs before its steps.
  void project_input(Member& team, int64_t s, int64_t end) const;
  void gather_input(Member& team, int64_t s, int64_t end, int64_t blocks) const;
  void gather_step(const Part& part, int64_t s, const Chunk& chunk) const;
  void fetch_next_input(int d, int64_t panel, int64_t s, int64_t block) const;
  void input_tile(int d, int64_t panel, const Element* packed, const StepRange& range,
                  int64_t block, const Element* ahead = nullptr) const;
  void touch_output(int d, const StepRange& range, int64_t begin, int64_t end) const;

  // The input of step t and batch row b, which is a row of the chunk.
  const Element* input_operands(int d, int64_t t, int64_t b, int64_t row) const {
    if constexpr (kValuesAreOperands) {
      if (!gather) return call.x.at(shape, t, b);
    }
    return directions[d].x + row * x_stride;
  }

  static int64_t block_end(int64_t begin, const StepRange& range) {
    return begin + kMaxRowBlock < range.rows ? begin + kMaxRowBlock : range.rows;
  }

  void step(Member& team, const Part& part, int64_t s, const Chunk& chunk) const {
    const auto time = [&](int d) { return step_at(shape, d == 1, s); };
    const auto gx_row = [&](int d) { return shape.first_row(time(d)) - chunk.base[d]; };
    if constexpr (kGates == 3) {
      if (two_stages) {
        for_tiles(team, part, directions[0].first.columns.panels(),
                  [&](int d, int64_t panel, int64_t block, int64_t) {
                    first_stage(d, panel, s, time(d), block, gx_row(d));
                  });
        for_tiles(team, part, directions[0].second.columns.panels(),
                  [&](int d, int64_t panel, int64_t block, int64_t) {
                    second_stage(d, panel, s, time(d), block, gx_row(d));
                  });
        return;
      }
    }
    if (gather) gather_step(part, s, chunk);
    for_tiles(team, part, columns.panels(), [&](int d, int64_t panel, int64_t block, int64_t next) {
      gate_tile(d, panel, s, time(d), part, block, gx_row(d), chunk, next);
    });
    if (norm)
      for_row_groups(team, part, plan, [&](int d, int64_t, int64_t block, int64_t r) {
        const int64_t t = time(d);
        const BatchRows rows = row_blocks.rows(block, shape.active(t)).from(r, kRowGroup);
        if (rows.count > 0) norm_rows(d, s, t, rows, gx_row(d));
      });
    if (shape.proj_size > 0)
      for_tiles(team, part, projection_columns.panels(),
                [&](int d, int64_t panel, int64_t block, int64_t) {
                  projection_tile(d, panel, s, time(d), block);
                });
  }

  void gate_tile(int d, int64_t panel, int64_t s, int64_t t, const Part& part, int64_t block,
                 int64_t gx_row, const Chunk& chunk, int64_t next) const {
    const Direction& w = directions[d];
    const bool project_in_step = chunk.in_step[d];
    const BatchRows rows = row_blocks.rows(block, shape.active(t));
    if (rows.count == 0) return;
    if (chunk.gathers[d]) fetch_next_input(d, panel, s, block);
    const int64_t tile_width = columns.vectors(panel) * kLanes<T>, width = columns.width();
    alignas(64) T buffer[kMaxRowBlock * kPanelVectors * kLanes<T>];
    T* const tile = norm ? w.gh + rows.place * width + columns.column(panel) : buffer;
    const Element* const all = own_copy(w.recurrent, w.w_hh, part);
    const Element* const w_hh = w.recurrent.panel(all, panel);
    const Element* const w_ih = w.input.panel(own_copy(w.input, w.w_ih, part), panel);
    const Element* const ahead = w.recurrent.panel_ahead(all, panel, next);
    w.recurrent.multiply(panel, w_hh, rows.count, w.h_operand[s & 1] + rows.place * state_stride(),
                         state_stride(), tile, norm ? width : tile_width,
                         project_in_step ? w_ih : ahead);
    if (norm) return;
    alignas(64) T projected[kMaxRowBlock * kPanelVectors * kLanes<T>];
    const T* gx = projected;
    const int64_t gx_stride = project_in_step ? tile_width : gx_step;
    if (project_in_step) {
      const bool by_place = chunk.gathers[d];
      const Element* const x = by_place ? w.x + rows.place * x_stride
                                        : input_operands(d, t, rows.first, gx_row + rows.first);
      w.input.multiply(panel, w_ih, rows.count, x, (by_place ? 1 : rows.step) * x_stride, projected,
                       tile_width, ahead);
    } else {
      gx = w.gx + (gx_row + rows.first) * width + columns.column(panel);
    }
    int64_t r = 0;
    if constexpr (kValuesAreOperands) {
      if (simple_rows && !any_starts_anew(d, t, rows)) {
        const SimpleRows at = simple_rows_from(d, s, t, rows);
        if constexpr (kVectorRegisters >= 32)
          for (; r + 2 <= rows.count; r += 2)
            simple_cell<false, Pair<T>>(at, panel, r, gx + r * gx_stride, gx_stride,
                                        tile + r * tile_width, tile_width);
        for (; r < rows.count; ++r)
          simple_cell<false, Vec<T>>(at, panel, r, gx + r * gx_stride, gx_stride,
                                     tile + r * tile_width, tile_width);
      }
    }
    for (; r < rows.count; ++r)
      cell_row<false>(d, panel, s, t, rows[r], gx + r * gx_stride, tile + r * tile_width);
  }

  T* reserve_row(int d, int64_t t, int64_t b) const {
    if (!call.reserve[d]) return nullptr;
    const int64_t row = shape.first_row(t) + b - call.reserve_first_row[d];
    return call.reserve[d] + row * features.kept(shape.cell) * padded(shape.hidden_size);
  }

  // Where batch rows have their values at one step: the first one's, and from row to row. Only
  // outputs may be in another order.
  struct SimpleRows {
    const T *h_prev, *c_prev;
    T *h, *c, *y, *reserve, *unnormalized;
    int64_t hidden, y_stride, reserve_stride, step;
    const int64_t* order;

    T* output(int64_t r) const { return y + (order ? order[r * step] : r) * y_stride; }
  };
  SimpleRows simple_rows_from(int d, int64_t s, int64_t t, const BatchRows& rows) const {
    const Direction& w = directions[d];
    const int64_t hidden = padded(shape.hidden_size), begin = rows.first;
    const int64_t first = rows.place * hidden;
    return {w.h[s & 1] + first,
            w.c ? w.c_prev + first : nullptr,
            w.h[~s & 1] + first,
            w.c ? w.c + first : nullptr,
            (shape.order ? call.y.data + t * call.y.step_stride : call.y.at(shape, t, begin)) +
                d * shape.hidden_size,
            reserve_row(d, t, begin),
            w.unnormalized ? w.unnormalized + 2 * first : nullptr,
            hidden,
            y_step,
            reserve_step,
            rows.step,
            shape.order ? shape.order + begin : nullptr};
  }

  // In cell_rows.h. The cell for row r of a panel, and where V is a pair for the next one, too.
  // What its gates get from x_t, and from h_{t-1}: gx, gh. kNorm: the LSTM's output is made later,
  // by norm_output.
  template <bool kNorm, class V>
  void simple_cell(const SimpleRows& at, int64_t panel, int64_t r, const T* gx, int64_t gx_stride,
                   const T* gh, int64_t gh_stride) const;
  template <class V>
  void simple_output(const SimpleRows& at, int64_t r, int64_t unit, V h) const;
  // The cell for one row of a panel, with all that may go on beyond it.
  template <bool kNorm>
  void cell_row(int d, int64_t panel, int64_t s, int64_t t, const BatchRow& of, const T* gx,
                const T* gh) const;

  // In layer_norm.h.
  void norm_rows(int d, int64_t s, int64_t t, const BatchRows& rows, int64_t gx_row) const;
  template <class V>
  void norm_row(int d, int64_t s, int64_t t, const BatchRows& rows, int64_t gx_row,
                const SimpleRows* simple, int64_t r) const;
  template <class V>
  V normalize(T* row, int64_t stride, const typename Direction::Norm& norm, T* kept,
              int64_t kept_stride) const;
  template <class V>
  void norm_output(int d, int64_t s, int64_t t, const BatchRows& rows, T* kept,
                   const SimpleRows* simple, int64_t r) const;

  // In reset_before.h.
  void place_stages(int d, bool packed, Arena& arena);
  void prepare_stages(int d, int64_t i) const;
  int64_t gx_column(int gate, int64_t unit) const;
  void first_stage(int d, int64_t panel, int64_t s, int64_t t, int64_t block, int64_t gx_row) const;
  void second_stage(int d, int64_t panel, int64_t s, int64_t t, int64_t block,
                    int64_t gx_row) const;

  // What a row's step does beyond the cell itself.
  struct Beyond {
    bool any = false;
    bool anew = false;  // does the row's next step start from the reset state?
    const T *reset_h = nullptr, *reset_c = nullptr;
    const T *zoneout_h = nullptr, *zoneout_c = nullptr;
    T* cells = nullptr;

    RNN_EXT_INLINE Vec<T> next_c(Vec<T> c, Vec<T> c_prev, int64_t unit, int64_t H) const {
      if (zoneout_c) c += row_vector(zoneout_c, unit, H) * (c_prev - c);
      if (cells) store_upto(cells + unit, c, H - unit);
      return c;
    }
    RNN_EXT_INLINE Vec<T> next_h(Vec<T> h, Vec<T> h_prev, int64_t unit, int64_t H) const {
      return zoneout_h ? h + row_vector(zoneout_h, unit, H) * (h_prev - h) : h;
    }
  };
  // Does one of the rows have another step after t, to which it comes with the reset state?
  bool any_starts_anew(int d, int64_t t, const BatchRows& rows) const {
    const int64_t next = d == 0 ? t + 1 : t - 1;
    if (!features.resets.data || next < 0 || next >= shape.steps) return false;
    for (int64_t r = 0; r < rows.count && rows[r].b < shape.active(next); ++r)
      if (features.starts_anew(shape, d, next, rows[r].b)) return true;
    return false;
  }
  RNN_EXT_INLINE Beyond beyond_plain(int d, int64_t t, int64_t b) const {
    const int64_t H = shape.hidden_size, R = shape.state_size();
    const auto row_of = [&](const auto& rows) {
      return rows.data ? rows.at(shape, t, b) + d * H : nullptr;
    };
    Beyond beyond;
    if (plain) return beyond;
    beyond.zoneout_h = row_of(features.zoneout_h);
    beyond.zoneout_c = row_of(features.zoneout_c);
    beyond.cells = row_of(call.cells);
    beyond.any = beyond.zoneout_h || beyond.zoneout_c || beyond.cells;
    if (features.resets.data) {
      beyond.anew = any_starts_anew(d, t, {b, 1, 1, 0});
      beyond.reset_h = state_row(features.reset_h[d], shape, b, R);
      beyond.reset_c = state_row(features.reset_c[d], shape, b, H);
    }
    return beyond;
  }
  // A vector of a row of n values, null means zeros.
  static RNN_EXT_INLINE Vec<T> row_vector(const T* row, int64_t unit, int64_t n) {
    return row && unit < n ? load_upto(row + unit, n - unit) : Vec<T>{};
  }

  RNN_EXT_INLINE void emit_h(int d, int64_t s, const BatchRow& of, int64_t unit, Vec<T> h,
                             const Beyond& beyond, T* y) const {
    h = round_to<T>(h, call.rounding);
    store_h(d, s, of, unit, beyond.anew ? row_vector(beyond.reset_h, unit, shape.hidden_size) : h);
    store_upto(y + unit, h, shape.hidden_size - unit);
  }
  // h_t of one vector of units, where the next position looks for it.
  void store_h(int d, int64_t s, const BatchRow& of, int64_t unit, Vec<T> h) const {
    const Direction& w = directions[d];
    store(w.h[~s & 1] + of.place * padded(shape.state_size()) + unit, h);
    if (separate_operands) store_operand(d, w.h_operand[~s & 1], of, unit, h);
  }
  void store_operand(int d, Element* operands, const BatchRow& of, int64_t unit, Vec<T> h) const {
    const int64_t R = shape.state_size();
    if (const T* mask = state_row(features.hidden_mask[d], shape, of.b, R))
      h *= row_vector(mask, unit, R);
    P::store(operands + of.place * state_stride(), unit, h, kLanes<T>);
  }

  void projection_tile(int d, int64_t panel, int64_t s, int64_t t, int64_t block) const {
    const Direction& w = directions[d];
    const BatchRows rows = row_blocks.rows(block, shape.active(t));
    if (rows.count == 0) return;
    const int vectors = projection_columns.vectors(panel);
    const int64_t first = projection_columns.first(panel), tile_width = vectors * kLanes<T>;
    alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
    multiply_panel<P>(vectors, rows.count, hidden_depth(),
                      {w.unprojected + rows.place * hidden_stride(), hidden_stride()},
                      w.projection + projection_columns.offset(panel, hidden_depth()), nullptr, 0,
                      tile, tile_width);
    for (int64_t r = 0; r < rows.count; ++r) {
      T* y = call.y.at(shape, t, rows[r].b) + d * shape.state_size() + first;
      const Beyond beyond = beyond_plain(d, t, rows[r].b);
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> out = round_to<T>(load(tile + r * tile_width + v * kLanes<T>), call.rounding);
        const int64_t unit = first + v * kLanes<T>;
        store_h(d, s, rows[r], unit,
                beyond.anew ? row_vector(beyond.reset_h, unit, shape.proj_size) : out);
        store_upto(y + v * kLanes<T>, out, shape.proj_size - first - v * kLanes<T>);
      }
    }
  }

  void finish(int d) const {
    const Direction& w = directions[d];
    const int64_t R = shape.state_size(), H = shape.hidden_size;
    row_blocks.for_each([&](const BatchRow& of) {
      // Which of the two buffers holds the last h depends on the last position the row was active
      // at. In direction 1 that is the end for every row: short rows start late there. A row that
      // was not active at all has the same in both.
      const int64_t first = features.first_position, last = features.end(shape);
      const int64_t own = d == 0 ? steps_of_row(shape, of.b) : last;
      const int64_t steps = own < first ? first : own < last ? own : last;
      if (call.h_n[d])
        copy_row(state_row(call.h_n[d], shape, of.b, R), w.h[steps & 1] + of.place * padded(R), R);
      if (w.c && call.c_n[d])
        copy_row(state_row(call.c_n[d], shape, of.b, H), w.c + of.place * padded(H), H);
    });
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
