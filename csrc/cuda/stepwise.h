// The kernels between the products of the stepwise way, and those that both ways use: any size, a
// thread takes kVector neighbouring units (more than one where all rows are aligned for it) of a
// batch row at a time.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../sequence.h"
#include "portable.h"
#include "tiles.h"

namespace rnn_ext::cuda {

// Units that a thread takes at once: 16 bytes of computed values.
template <class T>
inline constexpr int kUnitVector = 16 / int(sizeof(Compute<T>));

// First index of this thread and the number of all threads.
struct ThreadRange {
  int64_t first, step;
};
RNN_EXT_DEVICE ThreadRange thread_range() {
  return {int64_t(block_index()) * block_size() + thread_index(),
          int64_t(grid_size()) * block_size()};
}

template <class T, int kVector>
RNN_EXT_DEVICE void load_values(const T* from, Compute<T> (&to)[kVector]) {
  const Vector<T, kVector> v = load_vector<T, kVector>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i) to[i] = to_compute(v.v[i]);
}
template <class T, int kVector>
RNN_EXT_DEVICE void store_values(T* to, const Compute<T> (&from)[kVector]) {
  Vector<T, kVector> v;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v.v[i] = from_compute<T>(from[i]);
  store_vector<T, kVector>(to, v);
}

// --- Cell, forward
// --------------------------------------------------------------------------------

// One step of one direction. All matrices have unit stride along their rows.
template <class T>
struct CellForward {
  using C = Compute<T>;
  int64_t rows = 0, hidden_size = 0;  // active rows
  const C* gates_x = nullptr;         // (rows, G*H): W_ih x_t
  const C* gates_h = nullptr;         // (rows, G*H): W_hh h_{t-1}
  const T* b_ih = nullptr;            // (G*H), null without bias
  const T* b_hh = nullptr;
  C* state = nullptr;  // (rows, H): c, read and written
  T* h = nullptr;      // (rows, H): h_{t-1} on the way in, h_t on the way out (before a projection)
  bool has_h = false;  // is there an h_{t-1} of this width? Not with a projection
  T* y = nullptr;      // (rows, H) with a stride of y_stride; null: not stored here
  int64_t y_stride = 0;
  C* reserve = nullptr;  // (rows, saved, padded(H)), null in inference
  bool linear = false;
};

template <class Cell, class T, int kVector>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void cell_forward_kernel(
    const RNN_EXT_GRID_CONSTANT CellForward<T> p) {
  using C = Compute<T>;
  constexpr int kGates = Cell::kNumGates, kSaved = Cell::kNumSaved;
  const ThreadMath<C> math{p.linear};
  const ThreadRange range = thread_range();
  const int64_t H = p.hidden_size, vectors = H / kVector;
  for (int64_t i = range.first; i < p.rows * vectors; i += range.step) {
    const int64_t b = i / vectors, unit = i % vectors * kVector;
    const int64_t gates = b * (kGates * H) + unit, at = b * H + unit;
    C x[kGates][kVector], r[kGates][kVector], c[kVector] = {}, h[kVector] = {};
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      load_values<C, kVector>(p.gates_x + gates + g * H, x[g]);
      load_values<C, kVector>(p.gates_h + gates + g * H, r[g]);
      if (!p.b_ih) continue;
      C b_ih[kVector], b_hh[kVector];
      load_values<T, kVector>(p.b_ih + g * H + unit, b_ih);
      load_values<T, kVector>(p.b_hh + g * H + unit, b_hh);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        x[g][v] += b_ih[v];
        r[g][v] += b_hh[v];
      }
    }
    if (Cell::kHasCellState) load_values<C, kVector>(p.state + at, c);
    if (p.has_h) load_values<T, kVector>(p.h + at, h);
    C saved[kSaved + 1][kVector], result[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      C one_x[kGates], one_r[kGates], one_saved[kSaved + 1];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        one_x[g] = x[g][v];
        one_r[g] = r[g][v];
      }
      result[v] = Cell::forward(math, one_x, one_r, h[v], c[v], one_saved);
