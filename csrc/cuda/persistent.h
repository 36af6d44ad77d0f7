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
#include "portable.h"
#include "products.h"
#include "tiles.h"

namespace rnn_ext::cuda {

// Step t of position s of the direction's own order.
RNN_EXT_SHARED_INLINE int64_t step_at(const SequenceShape& shape, int direction, int64_t s) {
  return direction == 0 ? s : shape.steps - 1 - s;
}

// What the two kernels' parameters have in common. batch_sizes and offsets of the shape point into
// the device's memory.
struct GroupLayout {
  SequenceShape shape;
  SharedLayout shared;
  int unit_blocks = 0, groups = 0, first_direction = 0;
  int unit_passes = 1;  // of a block, over its units
  int64_t group_rows = 0;
  bool linear = false;
  uint32_t* counters = nullptr;  // (directions, groups), kCounterBytes apart; not for clusters
  int64_t rounds = 0;            // of those counters' barriers before this launch
};

// Where a block of the launch belongs.
struct BlockPlace {
  int direction, group, unit_block;
  int64_t first_row;  // batch rows of the group
  int rows;
  int64_t blocks;  // K / kDepthBlock

  RNN_EXT_DEVICE BlockPlace(const GroupLayout& g, int gates, bool backward) {
    const int index = block_index() / g.unit_blocks;
    unit_block = block_index() % g.unit_blocks;
    direction = g.first_direction + index / g.groups;
    group = index % g.groups;
    first_row = group * g.group_rows;
    const int64_t rest = g.shape.batch - first_row;
    rows = int(rest < g.group_rows ? rest : g.group_rows);
    blocks = depth(gates, backward, g.shape.hidden_size) / kDepthBlock;
  }

  RNN_EXT_DEVICE int64_t global_group(const GroupLayout& g) const {
    return int64_t(direction) * g.groups + group;
  }
  RNN_EXT_DEVICE GridBarrier barrier(const GroupLayout& g) const {
    return {g.counters + global_group(g) * (kCounterBytes / int64_t(sizeof(uint32_t))),
            uint32_t(g.unit_blocks), unit_block == 0, g.rounds % 2 ? GridBarrier::kTurn : 0u};
  }
  // Of the group's rows, those that have a step at t.
  RNN_EXT_DEVICE int active(const SequenceShape& shape, int64_t t) const {
    const int64_t all = shape.active(t) - first_row;
    return int(all < 0 ? 0 : all < rows ? all : rows);
  }
};

// The pairs of a unit and a batch row that a thread finishes: always the same ones, so that what
// belongs to them stays in its registers. Neighbouring lanes have neighbouring units.
template <int kUnits>
struct ThreadPairs {
  static constexpr int kRowsAtOnce = kThreads / kUnits;
  static constexpr int kPerPass = kPassRows / kRowsAtOnce;

  static RNN_EXT_DEVICE int unit() { return thread_index() % kUnits; }
  static RNN_EXT_DEVICE int row(int i) { return i * kRowsAtOnce + thread_index() / kUnits; }
  // A thread's own place in the array of values fetched ahead.
  static RNN_EXT_DEVICE int slot(int pass, int i) {
    return (pass * kPerPass + i) * kThreads + thread_index();
  }
  static RNN_EXT_DEVICE int64_t slots(int64_t passes) { return passes * kPassRows * kUnits; }
};

// Both slots start with h_0: a row that joins late (direction 1 of packed data) finds it there,
// whatever step it is, because nobody has written to the row before.
template <class Product, class T>
RNN_EXT_DEVICE T first_exchanged(int64_t blocks, int64_t index, const T* h_0, int64_t first_row,
                                 int64_t rows, int64_t hidden_size) {
  int64_t row, k;
  Product::exchange_place(blocks, index, row, k);
  const bool given = h_0 && k < hidden_size && row < rows;
  return given ? Product::operand(h_0[(first_row + row) * hidden_size + k]) : from_compute<T>(0);
}

// What both kernels have of a block: its place, its parts of shared memory and of the exchange, its
// product. kBackward and kCut choose shapes, kExchange what passes go over and how blocks meet.
template <class Cell, class T, bool kBackward, Cut kCut, Exchange kExchange>
struct PersistentBlock {
  using C = Compute<T>;
  using Shape = BlockShape<Cell, T, kBackward, kCut>;
  using Product = typename Shape::Product;
  using Pairs = ThreadPairs<Shape::kUnits>;
  static constexpr int kGates = Cell::kNumGates, kUnits = Shape::kUnits;
  static constexpr int kPassPairs = Shape::kPassPairs, kRows = Shape::kTiling.rows();
  static constexpr bool kCluster = kExchange == Exchange::kCluster;
  static constexpr int kUnitPasses = max_unit_passes(kExchange);
  // A value of each pair of the thread, in registers because all loops over pairs are unrolled.
  using OfPairs = C[kMaxPasses][kPassPairs];

