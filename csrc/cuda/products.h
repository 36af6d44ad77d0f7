// The product of a persistent block: its weights, M x K in shared memory, by what the blocks of its
// group exchanged, K values for each batch row. K is split among warps; each leaves its partial
// sums in shared memory, and whoever finishes a unit adds them up in order.
#pragma once

#include <cstring>
#include <type_traits>

#include "portable.h"
#include "tiles.h"

namespace rnn_ext::cuda {

// Of the exchange, wherever it is.
template <Exchange kExchange, class T, int N>
RNN_EXT_DEVICE Vector<T, N> load_exchanged(const T* p) {
  if constexpr (kExchange == Exchange::kCluster)
    return load_vector<T, N>(p);
  else
    return load_vector_l2<T, N>(p);
}

// On tensor cores. Both operands are stored as the lanes load them: for a fragment of 4 kValues
// values of K, lane (g, q) with g = lane / 4 and q = lane % 4 takes the kValues values from
// kValues q on of row g in one access of 16 bytes, which serve two mma. That permutes K within the
// fragment, alike in both operands, so the sums are of the same terms. Operands of float are
// rounded to tf32 where they are stored (`operand`), once for all that read them.
template <class T, int kTileRows, int kTiles, int kSlots>
struct TensorCoreProduct {
  static_assert(kTileRows == 16);
  static_assert(kWarps % kSlots == 0);
  static constexpr int kShares = kWarps / kSlots;  // the tiles are shared among so many warps
  static constexpr int kWarpTiles = (kTiles + kShares - 1) / kShares;
  static constexpr int kColumnTiles = kPassRows / kRowTile;
  static constexpr int kValues = kVectorLength<T>;
  static constexpr int kDepth = 4 * kValues;  // of a fragment
  static constexpr int kUnrolled =
      sizeof(T) == 4 ? 1 : 2;  // fragments: float has no registers for 2
  static_assert(kDepthBlock % kDepth == 0);

  static RNN_EXT_DEVICE T operand(T value) {
    if constexpr (sizeof(T) == 4) return float_of_bits(to_tf32(value));
    return value;
  }
  static RNN_EXT_DEVICE int64_t fragments(int64_t blocks) {
    return blocks * (kDepthBlock / kDepth);
  }

  static RNN_EXT_DEVICE int64_t weight_index(int64_t blocks, int row, int64_t k) {
    const int64_t fragment = ((row / 16) * fragments(blocks) + k / kDepth) * 2 + row % 16 / 8;
    return (fragment * kWarp + (row % 8) * 4 + k % kDepth / kValues) * kValues + k % kValues;
  }
  static RNN_EXT_DEVICE int64_t exchange_index(int64_t blocks, int64_t row, int64_t k) {
    const int64_t fragment = row / kRowTile * fragments(blocks) + k / kDepth;
    return (fragment * kWarp + (row % kRowTile) * 4 + k % kDepth / kValues) * kValues + k % kValues;
  }
  // The inverse.
  static RNN_EXT_DEVICE void exchange_place(int64_t blocks, int64_t index, int64_t& row,
                                            int64_t& k) {
    const int64_t lane = index / kValues % kWarp, fragment = index / kValues / kWarp;
    row = fragment / fragments(blocks) * kRowTile + lane / 4;
    k = fragment % fragments(blocks) * kDepth + lane % 4 * kValues + index % kValues;
  }

  // partial (slots, M, stride) for `rows` <= kPassRows batch rows from `first_row`, a multiple of
  // kRowTile.
  template <Exchange kExchange>
  static RNN_EXT_DEVICE void run(const T* weights, const T* exchange, int64_t blocks,
                                 int64_t first_row, int rows, float* partial, int stride) {
    const int lane = lane_index(), slot = warp_index() % kSlots;
    const int first_tile = warp_index() / kSlots * kWarpTiles;
    const int tiles = (rows + kRowTile - 1) / kRowTile;
    float acc[kWarpTiles][kColumnTiles][4] = {};
    constexpr int kFragment = kWarp * kValues;  // elements
    const int64_t count = fragments(blocks);
    const T* const from = exchange + first_row / kRowTile * count * kFragment + lane * kValues;
#pragma unroll kUnrolled
    for (int64_t f = slot; f < count; f += kSlots) {
      uint32_t b[kColumnTiles][4];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
        if (n < tiles)
          registers(load_exchanged<kExchange, T, kValues>(from + (n * count + f) * kFragment),
                    b[n]);
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        if (!has_tile(first_tile + m)) continue;
        const T* const w =
            weights + ((first_tile + m) * count + f) * 2 * kFragment + lane * kValues;
        uint32_t upper[4], lower[4];
        registers(load_vector<T, kValues>(w), upper);
        registers(load_vector<T, kValues>(w + kFragment), lower);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          if (n >= tiles) continue;
#pragma unroll
          for (int j = 0; j < 2; ++j)
            multiply_add(acc[m][n],
                         {upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1]},
                         {b[n][2 * j], b[n][2 * j + 1]});
        }
      }
    }
    float* const to =
        partial + ((slot * kTiles + first_tile) * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n >= tiles || !has_tile(first_tile + m)) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = to + (m * 16 + half * 8) * stride + n * kRowTile;
          at[0] = acc[m][n][2 * half];
          at[1] = acc[m][n][2 * half + 1];
        }
      }
  }

 private:
  // The last warps may have one tile less; all lanes of a warp agree.
  static RNN_EXT_DEVICE bool has_tile(int tile) { return kTiles % kShares == 0 || tile < kTiles; }
  static RNN_EXT_DEVICE void multiply_add(float (&acc)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
    if constexpr (sizeof(T) == 4)
      mma_m16n8k8_tf32(acc, a, b);
    else
      mma_m16n8k16<T>(acc, a, b);
  }
  static RNN_EXT_DEVICE void registers(const Vector<T, kValues>& v, uint32_t (&r)[4]) {
    std::memcpy(r, &v, sizeof r);
  }
  static RNN_EXT_DEVICE float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// With plain multiply-adds: a warp has one tile of rows, its lanes split K and add up through
