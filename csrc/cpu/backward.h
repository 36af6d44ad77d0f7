// One layer, one or both directions, backward through time.
//
// Position s of the loop undoes forward's last positions first (direction 0 goes from step T-1 to
// 0). One phase a position: a tile first finishes dL/dh of its units, the product of the gate
// gradients of position s-1 with W_hh, and then applies the cell's backward to them at once, which
// yields the gate gradients of position s. After every chunk of positions the gate gradients of the
// chunk, still in the cache, become weight, bias and input gradients as large products. Sums run in
// a fixed order, so the result is bitwise the same for any number of threads.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "activations.h"
#include "buffers.h"
#include "chunk_layout.h"
#include "product.h"
#include "team.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class P, class Cell>
struct BackwardPass : private ChunkLayout {
  using T = typename P::Value;
  using Element = typename P::Element;
  static constexpr bool kValuesAreOperands = P::kPerElement == 1;
  static constexpr int kGates = Cell::kNumGates;
  static constexpr int kSaved = Cell::kNumSaved;
  static constexpr int64_t kSumRows = 16;

  // dW (M, N) = left^T right, summed over a group's rows of a chunk: the left operand in blocks of
  // kMaxRowBlock columns [block][row][kMaxRowBlock], the right one in panels.
  struct WeightGradient {
    T* out = nullptr;     // of the first group, and in the end the sum of all
    T* others = nullptr;  // (groups - 1, M, N)
    int64_t m = 0;
    Columns<T> n{0};
    int64_t depth = 0;         // room for the rows of a group, in elements
    Element* left = nullptr;   // of every group
    Element* right = nullptr;  // of every group

    T* out_of(int64_t group) const { return group == 0 ? out : others + (group - 1) * m * n.count; }
    Element* left_of(int64_t group) const {
      return left ? left + group * blocks_of(m, kMaxRowBlock) * kMaxRowBlock * depth : nullptr;
    }
    Element* right_of(int64_t group) const { return right + group * n.size(depth); }
  };

  struct Direction {
    Element* w_hh;  // panels of (G*H, R)
    Element* w_ih;  // panels of (G*H, I), null where they are not packed once for all chunks
    Element* w_hr;  // panels of (P, H)
    // (chunk rows, G*H), a group's rows after another's: gradients of the gates' input side, and of
    // their recurrent side, the same array unless the cell tells them apart.
    T *dgx, *dgh;
    Element *dgx_operand, *dgh_operand;  // the same as operands
    Element* dgh_before;  // (B, G*H), by places: of the last position of the chunk before
    // By places (RowBlocks), as all that has a row for each of the batch:
    T* carry;  // (B, padded(R)): dL/dh on its way to the next position, without the product
    T* dc;     // (B, padded(H))
    T* dh;     // (chunk rows, padded(R)), of normalized layers (B, padded(R)): dL/dh, where its row
               // has to be complete before the cell
    Element* dh_operand;
    T* output;  // (chunk rows, padded(H)): h before the projection
    WeightGradient ih, hh, hr;
    T* biases;  // (groups - 1, 2, G*H): b_ih's and b_hh's gradients of the groups after the first
    // Only with layer normalization.
    T* dnormal;  // (B, 2, G*H): gradients by what it yields, of the input and the recurrent side
    T* dc_row;   // (B, 3, padded(H)): by c and by o's gate, from the output; normalized c
    // Gradients of its parameters, summed over a chunk's steps and a group's rows.
    struct Sums {
      T *ih, *hh, *b_ih, *b_hh;  // (groups, G*H)
      T *c, *c_bias;             // (groups, H)
    } sums;
    // Only with the reset gate before the product.
    Element* w_second;         // panels of W_hn, (H, H)
    Element* dn;               // (B, padded(H)), as operands
    T* reset_h;                // (chunk rows, padded(H)): r * h_{t-1}
    WeightGradient candidate;  // of W_hn; hh is that of W_hr and W_hz
  };

