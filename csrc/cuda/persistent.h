// The persistent kernels: all steps of a layer in one launch.
//
// A group of blocks owns some batch rows of one direction; each of its blocks owns some hidden
// units for them and keeps those units' part of W_hh in shared memory, its cell states in
// registers. In every step each block reads what the group's blocks wrote in the step before (the
// exchange), multiplies, finishes its own units, writes them to the exchange and waits for the
// others. The exchange has two slots, of even and odd steps: a block writes into a slot only after
// all have passed the barrier behind the step in which they read it. docs/cuda.md draws this.
//
// The exchange is in L2, or, where a group is a thread-block cluster, a copy of it in the shared
// memory of each block, which stores what it has made to all others.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../sequence.h"
#include "persistent_block.h"

namespace rnn_ext::cuda {

// --- Before a launch: what the exchange holds at first
// --------------------------------------------

template <class T>
struct PrepareExchange {
  T* exchange = nullptr;  // (directions, groups, 2, slot)
  uint32_t* counters = nullptr;
  int64_t counter_words = 0;
  int directions = 1, groups = 0;
  int64_t group_rows = 0, batch = 0, hidden_size = 0, slot = 0, blocks = 0;
  const T* h_0[kMaxDirections] = {};  // forward; null means zeros, backward always
};

template <class Product, class T>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads,
                                     1) void prepare_exchange_kernel(PrepareExchange<T> p) {
  const int64_t threads = int64_t(grid_size()) * block_size();
  const int64_t first = int64_t(block_index()) * block_size() + thread_index();
  for (int64_t i = first; i < p.counter_words; i += threads) p.counters[i] = 0;
  const int64_t count = 2 * p.slot * p.groups * p.directions;
  for (int64_t i = first; i < count; i += threads) {
    const int64_t group = i / (2 * p.slot) % p.groups;
    const int64_t direction = i / (2 * p.slot) / p.groups;
    const int64_t first_row = group * p.group_rows, rest = p.batch - first_row;
    p.exchange[i] =
        first_exchanged<Product>(p.blocks, i % p.slot, p.h_0[direction], first_row,
                                 rest < p.group_rows ? rest : p.group_rows, p.hidden_size);
  }
}

// --- Forward
// --------------------------------------------------------------------------------------

template <class T>
struct PersistentForward {
  using C = Compute<T>;
  struct Direction {
    DirectionWeights<T> weights;
    const T* h_0 = nullptr;  // (B, H), null means zeros
    const T* c_0 = nullptr;
    T* h_n = nullptr;  // (B, H); carries h from chunk to chunk
    T* c_n = nullptr;
    C* state = nullptr;          // (B, H): c from chunk to chunk
    const C* gates_x = nullptr;  // (rows of the chunk, G*H): W_ih x_t
    int64_t first_row = 0;       // that gates_x begins with
    C* reserve = nullptr;        // (N, saved, padded(H)), null in inference
  };
  GroupLayout group;
  Direction directions[kMaxDirections];
  StepRows<T> y;
  T* exchange = nullptr;
  int64_t begin = 0, end = 0;  // positions of this launch
};

