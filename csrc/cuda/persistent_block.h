// A block of a persistent kernel, forward or backward: its place in the launch, its parts of shared
// memory and of the exchange, its product. persistent.h says what blocks are for.
#pragma once

#include <type_traits>

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

}  // namespace rnn_ext::cuda
