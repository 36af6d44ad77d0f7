// What follows from the gate gradients of a chunk, while they are in the cache: gradients of
// weights and biases as large products over all its rows, and that of the input.
#pragma once

#include "backward.h"

namespace rnn_ext::RNN_EXT_ISA {

template <class P, class Cell>
void BackwardPass<P, Cell>::products(Member& team, int64_t s, int64_t end,
                                     const Groups& own) const {
  pack_chunk(team, s, end, own);
  weight_gradients(team, s, end, own);
  if (call.dx.data)
    for (int d = 0; d < shape.directions; ++d) input_gradient(team, d, s, end, own);
}

// Left operands in blocks (with the bias sums, which read the same values), right ones in panels.
template <class P, class Cell>
void BackwardPass<P, Cell>::pack_chunk(Member& team, int64_t s, int64_t end,
                                       const Groups& own) const {
  const int64_t gate_blocks = blocks_of(gate_rows, kMaxRowBlock);
  const int64_t projection_blocks = blocks_of(shape.proj_size, kMaxRowBlock);
  const int64_t hidden_blocks = blocks_of(shape.hidden_size, kMaxRowBlock);
  const int64_t counts[] = {gate_blocks,
                            gate_blocks,
                            projection_blocks,
                            input_columns.panels(),
                            state_columns.panels(),
                            hidden_columns.panels(),
                            norm ? gate_blocks : 0,
                            norm && Cell::kHasCellState ? hidden_blocks : 0};
  const int64_t sums = row_groups(shape, plan);
  int64_t jobs = 0;
  for (int64_t count : counts) jobs += count;
  team.for_each(shape.directions * own.count * jobs, [&](int64_t job) {
    const int d = int(job / (own.count * jobs));
    const int64_t group = own.first + job / jobs % own.count;
    const Direction& w = directions[d];
    const DirectionGradients<T>& g = call.gradients[d];
    const Section rows = section(d, s, end, group);
    const T* const dgx = w.dgx + rows.base * gate_rows;
    const T* const dgh = w.dgh + rows.base * gate_rows;
    T* const biases = group > 0 ? w.biases + (group - 1) * 2 * gate_rows : nullptr;
    T* const b_ih = g.b_ih && biases ? biases : g.b_ih;
    T* const b_hh = g.b_hh && biases ? biases + gate_rows : g.b_hh;
    int64_t i = job % jobs;
    int kind = 0;
    while (i >= counts[kind]) i -= counts[kind++];
    switch (kind) {
      case 0: {
        const bool both = !splits;
        pack_left(dgx, gate_rows, rows.rows, i,
                  (both && !two_stages && !w.ih.left ? w.hh : w.ih).left_of(group), gate_rows);
        if (two_stages) {
          const int64_t H = shape.hidden_size;
          pack_left(dgx, gate_rows, rows.rows, i, w.hh.left, 2 * H);
          pack_left(dgx + 2 * H, gate_rows, rows.rows, i, w.candidate.left, H);
        }
        if (norm) return;
        return sum_rows(dgx, gate_rows, rows.rows, i, s == 0, b_ih, both ? b_hh : nullptr);
      }
      case 1:
        if (!splits) return;
        pack_left(dgh, gate_rows, rows.rows, i, w.hh.left_of(group), gate_rows);
        if (norm) return;
        return sum_rows(dgh, gate_rows, rows.rows, i, s == 0, b_hh, nullptr);
      case 2:
        return pack_left(w.dh, padded(shape.proj_size), rows.rows, i, w.hr.left, shape.proj_size);
      case 3:
        return pack_right(rows, i, w.ih, group,
                          [&](int64_t, int64_t t, int64_t b) { return call.x.at(shape, t, b); });
      case 4:
        if (two_stages)
          pack_right(
              rows, i, w.candidate, group,
              [&](int64_t row, int64_t, int64_t) {
                return static_cast<const T*>(w.reset_h) + row * padded(shape.hidden_size);
              },
              features.hidden_mask[d]);
        return pack_right(
            rows, i, w.hh, group,
            [&](int64_t, int64_t t, int64_t b) { return previous_h(d, t, b); },
            features.hidden_mask[d]);
      case 5:
        return pack_right(rows, i, w.hr, group, [&](int64_t row, int64_t, int64_t) {
          return static_cast<const T*>(w.output) + row * padded(shape.hidden_size);
        });
      case 6:
        take_sums(w.sums.ih, gate_rows, sums, i, s == 0, g.norm_ih, nullptr);
        take_sums(w.sums.hh, gate_rows, sums, i, s == 0, g.norm_hh, nullptr);
        take_sums(w.sums.b_ih, gate_rows, sums, i, s == 0, g.b_ih,
                  Cell::kSplitsGradient ? nullptr : g.b_hh);
        if (Cell::kSplitsGradient)
          take_sums(w.sums.b_hh, gate_rows, sums, i, s == 0, g.b_hh, nullptr);
        return;
      case 7:
        take_sums(w.sums.c, shape.hidden_size, sums, i, s == 0, g.norm_c, nullptr);
        take_sums(w.sums.c_bias, shape.hidden_size, sums, i, s == 0, g.norm_c_bias, nullptr);
    }
  });
}

template <class P, class Cell>
void BackwardPass<P, Cell>::pack_left(const T* from, int64_t ld, int64_t rows, int64_t block,
                                      Element* blocks, int64_t m) {
  if (!blocks || block * kMaxRowBlock >= m) return;
  constexpr int kVectors = int(kMaxRowBlock) / kLanes<T>;
  const int64_t first = block * kMaxRowBlock;
  Element* out = blocks + first * elements<P>(rows);
  for (int64_t r = 0; r < rows; ++r)
    pack_row<P>(from + r * ld + first, m - first, kVectors, r, out);
}

// A block of columns of the (rows, n) sources, summed over the rows.
template <class P, class Cell>
void BackwardPass<P, Cell>::sum_rows(const T* from, int64_t n, int64_t rows, int64_t block,
                                     bool first_chunk, T* bias, T* also) const {
  if (!bias && !also) return;
  const int64_t first = block * kMaxRowBlock;
  const int64_t last = first + kMaxRowBlock < n ? first + kMaxRowBlock : n;
  for (int64_t column = first; column < last; column += kLanes<T>) {
    const int64_t rest = last - column;
    Vec<T> sum = {};
    for (int64_t r = 0; r < rows;) {  // in two levels: the error grows with the square root
      const int64_t end = r + kSumRows < rows ? r + kSumRows : rows;
      Vec<T> part = {};
      for (; r < end; ++r) part += load_upto(from + r * n + column, rest);
      sum += part;
    }
    for (T* to : {bias, also})
      if (to) store_upto(to + column, first_chunk ? sum : load_upto(to + column, rest) + sum, rest);
  }
}

// The same of a normalized layer's sums by groups, which begin again at zero.
template <class P, class Cell>
void BackwardPass<P, Cell>::take_sums(T* from, int64_t n, int64_t groups, int64_t block,
                                      bool first_chunk, T* to, T* also) const {
  sum_rows(from, n, groups, block, first_chunk, to, also);
  const int64_t first = block * kMaxRowBlock, rest = n - first;
  for (int64_t group = 0; group < groups; ++group)
    zero_row(from + group * n + first, rest < kMaxRowBlock ? rest : kMaxRowBlock);
}

// `mask` (B, count of columns): factors of the source's rows, null means ones.
template <class P, class Cell>
template <class Source>
void BackwardPass<P, Cell>::pack_right(const Section& section, int64_t panel,
                                       const WeightGradient& gradient, int64_t group,
                                       Source&& source, const T* mask) const {
  if (!gradient.right) return;
  const int vectors = gradient.n.vectors(panel);
  const int64_t first = gradient.n.first(panel);
  Element* to = gradient.right_of(group) + gradient.n.offset(panel, elements<P>(section.rows));
  for_rows_of(section, 0, section.rows, [&](int64_t row, int64_t t, int64_t b) {
    const T* const from = source(row, t, b);
    const T* values = from ? from + first : nullptr;
    const int64_t count = gradient.n.count - first;
    alignas(64) T masked[Columns<T>::kWidth];
    if (values && mask) {
      const T* factor = state_row(mask, shape, b, gradient.n.count) + first;
      for (int64_t i = 0; i < Columns<T>::kWidth && i < count; i += kLanes<T>)
        store(masked + i, load_upto(values + i, count - i) * load_upto(factor + i, count - i));
      values = masked;
    }
    pack_row<P>(values, count, vectors, row, to);
  });
}

template <class P, class Cell>
void BackwardPass<P, Cell>::weight_gradients(Member& team, int64_t s, int64_t end,
                                             const Groups& own) const {
  struct Part {
    const WeightGradient* gradient;
    int64_t jobs;
    int d;
  } parts[4 * kMaxDirections];
  int n = 0;
  int64_t jobs = 0;
  for (int d = 0; d < shape.directions; ++d) {
    for (const WeightGradient* g :
         {&directions[d].ih, &directions[d].hh, &directions[d].hr, &directions[d].candidate}) {
      if (!g->out) continue;
      parts[n] = {g, own.count * g->n.panels() * blocks_of(g->m, kMaxRowBlock), d};
      jobs += parts[n++].jobs;
    }
  }
  // Block after block, all panels of each: the left operand, mostly the larger one, is read once,
  // and the panels stay in the cache.
  team.for_each(jobs, [&](int64_t i) {
    const int64_t step = team.after(i) - i;
    const Part* part = parts;
    while (i >= part->jobs) i -= (part++)->jobs;
    const WeightGradient& g = *part->gradient;
    const int64_t panels = g.n.panels(), tiles = blocks_of(g.m, kMaxRowBlock) * panels;
    const int64_t group = own.first + i / tiles;
    weight_tile(g, group, i % panels, i % tiles / panels, step,
                section(part->d, s, end, group).rows, s == 0);
  });
}

template <class P, class Cell>
void BackwardPass<P, Cell>::weight_tile(const WeightGradient& g, int64_t group, int64_t panel,
                                        int64_t block, int64_t step, int64_t rows,
                                        bool first_chunk) {
  const int64_t m = block * kMaxRowBlock, count = g.m - m < kMaxRowBlock ? g.m - m : kMaxRowBlock;
  const int64_t first = g.n.first(panel);
  const int vectors = g.n.vectors(panel);
  const int64_t width = vectors * kLanes<T>;
  const int64_t depth = elements<P>(rows);
  T* const to = g.out_of(group) + m * g.n.count + first;
  for (int64_t r = 0; r < count && !first_chunk; ++r)
    for (int v = 0; v < vectors; ++v)
      __builtin_prefetch(to + r * g.n.count + v * kLanes<T>, /*for writing*/ 1);
  const Element* const left = g.left_of(group);
  const Element* const right = g.right_of(group);
  // What comes next: another panel, or, where they end, another block of the left operand. A block
  // is not as wide as a panel, so that what follows the last one would be fetched, too.
  const Element* ahead = nullptr;
  if (const int64_t next = panel + step; next >= 0 && next < g.n.panels()) {
    if (g.n.vectors(next) >= vectors) ahead = right + g.n.offset(next, depth);
  } else if (block + step >= 0 && (block + step + 1) * kMaxRowBlock < g.m) {
    ahead = left + (block + step) * kMaxRowBlock * depth;
  }
  const auto multiply = [&](T* out, int64_t stride, bool add) {
    multiply_panel<P>(vectors, count, depth, {left + m * depth, 1, kMaxRowBlock},
                      right + g.n.offset(panel, depth), nullptr, 0, out, stride, ahead, add);
  };
  const int64_t rest = g.n.count - first;
  if (rest >= width) return multiply(to, g.n.count, !first_chunk);
  alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
  multiply(tile, width, false);
  for (int64_t r = 0; r < count; ++r) {
    T* const out = to + r * g.n.count;
    for (int64_t i = 0; i < width; i += kLanes<T>) {
      Vec<T> sum = load(tile + r * width + i);
      if (!first_chunk) sum += load_upto(out + i, rest - i);
      store_upto(out + i, sum, rest - i);
    }
  }
}

// The sums of all groups, in the place of the first one's.
template <class P, class Cell>
void BackwardPass<P, Cell>::add_groups(Member& team) const {
  if (groups == 1) return;
  const Direction& w = directions[0];
  const DirectionGradients<T>& g = call.gradients[0];
  const auto add = [&](T* out, const T* others, int64_t stride, int64_t count) {
    for (int64_t group = 1; group < groups; ++group, others += stride)
      for (int64_t i = 0; i < count; i += kLanes<T>)
        store_upto(out + i, load_upto(out + i, count - i) + load_upto(others + i, count - i),
                   count - i);
  };
  team.for_each(blocks_of(gate_rows, kMaxRowBlock), [&](int64_t block) {
    const int64_t first = block * kMaxRowBlock, rest = gate_rows - first;
    const int64_t rows = rest < kMaxRowBlock ? rest : kMaxRowBlock;
    for (const WeightGradient* weight : {&w.ih, &w.hh}) {
      const int64_t n = weight->n.count;
      if (weight->out)
        add(weight->out + first * n, weight->others + first * n, gate_rows * n, rows * n);
    }
    if (g.b_ih) add(g.b_ih + first, w.biases + first, 2 * gate_rows, rows);
    if (g.b_hh) add(g.b_hh + first, w.biases + gate_rows + first, 2 * gate_rows, rows);
  });
}

// dx = dgx W_ih. Of two directions the one that reaches a step first writes, the other adds: a
// sum of two terms is the same either way. Their chunks run in separate phases.
template <class P, class Cell>
void BackwardPass<P, Cell>::input_gradient(Member& team, int d, int64_t s, int64_t end,
                                           const Groups& own) const {
  // Every group gets as many blocks as the largest one has: the last of a smaller one may be empty.
  int64_t largest = 0;
  for (int64_t group = own.first; group < own.first + own.count; ++group) {
    const int64_t rows = section(d, s, end, group).rows;
    if (rows > largest) largest = rows;
  }
  const int64_t of_group = blocks_of(largest, kMaxRowBlock), blocks = own.count * of_group;
  const int64_t panels = input_columns.panels();
  const Element* const panels_of_all = directions[d].w_ih;
  // Each member takes a share of the rows through all panels, or, where it packs them, all rows
  // through some panels, unless these are too few.
  const int64_t most = panels_of_all ? team.members() : blocks_of(team.members(), panels);
  const int64_t shares = most < blocks ? most : blocks;
  const int64_t packer = own.packer < 0 ? team.id() : own.packer;
  Element* const panel_of_member =
      panels_of_all ? nullptr : member_panels + packer * gate_depth() * Columns<T>::kWidth;
  const auto panel_at = [&](int64_t panel) {
    return panels_of_all + input_columns.offset(panel, gate_depth());
  };
  team.for_each(panels * shares, [&](int64_t i) {
    const int64_t share = i / panels, panel = i % panels, next = panel + team.after(i) - i;
    const DirectionWeights<T>& from = call.weights[d];
    if (!panels_of_all)
      pack_panel(from.w_ih, from.ld_ih, gate_rows, input_columns, panel, panel_of_member);
    const Element* const packed = panels_of_all ? panel_at(panel) : panel_of_member;
    const bool known = panels_of_all && next >= 0 && next < panels &&
                       input_columns.vectors(next) >= input_columns.vectors(panel);
    const int64_t last = blocks * (share + 1) / shares;
    for (int64_t block = blocks * share / shares; block < last; ++block)
      input_tile(d, panel, packed, section(d, s, end, own.first + block / of_group),
                 block % of_group * kMaxRowBlock, s,
                 known && block + 1 == last ? panel_at(next) : nullptr);
  });
}

template <class P, class Cell>
void BackwardPass<P, Cell>::input_tile(int d, int64_t panel, const Element* packed,
                                       const Section& section, int64_t begin, int64_t s,
                                       const Element* ahead) const {
  const int64_t rest = section.rows - begin, rows = rest < kMaxRowBlock ? rest : kMaxRowBlock;
  if (rows <= 0) return;
  const int64_t first = input_columns.first(panel), chunk = s / plan.chunk_steps;
  const int vectors = input_columns.vectors(panel);
  const int64_t width = vectors * kLanes<T>;
  alignas(64) T tile[kMaxRowBlock * kPanelVectors * kLanes<T>];
  const Element* dg = directions[d].dgx_operand + (section.base + begin) * gate_depth();
  multiply_panel<P>(vectors, rows, gate_depth(), {dg, gate_depth()}, packed, nullptr, 0, tile,
                    width, ahead);
  for_rows_of(section, begin, begin + rows, [&](int64_t row, int64_t t, int64_t b) {
    const bool add = shape.directions == 2 && other_was_here(d, t, chunk);
    T* dx = call.dx.at(shape, t, b) + first;
    for (int v = 0; v < vectors; ++v) {
      const int64_t rest = shape.input_size - first - v * kLanes<T>;
      Vec<T> sum = load(tile + (row - begin) * width + v * kLanes<T>);
      if (add) sum += load_upto(dx + v * kLanes<T>, rest);
      store_upto(dx + v * kLanes<T>, sum, rest);
    }
  });
}

template <class P, class Cell>
bool BackwardPass<P, Cell>::other_was_here(int d, int64_t t, int64_t chunk) const {
  const int64_t position = d == 0 ? t : shape.steps - 1 - t;  // of the other direction
  const int64_t other = position / plan.chunk_steps;
  return d == 0 ? other < chunk : other <= chunk;
}

}  // namespace rnn_ext::RNN_EXT_ISA
