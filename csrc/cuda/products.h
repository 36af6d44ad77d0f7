// The product of a persistent block: its weights, M x K in shared memory, by what the blocks of its
// group exchanged, K values for each batch row. K is split among warps; each leaves its partial
// sums in shared memory, and whoever finishes a unit adds them up in order.
#pragma once

#include <cstring>

#include "portable.h"
#include "tiles.h"

namespace rnn_ext::cuda {

template <class T>
inline constexpr bool kIsNarrow = sizeof(T) == 2;

// On tensor cores. Both operands are stored as the lanes load them: for 32 values of K, lane (g, q)
// with g = lane / 4 and q = lane % 4 takes values 8q .. 8q+7 of row g in one access of 16 bytes,
// which serve two mma. That permutes K within the 32, alike in both operands, so the sums are of
// the same terms.
template <class T, int kTileRows, int kTiles>
struct TensorCoreProduct {
  static_assert(kTileRows == 16);
  static constexpr int kColumnTiles = kPassRows / kRowTile;

  static RNN_EXT_DEVICE int64_t weight_index(int64_t blocks, int row, int64_t k) {
    const int64_t fragment = ((row / 16) * blocks + k / kDepthBlock) * 2 + row % 16 / 8;
    return (fragment * kWarp + (row % 8) * 4 + k % kDepthBlock / 8) * 8 + k % 8;
  }
  static RNN_EXT_DEVICE int64_t exchange_index(int64_t blocks, int64_t row, int64_t k) {
    const int64_t fragment = row / kRowTile * blocks + k / kDepthBlock;
    return (fragment * kWarp + (row % kRowTile) * 4 + k % kDepthBlock / 8) * 8 + k % 8;
  }
  // The inverse.
  static RNN_EXT_DEVICE void exchange_place(int64_t blocks, int64_t index, int64_t& row,
                                            int64_t& k) {
    const int64_t lane = index / 8 % kWarp, fragment = index / 8 / kWarp;
    row = fragment / blocks * kRowTile + lane / 4;
    k = fragment % blocks * kDepthBlock + lane % 4 * 8 + index % 8;
  }

  // partial (warps, M, stride) for `rows` <= kPassRows batch rows from `first_row`, a multiple of
  // kRowTile.
  static RNN_EXT_DEVICE void run(const T* weights, const T* exchange, int64_t blocks,
                                 int64_t first_row, int rows, float* partial, int stride) {
    const int lane = lane_index(), warp = warp_index();
    const int tiles = (rows + kRowTile - 1) / kRowTile;
    float acc[kTiles][kColumnTiles][4] = {};
    const T* const from = exchange + first_row / kRowTile * blocks * kWarp * 8 + lane * 8;
#pragma unroll 2
    for (int64_t block = warp; block < blocks; block += kWarps) {
      uint32_t b[kColumnTiles][4];
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
        if (n < tiles)
          registers(load_vector_l2<T, 8>(from + (n * blocks + block) * kWarp * 8), b[n]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const T* const w = weights + (m * blocks + block) * 2 * kWarp * 8 + lane * 8;
        uint32_t upper[4], lower[4];
        registers(load_vector<T, 8>(w), upper);
        registers(load_vector<T, 8>(w + kWarp * 8), lower);
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          if (n >= tiles) continue;
#pragma unroll
          for (int j = 0; j < 2; ++j)
            mma_m16n8k16<T>(acc[m][n],
                            {upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1]},
                            {b[n][2 * j], b[n][2 * j + 1]});
        }
      }
    }
    float* const to = partial + (warp * kTiles * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if (n >= tiles) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = to + (m * 16 + half * 8) * stride + n * kRowTile;
          at[0] = acc[m][n][2 * half];
          at[1] = acc[m][n][2 * half + 1];
        }
      }
  }

 private:
  static RNN_EXT_DEVICE void registers(const Vector<T, 8>& v, uint32_t (&r)[4]) {
    std::memcpy(r, &v, sizeof r);
  }
};

// With plain multiply-adds: a warp has one tile of rows, its lanes split K and add up through
// shuffles. Both operands are stored row by row.
template <class T, int kTileRows, int kTiles>
struct LaneProduct {
  static constexpr int kSlots = kWarps / kTiles;
  // Batch rows at a time: as many sums as registers allow.
  static constexpr int kColumns = (sizeof(T) == 8 ? 32 : 64) / kTileRows;
  static constexpr int kSums = kTileRows * kColumns;

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
        for (int n = 0; n < kColumns; ++n) h[n] = load_vector_l2<T, 1>(from + n * depth + k).v[0];
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

template <class T, bool kNarrow, int kTileRows, int kTiles>
struct BlockProductOf;
template <class T, int kTileRows, int kTiles>
struct BlockProductOf<T, true, kTileRows, kTiles> : TensorCoreProduct<T, kTileRows, kTiles> {};
template <class T, int kTileRows, int kTiles>
struct BlockProductOf<T, false, kTileRows, kTiles> : LaneProduct<T, kTileRows, kTiles> {};

// What a persistent block of a cell has at hand.
template <class Cell, class T, bool kBackward>
struct BlockShape {
  static constexpr Tiling kTiling = tiling(Cell::kNumGates, kBackward, kIsNarrow<T>);
  static constexpr int kUnits = kTiling.units;
  static constexpr int kPassPairs = kUnits * kPassRows / kThreads;  // of a thread
  using Product = BlockProductOf<T, kIsNarrow<T>, kTiling.tile_rows, kTiling.tiles>;
};

}  // namespace rnn_ext::cuda
