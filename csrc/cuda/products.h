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
  static constexpr int kValues = kVectorLength<T>;
  static constexpr int kDepth = 4 * kValues;  // of a fragment
  static_assert(kDepthBlock % kDepth == 0);
  static constexpr bool kRowsFirst = false;  // how weights are best stored in turn

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
    static_assert(kPassRows == 4 * kRowTile);
    const int tiles = (rows + kRowTile - 1) / kRowTile;
    if (tiles <= 1)
      run_tiles<kExchange, 1>(weights, exchange, blocks, first_row, tiles, partial, stride);
    else if (tiles == 2)
      run_tiles<kExchange, 2>(weights, exchange, blocks, first_row, tiles, partial, stride);
    else
      run_tiles<kExchange, 4>(weights, exchange, blocks, first_row, tiles, partial, stride);
  }

 private:
  // Where the exchange is far away, in L2, a warp asks for that many loads of it at a time.
  static constexpr int kFetched = sizeof(T) == 4 ? kFloatLoads : 8;

  template <Exchange kExchange, int kColumnTiles>
  static RNN_EXT_DEVICE void run_tiles(const T* weights, const T* exchange, int64_t blocks,
                                       int64_t first_row, int tiles, float* partial, int stride) {
    constexpr int kAtOnce = kExchange == Exchange::kMemory ? kFetched / kColumnTiles : 1;
    constexpr int kFull = kColumnTiles == 4 ? 2 : kColumnTiles;  // tiles that are there for sure
    const int lane = lane_index(), slot = warp_index() % kSlots;
    const int first_tile = warp_index() / kSlots * kWarpTiles;
    float acc[kWarpTiles][kColumnTiles][4] = {};
    constexpr int kFragment = kWarp * kValues;  // elements
    const int count = int(fragments(blocks));
    const T* const from = exchange + first_row / kRowTile * count * kFragment + lane * kValues;
#pragma unroll 1
    for (int first = slot; first < count; first += kAtOnce * kSlots) {
      uint32_t b[kAtOnce][kColumnTiles][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int f = first + i * kSlots;
        if (f >= count) break;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n)
          if (n < kFull || n < tiles)
            registers(load_exchanged<kExchange, T, kValues>(from + (n * count + f) * kFragment),
                      b[i][n]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int f = first + i * kSlots;
        if (f >= count) break;
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
            if (n >= kFull && n >= tiles) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j)
              multiply_add(acc[m][n],
                           {upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1]},
                           {b[i][n][2 * j], b[i][n][2 * j + 1]});
          }
        }
      }
    }
    float* const to =
        partial + ((slot * kTiles + first_tile) * 16 + lane / 4) * stride + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        if ((n >= kFull && n >= tiles) || !has_tile(first_tile + m)) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* const at = to + (m * 16 + half * 8) * stride + n * kRowTile;
          at[0] = acc[m][n][2 * half];
          at[1] = acc[m][n][2 * half + 1];
        }
      }
  }

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

// With plain multiply-adds. Of the products of a warp, a lane makes those of 4 rows and some
// columns, which takes few loads for many multiply-adds; what lanes are left over splits K further,
// and they add up through shuffles. Lanes that share a value would each ask L2 for it: a warp
// brings what it reads of the exchange, which is stored row by row, to a place of its own in shared
// memory first, every byte once. Weights are stored with the rows of one k side by side, and K
// permuted so that 8 lanes read 128 bytes one after the other.
template <class T, int kTileRows, int kTiles, int kSlots>
struct LaneProduct {
  static_assert(kSlots == kWarps);
  static constexpr int kRows = kTileRows * kTiles, kLaneRows = 4, kColumnGroups = 2;
  static constexpr int kRowGroups = kRows / kLaneRows;
  static constexpr int kDepthGroups = kWarp / (kRowGroups * kColumnGroups);
  static_assert(kRowGroups * kColumnGroups * kDepthGroups == kWarp);
  static constexpr int kValues = kVectorLength<T>;             // of K, in one load
  static constexpr int kDepth = kDepthGroups * kValues;        // of K, multiplied at a time
  static constexpr int kChunk = lane_chunk(kRows, sizeof(T));  // of K, brought at a time
  static constexpr int kMaxColumns = lane_columns(sizeof(T));
  static_assert(kDepthBlock % kChunk == 0 && kChunk % kDepth == 0);
  static constexpr bool kRowsFirst = true;

  static RNN_EXT_DEVICE T operand(T value) { return value; }
  static RNN_EXT_DEVICE int64_t weight_index(int64_t, int row, int64_t k) {
    const int64_t place =
        (k / kDepth * kValues + k % kValues) * kDepthGroups + k % kDepth / kValues;
    return place * kRows + row;
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
    if (rows <= kRowTile)
      run_columns<kExchange, kRowTile>(weights, exchange, blocks, first_row, rows, partial, stride);
    else
      run_columns<kExchange, kMaxColumns>(weights, exchange, blocks, first_row, rows, partial,
                                          stride);
  }