  const BackwardCall<T>& call;
  const Features<T>& features;
  const int64_t gate_rows;  // G*H
  const bool project, norm, two_stages;
  const bool splits;  // do gradients of the gates' input side and recurrent side differ?
  Columns<T> state_columns, input_columns, hidden_columns;
  Direction directions[kMaxDirections];
  Element* member_panels = nullptr;  // a panel of W_ih per member of the team, where it is not
  size_t workspace_bytes;

  BackwardPass(const BackwardCall<T>& c, const Plan& p, void* workspace)
      : ChunkLayout(c.shape, p, padded(c.shape.state_size()) * int64_t(sizeof(T)), has_groups(c)),
        call(c),
        features(c.features),
        gate_rows(kGates * c.shape.hidden_size),
        project(c.shape.proj_size > 0),
        norm(c.features.norm_ih[0]),
        two_stages(c.features.reset_before),
        splits((Cell::kSplitsGradient && !two_stages) || norm),
        state_columns{c.shape.state_size()},
        input_columns{c.shape.input_size},
        hidden_columns{c.shape.hidden_size} {
    const int64_t rows = max_chunk_rows(shape, plan), H = shape.hidden_size;
    const int64_t places = row_blocks.places();
    Arena arena(workspace);
    const auto take = [&](int64_t count, bool wanted = true) {
      return wanted ? arena.take<T>(count) : nullptr;
    };
    const auto take_elements = [&](int64_t count, bool wanted = true) {
      return wanted ? arena.take<Element>(count) : nullptr;
    };
    // The operands made of an array of values: the array itself if they are the same.
    const auto take_operand = [&](T* values, int64_t count, bool wanted = true) {
      if constexpr (kValuesAreOperands)
        return values;
      else
        return take_elements(count, wanted);
    };
    if (dealt()) rows_before = arena.take<int64_t>(groups * (shape.steps + 1));
    for (int d = 0; d < shape.directions; ++d) {
      Direction& w = directions[d];
      const DirectionGradients<T>& g = call.gradients[d];
      w.w_hh = take_elements(state_columns.size(gate_depth()));
      // One chunk needs every panel once: a copy of all of them would only count in peak memory.
      const bool one_chunk = plan.chunk_steps >= shape.steps;
      w.w_ih = take_elements(input_columns.size(gate_depth()), call.dx.data && !one_chunk);
      w.w_hr = take_elements(hidden_columns.size(elements<P>(shape.proj_size)), project);
      const GateGradients<T>& gates = call.gates[d];
      w.dgx = gates.dgx ? gates.dgx : take(rows * gate_rows);
      w.dgx_operand = take_operand(w.dgx, rows * gate_depth());
      w.dgh = !splits ? w.dgx : gates.dgh ? gates.dgh : take(rows * gate_rows);
      w.dgh_operand = splits ? take_operand(w.dgh, rows * gate_depth()) : w.dgx_operand;
      w.dgh_before = take_elements(places * gate_depth(), !one_chunk);
      w.carry = take(places * padded(shape.state_size()));
      w.dc = take(places * padded(H), Cell::kHasCellState);
      w.dh = take((norm ? places : rows) * padded(shape.state_size()), project || norm);
      w.w_second = take_elements(state_columns.size(elements<P>(H)), two_stages);
      w.dn = take_elements(places * elements<P>(padded(H)), two_stages);
      w.reset_h = take(rows * padded(H), two_stages && g.w_hh);
      w.dnormal = take(places * 2 * gate_rows, norm);
      w.dc_row = take(places * 3 * padded(H), norm && Cell::kHasCellState);
      const int64_t groups = row_groups(shape, plan);
      for (T** p : {&w.sums.ih, &w.sums.hh, &w.sums.b_ih, &w.sums.b_hh})
        *p = take(groups * gate_rows, norm);
      for (T** p : {&w.sums.c, &w.sums.c_bias}) *p = take(groups * H, norm && Cell::kHasCellState);
      w.dh_operand = take_operand(w.dh, rows * projection_stride(), project);
      w.output = take(rows * padded(H), project && g.w_hr);
      w.biases = take((groups - 1) * 2 * gate_rows);
    }
    const auto others = [&](const T* out, int64_t size) {
      return take((groups - 1) * size, out && groups > 1);
    };
    for (int d = 0; d < shape.directions; ++d) {
      Direction& w = directions[d];
      const DirectionGradients<T>& g = call.gradients[d];
      w.ih.others = others(g.w_ih, gate_rows * shape.input_size);
      w.hh.others = others(g.w_hh, gate_rows * shape.state_size());
    }
    const size_t mark = arena.mark();
    // Of the largest group, and so of all rows where there is but one.
    const int64_t blocks_of_group = blocks_of(blocks_of(shape.batch, plan.row_block), groups);
    const int64_t group_rows = plan.chunk_steps * blocks_of_group * plan.row_block;
    const int64_t depth = elements<P>(group_rows < rows ? group_rows : rows);
    for (int d = 0; d < shape.directions; ++d) {
      const auto set_up = [&](WeightGradient& gradient, T* out, int64_t m, Columns<T> n,
                              Element* left = nullptr) {
        gradient.out = out;
        gradient.m = m;
        gradient.n = n;
        gradient.depth = depth;
        const int64_t blocks = blocks_of(m, kMaxRowBlock);
        gradient.left = left ? left : take_elements(groups * blocks * kMaxRowBlock * depth, out);
        gradient.right = take_elements(groups * n.size(depth), out);
      };
      Direction& w = directions[d];
      const DirectionGradients<T>& g = call.gradients[d];
      set_up(w.ih, g.w_ih, gate_rows, input_columns);
      if (two_stages) {
        set_up(w.hh, g.w_hh, 2 * H, state_columns);
        set_up(w.candidate, g.w_hh ? g.w_hh + 2 * H * H : nullptr, H, state_columns);
      } else {
        set_up(w.hh, g.w_hh, gate_rows, state_columns, splits ? nullptr : w.ih.left);
      }
      set_up(w.hr, g.w_hr, shape.proj_size, hidden_columns);
    }
    // A chunk's weight gradients are done before its input gradient begins, unless each group goes
    // on by itself.
    if (groups == 1) arena.rewind(mark);
    const int64_t packers = plan.threads > groups ? plan.threads : groups;
    if (call.dx.data && !directions[0].w_ih)
      member_panels = arena.take<Element>(packers * gate_depth() * Columns<T>::kWidth);
    workspace_bytes = arena.bytes();
  }

