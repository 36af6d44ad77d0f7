// Which rows a chunk of backward's positions has, and where each stands in the chunk's arrays:
// group after group of row blocks (Plan::groups), within a group in time order.
#pragma once

#include "buffers.h"

namespace rnn_ext::RNN_EXT_ISA {

struct ChunkLayout {
  const SequenceShape& shape;
  const Plan& plan;
  const int64_t groups;

  // The rows of one group at the steps of a chunk.
  struct Section {
    StepRange steps;
    int64_t first_b, batch;  // of the group
    int64_t base, rows;      // number of the first one in the arrays, count
  };

  // Backward undoes the directions' own order.
  static bool reversed(int d) { return d == 0; }

  int64_t active_at(int d, int64_t s) const {
    return s < 0 || s >= shape.steps ? 0 : shape.active(step_at(shape, reversed(d), s));
  }
  // Which of two sets of arrays the chunk of position s has.
  int slot(int64_t s) const { return int(s / plan.chunk_steps & 1); }

  // The batch row that a group begins with, of the one after the last: the batch.
  int64_t first_of_group(int64_t group) const {
    const int64_t row = blocks_of(shape.batch, plan.row_block) * group / groups * plan.row_block;
    return row < shape.batch ? row : shape.batch;
  }
  Section section(int d, int64_t s, int64_t end, int64_t group) const {
    const StepRange steps = range_at(shape, reversed(d), s, end);
    if (groups == 1) return {steps, 0, shape.batch, 0, steps.rows};
    const int64_t first = first_of_group(group), batch = first_of_group(group + 1) - first;
    return {steps, first, batch, (end - s) * first, (end - s) * batch};
  }
  // Visits rows [begin, end) of a section: visit(row in it, t, b).
  template <class Visit>
  void for_rows_of(const Section& section, int64_t begin, int64_t end, Visit&& visit) const {
    if (groups == 1) return for_rows(shape, section.steps, begin, end, visit);
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
  // other rows of b's block follow.
  int64_t chunk_row(int d, int64_t s, int64_t b) const {
    const int64_t begin = s / plan.chunk_steps * plan.chunk_steps, end = begin + plan.chunk_steps;
    const StepRange steps =
        range_at(shape, reversed(d), begin, end < shape.steps ? end : shape.steps);
    const int64_t t = step_at(shape, reversed(d), s);
    if (groups == 1) return shape.first_row(t) - steps.base + b;
    int64_t group = groups - 1;
    while (first_of_group(group) > b) --group;
    const int64_t first = first_of_group(group), batch = first_of_group(group + 1) - first;
    return (steps.last - steps.first) * first + (t - steps.first) * batch + b - first;
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
