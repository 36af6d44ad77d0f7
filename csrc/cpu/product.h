// Register-tiled matrix products on packed panels, and the packing. Every product of the engine,
// per step or over all steps, is one call of multiply_panel: rows of A times one panel of B.
//
// A panel holds up to kPanelVectors vectors of columns, stored [K][vectors][lanes], so that the
// kernel streams it in one direction whatever the matrix looked like. In a gate panel the vectors
// are the gates of the same hidden units: a tile of the product holds all gates of its units and
// the cell can be applied to it at once.
#pragma once

#include "precision.h"
#include "tiles.h"

namespace rnn_ext::RNN_EXT_ISA {

inline constexpr int kPanelVectors = 4;

// Rows of a tile: as many as leave registers for one row of B and the broadcasts.
constexpr int tile_rows(int vectors) {
  if (kVectorRegisters >= 32) return vectors == 4 ? 6 : 8;
  return vectors == 4 ? 3 : vectors == 3 ? 4 : 6;
}
// K is cut into blocks, summed from zero each: a block of a panel (at most 64 KB) stays in the L2
// cache while all row tiles pass over it, and the rounding error grows with the square root of the
// block, not of K.
inline constexpr int64_t kBlockDepth = 256;

// The left operand, in elements (precision.h).
template <class Element>
struct Rows {
  const Element* data;
  int64_t row_stride;
  int64_t k_stride = 1;
};

// out = A * panel + init, or with `accumulate` out += A * panel. `ahead`: what is read after this
// block of the panel; the tile fetches a vector of it for every k.
template <class P, int kRows, int kVectors>
RNN_EXT_INLINE void multiply_tile(int64_t depth, const Element<P>* a, int64_t row_stride,
                                  int64_t k_stride, const Element<P>* b, const Value<P>* init,
                                  int64_t init_stride, Value<P>* out, int64_t out_stride,
                                  bool accumulate, const Element<P>* ahead) {
  using T = Value<P>;
  using V = Vec<T>;
  using Operand = Vec<Element<P>>;
  // With few rows there are too few independent sums to hide the latency of the multiply-adds:
  // take two or four consecutive k at a time, each with its own sums.
  constexpr int kUnroll = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;
  constexpr int kWidth = kVectors * kLanes<T>;
  V sum[kUnroll][kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[0][r][v] = init ? load(init + r * init_stride + v * kLanes<T>) : V{};
#pragma GCC unroll 4
      for (int u = 1; u < kUnroll; ++u) sum[u][r][v] = V{};
    }
  }
  int64_t k = 0;
  // Half as many additions to addresses, which take turns with the multiply-adds. Where registers
  // are few GCC would fill them with what the second k needs, and spill a sum.
#pragma GCC unroll(kVectorRegisters >= 32 ? 2 : 1)
  for (; k + kUnroll <= depth; k += kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      // Into the L2 cache. Tiles of less work would only wait for it.
      if (kUnroll == 1) __builtin_prefetch(ahead + k * kLanes<T>, 0, 2);
      Operand column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        column[v] = load(b + u * kWidth + v * kLanes<T>);
        // Once for all rows, if there is room: GCC would read it again for each.
        if constexpr (kRows > 1 && kRows * kVectors + kVectors < kVectorRegisters)
          column[v] = in_register(column[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Operand left = P::broadcast(a[r * row_stride + u * k_stride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          sum[u][r][v] = P::multiply_add(left, column[v], sum[u][r][v]);
      }
    }
    a += kUnroll * k_stride;
    b += kUnroll * kWidth;
  }
  for (; k < depth; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Operand left = P::broadcast(a[r * row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[0][r][v] = P::multiply_add(left, load(b + v * kLanes<T>), sum[0][r][v]);
    }
    a += k_stride;
    b += kWidth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V total = sum[0][r][v];
#pragma GCC unroll 4
      for (int u = 1; u < kUnroll; ++u) total += sum[u][r][v];
      T* to = out + r * out_stride + v * kLanes<T>;
      store(to, accumulate ? load(to) + total : total);
    }
  }
}

template <class P, int kVectors, int kRows>
inline void multiply_rest(int64_t rows, int64_t depth, const Element<P>* a, int64_t row_stride,
                          int64_t k_stride, const Element<P>* b, const Value<P>* init,
                          int64_t init_stride, Value<P>* out, int64_t out_stride, bool accumulate,
                          const Element<P>* ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      multiply_tile<P, kRows, kVectors>(depth, a, row_stride, k_stride, b, init, init_stride, out,
                                        out_stride, accumulate, ahead);
    else
      multiply_rest<P, kVectors, kRows - 1>(rows, depth, a, row_stride, k_stride, b, init,
                                            init_stride, out, out_stride, accumulate, ahead);
  }
}

#if defined(__AMX_BF16__) || defined(RNN_EXT_EMULATE_TILES)
// A block of 16 rows, depth a multiple of 16 elements: sums in tiles 0-3, A in 4, B in 5-7.
template <class P, int kVectors>
RNN_EXT_INLINE void multiply_in_tiles(Tiles& tiles, int64_t depth, const Element<P>* a,
                                      int64_t row_stride, const Element<P>* b, const float* init,
                                      int64_t init_stride, float* out, int64_t out_stride,
                                      bool accumulate) {
  constexpr int64_t kWidth = kVectors * kTileElements;
  const auto for_vectors = [&](auto&& visit) {
    visit(std::integral_constant<int, 0>());
    if constexpr (kVectors > 1) visit(std::integral_constant<int, 1>());
    if constexpr (kVectors > 2) visit(std::integral_constant<int, 2>());
    if constexpr (kVectors > 3) visit(std::integral_constant<int, 3>());
  };
  for_vectors([&](auto v) {
    if (accumulate)
      tiles.template load<v>(out + v * kTileElements, out_stride * 4);
    else if (init)
      tiles.template load<v>(init + v * kTileElements, init_stride * 4);
    else
      tiles.template zero<v>();
  });
  for (int64_t k = 0; k < depth; k += kTileElements) {
    tiles.template load<4>(a + k, row_stride * 4);
    for_vectors([&](auto v) {
      constexpr int kRight = 5 + v % 3;
      tiles.template load<kRight>(b + k * kWidth + v * kTileElements, kWidth * 4);
      tiles.template multiply_add<v, 4, kRight>();
    });
  }
  for_vectors([&](auto v) { tiles.template store<v>(out + v * kTileElements, out_stride * 4); });
}
#endif

template <class P, int kVectors>
inline void multiply_vectors(int64_t rows, int64_t depth, const Rows<Element<P>>& a,
                             const Element<P>* panel, const Value<P>* init, int64_t init_stride,
                             Value<P>* out, int64_t out_stride, const Element<P>* ahead, bool add) {
  using T = Value<P>;
  constexpr int kRows = tile_rows(kVectors);
  constexpr int64_t kWidth = kVectors * kLanes<T>;
  int64_t k = 0;
  do {  // once even for depth 0: out = init
    const int64_t length = depth - k < kBlockDepth ? depth - k : kBlockDepth;
    const bool accumulate = add || k > 0;
    const Element<P>* block = panel + k * kWidth;
    const Element<P>* left = a.data + k * a.k_stride;
    int64_t row = 0;
#if defined(__AMX_BF16__) || defined(RNN_EXT_EMULATE_TILES)
    const int64_t in_tiles = length / kTileElements * kTileElements;
    if (P::kHasTiles && a.k_stride == 1 && rows >= kTileRows && in_tiles > 0) {
      Tiles tiles;
      for (; row + kTileRows <= rows; row += kTileRows)
        multiply_in_tiles<P, kVectors>(tiles, in_tiles, left + row * a.row_stride, a.row_stride,
                                       block, init ? init + row * init_stride : nullptr,
                                       init_stride, out + row * out_stride, out_stride, accumulate);
      for (int64_t done = 0; in_tiles < length && done < row;) {  // what is left of K
        const int64_t count = row - done < kRows ? row - done : kRows;
        multiply_rest<P, kVectors, kRows>(count, length - in_tiles,
                                          left + done * a.row_stride + in_tiles, a.row_stride, 1,
                                          block + in_tiles * kWidth, nullptr, 0,
                                          out + done * out_stride, out_stride, true, block);
        done += count;
      }
    }
#endif
    const Element<P>* const next = k + length < depth ? block + length * kWidth : ahead;
    for (int64_t i = 0; row < rows; ++i) {
      // The last rows in two equal tiles: a full one and a small one would leave the small one to
      // wait for the panel. One tile after the other fetches its part of the block that follows.
      const int64_t rest = rows - row;
      const int64_t count = rest >= 2 * kRows ? kRows : rest > kRows ? (rest + 1) / 2 : rest;
      multiply_rest<P, kVectors, kRows>(
          count, length, left + row * a.row_stride, a.row_stride, a.k_stride, block,
          init ? init + row * init_stride : nullptr, init_stride, out + row * out_stride,
          out_stride, accumulate, next && i < kVectors ? next + i * length * kLanes<T> : block);
      row += count;
    }
    k += length;
    init = nullptr;
  } while (k < depth);
}

// out (rows, vectors*lanes) = init + A (rows, depth) * panel (depth, vectors*lanes), depth counted
// in elements. init null means zeros; init_stride 0 repeats one row (a bias). `add`: to what is in
// out, and init is null. `ahead`: what the next call reads, as large as this panel, if it is
// known. Nothing else may be fetched early: what follows in memory may be another member's, who
// writes it.
template <class P>
void multiply_panel(int vectors, int64_t rows, int64_t depth, const Rows<Element<P>>& a,
                    const Element<P>* panel, const Value<P>* init, int64_t init_stride,
                    Value<P>* out, int64_t out_stride, const Element<P>* ahead = nullptr,
                    bool add = false) {
  switch (vectors) {
    case 1:
      return multiply_vectors<P, 1>(rows, depth, a, panel, init, init_stride, out, out_stride,
                                    ahead, add);
    case 2:
      return multiply_vectors<P, 2>(rows, depth, a, panel, init, init_stride, out, out_stride,
                                    ahead, add);
    case 3:
      return multiply_vectors<P, 3>(rows, depth, a, panel, init, init_stride, out, out_stride,
                                    ahead, add);
    case 4:
      return multiply_vectors<P, 4>(rows, depth, a, panel, init, init_stride, out, out_stride,
                                    ahead, add);
  }
}

// A tile of dot products has as many batch rows as leave registers for the operands. A single row
// takes more weight rows at a time: enough independent sums.
inline constexpr int kDotRows = kVectorRegisters >= 32 ? 4 : 2;
template <class T>
constexpr int dot_columns(int rows) {
  const int columns = rows == 1 || (rows == 2 && kVectorRegisters >= 32) ? 8 : 4;
  return columns < kLanes<T> ? columns : kLanes<T>;
}
// Short weight rows: a whole vector of them at once, for they follow each other in memory. Of
// longer ones that would be more streams than the processor fetches ahead of.
inline constexpr int64_t kShortDots = 128;

// kWhole: do all columns of the vector exist?
template <class T, int kRows, int kColumns, bool kWhole>
inline void multiply_dots(int64_t columns, int64_t depth, const T* a, int64_t row_stride,
                          const T* weights, int64_t ld, const T* init, T* out, int64_t out_stride) {
  using V = Vec<T>;
  const int64_t whole = depth / kLanes<T> * kLanes<T>;
  constexpr int kGroups = kLanes<T> / kColumns;
  // Every kGroups-th column at once: these are what the first levels of the sums over lanes
  // combine, so that one vector of each row is left of them. Those of a single row fit into
  // registers as they are, and weight rows are read as they follow each other.
  constexpr bool kFirstLevels = kRows > 1;
  constexpr int kSums = kFirstLevels ? kGroups : kLanes<T>;
  V sum[kRows][kSums];
#pragma GCC unroll 4
  for (int64_t j = 0; j < kGroups; ++j) {
    // Beyond the edge the last row is repeated: same code, results ignored.
    const T* w[kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = kFirstLevels ? j + i * kGroups : j * kColumns + i;
      w[i] = weights + (kWhole || column < columns ? column : columns - 1) * ld;
    }
    V group[kRows][kColumns] = {};
    const auto add = [&](int64_t k, auto&& load_weights) {
      V x[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) x[r] = load(a + r * row_stride + k);
#pragma GCC unroll 16
      for (int i = 0; i < kColumns; ++i) {
        V y = load_weights(w[i] + k);
        if constexpr (kRows > 1) y = in_register(y);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) group[r][i] += y * x[r];
      }
    };
    for (int64_t k = 0; k < whole; k += kLanes<T>) add(k, [](const T* p) { return load(p); });
    if (whole < depth) add(whole, [&](const T* p) { return load_first(p, depth - whole); });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kFirstLevels) {
        sum[r][j] = sum_each<T, kLanes<T>, kColumns>(group[r]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kColumns; ++i) sum[r][j * kColumns + i] = group[r][i];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    V total = sum_each<T, kSums, kSums>(sum[r]);
    if (!kWhole) total = first_lanes<T>(total, columns);  // the others repeat the last row
    store(out + r * out_stride, load(init) + total);
  }
}