  // Positions [from, to). Runs follow each other in order; all that outlives one is in the
  // workspace.
  void run(Member& team, int64_t from, int64_t to) const {
    if (from == 0) {
      prepare(team);
      pack_input_weights(team);
    }
    // Whole groups each: a member makes the products of its own rows, too.
    const bool apart = plan.shares > 0 && groups > 1 && groups % plan.shares == 0;
    for (int64_t s = from; s < to;) {
      const int64_t begin = s / plan.chunk_steps * plan.chunk_steps;
      const int64_t end =
          begin + plan.chunk_steps < shape.steps ? begin + plan.chunk_steps : shape.steps;
      const int64_t stop = end < to ? end : to;
      if (apart) {
        team.for_each_alone(plan.shares, [&](Member& alone, int64_t i) {
          const Part part = Part::share(shape, plan, i);
          for (int64_t position = s; position < stop; ++position) step(alone, part, position);
          const int64_t own = groups / plan.shares;
          if (stop < end) return;
          keep_last(alone, part, end);
          products(alone, begin, end, {i * own, own, i});
        });
      } else {
        for_steps(team, shape, plan, s, stop,
                  [&](Member& member, const Part& part, int64_t i) { step(member, part, i); });
        if (stop == end) {
          keep_last(team, Part::all(shape, plan), end);
          products(team, begin, end, {0, groups, -1});
        }
      }
      s = stop;
    }
    if (to < shape.steps) return;
    add_groups(team);
    step(team, Part::all(shape, plan), shape.steps);  // the last product: dL/dh_0
    team.for_each(shape.directions, [&](int64_t d) { finish(int(d)); });
  }