  const SequenceShape& shape;
  const BlockPlace place;
  const int64_t hidden_size;
  const SharedLayout& layout;
  const int64_t slot_size, prefetch_slots;
  const int unit_passes, group_blocks;
  T* const exchange;  // of the group
  std::conditional_t<kCluster, ClusterBarrier, GridBarrier> barrier;
  const ThreadMath<C> math;
  const int64_t own_unit;  // of the thread's pairs in the first pass
  const bool has_own;

  RNN_EXT_DEVICE PersistentBlock(const GroupLayout& g, T* exchange_of_all)
      : shape(g.shape),
        place(g, kGates, kBackward),
        hidden_size(g.shape.hidden_size),
        layout(g.shared),
        slot_size(exchange_slot(kGates, kBackward, hidden_size, g.group_rows)),
        prefetch_slots(Pairs::slots(kCluster ? g.unit_passes : blocks_of(g.group_rows, kPassRows))),
        unit_passes(kCluster ? g.unit_passes : 1),
        group_blocks(g.unit_blocks),
        exchange(kCluster ? dynamic_shared<T>(size_t(g.shared.exchange))
                          : exchange_of_all + place.global_group(g) * 2 * slot_size),
        barrier(barrier_of(g)),
        math{g.linear},
        own_unit(place.unit_block * unit_passes * kUnits + Pairs::unit()),
        has_own(own_unit < hidden_size) {}

  RNN_EXT_DEVICE auto barrier_of(const GroupLayout& g) const {
    if constexpr (kCluster)
      return ClusterBarrier{};
    else
      return place.barrier(g);
  }

  // What a pass is: some units of the block by some rows of the group.
  RNN_EXT_DEVICE static constexpr int unit_pass(int pass) { return kCluster ? pass : 0; }
  RNN_EXT_DEVICE static constexpr int first_row(int pass) {
    return kCluster ? 0 : pass * kPassRows;
  }
  RNN_EXT_DEVICE bool has_pass(int pass, int rows) const {
    return first_row(pass) < rows && (!kCluster || pass < unit_passes);
  }
  RNN_EXT_DEVICE int first_unit(int pass) const {
    return (place.unit_block * unit_passes + unit_pass(pass)) * kUnits;
  }
  // Of the thread's pairs in a pass.
  RNN_EXT_DEVICE int64_t unit(int pass) const { return own_unit + unit_pass(pass) * kUnits; }
  RNN_EXT_DEVICE bool has_unit(int pass) const {
    return kCluster ? pass < unit_passes && unit(pass) < hidden_size : has_own;
  }

  RNN_EXT_DEVICE T* weights(int pass) const {
    return dynamic_shared<T>() + unit_pass(pass) * kRows * place.blocks * kDepthBlock;
  }
  RNN_EXT_DEVICE C* partial() const { return dynamic_shared<C>(size_t(layout.partial)); }
  // A thread's own place for value `v` of one of its pairs, fetched ahead.
  RNN_EXT_DEVICE C* prefetched(int v, int pass, int i) const {
    return dynamic_shared<C>(size_t(layout.prefetch)) + v * prefetch_slots + Pairs::slot(pass, i);
  }
  RNN_EXT_DEVICE void fetch(int v, int pass, int i, const C* from) const {
    copy_async<int(sizeof(C))>(prefetched(v, pass, i), from);
  }
  // Of even, of odd steps.
  RNN_EXT_DEVICE T* slot(int64_t s) const { return exchange + (s & 1) * slot_size; }
  RNN_EXT_DEVICE void send(T* to, int row, int64_t k, T value) const {
    to[Product::exchange_index(place.blocks, row, k)] = Product::operand(value);
  }