#pragma unroll
      for (int k = 0; k < kSaved; ++k) saved[k][v] = one_saved[k];
    }
    if (Cell::kHasCellState) store_values<C, kVector>(p.state + at, c);
    store_values<T, kVector>(p.h + at, result);
    if (p.y) store_values<T, kVector>(p.y + b * p.y_stride + unit, result);
    if (kSaved > 0 && p.reserve) {
      C* const to = p.reserve + b * kSaved * padded(H) + unit;
#pragma unroll
      for (int k = 0; k < kSaved; ++k) store_values<C, kVector>(to + k * padded(H), saved[k]);
    }
  }
}

// --- Cell, backward
// -------------------------------------------------------------------------------

// One position of one direction. `earlier` rows had a position before this one (a later step),
// `now` have this one.
template <class T>
struct CellBackward {
  using C = Compute<T>;
  int64_t earlier = 0, now = 0, hidden_size = 0, state_size = 0;  // H, R
  C* carry = nullptr;  // (rows, R): dL/dh without the product; written: of the next position
  const C* product = nullptr;  // (earlier, R): W_hh^T dgates of the position before
  const C* dh = nullptr;       // (now, H): dL/dh before the projection; null without one
  const T* dy = nullptr;       // (now, R) with a stride of dy_stride, null means zeros
  int64_t dy_stride = 0;
  T* dhidden = nullptr;        // (now, R): dL/dh_t after the projection, written where there is one
  const C* reserve = nullptr;  // (now, saved, padded(H))
  const T* y = nullptr;        // (now, H) with a stride of y_stride
  const T* y_previous = nullptr;  // (previous, H) likewise: h_{t-1} of the rows that had that step
  int64_t previous = 0, y_stride = 0;
  const T* h_0 = nullptr;  // (rows, H): of the others
  C* dc = nullptr;         // (rows, H), read and written
  T* dgates_x = nullptr;   // (now, G*H)
  T* dgates_h = nullptr;   // (now, G*H), written where the cell tells the two apart
  T* hidden = nullptr;     // (now, H): h before the projection, written where there is one
  bool linear = false;
};

// dL/dh of kVector values: what was carried, the product, and what comes from above.
template <int kVector, class T>
RNN_EXT_DEVICE void gather_dh(const CellBackward<T>& p, int64_t b, int64_t column,
                              Compute<T> (&dh)[kVector]) {
  using C = Compute<T>;
  load_values<C, kVector>(p.carry + b * p.state_size + column, dh);
  C other[kVector];
  if (b < p.earlier) {
    load_values<C, kVector>(p.product + b * p.state_size + column, other);
#pragma unroll
    for (int v = 0; v < kVector; ++v) dh[v] += other[v];
  }
  if (b < p.now && p.dy) {
    load_values<T, kVector>(p.dy + b * p.dy_stride + column, other);
#pragma unroll
    for (int v = 0; v < kVector; ++v) dh[v] += other[v];
  }
}

// After the last position, and with a projection before the cell's kernel: finishes dL/dh. Rows
// that have no step any more keep it as their dL/dh_0.
template <class T, int kVector>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void state_backward_kernel(
    const RNN_EXT_GRID_CONSTANT CellBackward<T> p) {
  using C = Compute<T>;
  const ThreadRange range = thread_range();
  const int64_t vectors = p.state_size / kVector, rows = p.earlier > p.now ? p.earlier : p.now;
  for (int64_t i = range.first; i < rows * vectors; i += range.step) {
    const int64_t b = i / vectors, column = i % vectors * kVector;
    C dh[kVector];
    gather_dh<kVector>(p, b, column, dh);
    if (b < p.now) {
      store_values<T, kVector>(p.dhidden + b * p.state_size + column, dh);
#pragma unroll
      for (int v = 0; v < kVector; ++v) dh[v] = C(0);  // all of it passes through W_hr
    }
    store_values<C, kVector>(p.carry + b * p.state_size + column, dh);
  }
}