  // What is left to do where call.known has the gate gradients: the products over all rows.
  void run_known(Member& team) const {
    pack_input_weights(team);
    for (int64_t s = 0; s < shape.steps; s += plan.chunk_steps) {
      const int64_t end = s + plan.chunk_steps < shape.steps ? s + plan.chunk_steps : shape.steps;
      const int64_t blocks = blocks_of(max_chunk_rows(shape, plan), kMaxRowBlock);
      team.for_each(shape.directions * blocks, [&](int64_t i) {
        take_known(int(i / blocks), s, end, i % blocks * kMaxRowBlock);
      });
      products(team, s, end, {0, 1, -1});
    }
  }

 private:
  // Do sums over rows fall into the plan's groups?
  static bool has_groups(const BackwardCall<T>& c) {
    return !c.features.two_parts() && !c.known[0].dgx && !c.gates[0].dgx;
  }

  // Rows of operands, in elements.
  int64_t gate_depth() const { return elements<P>(gate_rows); }
  int64_t projection_stride() const { return elements<P>(padded(shape.proj_size)); }

  // Rows of W_hh whose product with the gate gradients leads to h_{t-1} directly.
  int64_t recurrent_rows() const { return two_stages ? 2 * shape.hidden_size : gate_rows; }
  int64_t recurrent_depth() const { return elements<P>(recurrent_rows()); }

  // Groups that a member, or the whole team, works on.
  struct Groups {
    int64_t first, count;
    int64_t packer;  // whose space for packing, -1: the team member's own
  };

  void prepare(Member& team) const {
    const int64_t states = state_columns.panels();
    const int64_t hiddens = project ? hidden_columns.panels() : 0;
    const int64_t jobs = states + hiddens + 1;
    team.for_each(shape.directions * jobs, [&](int64_t job) {
      const int d = int(job / jobs);
      int64_t i = job % jobs;
      const Direction& w = directions[d];
      const DirectionWeights<T>& from = call.weights[d];
      if (i < states) {
        pack(from.w_hh, from.ld_hh, recurrent_rows(), state_columns, i, w.w_hh);
        if (two_stages)
          pack(from.w_hh + recurrent_rows() * from.ld_hh, from.ld_hh, shape.hidden_size,
               state_columns, i, w.w_second);
        return;
      }
      i -= states;
      if (i < hiddens)
        return pack(from.w_hr, from.ld_hr, shape.proj_size, hidden_columns, i, w.w_hr);
      clear_operand_ends(w);
      for (int64_t group = 0; dealt() && group < groups; ++group) count_rows(group);
      const int64_t R = shape.state_size(), H = shape.hidden_size;
      load_state(w.carry, row_blocks, R,
                 [&](int64_t b) { return state_row(call.dh_n[d], shape, b, R); });
      if (w.dc)
        load_state(w.dc, row_blocks, H,
                   [&](int64_t b) { return state_row(call.dc_n[d], shape, b, H); });
      const DirectionGradients<T>& g = call.gradients[d];
      for (T* sums : {w.sums.ih, w.sums.hh, w.sums.b_ih, w.sums.b_hh})
        if (norm) zero_row(sums, row_groups(shape, plan) * gate_rows);
      for (T* sums : {w.sums.c, w.sums.c_bias})
        if (norm && Cell::kHasCellState) zero_row(sums, row_groups(shape, plan) * H);
      if (g.reset_h) zero_row(g.reset_h, shape.batch * R);
      if (g.reset_c) zero_row(g.reset_c, shape.batch * H);
    });
  }

  void pack_input_weights(Member& team) const {
    if (!directions[0].w_ih) return;
    const int64_t panels = input_columns.panels();
    team.for_each(shape.directions * panels, [&](int64_t i) {
      const DirectionWeights<T>& from = call.weights[i / panels];
      pack(from.w_ih, from.ld_ih, gate_rows, input_columns, i % panels,
           directions[i / panels].w_ih);
    });
  }

