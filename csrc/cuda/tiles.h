// How a persistent kernel is cut into blocks and tiles: constants and arithmetic that the kernels,
// the plan and the tests share. Plain constexpr code, no CUDA.
//
// A block owns `units` hidden units and keeps the rows of W_hh that belong to them (backward: the
// columns) in shared memory as a matrix of M rows and K columns. Each step it multiplies that
// matrix by what all blocks exchanged, K values for each batch row of its group, and finishes its
// units.
#pragma once

#include <cstdint>

#include "../sequence.h"

namespace rnn_ext::cuda {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };
RNN_EXT_SHARED_INLINE constexpr int64_t bytes_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}
// Of accumulators, cell states and everything a cell saves.
RNN_EXT_SHARED_INLINE constexpr int64_t compute_bytes_of(DType t) {
  return t == DType::kFloat64 ? 8 : 4;
}
RNN_EXT_SHARED_INLINE constexpr bool is_narrow(DType t) { return bytes_of(t) == 2; }

inline constexpr int kWarp = 32;
inline constexpr int kWarps = 8;  // of a block
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kPassRows = 32;  // batch rows whose products are in shared memory at once
inline constexpr int kMaxPasses = 2;
inline constexpr int kMaxGroupRows = kPassRows * kMaxPasses;
inline constexpr int kDepthBlock = 32;  // K is padded to this: 8 elements of 16 bits for 4 lanes
inline constexpr int kRowTile = 8;      // batch rows of one mma, and of one block of the exchange
inline constexpr int kPartialPad = 4;   // keeps the rows of partial sums in different banks
// Blocks of a persistent kernel that the registers of a multiprocessor allow: the compiler may use
// all of them for one block.
inline constexpr int kBlocksByRegisters = 1;
// A barrier counter has a line of its own.
inline constexpr int64_t kCounterBytes = 128;

RNN_EXT_SHARED_INLINE constexpr int64_t rounded_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}
RNN_EXT_SHARED_INLINE constexpr int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// The ways to cut a layer: each is an instantiation of the kernels, the plan chooses.
enum class Cut : int {
  kLanes = 0,        // plain multiply-adds
  kTensorCores = 1,  // f16, bf16; f32 with operands rounded to tf32
  kWide = 2          // the same with twice the units in a block: half the blocks, where those of
                     // kTensorCores are more than the device has multiprocessors
};
inline constexpr Cut kCuts[] = {Cut::kLanes, Cut::kTensorCores, Cut::kWide};

RNN_EXT_SHARED_INLINE constexpr bool has_cut(DType dtype, int gates, bool backward, Cut cut) {
  switch (cut) {
    case Cut::kLanes:
      return !is_narrow(dtype);
    case Cut::kTensorCores:
      return dtype != DType::kFloat64;
    case Cut::kWide:  // backward, and with one gate, a block has 16 units anyway; the GRU's spilled
      return is_narrow(dtype) && !backward && gates == 4;
  }
  return false;
}

// Forward: the gates of the units are the rows, so the tensor cores' 16 rows are filled by weights
// and a small batch wastes little. Backward: the units themselves are.
RNN_EXT_SHARED_INLINE constexpr int units_of_block(int gates, bool backward, Cut cut) {
  if (backward) return cut == Cut::kLanes ? 8 : 16;
  return gates == 1 || cut == Cut::kWide ? 16 : 8;
}
// Rows of a warp's tile.
RNN_EXT_SHARED_INLINE constexpr int tile_rows(bool backward, Cut cut) {
  return backward && cut == Cut::kLanes ? 8 : 16;
}

struct Tiling {
  int units, tile_rows, tiles;  // tiles * tile_rows = M
  int slots;                    // warps among which K is split; their partial sums are added up

  RNN_EXT_SHARED_INLINE constexpr int rows() const { return tiles * tile_rows; }
};

RNN_EXT_SHARED_INLINE constexpr Tiling tiling(int gates, bool backward, Cut cut) {
  const int units = units_of_block(gates, backward, cut), rows = tile_rows(backward, cut);
  const int needed = backward ? units : gates * units;
  const int tiles = (needed + rows - 1) / rows;
  // A warp makes all tiles from each operand it loads; of a wide block half of them, for half the
  // partial sums (an LSTM's would have no room beside the weights of 1024 units) and half the
  // accumulators.
  const int slots = cut == Cut::kWide ? kWarps / 2 : kWarps;
  return {units, rows, tiles, slots};
}

