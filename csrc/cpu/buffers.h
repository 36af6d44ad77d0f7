// Placing the engine's arrays in one workspace, and the row arithmetic that forward and backward
// share.
#pragma once

#include "../sequence.h"
#include "plan.h"
#include "simd.h"
#include "team.h"

namespace rnn_ext::RNN_EXT_ISA {

// Hands out consecutive 64-byte aligned arrays. With base null it only counts, so the same code
// that lays out a workspace also tells its size: its arrays then lie nowhere, but are not null, so
// that code which asks what it has already placed gets the same answers.
class Arena {
 public:
  explicit Arena(void* base) : base_(base ? reinterpret_cast<uintptr_t>(base) : 64) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    return reinterpret_cast<T*>(base_ + at);
  }
  // Arrays taken after a rewind lie over those taken since the mark.
  size_t mark() const { return used_; }
  void rewind(size_t mark) {
    if (used_ > peak_) peak_ = used_;
    used_ = mark;
  }
  size_t bytes() const { return used_ > peak_ ? used_ : peak_; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
  size_t peak_ = 0;
};

// Consecutive steps first..last-1 and their rows in time order.
struct StepRange {
  int64_t first, last;
  int64_t base, rows;  // number of the first row, count of rows

  static StepRange of(const SequenceShape& shape, int64_t first, int64_t last) {
    const int64_t base = shape.first_row(first);
    return {first, last, base, shape.first_row(last) - base};
  }
};

// Step that a direction works on at position s of `reversed` or natural order, and the range of
// steps covered by positions [begin, end).
inline int64_t step_at(const SequenceShape& shape, bool reversed, int64_t s) {
  return reversed ? shape.steps - 1 - s : s;
}
inline StepRange range_at(const SequenceShape& shape, bool reversed, int64_t begin, int64_t end) {
  return reversed ? StepRange::of(shape, shape.steps - end, shape.steps - begin)
                  : StepRange::of(shape, begin, end);
}

// The largest number of rows in any chunk.
inline int64_t max_chunk_rows(const SequenceShape& shape, const Plan& plan) {
  const int64_t most = plan.chunk_steps * shape.batch;
  return most < shape.rows() ? most : shape.rows();
}

// Are the rows of consecutive steps evenly spaced in memory? Then a product can read them in place.
template <class T>
bool evenly_spaced(const SequenceShape& shape, const StepRows<T>& rows, int64_t* stride) {
  if (shape.order) return false;
  if (shape.offsets || shape.steps == 1) {
    *stride = rows.row_stride;
    return true;
  }
  if (shape.batch == 1) {
    *stride = rows.step_stride;
    return true;
  }
  *stride = rows.row_stride;
  return rows.step_stride == shape.batch * rows.row_stride;
}

// Visits rows [begin, end) of a range, counted in time order: visit(row in range, t, b).
template <class Visit>
void for_rows(const SequenceShape& shape, const StepRange& range, int64_t begin, int64_t end,
              Visit&& visit) {
  if (begin >= end) return;  // the range ends before this block: the other direction's is longer
  int64_t t = range.first;
  if (!shape.offsets) {
    t += begin / shape.batch;
  } else {
    while (shape.offsets[t + 1] - range.base <= begin) ++t;
  }
  int64_t b = range.base + begin - shape.first_row(t);
  for (int64_t row = begin; row < end; ++row) {
    visit(row, t, b);
    if (++b == shape.active(t)) {
      b = 0;
      ++t;
    }
  }
}

inline int64_t blocks_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// What the jobs of a step work on: directions, and blocks of batch rows of each.
struct Part {
  int first_direction, directions;
  int64_t first_block, blocks;
  int64_t number = 0;  // which of the shares

  static Part all(const SequenceShape& shape, const Plan& plan) {
    return {0, shape.directions, 0, blocks_of(shape.batch, plan.row_block)};
  }
  static Part direction(const SequenceShape& shape, const Plan& plan, int d) {
    return {d, 1, 0, blocks_of(shape.batch, plan.row_block)};
  }
  // The i-th of directions * shares.
  static Part share(const SequenceShape& shape, const Plan& plan, int64_t i) {
    const int64_t blocks = blocks_of(shape.batch, plan.row_block), k = i % plan.shares;
    const int64_t first = blocks * k / plan.shares, last = blocks * (k + 1) / plan.shares;
    return {int(i / plan.shares), 1, first, last - first, k};
  }
  int64_t jobs(int64_t panels) const { return directions * panels * blocks; }
};

// A row of the batch, and its place in the arrays that the engine keeps of all rows' state: a
// block's rows stand there one after the other, and blocks apart.
struct BatchRow {
  int64_t b, place;
};

// Batch rows that a job works on.
struct BatchRows {
  int64_t first, step, count;
  int64_t place;  // of the first one

  BatchRow operator[](int64_t r) const { return {first + r * step, place + r}; }
  BatchRows from(int64_t r, int64_t most) const {
    const int64_t rest = count - r;
    return {first + r * step, step, rest < 0 ? 0 : rest < most ? rest : most, place + r};
  }
};

// The rows of each block, and their places. What one member writes at every step must not lie next
// to what another does: the processors fetch ahead what follows, and take it from each other.
struct RowBlocks {
  static constexpr int64_t kApartBytes = 512;