  // A block of rows of the known gradients, where step() would have left them.
  void take_known(int d, int64_t s, int64_t end, int64_t begin) const {
    const Direction& w = directions[d];
    const KnownGradients<T>& known = call.known[d];
    const StepRange range = range_at(shape, reversed(d), s, end);
    const int64_t last = begin + kMaxRowBlock < range.rows ? begin + kMaxRowBlock : range.rows;
    const int64_t hidden = padded(shape.hidden_size), proj = shape.proj_size;
    const int64_t stride = known.row_stride > 0 ? known.row_stride : gate_rows;
    for (int64_t r = begin; r < last; ++r) {
      const int64_t row = range.base + r;
      copy_row(w.dgx + r * gate_rows, known.dgx + row * stride, gate_rows);
      if constexpr (Cell::kSplitsGradient)
        copy_row(w.dgh + r * gate_rows, known.dgh + row * stride, gate_rows);
      if (!project) continue;
      copy_row(w.dh + r * padded(proj), known.dh + row * proj, proj);
      if constexpr (Cell::kHasCellState) {
        const VectorMath<T> math{call.linear_activations};
        const T* reserve = call.reserve[d] + row * kSaved * hidden;
        for (int64_t unit = 0; w.output && unit < shape.hidden_size; unit += kLanes<T>) {
          Vec<T> saved[kSaved];
          for (int i = 0; i < kSaved; ++i) saved[i] = load(reserve + i * hidden + unit);
          store(w.output + r * hidden + unit,
                Cell::template output<VectorMath<T>, Vec<T>>(math, saved));
        }
      }
    }
  }

  // The last element of a row of gate gradients may have room for a value that is never stored.
  void clear_operand_ends(const Direction& w) const {
    if (gate_rows % P::kPerElement == 0) return;
    const int64_t rows = max_chunk_rows(shape, plan);
    for (Element* operands : {w.dgx_operand, w.dgh_operand})
      for (int64_t r = 0; r < rows; ++r) operands[(r + 1) * gate_depth() - 1] = 0;
  }

 public:
  static void pack(const T* matrix, int64_t ld, int64_t depth, Columns<T> columns, int64_t panel,
                   Element* panels) {
    pack_panel(matrix, ld, depth, columns, panel,
               panels + columns.offset(panel, elements<P>(depth)));
  }

 private:
  static void pack_panel(const T* matrix, int64_t ld, int64_t depth, Columns<T> columns,
                         int64_t panel, Element* to) {
    const int64_t first = columns.first(panel);
    for (int64_t k = 0; k < depth; ++k)
      pack_row<P>(matrix + k * ld + first, columns.count - first, columns.vectors(panel), k, to);
  }

  // The h_{t-1} of a row, in the direction's own order: an earlier output or the initial state.
  const T* previous_h(int d, int64_t t, int64_t b) const {
    const int64_t previous = d == 0 ? t - 1 : t + 1;
    const int64_t R = shape.state_size();
    if (features.starts_anew(shape, d, t, b)) return state_row(features.reset_h[d], shape, b, R);
    if (previous >= 0 && previous < shape.steps && b < shape.active(previous))
      return call.y.at(shape, previous, b) + d * R;
    return state_row(call.h_0[d], shape, b, R);
  }

  // What becomes of the gradient by the state before the b-th row's step t.
  enum class Cut { kNone, kReset, kDetached };
  Cut cut_before(int d, int64_t t, int64_t b) const {
    if (features.starts_anew(shape, d, t, b)) return Cut::kReset;
    if (features.detach_steps <= 0) return Cut::kNone;
    const int64_t position = d == 0 ? t : steps_of_row(shape, b) - 1 - t;
    return position > 0 && position % features.detach_steps == 0 ? Cut::kDetached : Cut::kNone;
  }
  bool cuts() const { return features.resets.data || features.detach_steps > 0; }

