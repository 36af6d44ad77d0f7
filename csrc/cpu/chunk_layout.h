// Which rows a chunk of backward's positions has, and where each stands in the chunk's arrays:
// group after group of row blocks (Plan::groups), within a group in time order.
#pragma once

#include "buffers.h"

namespace rnn_ext::RNN_EXT_ISA {

struct ChunkLayout {
  const SequenceShape& shape;
  const Plan& plan;
  const RowBlocks row_blocks;
  const int64_t groups;
  // (groups, T + 1): rows of a group before each step. Only where rows are dealt out, a block to
  // each group.
  int64_t* rows_before = nullptr;

  ChunkLayout(const SequenceShape& s, const Plan& p, int64_t row_bytes, bool has_groups)
      : shape(s),
        plan(p),
        row_blocks(s, p, row_bytes),
        groups(has_groups && (!p.deal_rows || p.groups == row_blocks.blocks) ? p.groups : 1) {}

  // The rows of one group at the steps of a chunk.
  struct Section {
    StepRange steps;
    int64_t first_b, batch;  // the group's first batch row, and how many if they are consecutive
    int64_t base, rows;      // number of the first one in the arrays, count
  };

  bool dealt() const { return groups > 1 && row_blocks.step > 1; }
  // From one row of a block to the next in the arrays.
  int64_t step_in_chunk() const { return dealt() ? 1 : row_blocks.step; }
  int64_t rows_between(int64_t group, int64_t first, int64_t last) const {
    const int64_t* const before = rows_before + group * (shape.steps + 1);
    return before[last] - before[first];
  }
  void count_rows(int64_t group) const {
    int64_t* const before = rows_before + group * (shape.steps + 1);
    before[0] = 0;
    for (int64_t t = 0; t < shape.steps; ++t)
      before[t + 1] = before[t] + row_blocks.rows(group, shape.active(t)).count;
  }

  // Backward undoes the directions' own order.
  static bool reversed(int d) { return d == 0; }

  int64_t active_at(int d, int64_t s) const {
    return s < 0 || s >= shape.steps ? 0 : shape.active(step_at(shape, reversed(d), s));
  }

  // The batch row that a group begins with, of the one after the last: the batch.
  int64_t first_of_group(int64_t group) const {
    const int64_t row = blocks_of(shape.batch, plan.row_block) * group / groups * plan.row_block;
    return row < shape.batch ? row : shape.batch;
  }
  Section section(int d, int64_t s, int64_t end, int64_t group) const {
    const StepRange steps = range_at(shape, reversed(d), s, end);
    if (groups == 1) return {steps, 0, shape.batch, 0, steps.rows};
    if (dealt()) {
      int64_t base = 0;
      for (int64_t i = 0; i < group; ++i) base += rows_between(i, steps.first, steps.last);
      return {steps, group, 0, base, rows_between(group, steps.first, steps.last)};
    }
    const int64_t first = first_of_group(group), batch = first_of_group(group + 1) - first;
    return {steps, first, batch, (end - s) * first, (end - s) * batch};
  }
  // Visits rows [begin, end) of a section: visit(row in it, t, b).
  template <class Visit>
  void for_rows_of(const Section& section, int64_t begin, int64_t end, Visit&& visit) const {
    if (groups == 1) return for_rows(shape, section.steps, begin, end, visit);
    if (dealt()) {
      if (begin >= end) return;
      const int64_t first = section.steps.first, group = section.first_b;
      int64_t t = first;
      while (rows_between(group, first, t + 1) <= begin) ++t;
      int64_t r = begin - rows_between(group, first, t);
      for (int64_t row = begin; row < end; ++t, r = 0)
        for (int64_t b = group + r * row_blocks.step; b < shape.active(t) && row < end; ++row) {
          visit(row, t, b);
          b += row_blocks.step;
        }
      return;
    }
    int64_t t = section.steps.first + begin / section.batch, b = begin % section.batch;
    for (int64_t row = begin; row < end; ++row) {
      visit(row, t, section.first_b + b);
      if (++b == section.batch) {
        b = 0;
        ++t;
      }
    }
  }
  // Where the values of (position s, batch row b) stand in the arrays of its chunk; those of the
  // rows that follow in b's block follow, step_in_chunk() apart.
  int64_t chunk_row(int d, int64_t s, int64_t b) const {
    const int64_t begin = s / plan.chunk_steps * plan.chunk_steps, end = begin + plan.chunk_steps;
    const StepRange steps =
        range_at(shape, reversed(d), begin, end < shape.steps ? end : shape.steps);
    const int64_t t = step_at(shape, reversed(d), s);
    if (groups == 1) return shape.first_row(t) - steps.base + b;
    if (dealt()) {
      const int64_t own = b % row_blocks.step;
      int64_t row = rows_between(own, steps.first, t) + b / row_blocks.step;
      for (int64_t i = 0; i < own; ++i) row += rows_between(i, steps.first, steps.last);
      return row;
    }
    int64_t group = groups - 1;
    while (first_of_group(group) > b) --group;
    const int64_t first = first_of_group(group), batch = first_of_group(group + 1) - first;
    return (steps.last - steps.first) * first + (t - steps.first) * batch + b - first;
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