template <class T, int kRows>
inline void multiply_dots(int64_t columns, int64_t depth, const T* a, int64_t row_stride,
                          const T* weights, int64_t ld, const T* init, T* out, int64_t out_stride) {
  constexpr int kColumns = dot_columns<T>(kRows);
  constexpr int kAll = kRows == 1 && kVectorRegisters >= 32 ? kLanes<T> : kColumns;
  const auto multiply = columns < kLanes<T>   ? multiply_dots<T, kRows, kColumns, false>
                        : depth <= kShortDots ? multiply_dots<T, kRows, kAll, true>
                                              : multiply_dots<T, kRows, kColumns, true>;
  multiply(columns, depth, a, row_stride, weights, ld, init, out, out_stride);
}

// The same product for one vector of columns, straight from a row-major weight matrix (column j
// of B is row j of it): dot products. Worth it when packing would not be paid back. `weights` is
// the row of lane 0, `columns` (1..lanes) how many rows exist. Rows of A are readable and zero up
// to padded(depth).
template <class T>
void multiply_unpacked(int64_t columns, int64_t rows, int64_t depth, const T* a, int64_t row_stride,
                       const T* weights, int64_t ld, const T* init, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows;) {
    const int64_t count = rows - r < kDotRows ? rows - r : kDotRows;
    const auto multiply = count == 1   ? multiply_dots<T, 1>
                          : count == 2 ? multiply_dots<T, 2>
                                       : count == 3 ? multiply_dots < T,
               kDotRows < 3 ? kDotRows : 3 > : multiply_dots<T, kDotRows>;
    multiply(columns, depth, a + r * row_stride, row_stride, weights, ld, init,
             out + r * out_stride, out_stride);
    r += count;
  }
}