  int64_t block_rows, blocks, step, batch, pitch;

  RowBlocks(const SequenceShape& shape, const Plan& plan, int64_t row_bytes)
      : block_rows(plan.row_block),
        blocks(blocks_of(shape.batch, plan.row_block)),
        step(plan.deal_rows ? blocks : 1),
        batch(shape.batch),
        pitch(plan.row_block + (shape.steps > 1 ? blocks_of(kApartBytes, row_bytes) : 0)) {}

  int64_t places() const { return blocks == 1 ? batch : blocks * pitch; }
  // Those of a block among the first `active` rows of the batch.
  BatchRows rows(int64_t block, int64_t active) const {
    if (blocks == 1) return {0, 1, active, 0};  // a step at batch 1 is short
    if (step == 1) {
      const int64_t first = block * block_rows;
      return BatchRows{first, 1, active - first, block * pitch}.from(0, block_rows);
    }
    const int64_t rest = active - block;
    return {block, step, rest > 0 ? (rest + step - 1) / step : 0, block * pitch};
  }
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (int64_t block = 0; block < blocks; ++block) {
      const BatchRows of_block = rows(block, batch);
      for (int64_t r = 0; r < of_block.count; ++r) visit(of_block[r]);
    }
  }
};

// Calls job(direction, panel, block, the panel likely to be next or -1) for the part's tiles: panel
// after panel, all blocks of each. Without divisions where there is one block: the jobs of a step
// at batch 1 are so short that they would wait for them.
template <class Job>
void for_tiles(Member& team, const Part& part, int64_t panels, Job&& job) {
  team.for_each(part.jobs(panels), [&](int64_t i) {
    const int64_t of_all = part.blocks == 1 ? i : i / part.blocks;
    const int64_t block = i - of_all * part.blocks;
    const int second = of_all >= panels;  // of two directions
    const int64_t panel = second ? of_all - panels : of_all,
                  next = team.after(i) < i ? panel - 1 : panel + 1;
    job(part.first_direction + second, panel, part.first_block + block, next < panels ? next : -1);
  });
}

// Calls job(direction, group, block, first row in it) for the part's rows, in groups that lie
// within a block each and count through all of a direction's.
inline constexpr int64_t kRowGroup = 4;
inline int64_t row_groups(const SequenceShape& shape, const Plan& plan) {
  return blocks_of(shape.batch, plan.row_block) * blocks_of(plan.row_block, kRowGroup);
}
template <class Job>
void for_row_groups(Member& team, const Part& part, const Plan& plan, Job&& job) {
  const int64_t of_block = blocks_of(plan.row_block, kRowGroup), groups = part.blocks * of_block;
  team.for_each(part.directions * groups, [&](int64_t i) {
    const int64_t group = part.first_block * of_block + i % groups;
    job(part.first_direction + int(i / groups), group, group / of_block,
        group % of_block * kRowGroup);
  });
}

// Takes a chunk through step(member, part, position) for its positions: shared out by the plan, or
// every step by the whole team.
template <class Step>
void for_steps(Member& team, const SequenceShape& shape, const Plan& plan, int64_t begin,
               int64_t end, Step&& step) {
  if (plan.shares > 0) {
    team.for_each_alone(shape.directions * plan.shares, [&](Member& alone, int64_t i) {
      const Part part = Part::share(shape, plan, i);
      for (int64_t s = begin; s < end; ++s) step(alone, part, s);
    });
  } else if (plan.directions_in_turn) {
    for (int d = 0; d < shape.directions; ++d) {
      const Part part = Part::direction(shape, plan, d);
      for (int64_t s = begin; s < end; ++s) step(team, part, s);
    }
  } else {
    const Part all = Part::all(shape, plan);
    for (int64_t s = begin; s < end; ++s) step(team, all, s);
  }
}

template <class T>
inline void copy_row(T* to, const T* from, int64_t n) {
  std::memcpy(to, from, size_t(n) * sizeof(T));
}
template <class T>
inline void zero_row(T* to, int64_t n) {
  std::memset(to, 0, size_t(n) * sizeof(T));
}

// Fills a (places, padded(width)) state. source(b): the b-th row's values, null means zeros.
template <class T, class Source>
void load_state(T* to, const RowBlocks& row_blocks, int64_t width, Source&& source) {
  row_blocks.for_each([&](const BatchRow& of) {
    T* row = to + of.place * padded(width);
    zero_row(row, padded(width));
    if (const T* from = source(of.b)) copy_row(row, from, width);
  });
}
// The b-th row of a contiguous (B, width) state.
template <class T>
T* state_row(T* state, const SequenceShape& shape, int64_t b, int64_t width) {
  return state ? state + shape.row(b) * width : nullptr;
}

// Steps of the b-th row.
inline int64_t steps_of_row(const SequenceShape& shape, int64_t b) {
  if (!shape.batch_sizes) return shape.steps;
  int64_t low = 0, high = shape.steps;  // batch_sizes does not increase: bisect
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (shape.batch_sizes[middle] > b)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

}  // namespace rnn_ext::RNN_EXT_ISA