template <class Cell, class T, int kVector>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void cell_backward_kernel(
    const RNN_EXT_GRID_CONSTANT CellBackward<T> p) {
  using C = Compute<T>;
  constexpr int kGates = Cell::kNumGates, kSaved = Cell::kNumSaved;
  const ThreadMath<C> math{p.linear};
  const ThreadRange range = thread_range();
  const bool project = p.dh != nullptr;
  const int64_t H = p.hidden_size, vectors = H / kVector;
  const int64_t rows = !project && p.earlier > p.now ? p.earlier : p.now;
  for (int64_t i = range.first; i < rows * vectors; i += range.step) {
    const int64_t b = i / vectors, unit = i % vectors * kVector, at = b * H + unit;
    C dh[kVector];
    if (project)
      load_values<C, kVector>(p.dh + at, dh);
    else
      gather_dh<kVector>(p, b, unit, dh);
    if (b >= p.now) {  // on its way out: what is left is dL/dh_0
      store_values<C, kVector>(p.carry + at, dh);
      continue;
    }
    C saved[kSaved + 1][kVector], h[kVector] = {}, h_previous[kVector] = {}, dc[kVector] = {};
#pragma unroll
    for (int k = 0; k < kSaved; ++k)
      load_values<C, kVector>(p.reserve + (b * kSaved + k) * padded(H) + unit, saved[k]);
    if (Cell::kReadsOutput) load_values<T, kVector>(p.y + b * p.y_stride + unit, h);
    if (Cell::kReadsPreviousOutput) {
      if (b < p.previous)
        load_values<T, kVector>(p.y_previous + b * p.y_stride + unit, h_previous);
      else if (p.h_0)
        load_values<T, kVector>(p.h_0 + at, h_previous);
    }
    if (Cell::kHasCellState) load_values<C, kVector>(p.dc + at, dc);
    C dx[kGates][kVector], dr[kGates][kVector], carry[kVector], output[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      C one_saved[kSaved + 1], one_dx[kGates], one_dr[kGates];
#pragma unroll
      for (int k = 0; k < kSaved; ++k) one_saved[k] = saved[k][v];
      UnitBackward<C> u{h[v], h_previous[v], dh[v], dc[v], C(0)};
      Cell::backward(math, one_saved, u, one_dx, one_dr);
      if constexpr (Cell::kHasCellState) output[v] = Cell::output(math, one_saved);
      carry[v] = u.dh_prev;
      dc[v] = u.dc;
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        dx[g][v] = one_dx[g];
        dr[g][v] = Cell::kSplitsGradient ? one_dr[g] : one_dx[g];
      }
    }
    if (!project) store_values<C, kVector>(p.carry + at, carry);
    if (Cell::kHasCellState) store_values<C, kVector>(p.dc + at, dc);
    if constexpr (Cell::kHasCellState)
      if (project) store_values<T, kVector>(p.hidden + at, output);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const int64_t gate = b * (kGates * H) + g * H + unit;
      store_values<T, kVector>(p.dgates_x + gate, dx[g]);
      if (Cell::kSplitsGradient) store_values<T, kVector>(p.dgates_h + gate, dr[g]);
    }
  }
}

// --- Moving and summing
// ---------------------------------------------------------------------------

// to = from, or zeros without a from.
template <class To, class From>
struct Convert {
  To* to = nullptr;
  const From* from = nullptr;
  int64_t count = 0;
};
template <class To, class From>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void convert_kernel(Convert<To, From> p) {
  const ThreadRange range = thread_range();
  for (int64_t i = range.first; i < p.count; i += range.step)
    p.to[i] = from_compute<To>(p.from ? Compute<To>(to_compute(p.from[i])) : Compute<To>(0));
}

// A few entries of a table from the host, which travel among the kernel's arguments: the copy needs
// no memory of the host that would have to outlive the call.
inline constexpr int kTableEntries = 256;
template <class V>
struct TableEntries {
  V* to = nullptr;
  int count = 0;
  V values[kTableEntries];
};
template <class V>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void fill_table_kernel(
    const RNN_EXT_GRID_CONSTANT TableEntries<V> p) {
  static_assert(kTableEntries == kThreads);
  const int i = thread_index();
  if (i < p.count) p.to[i] = p.values[i];
}