  void step(Member& team, const Part& part, int64_t s) const {
    for_tiles(team, part, state_columns.panels(),
              [&](int d, int64_t panel, int64_t block, int64_t next) {
                state_tile(d, panel, s, block, next);
              });
    if (s == shape.steps) return;
    if (norm)
      return for_row_groups(
          team, part, plan, [&](int d, int64_t group, int64_t block, int64_t begin) {
            const BatchRows rows = row_blocks.rows(block, active_at(d, s)).from(begin, kRowGroup);
            for (int64_t r = 0; r < rows.count; ++r) norm_row(d, s, rows[r], group);
          });
    if constexpr (kGates == 3) {
      if (two_stages)
        for_tiles(
            team, part, state_columns.panels(),
            [&](int d, int64_t panel, int64_t block, int64_t) { first_stage(d, panel, s, block); });
    }
    if (!project) return;
    for_tiles(
        team, part, hidden_columns.panels(),
        [&](int d, int64_t panel, int64_t block, int64_t) { projected_tile(d, panel, s, block); });
  }

  // The gate gradients of a chunk's last position, which the next chunk begins with.
  void keep_last(Member& team, const Part& part, int64_t end) const {
    if (end == shape.steps) return;
    team.for_each(part.directions * part.blocks, [&](int64_t i) {
      const int d = part.first_direction + int(i / part.blocks);
      const Direction& w = directions[d];
      const BatchRows rows =
          row_blocks.rows(part.first_block + i % part.blocks, active_at(d, end - 1));
      if (rows.count == 0) return;
      const Element* from = w.dgh_operand + chunk_row(d, end - 1, rows.first) * gate_depth();
      for (int64_t r = 0; r < rows.count; ++r)
        copy_row(w.dgh_before + rows[r].place * gate_depth(),
                 from + r * step_in_chunk() * gate_depth(), gate_depth());
    });
  }