// Without tensor cores a warp brings what it multiplies to a place of its own in shared memory: so
// many vectors of 16 bytes for each lane at a time, so many values of K of a batch row one after
// the other, and of so many batch rows at most. A lane multiplies a vector for 4 rows of the
// matrix.
inline constexpr int kStagedVectors = 4;
RNN_EXT_SHARED_INLINE constexpr int lane_chunk(int rows, int64_t element_bytes) {
  const int at_once = 2 * kWarp / rows * int(16 / element_bytes);
  return at_once < 16 ? 16 : at_once;
}
RNN_EXT_SHARED_INLINE constexpr int lane_columns(int64_t element_bytes) {
  return element_bytes == 8 ? kRowTile : 2 * kRowTile;  // of doubles there are fewer registers
}

// K: the units, backward those of every gate, padded gate by gate.
RNN_EXT_SHARED_INLINE constexpr int64_t depth(int gates, bool backward, int64_t hidden_size) {
  return (backward ? gates : 1) * rounded_up(hidden_size, kDepthBlock);
}

// How the blocks of a group exchange what each step makes, and meet.
enum class Exchange : int {
  kMemory = 0,   // through L2, with a barrier in global memory: all blocks of a launch are resident
  kCluster = 1,  // a group is a thread-block cluster: through its blocks' shared memory, with its
                 // barrier. Groups never wait for each other
};

// What a block does in one pass: `units` of its tiling by kPassRows rows. Passes go over the rows
// of a group, or, in a cluster of few blocks, over the units of a block; that decides what belongs
// to a pass at compile time.
RNN_EXT_SHARED_INLINE constexpr int max_group_rows(Exchange exchange) {
  return exchange == Exchange::kCluster ? kPassRows : kMaxGroupRows;
}
RNN_EXT_SHARED_INLINE constexpr int max_unit_passes(Exchange exchange) {
  return exchange == Exchange::kCluster ? kMaxPasses : 1;
}
// Blocks of a cluster that every device of compute capability 9.0 and later allows.
inline constexpr int kMaxCluster = 8;

// Values of compute type that a block fetches ahead for each unit and row.
RNN_EXT_SHARED_INLINE constexpr int prefetched(int gates, int saved, bool backward) {
  return backward ? saved : gates;
}

// The exchange: two slots, of even and odd steps, of K values for each row of a group.
RNN_EXT_SHARED_INLINE constexpr int64_t exchange_slot(int gates, bool backward, int64_t hidden_size,
                                                      int64_t group_rows) {
  return depth(gates, backward, hidden_size) * rounded_up(group_rows, kRowTile);
}

// Shared memory of a block, in this order. All parts are multiples of 16 bytes.
struct SharedLayout {
  int64_t partial, prefetch, exchange, bytes;  // the weights are at 0
  int partial_stride;                          // elements between rows of partial sums
};

RNN_EXT_SHARED_INLINE constexpr SharedLayout shared_layout(int gates, int saved, bool backward,
                                                           DType dtype, Cut cut, Exchange exchange,
                                                           int unit_passes, int64_t hidden_size,
                                                           int64_t group_rows) {
  const Tiling t = tiling(gates, backward, cut);
  const int64_t pass_rows = group_rows < kPassRows ? rounded_up(group_rows, kRowTile) : kPassRows;
  SharedLayout s{};
  s.partial_stride = int(pass_rows) + kPartialPad;
  s.partial = unit_passes * t.rows() * depth(gates, backward, hidden_size) * bytes_of(dtype);
  s.prefetch = s.partial + t.slots * t.rows() * int64_t(s.partial_stride) * compute_bytes_of(dtype);
  if (cut == Cut::kLanes) s.prefetch += kThreads * kStagedVectors * 16;  // behind partial sums
  const int64_t pairs = unit_passes * rounded_up(group_rows, kPassRows) * t.units;
  s.exchange = s.prefetch + pairs * prefetched(gates, saved, backward) * compute_bytes_of(dtype);
  const bool inside = exchange == Exchange::kCluster;
  const int64_t slot = exchange_slot(gates, backward, hidden_size, group_rows);
  s.bytes = s.exchange + (inside ? 2 * slot * bytes_of(dtype) : 0);
  return s;
}

}  // namespace rnn_ext::cuda