 private:
  template <Exchange kExchange, int kColumns>
  static RNN_EXT_DEVICE void run_columns(const T* weights, const T* exchange, int64_t blocks,
                                         int64_t first_row, int rows, T* partial, int stride) {
    constexpr int kLaneColumns = kColumns / kColumnGroups, kSums = kLaneRows * kLaneColumns;
    constexpr int kRowVectors = kChunk / kValues, kVectors = kColumns * kRowVectors / kWarp;
    // Chunks in shared memory at once, and those on their way from L2.
    constexpr int kStaged = kStagedVectors / kVectors, kAtOnce = 2 * kStaged;
    static_assert(kStaged > 0);
    const int lane = lane_index(), slot = warp_index();
    const int row_group = lane % kRowGroups, depth_group = lane / kRowGroups % kDepthGroups;
    const int column_group = lane / (kRowGroups * kDepthGroups);
    const int depth = int(blocks) * kDepthBlock, chunks = depth / kChunk;
    const T* const w = weights + depth_group * kRows + row_group * kLaneRows;
    T* const staged = partial + kSlots * kRows * stride + slot * (kStagedVectors * kWarp * kValues);
    const T* const own =
        staged + column_group * kLaneColumns * kChunk + depth_group * kValues;  // of the lane
#pragma unroll 1
    for (int first = 0; first < rows; first += kColumns) {
      const T* const from = exchange + (first_row + first) * depth;
      T sums[kSums] = {};  // (columns, rows)
#pragma unroll 1
      for (int chunk = slot; chunk < chunks; chunk += kAtOnce * kSlots) {
        Vector<T, kValues> h[kAtOnce][kVectors] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (chunk + i * kSlots >= chunks) break;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const int row = (v * kWarp + lane) / kRowVectors, at = (v * kWarp + lane) % kRowVectors;
            if (first + row < rows)
              h[i][v] = load_exchanged<kExchange, T, kValues>(
                  from + row * depth + (chunk + i * kSlots) * kChunk + at * kValues);
          }
        }
#pragma unroll
        for (int begin = 0; begin < kAtOnce; begin += kStaged) {
          const int rest = chunks - chunk - begin * kSlots;
          if (rest <= 0) break;
          warp_barrier();  // what was there before has been read
#pragma unroll
          for (int i = 0; i < kStaged; ++i)
#pragma unroll
            for (int v = 0; v < kVectors; ++v)
              store_vector<T, kValues>(staged + ((i * kVectors + v) * kWarp + lane) * kValues,
                                       h[begin + i][v]);
          warp_barrier();
          const int count = rest > (kStaged - 1) * kSlots ? kStaged : (rest + kSlots - 1) / kSlots;
          // Rolled: half the kernel's code. Unrolled it took 0.95 to 0.97 of the time on an H100.
#pragma unroll 1
          for (int i = 0; i < count; ++i)
#pragma unroll 1
            for (int k = 0; k < kChunk; k += kDepth)
              add_piece<kLaneColumns>(w + ((chunk + (begin + i) * kSlots) * kChunk + k) * kRows,
                                      own + i * kColumns * kChunk + k, sums);
        }
      }
      // Each time one half of the lanes that share the sums keeps one half of them.
      int kept = kSums, begin = 0;  // the lane's are `kept` from `begin` on
#pragma unroll
      for (int mask = kDepthGroups / 2; mask > 0; mask /= 2) {
        const bool upper = depth_group & mask;
        const int half = kSums / kDepthGroups * mask;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
          if (i >= half) continue;
          const T stays = upper ? sums[i + half] : sums[i];
          sums[i] = stays + shuffle_xor(upper ? sums[i] : sums[i + half], mask * kRowGroups);
        }
        if (upper) begin += half;
        kept = half;
      }
      T* const to = partial + (slot * kRows + row_group * kLaneRows) * stride + first +
                    column_group * kLaneColumns;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (i >= kept) continue;
        const int row = (begin + i) % kLaneRows, column = (begin + i) / kLaneRows;
        if (first + column_group * kLaneColumns + column < rows)
          to[row * stride + column] = sums[i];
      }
    }
  }

  // kDepth values of K: sums (columns, rows) of the lane.
  template <int kLaneColumns>
  static RNN_EXT_DEVICE void add_piece(const T* weights, const T* h, T* sums) {
    Vector<T, kValues> values[kLaneColumns];
#pragma unroll
    for (int n = 0; n < kLaneColumns; ++n) values[n] = load_vector<T, kValues>(h + n * kChunk);
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      Vector<T, kValues> weight[kLaneRows / kValues];
#pragma unroll
      for (int m = 0; m < kLaneRows / kValues; ++m)
        weight[m] = load_vector<T, kValues>(weights + k * kDepthGroups * kRows + m * kValues);
#pragma unroll
      for (int n = 0; n < kLaneColumns; ++n)
#pragma unroll
        for (int m = 0; m < kLaneRows; ++m)
          sums[n * kLaneRows + m] += weight[m / kValues].v[m % kValues] * values[n].v[k];
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
