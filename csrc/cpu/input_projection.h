// Forward's input projection: gx = x W_ih^T + b_ih for the rows of a chunk, as one product, or what
// is left to do before the steps where their tiles project their own input.
#pragma once

#include "forward.h"

namespace rnn_ext::RNN_EXT_ISA {

// The chunk's rows of x, where a product cannot read them in place.
template <class P, class Cell>
void ForwardPass<P, Cell>::gather_input(Member& team, int64_t s, int64_t end,
                                        int64_t blocks) const {
  const auto take = [&](int d, int64_t row, int64_t t, int64_t b) {
    store_row<P>(directions[d].x + row * x_stride, call.x.at(shape, t, b), shape.input_size);
  };
  // Rows that are dealt out: block by block, each by the member that is likely to read it.
  const int64_t dealt = row_blocks.step > 1 ? row_blocks.step : blocks;
  team.for_each(shape.directions * dealt, [&](int64_t job) {
    const int d = int(job / dealt);
    const StepRange range = range_at(shape, d == 1, s, end);
    if (gathers_in_step(range)) return;
    if (row_blocks.step > 1) {
      for (int64_t t = range.first; t < range.last; ++t) {
        const BatchRows rows = row_blocks.rows(job % dealt, shape.active(t));
        for (int64_t r = 0; r < rows.count; ++r)
          take(d, shape.first_row(t) - range.base + rows[r].b, t, rows[r].b);
      }
      return;
    }
    const int64_t begin = job % blocks * kMaxRowBlock;
    for_rows(shape, range, begin, block_end(begin, range),
             [&](int64_t row, int64_t t, int64_t b) { take(d, row, t, b); });
  });
}

// The rows of x of one step, by the member that alone reads them.
template <class P, class Cell>
void ForwardPass<P, Cell>::gather_step(const Part& part, int64_t s, const Chunk& chunk) const {
  for (int d = part.first_direction; d < part.first_direction + part.directions; ++d) {
    if (!chunk.gathers[d]) continue;
    const int64_t t = step_at(shape, d == 1, s);
    for (int64_t block = part.first_block; block < part.first_block + part.blocks; ++block) {
      const BatchRows rows = row_blocks.rows(block, shape.active(t));
      for (int64_t r = 0; r < rows.count; ++r)
        store_row<P>(directions[d].x + (rows.place + r) * x_stride, call.x.at(shape, t, rows[r].b),
                     shape.input_size);
    }
  }
}

// Asks for the rows that the block's next step will gather. They lie apart, so the processor does
// not foresee it; a few lines with every panel, as there are few that it can wait for at once.
template <class P, class Cell>
void ForwardPass<P, Cell>::fetch_next_input(int d, int64_t panel, int64_t s, int64_t block) const {
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  if (s + 1 >= shape.steps) return;
  const int64_t t = step_at(shape, d == 1, s + 1), panels = columns.panels();
  const BatchRows rows = row_blocks.rows(block, shape.active(t));
  for (int64_t r = rows.count * panel / panels; r < rows.count * (panel + 1) / panels; ++r)
    for (int64_t i = 0; i < shape.input_size; i += kLine)
      __builtin_prefetch(call.x.at(shape, t, rows[r].b) + i, /*for writing*/ 0, 2);
}

template <class P, class Cell>
void ForwardPass<P, Cell>::project_input(Member& team, int64_t s, int64_t end) const {
  // Steps of the same positions, but rows of a packed batch differ by direction.
  int64_t blocks = 0;
  for (int d = 0; d < shape.directions; ++d) {
    const int64_t n = blocks_of(range_at(shape, d == 1, s, end).rows, kMaxRowBlock);
    if (n > blocks) blocks = n;
  }
  const StepRange first = range_at(shape, false, s, end);
  const StepRange second = range_at(shape, shape.directions == 2, s, end);
  const bool all_in_step = in_step(first) && in_step(second);
  if (gather && !(gathers_in_step(first) && gathers_in_step(second)))
    gather_input(team, s, end, blocks);
  if (all_in_step) {
    if (!one_chunk && !features.again)
      team.for_each(shape.directions * blocks, [&](int64_t job) {
        const int d = int(job / blocks);
        const StepRange range = range_at(shape, d == 1, s, end);
        const int64_t begin = job % blocks * kMaxRowBlock;
        touch_output(d, range, begin, block_end(begin, range));
      });
    return;
  }
  const int64_t panels = columns.panels();
  if (!member_panels) {
    team.for_each(shape.directions * panels * blocks, [&](int64_t job) {
      const int d = int(job / (panels * blocks));
      const int64_t panel = job / blocks % panels;
      const Direction& w = directions[d];
      const int64_t next = team.after(job) < job ? panel - 1 : panel + 1;
      input_tile(d, panel, w.input.panel(w.w_ih, panel), range_at(shape, d == 1, s, end),
                 job % blocks, w.input.panel_ahead(w.w_ih, panel, next));
    });
    return;
  }
  const int64_t most = blocks_of(team.members(), shape.directions * panels);
  const int64_t shares = most < blocks ? most : blocks;  // of the rows, if panels are few
  Element* packed = member_panels + team.id() * member_panel_size();
  team.for_each(shape.directions * panels * shares, [&](int64_t job) {
    const int d = int(job / (panels * shares));
    const int64_t panel = job / shares % panels, share = job % shares;
    directions[d].input.pack(panel, packed);
    for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; ++block)
      input_tile(d, panel, packed, range_at(shape, d == 1, s, end), block);
  });
}

template <class P, class Cell>
void ForwardPass<P, Cell>::input_tile(int d, int64_t panel, const Element* packed,
                                      const StepRange& range, int64_t block,
                                      const Element* ahead) const {
  const int64_t begin = block * kMaxRowBlock, last = block_end(begin, range);
  if (begin >= last) return;
  const Direction& w = directions[d];
  if (panel == 0 && !one_chunk && !features.again) touch_output(d, range, begin, last);
  if (in_step(range)) return;
  const Element* x = input_operands(d, range.first, 0, 0);
  w.input.multiply(panel, packed, last - begin, x + begin * x_stride, x_stride,
                   w.gx + begin * columns.width() + columns.column(panel), columns.width(), ahead);
}

// A long sequence's output is fresh from the system, and at the steps two members would write to
// the same page of it at once: that first write is far dearer than this one.
template <class P, class Cell>
void ForwardPass<P, Cell>::touch_output(int d, const StepRange& range, int64_t begin,
                                        int64_t end) const {
  for_rows(shape, range, begin, end, [&](int64_t, int64_t t, int64_t b) {
    call.y.at(shape, t, b)[d * shape.state_size()] = 0;
  });
}

}  // namespace rnn_ext::RNN_EXT_ISA