// shuffles. Both operands are stored row by row.
template <class T, int kTileRows, int kTiles, int kSlots>
struct LaneProduct {
  static_assert(kSlots * kTiles == kWarps);
  // Batch rows at a time: as many sums as registers allow.
  static constexpr int kColumns = (sizeof(T) == 8 ? 32 : 64) / kTileRows;
  static constexpr int kSums = kTileRows * kColumns;

  static RNN_EXT_DEVICE T operand(T value) { return value; }
  static RNN_EXT_DEVICE int64_t weight_index(int64_t blocks, int row, int64_t k) {
    return row * blocks * kDepthBlock + k;
  }
  static RNN_EXT_DEVICE int64_t exchange_index(int64_t blocks, int64_t row, int64_t k) {
    return row * blocks * kDepthBlock + k;
  }
  static RNN_EXT_DEVICE void exchange_place(int64_t blocks, int64_t index, int64_t& row,
                                            int64_t& k) {
    row = index / (blocks * kDepthBlock);
    k = index % (blocks * kDepthBlock);
  }

  // As above; partial (slots, M, stride).
  template <Exchange kExchange>
  static RNN_EXT_DEVICE void run(const T* weights, const T* exchange, int64_t blocks,
                                 int64_t first_row, int rows, T* partial, int stride) {
    const int lane = lane_index(), tile = warp_index() % kTiles, slot = warp_index() / kTiles;
    const int64_t depth = blocks * kDepthBlock;
    const T* const w = weights + tile * kTileRows * depth;
    T* const to = partial + (slot * kTiles + tile) * kTileRows * stride;
    for (int first = 0; first < rows; first += kColumns) {
      const T* const from = exchange + (first_row + first) * depth;
      T sums[kSums] = {};
      for (int64_t k = slot * kWarp + lane; k < depth; k += kSlots * kWarp) {
        T h[kColumns];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
          h[n] = load_exchanged<kExchange, T, 1>(from + n * depth + k).v[0];
#pragma unroll
        for (int m = 0; m < kTileRows; ++m) {
          const T weight = w[m * depth + k];
#pragma unroll
          for (int n = 0; n < kColumns; ++n) sums[m * kColumns + n] += weight * h[n];
        }
      }
      // Each time one half of the lanes keeps one half of the sums, until lane l has those from
      // l * kSums / 32.
#pragma unroll
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const bool upper = lane & mask;
        const int half = kSums / kWarp * mask;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
          if (i >= half) continue;
          const T kept = upper ? sums[i + half] : sums[i];
          sums[i] = kept + shuffle_xor(upper ? sums[i] : sums[i + half], mask);
        }
      }
#pragma unroll
      for (int i = 0; i < kSums / kWarp; ++i) {
        const int sum = lane * (kSums / kWarp) + i;
        to[sum / kColumns * stride + first + sum % kColumns] = sums[i];
      }
    }
  }
};

// What a persistent block of a cell has at hand.
template <class Cell, class T, bool kBackward, Cut kCut>
struct BlockShape {
  static constexpr Tiling kTiling = tiling(Cell::kNumGates, kBackward, kCut);
  static constexpr int kUnits = kTiling.units;
  static constexpr int kPassPairs = kUnits * kPassRows / kThreads;  // of a thread
  template <template <class, int, int, int> class Kind>
  using ProductOf = Kind<T, kTiling.tile_rows, kTiling.tiles, kTiling.slots>;
  using Product =
      std::conditional_t<kCut == Cut::kLanes, ProductOf<LaneProduct>, ProductOf<TensorCoreProduct>>;
};

}  // namespace rnn_ext::cuda