  // visit(pass, i, row) for the thread's pairs whose row is below `rows`.
  template <class Visit>
  RNN_EXT_DEVICE void for_pairs_of_pass(int pass, int rows, Visit&& visit) const {
#pragma unroll
    for (int i = 0; i < kPassPairs; ++i) {
      const int row = first_row(pass) + Pairs::row(i);
      if (has_unit(pass) && row < rows) visit(pass, i, row);
    }
  }
  template <class Visit>
  RNN_EXT_DEVICE void for_pairs(int rows, Visit&& visit) const {
#pragma unroll
    for (int pass = 0; pass < kMaxPasses; ++pass) for_pairs_of_pass(pass, rows, visit);
  }

  // value(pass, row, k) of the matrix of each pass over units, M x K. Neighbouring lanes take
  // neighbouring columns of W_hh: those are K forward, M backward.
  template <class Value>
  RNN_EXT_DEVICE void load_weights(Value&& value) const {
    constexpr int kAtOnce = 8;  // on their way from memory
    const int depth = int(place.blocks) * kDepthBlock, count = kRows * depth;
    constexpr bool kRowsFirst = kBackward || Product::kRowsFirst;
    const auto row = [&](int i) { return kRowsFirst ? i % kRows : i / depth; };
    const auto column = [&](int i) { return kRowsFirst ? i / kRows : i % depth; };
    for (int pass = 0; pass < unit_passes; ++pass)
      for (int first = thread_index(); first < count; first += kAtOnce * kThreads) {
        T values[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = first + j * kThreads;
          if (i < count) values[j] = value(pass, row(i), column(i));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = first + j * kThreads;
          if (i < count)
            weights(pass)[Product::weight_index(place.blocks, row(i), column(i))] =
                Product::operand(values[j]);
        }
      }
  }

  // Clusters only (a kernel has prepared the exchange in L2): before any block may store to
  // another, each fills its own copy, with zeros or with the state that the launch begins with.
  RNN_EXT_DEVICE void begin_exchange(const T* state) {
    for (int64_t i = thread_index(); i < 2 * slot_size; i += kThreads)
      exchange[i] = first_exchanged<Product>(place.blocks, i % slot_size, state, place.first_row,
                                             place.rows, hidden_size);
    barrier.arrive();
    barrier.wait();
  }
  // Clusters only, behind the last send() of a step: the block's values of the group's first `rows`
  // rows from its own copy to all others, 16 bytes at a time.
  RNN_EXT_DEVICE void share(T* slot, int rows) const {
    constexpr int kVector = kVectorLength<T>;
    static_assert(kUnits % kVector == 0 && kDepthBlock % kVector == 0);
    block_barrier();  // all that the block has sent is in its copy
    const int gates = kBackward ? kGates : 1;
    const int64_t gate_depth = rounded_up(hidden_size, kDepthBlock);
    const int vectors = unit_passes * kUnits / kVector;  // of a gate and row
    const int own = gates * rows * vectors;
    for (int i = thread_index(); i < (group_blocks - 1) * own; i += kThreads) {
      const int64_t unit = first_unit(0) + i % vectors * kVector;
      if (unit >= gate_depth) continue;
      const int row = i / vectors % rows, gate = i / vectors / rows % gates;
      T* const at = slot + Product::exchange_index(place.blocks, row, gate * gate_depth + unit);
      store_to_block(at, (place.unit_block + 1 + i / own) % group_blocks,
                     load_vector<T, kVector>(at));
    }
  }

  // The sums of a pass, met by the whole block.
  RNN_EXT_DEVICE void multiply(const T* read, int pass, int rows) const {
    const int first = first_row(pass);
    if (pass > 0) block_barrier();  // the sums of the pass before have been read
    Product::template run<kExchange>(weights(pass), read, place.blocks, first,
                                     rows - first < kPassRows ? rows - first : kPassRows, partial(),
                                     layout.partial_stride);
    block_barrier();
  }
  // Row m of the block's matrix by a batch row: what the warps made of it.
  RNN_EXT_DEVICE C product(int m, int pass, int row) const {
    const C* const from = partial() + m * layout.partial_stride + row - first_row(pass);
    C sum = C(0);
    for (int i = 0; i < Shape::kTiling.slots; ++i) sum += from[i * kRows * layout.partial_stride];
    return sum;
  }
};

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