template <class Cell, class T, Cut kCut, Exchange kExchange>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, kBlocksByRegisters) void persistent_forward_kernel(
    const RNN_EXT_GRID_CONSTANT PersistentForward<T> p) {
  // Never launched: no code for it either.
  if (kCut != Cut::kLanes && !kHasTensorCores) return;
  if (kExchange == Exchange::kCluster && !kHasClusters) return;
  using Block = PersistentBlock<Cell, T, false, kCut, kExchange>;
  using C = Compute<T>;
  constexpr int kGates = Block::kGates, kUnits = Block::kUnits;
  Block block(p.group, p.exchange);
  const BlockPlace& place = block.place;
  const SequenceShape& shape = block.shape;
  const auto& d = p.directions[place.direction];
  const int64_t H = block.hidden_size;

  // W_ih x_t of a position, each thread its own values: no barrier is needed to read them again.
  const auto fetch = [&](int64_t s) {
    const int64_t t = step_at(shape, place.direction, s);
    const int64_t first = shape.first_row(t) - d.first_row + place.first_row;
    block.for_pairs(place.active(shape, t), [&](int pass, int i, int row) {
      const C* const from = d.gates_x + (first + row) * (kGates * H) + block.unit(pass);
#pragma unroll
      for (int g = 0; g < kGates; ++g) block.fetch(g, pass, i, from + g * H);
    });
    copy_async_commit();
  };
  fetch(p.begin);

  // Row g * kUnits + u is gate g of unit u; the rest is zeros.
  block.load_weights([&](int pass, int row, int64_t k) {
    const int64_t u = block.first_unit(pass) + row % kUnits;
    const bool real = row < kGates * kUnits && u < H && k < H;
    return real ? d.weights.w_hh[(row / kUnits * H + u) * d.weights.ld_hh + k] : from_compute<T>(0);
  });
  C b_ih[Block::kUnitPasses][kGates], b_hh[Block::kUnitPasses][kGates];
#pragma unroll
  for (int pass = 0; pass < Block::kUnitPasses; ++pass)
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const bool given = block.has_unit(pass) && d.weights.b_ih;
      b_ih[pass][g] = given ? to_compute(d.weights.b_ih[g * H + block.unit(pass)]) : C(0);
      b_hh[pass][g] = given ? to_compute(d.weights.b_hh[g * H + block.unit(pass)]) : C(0);
    }
  typename Block::OfPairs c = {}, h = {};
  const T* const h_first = p.begin == 0 ? d.h_0 : d.h_n;
  block.for_pairs(place.rows, [&](int pass, int i, int row) {
    const int64_t at = (place.first_row + row) * H + block.unit(pass);
    if (h_first) h[pass][i] = to_compute(h_first[at]);
    if (!Cell::kHasCellState) return;
    if (p.begin > 0)
      c[pass][i] = d.state[at];
    else if (d.c_0)
      c[pass][i] = to_compute(d.c_0[at]);
  });
  if constexpr (Block::kCluster)
    block.begin_exchange(h_first);
  else
    block_barrier();  // the weights are there

  for (int64_t s = p.begin; s < p.end; ++s) {
    const int64_t t = step_at(shape, place.direction, s);
    const int active = place.active(shape, t);
    const T* const read = block.slot(s);
    T* const write = block.slot(s + 1);
    if (s > p.begin) block.barrier.wait();
    copy_async_wait<0>();
    // What nobody waits for is stored when the others have been told: to tell them takes until all
    // that was stored before is there.
    T fresh[Block::kPassPairs] = {};
    C saved[Block::kPassPairs][Cell::kNumSaved + 1] = {};
    const auto store = [&](int pass) {
      block.for_pairs_of_pass(pass, active, [&](int, int i, int row) {
        const int64_t b = place.first_row + row, unit = block.unit(pass);
        p.y.at(shape, t, b)[place.direction * H + unit] = fresh[i];
        if (Cell::kNumSaved == 0 || !d.reserve) return;
        C* const to = d.reserve + (shape.first_row(t) + b) * Cell::kNumSaved * padded(H) + unit;
#pragma unroll
        for (int v = 0; v < Cell::kNumSaved; ++v) to[v * padded(H)] = saved[i][v];
      });
    };
    int last = 0;
#pragma unroll
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      if (!block.has_pass(pass, active)) break;
      if (pass > 0) store(pass - 1);
      last = pass;
      block.multiply(read, pass, active);
      const int64_t unit = block.unit(pass);
      const int own = Block::unit_pass(pass);
      block.for_pairs_of_pass(pass, active, [&](int, int i, int row) {
        C x[kGates], recurrent[kGates];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          x[g] = *block.prefetched(g, pass, i) + b_ih[own][g];
          recurrent[g] = block.product(g * kUnits + Block::Pairs::unit(), pass, row) + b_hh[own][g];
        }
        fresh[i] = from_compute<T>(
            Cell::forward(block.math, x, recurrent, h[pass][i], c[pass][i], saved[i]));
        h[pass][i] = to_compute(fresh[i]);
        if (s + 1 < shape.steps) block.send(write, row, unit, fresh[i]);
      });
    }
    if (s + 1 < p.end) {
      if constexpr (Block::kCluster) block.share(write, active);
      block.barrier.arrive();
      fetch(s + 1);
    }
    store(last);
  }

  block.for_pairs(place.rows, [&](int pass, int i, int row) {
    const int64_t at = (place.first_row + row) * H + block.unit(pass);
    d.h_n[at] = from_compute<T>(h[pass][i]);
    if (!Cell::kHasCellState) return;
    if (p.end < shape.steps)
      d.state[at] = c[pass][i];
    else
      d.c_n[at] = from_compute<T>(c[pass][i]);
  });
}