// Rows of a (T, B, width) view to or from a dense array in time order, of the steps [begin, end).
template <class T>
struct MoveRows {
  SequenceShape shape;  // with the device's tables
  int64_t begin = 0, end = 0, width = 0;
  StepRows<const T> from;  // gathers into `dense`, else
  StepRows<T> to;          // scatters from it
  T* dense = nullptr;      // (rows of the steps, width)
};
template <class T>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void move_rows_kernel(
    const RNN_EXT_GRID_CONSTANT MoveRows<T> p) {
  const ThreadRange range = thread_range();
  const int64_t count = (p.end - p.begin) * p.shape.batch * p.width;
  const int64_t base = p.shape.first_row(p.begin);
  for (int64_t i = range.first; i < count; i += range.step) {
    const int64_t column = i % p.width, row = i / p.width;
    const int64_t b = row % p.shape.batch, t = p.begin + row / p.shape.batch;
    if (b >= p.shape.active(t)) continue;
    T& dense = p.dense[(p.shape.first_row(t) + b - base) * p.width + column];
    if (p.from.data)
      dense = p.from.at(p.shape, t, b)[column];
    else
      p.to.at(p.shape, t, b)[column] = dense;
  }
}

// h_{t-1} of every row in time order, in the direction's own order: an earlier output or h_0.
template <class T>
struct PreviousOutputs {
  SequenceShape shape;
  int direction = 0;
  int64_t width = 0;  // R
  StepRows<const T> y;
  const T* h_0 = nullptr;  // (B, R), null means zeros
  T* previous = nullptr;   // (N, R)
};
template <class T>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void previous_outputs_kernel(
    const RNN_EXT_GRID_CONSTANT PreviousOutputs<T> p) {
  const ThreadRange range = thread_range();
  const int64_t R = p.width, count = p.shape.steps * p.shape.batch * R;
  for (int64_t i = range.first; i < count; i += range.step) {
    const int64_t column = i % R, b = i / R % p.shape.batch, t = i / R / p.shape.batch;
    if (b >= p.shape.active(t)) continue;
    const int64_t before = p.direction == 0 ? t - 1 : t + 1;
    const bool inside = before >= 0 && before < p.shape.steps && b < p.shape.active(before);
    p.previous[(p.shape.first_row(t) + b) * R + column] =
        inside  ? p.y.at(p.shape, before, b)[p.direction * R + column]
        : p.h_0 ? p.h_0[b * R + column]
                : from_compute<T>(0);
  }
}

// Sums of columns in two stages: parts of the rows, each in order, then the parts in order.
template <class T>
struct ColumnSums {
  const T* values = nullptr;  // (rows, columns)
  int64_t rows = 0, columns = 0, parts = 0;
  Compute<T>* sums = nullptr;  // (parts, columns)
  T* first = nullptr;          // (columns): the results, either may be null
  T* second = nullptr;
};
template <class T>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void column_parts_kernel(ColumnSums<T> p) {
  const ThreadRange range = thread_range();
  const int64_t size = blocks_of(p.rows, p.parts);
  for (int64_t i = range.first; i < p.parts * p.columns; i += range.step) {
    const int64_t part = i / p.columns, column = i % p.columns;
    const int64_t begin = part * size, end = begin + size < p.rows ? begin + size : p.rows;
    Compute<T> sum = 0;
    for (int64_t r = begin; r < end; ++r) sum += to_compute(p.values[r * p.columns + column]);
    p.sums[i] = sum;
  }
}
template <class T>
RNN_EXT_KERNEL RNN_EXT_LAUNCH_BOUNDS(kThreads, 1) void column_totals_kernel(ColumnSums<T> p) {
  const ThreadRange range = thread_range();
  for (int64_t column = range.first; column < p.columns; column += range.step) {
    Compute<T> sum = 0;
    for (int64_t part = 0; part < p.parts; ++part) sum += p.sums[part * p.columns + column];
    if (p.first) p.first[column] = from_compute<T>(sum);
    if (p.second) p.second[column] = from_compute<T>(sum);
  }
}

}  // namespace rnn_ext::cuda