  void state_tile(int d, int64_t panel, int64_t s, int64_t block, int64_t next) const {
    const Direction& w = directions[d];
    const BatchRows of_block = row_blocks.rows(block, shape.batch);
    const int64_t earlier = row_blocks.rows(block, active_at(d, s - 1)).count,
                  now = row_blocks.rows(block, active_at(d, s)).count;
    const int64_t rows = earlier > now ? earlier : now;
    if (rows == 0) return;
    const int64_t R = shape.state_size(), stride = padded(R), first = state_columns.first(panel);
    const int64_t begin = of_block.first, step = step_in_chunk();
    const int vectors = state_columns.vectors(panel);
    const int64_t width = vectors * kLanes<T>;
    if (next >= 0 && state_columns.vectors(next) < vectors) next = -1;
    alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
    T* carry = w.carry + of_block.place * stride + first;
    if (earlier > 0) {
      const bool kept = s % plan.chunk_steps == 0 && s < shape.steps;
      const Element* const dg = kept ? w.dgh_before + of_block.place * gate_depth()
                                     : w.dgh_operand + chunk_row(d, s - 1, begin) * gate_depth();
      const auto panel_of = [&](int64_t i) {
        return w.w_hh + state_columns.offset(i, recurrent_depth());
      };
      multiply_panel<P>(vectors, earlier, recurrent_depth(), {dg, (kept ? 1 : step) * gate_depth()},
                        panel_of(panel), nullptr, 0, tile, width,
                        next < 0 ? nullptr : panel_of(next));
    }
    if (features.hidden_mask[d]) {
      for (int64_t r = 0; r < earlier; ++r) {
        const T* mask = state_row(features.hidden_mask[d], shape, of_block[r].b, R) + first;
        for (int64_t i = 0; i < width && first + i < R; i += kLanes<T>) {
          T* to = tile + r * width + i;
          store(to, load(to) * load_upto(mask + i, R - first - i));
        }
      }
    }
    // The carried part is added to the finished product, not used as its start: it is larger than
    // any single term, and every addition to it would round at its size.
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; i += kLanes<T>) {
        T* to = tile + r * width + i;
        store(to,
              r < earlier ? load(carry + r * stride + i) + load(to) : load(carry + r * stride + i));
      }
    }
    if (cuts()) cut_rows(d, s, of_block.from(0, earlier), first, width, tile);
    // Rows that have no step here are on their way out: what is left is their dL/dh_0.
    for (int64_t r = now; r < rows; ++r) copy_row(carry + r * stride, tile + r * width, width);
    if (now == 0) return;

    const int64_t t = step_at(shape, reversed(d), s), row_of_begin = chunk_row(d, s, begin);
    const GateRows gates = gate_rows_of(d);
    if (call.dy.data) {
      for (int64_t r = 0; r < now; ++r) {
        const T* dy = call.dy.at(shape, t, of_block[r].b) + d * R + first;
        for (int v = 0; v < vectors; ++v) {
          T* to = tile + r * width + v * kLanes<T>;
          const int64_t rest = R - first - v * kLanes<T>;
          store(to, load(to) + load_upto(dy + v * kLanes<T>, rest));
        }
      }
    }
    if (project || norm) {
      for (int64_t r = 0; r < now; ++r) {
        const int64_t row = norm ? of_block[r].place : row_of_begin + r * step;
        copy_row(w.dh + row * stride + first, tile + r * width, width);
        if (!kValuesAreOperands && project) {
          for (int64_t i = 0; i < width; i += kLanes<T>)
            P::store(w.dh_operand + row * projection_stride(), first + i,
                     load(tile + r * width + i), kLanes<T>);
        }
        zero_row(carry + r * stride, width);
      }
    } else {
      for (int64_t r = 0; r < now; ++r)
        for (int v = 0; v < vectors; ++v)
          store(carry + r * stride + v * kLanes<T>,
                unit_backward<false>(d, s, t, of_block[r], row_of_begin + r * step,
                                     first + v * kLanes<T>, gates,
                                     load(tile + r * width + v * kLanes<T>)));
    }
  }

  // Takes dL/dh by the states that position s-1 did not start from out of the tile.
  void cut_rows(int d, int64_t s, const BatchRows& earlier, int64_t first, int64_t width,
                T* tile) const {
    const int64_t R = shape.state_size();
    for (int64_t r = 0; r < earlier.count; ++r) {
      const Cut cut = cut_before(d, step_at(shape, reversed(d), s - 1), earlier[r].b);
      if (cut == Cut::kNone) continue;
      if (cut == Cut::kReset)
        add_to(state_row(call.gradients[d].reset_h, shape, earlier[r].b, R), first, width, R,
               tile + r * width);
      zero_row(tile + r * width, width);
    }
  }

  // to[first + i] += from[i] for i < count, of a row of n values; null: nobody asks for it.
  static void add_to(T* to, int64_t first, int64_t count, int64_t n, const T* from) {
    if (!to) return;
    for (int64_t i = 0; i < count && first + i < n; i += kLanes<T>) {
      const int64_t rest = n - first - i;
      store_upto(to + first + i, load_upto(to + first + i, rest) + load(from + i), rest);
    }
  }

  // dL/dh through W_hr, then the cell.
  void projected_tile(int d, int64_t panel, int64_t s, int64_t block) const {
    const Direction& w = directions[d];
    const BatchRows rows = row_blocks.rows(block, active_at(d, s));
    if (rows.count == 0) return;
    const int64_t depth = elements<P>(shape.proj_size), first = hidden_columns.first(panel);
    const int vectors = hidden_columns.vectors(panel);
    const int64_t width = vectors * kLanes<T>, t = step_at(shape, reversed(d), s);
    alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
    const int64_t row_of_first = chunk_row(d, s, rows.first);
    const GateRows gates = gate_rows_of(d);
    const Element* dh = w.dh_operand + row_of_first * projection_stride();
    multiply_panel<P>(vectors, rows.count, depth, {dh, step_in_chunk() * projection_stride()},
                      w.w_hr + hidden_columns.offset(panel, depth), nullptr, 0, tile, width);
    for (int64_t r = 0; r < rows.count; ++r)
      for (int v = 0; v < vectors; ++v)
        unit_backward<false>(d, s, t, rows[r], row_of_first + r * step_in_chunk(),
                             first + v * kLanes<T>, gates, load(tile + r * width + v * kLanes<T>));
  }

  // Where unit_backward leaves the gate gradients: Direction's arrays, but known not to change with
  // what it stores.
  struct GateRows {
    T *dgx, *dgh;
    Element *dgx_operand, *dgh_operand;
  };
  GateRows gate_rows_of(int d) const {
    const Direction& w = directions[d];
    return {w.dgx, w.dgh, w.dgx_operand, w.dgh_operand};
  }

  // The cell's backward for one vector of units of one row; returns what of dL/dh_{t-1} does not
  // pass through W_hh. `row`: where it stands in the arrays of its chunk. kNorm: for norm_row.
  template <bool kNorm>
  RNN_EXT_INLINE Vec<T> unit_backward(int d, int64_t s, int64_t t, const BatchRow& of, int64_t row,
                                      int64_t unit, const GateRows& gates, Vec<T> dh) const {
    if constexpr (kGates == 3) {
      if (two_stages) return second_stage(d, s, t, of, unit, dh);
    }
    const int64_t b = of.b;
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
      u.dc = load(w.dc + of.place * hidden + unit);
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
      const T* known = w.dc_row + of.place * 3 * hidden + unit;
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
      store(w.dc + of.place * hidden + unit, u.dc);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGates; ++g) {
      const int64_t column = g * H + unit;
      if constexpr (kNorm) {
        T* const by_side = w.dnormal + of.place * 2 * gate_rows + column;
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

  // In weight_gradients.h: all that follows from the gate gradients of a chunk.
  void products(Member& team, int64_t s, int64_t end, const Groups& own) const;
  void pack_chunk(Member& team, int64_t s, int64_t end, const Groups& own) const;
  static void pack_left(const T* from, int64_t ld, int64_t rows, int64_t block, Element* blocks,
                        int64_t m);
  void sum_rows(const T* from, int64_t n, int64_t rows, int64_t block, bool first_chunk, T* bias,
                T* also) const;
  void take_sums(T* from, int64_t n, int64_t groups, int64_t block, bool first_chunk, T* to,
                 T* also) const;
  template <class Source>
  void pack_right(const Section& section, int64_t panel, const WeightGradient& gradient,
                  int64_t group, Source&& source, const T* mask = nullptr) const;
  void weight_gradients(Member& team, int64_t s, int64_t end, const Groups& own) const;
  static void weight_tile(const WeightGradient& g, int64_t group, int64_t panel, int64_t block,
                          int64_t step, int64_t rows, bool first_chunk);
  void add_groups(Member& team) const;
  void input_gradient(Member& team, int d, int64_t s, int64_t end, const Groups& own) const;
  void input_tile(int d, int64_t panel, const Element* packed, const Section& section,
                  int64_t begin, int64_t s, const Element* ahead) const;
  bool other_was_here(int d, int64_t t, int64_t chunk) const;

  // In reset_before.h.
  Vec<T> second_stage(int d, int64_t s, int64_t t, const BatchRow& of, int64_t unit,
                      Vec<T> dh) const;
  void first_stage(int d, int64_t panel, int64_t s, int64_t block) const;
  void store_gate(int d, int64_t s, int64_t b, int gate, int64_t unit, Vec<T> value) const;

  const T* reserve_row(int d, int64_t t, int64_t b) const {
    const int64_t row = shape.first_row(t) + b - call.reserve_first_row[d];
    return call.reserve[d] + row * features.kept(shape.cell) * padded(shape.hidden_size);
  }

  // In layer_norm.h.
  struct NormSide;
  void norm_row(int d, int64_t s, const BatchRow& of, int64_t group) const;
  void normalize_backward(const NormSide& side) const;
  void norm_output(int d, int64_t t, const BatchRow& of, int64_t group, const T* dh,
                   const T* kept) const;

  void finish(int d) const {
    const Direction& w = directions[d];
    const DirectionGradients<T>& g = call.gradients[d];
    const int64_t R = shape.state_size(), H = shape.hidden_size;
    row_blocks.for_each([&](const BatchRow& of) {
      if (g.h_0) copy_row(state_row(g.h_0, shape, of.b, R), w.carry + of.place * padded(R), R);
      if (g.c_0) copy_row(state_row(g.c_0, shape, of.b, H), w.dc + of.place * padded(H), H);
    });
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