// --- Backward
// -------------------------------------------------------------------------------------

template <class T>
struct PersistentBackward {
  using C = Compute<T>;
  struct Direction {
    const T* w_hh = nullptr;  // (G*H, H)
    int64_t ld_hh = 0;
    const C* reserve = nullptr;  // (N, saved, padded(H))
    const T* h_0 = nullptr;      // (B, H), null means zeros
    const T* dh_n = nullptr;
    const T* dc_n = nullptr;
    T* dh_0 = nullptr;  // (B, H), null where not asked for
    T* dc_0 = nullptr;
    T* dgates_x = nullptr;  // (N, G*H)
    T* dgates_h = nullptr;
  };
  GroupLayout group;
  Direction directions[kMaxDirections];
  StepRows<const T> y, dy;
  T* exchange = nullptr;
};

// Position s undoes the direction's last positions first. What is exchanged are the gate gradients:
// dL/dh of a unit needs those of all units.
template <class Cell, class T, Cut kCut, Exchange kExchange>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, kBlocksByRegisters) void persistent_backward_kernel(
    const RNN_EXT_GRID_CONSTANT PersistentBackward<T> p) {
  // Never launched: no code for it either.
  if (kCut != Cut::kLanes && !kHasTensorCores) return;
  if (kExchange == Exchange::kCluster && !kHasClusters) return;
  using Block = PersistentBlock<Cell, T, true, kCut, kExchange>;
  using C = Compute<T>;
  constexpr int kGates = Block::kGates, kUnits = Block::kUnits;
  Block block(p.group, p.exchange);
  const BlockPlace& place = block.place;
  const SequenceShape& shape = block.shape;
  const auto& d = p.directions[place.direction];
  const int64_t H = block.hidden_size, steps = shape.steps;
  const int64_t gate_depth = rounded_up(H, kDepthBlock);

  const auto step_of = [&](int64_t s) { return step_at(shape, 1 - place.direction, s); };
  const auto active_at = [&](int64_t s) {
    return s < 0 || s >= steps ? 0 : place.active(shape, step_of(s));
  };
  // What a position needs of its own: saved values by way of shared memory, the rest in registers.
  // These are not widened before they are needed: that would wait for them.
  T dy[kMaxPasses][Block::kPassPairs] = {}, h[kMaxPasses][Block::kPassPairs] = {};
  const auto fetch = [&](int64_t s) {
    const int64_t t = step_of(s), previous = place.direction == 0 ? t - 1 : t + 1;
    const int before = previous < 0 || previous >= steps ? 0 : place.active(shape, previous);
    block.for_pairs(place.active(shape, t), [&](int pass, int i, int row) {
      const int64_t b = place.first_row + row, unit = block.unit(pass);
      const int64_t column = place.direction * H + unit;
      if (Cell::kNumSaved > 0) {
        const C* const from =
            d.reserve + (shape.first_row(t) + b) * Cell::kNumSaved * padded(H) + unit;
#pragma unroll
        for (int v = 0; v < Cell::kNumSaved; ++v) block.fetch(v, pass, i, from + v * padded(H));
      }
      if (p.dy.data) dy[pass][i] = p.dy.at(shape, t, b)[column];
      if (Cell::kReadsOutput) h[pass][i] = p.y.at(shape, t, b)[column];
      if (Cell::kReadsPreviousOutput)
        h[pass][i] = row < before ? p.y.at(shape, previous, b)[column]
                     : d.h_0      ? d.h_0[b * H + unit]
                                  : from_compute<T>(0);
    });
    copy_async_commit();
  };
  fetch(0);

  // Row u is column `unit` of W_hh; K counts units within gates, each gate padded.
  block.load_weights([&](int pass, int row, int64_t k) {
    const int64_t gate = k / gate_depth, u = k % gate_depth;
    const int64_t column = block.first_unit(pass) + row;
    const bool real = row < kUnits && u < H && column < H;
    return real ? d.w_hh[(gate * H + u) * d.ld_hh + column] : from_compute<T>(0);
  });
  typename Block::OfPairs carry = {}, dc = {};
  block.for_pairs(place.rows, [&](int pass, int i, int row) {
    const int64_t at = (place.first_row + row) * H + block.unit(pass);
    if (d.dh_n) carry[pass][i] = to_compute(d.dh_n[at]);
    if (Cell::kHasCellState && d.dc_n) dc[pass][i] = to_compute(d.dc_n[at]);
  });
  // The first position multiplies nothing: the weights are met behind its arrival at the barrier.
  if constexpr (Block::kCluster) block.begin_exchange(nullptr);

  for (int64_t s = 0; s <= steps; ++s) {
    const int earlier = active_at(s - 1), now = active_at(s);
    const int rows = earlier > now ? earlier : now;
    const int64_t t = s < steps ? step_of(s) : 0;
    const T* const read = block.slot(s + 1);
    T* const write = block.slot(s);
    if (s > 0) block.barrier.wait();
    copy_async_wait<0>();
    // Stored when the others have been told, as in forward.
    T of_x[Block::kPassPairs][kGates] = {}, of_h[Block::kPassPairs][kGates] = {};
    const auto store = [&](int pass) {
      block.for_pairs_of_pass(pass, now, [&](int, int i, int row) {
        const int64_t b = place.first_row + row;
        const int64_t at = (shape.first_row(t) + b) * (kGates * H) + block.unit(pass);
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          d.dgates_x[at + g * H] = of_x[i][g];
          if (Cell::kSplitsGradient) d.dgates_h[at + g * H] = of_h[i][g];
        }
      });
    };
    int last = 0;
#pragma unroll
    for (int pass = 0; pass < kMaxPasses; ++pass) {
      if (!block.has_pass(pass, rows)) break;
      if (pass > 0) store(pass - 1);
      last = pass;
      if (Block::first_row(pass) < earlier) block.multiply(read, pass, earlier);
      const int64_t unit = block.unit(pass);
      block.for_pairs_of_pass(pass, rows, [&](int, int i, int row) {
        const int64_t b = place.first_row + row;
        C dh = carry[pass][i];
        if (row < earlier) dh += block.product(Block::Pairs::unit(), pass, row);
        if (row >= now) {  // on its way out: what is left is dL/dh_0
          if (d.dh_0) d.dh_0[b * H + unit] = from_compute<T>(dh);
          if (Cell::kHasCellState && d.dc_0) d.dc_0[b * H + unit] = from_compute<T>(dc[pass][i]);
          return;
        }
        C saved[Cell::kNumSaved + 1];
#pragma unroll
        for (int v = 0; v < Cell::kNumSaved; ++v) saved[v] = *block.prefetched(v, pass, i);
        const C y = to_compute(h[pass][i]);
        UnitBackward<C> u{y, y, dh + to_compute(dy[pass][i]), dc[pass][i], C(0)};
        C dx[kGates], recurrent[kGates];
        Cell::backward(block.math, saved, u, dx, recurrent);
        carry[pass][i] = u.dh_prev;
        dc[pass][i] = u.dc;
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          of_x[i][g] = from_compute<T>(dx[g]);
          of_h[i][g] = Cell::kSplitsGradient ? from_compute<T>(recurrent[g]) : of_x[i][g];
          block.send(write, row, g * gate_depth + unit, of_h[i][g]);
        }
      });
    }
    if (s < steps) {
      if constexpr (Block::kCluster) block.share(write, now);
      block.barrier.arrive();
      if (s + 1 < steps) fetch(s + 1);
      store(last);
    }
  }
}

}  // namespace rnn_ext::cuda