// Packs rows `first .. first + columns` of a row-major matrix (ld, depth columns) as one vector
// of a panel: panel[k][lane] = weights[lane][k]. `width` is the panel's row length.
template <class P>
void pack_transposed(const Value<P>* weights, int64_t ld, int64_t columns, int64_t depth,
                     Element<P>* panel, int64_t width) {
  using T = Value<P>;
  constexpr int64_t kSide = kLanes<T>, kValues = kSide * P::kPerElement;
  for (int64_t k = 0; k < depth; k += kValues, panel += kSide * width) {
    const int64_t rest = depth - k, length = rest < kValues ? elements<P>(rest) : kSide;
    Vec<Element<P>> square[kSide];
    if (length == kSide && columns >= kSide) {
#pragma GCC unroll 16
      for (int64_t j = 0; j < kSide; ++j) square[j] = P::gather(weights + j * ld + k, rest);
    } else {
      for (int64_t j = 0; j < kSide; ++j)
        square[j] = j < columns ? P::gather(weights + j * ld + k, rest) : Vec<Element<P>>{};
    }
    transpose<Element<P>>(square);
    if (length == kSide) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSide; ++i) store(panel + i * width, square[i]);
    } else {
      for (int64_t i = 0; i < length; ++i) store(panel + i * width, square[i]);
    }
  }
}

// Packs value k of up to `vectors` vectors of columns from a row of contiguous values, for
// k = 0, 1, 2, ...
template <class P>
RNN_EXT_INLINE void pack_row(const Value<P>* values, int64_t columns, int vectors, int64_t k,
                             Element<P>* panel) {
  using T = Value<P>;
  Element<P>* to = panel + k / P::kPerElement * vectors * kLanes<T>;
  for (int v = 0; v < vectors; ++v) {
    const int64_t rest = columns - v * kLanes<T>;
    P::append(to + v * kLanes<T>, k,
              values && rest > 0 ? load_upto(values + v * kLanes<T>, rest) : Vec<T>{});
  }
}

// Panels of plain columns: kPanelVectors vectors each, the last one as few as it needs.
template <class T>
struct Columns {
  int64_t count;  // columns of the matrix

  static constexpr int64_t kWidth = kPanelVectors * kLanes<T>;
  int64_t panels() const { return (count + kWidth - 1) / kWidth; }
  int64_t first(int64_t panel) const { return panel * kWidth; }
  int vectors(int64_t panel) const {
    const int64_t rest = (count - first(panel) + kLanes<T> - 1) / kLanes<T>;
    return int(rest < kPanelVectors ? rest : kPanelVectors);
  }
  int64_t size(int64_t depth) const {  // elements of all panels
    return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T> * depth;
  }
  int64_t offset(int64_t panel, int64_t depth) const { return panel * kWidth * depth; }
};

// Panels of gates: `kGates` vectors for the same units, or (one gate) kPanelVectors of units.
template <class T, int kGates>
struct GateColumns {
  static constexpr int kUnitVectors = kGates == 1 ? kPanelVectors : 1;
  static constexpr int64_t kUnits = kUnitVectors * kLanes<T>;  // of a full panel
  int64_t hidden_size;

  int64_t panels() const { return (hidden_size + kUnits - 1) / kUnits; }
  int64_t first_unit(int64_t panel) const { return panel * kUnits; }
  int unit_vectors(int64_t panel) const {
    const int64_t rest = (hidden_size - first_unit(panel) + kLanes<T> - 1) / kLanes<T>;
    return int(rest < kUnitVectors ? rest : kUnitVectors);
  }
  int vectors(int64_t panel) const { return kGates * unit_vectors(panel); }
  int64_t width() const {  // columns of all panels
    return (hidden_size + kLanes<T> - 1) / kLanes<T> * kLanes<T> * kGates;
  }
  int64_t column(int64_t panel) const { return panel * kUnits * kGates; }
};

}  // namespace rnn_ext::RNN_EXT_ISA
