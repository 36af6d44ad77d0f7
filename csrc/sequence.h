// The plain structs that describe one layer of one call: the only language the torch layer and the
// engines share. No torch, no STL containers: a kernel unit compiled for one instruction set may
// include this header.
//
// Letters used in shapes, here and everywhere: T steps, B batch rows, N rows over all steps
// (T*B, or the sum of batch_sizes for packed data), I input size, H hidden size, R width of the
// recurrent state h (the projection size where there is one, else H), G gates of the cell,
// D directions (1 or 2). Strides count elements, not bytes; the last dimension has stride 1.
#pragma once

#include <cstddef>
#include <cstdint>

// Forced inline: these are called from units compiled for different instruction sets, and the
// linker must not be given one unit's copy to use for all. Kernels of a GPU call them, too.
#if defined(__CUDACC__)
#define RNN_EXT_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define RNN_EXT_SHARED_INLINE inline __attribute__((always_inline))
#endif

namespace rnn_ext {

enum class CellKind : int { kRnnTanh = 0, kRnnRelu = 1, kLstm = 2, kGru = 3 };
inline constexpr int kNumCellKinds = 4;

// Narrower type to which every h is rounded before it is fed back. The arithmetic is the struct's
// own type (f32) throughout; this is what makes a bf16 or f16 model exact in its semantics.
enum class Rounding : int { kNone = 0, kBFloat16 = 1, kFloat16 = 2 };

inline constexpr int kMaxDirections = 2;

// Arrays owned by the engine pad their innermost dimension to this many elements, for every
// instruction set alike: a reserve written under one is readable under another.
inline constexpr int64_t kPad = 16;
RNN_EXT_SHARED_INLINE constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct SequenceShape {
  CellKind cell = CellKind::kLstm;
  int64_t steps = 0;        // T
  int64_t batch = 0;        // B (of the widest step)
  int64_t input_size = 0;   // I
  int64_t hidden_size = 0;  // H
  int64_t proj_size = 0;    // P, 0 without projection
  int directions = 1;       // D
  // Packed data: rows active at each step (T, non-increasing, >= 1) and the first row of each
  // step (T + 1). Both null for padded data.
  const int64_t* batch_sizes = nullptr;
  const int64_t* offsets = nullptr;
  // Padded data whose rows end at steps of their own: batch_sizes and offsets count the rows that
  // are active, longest first, and the b-th of them is row order[b] of every tensor (B). Null where
  // rows stand as they are counted.
  const int64_t* order = nullptr;

  RNN_EXT_SHARED_INLINE int64_t state_size() const {
    return proj_size > 0 ? proj_size : hidden_size;
  }  // R
  RNN_EXT_SHARED_INLINE int64_t active(int64_t t) const {
    return batch_sizes ? batch_sizes[t] : batch;
  }
  // Row of (step t, batch row 0) when all rows are counted in time order.
  RNN_EXT_SHARED_INLINE int64_t first_row(int64_t t) const {
    return offsets ? offsets[t] : t * batch;
  }
  RNN_EXT_SHARED_INLINE int64_t rows() const { return first_row(steps); }  // N
  // Where the b-th row stands in tensors that have a row for each.
  RNN_EXT_SHARED_INLINE int64_t row(int64_t b) const { return order ? order[b] : b; }
};

RNN_EXT_SHARED_INLINE constexpr int num_gates(CellKind cell) {
  return cell == CellKind::kLstm ? 4 : cell == CellKind::kGru ? 3 : 1;
}

// Values kept per hidden unit, row and direction between forward and backward.
RNN_EXT_SHARED_INLINE constexpr int num_saved(CellKind cell) {
  return cell == CellKind::kLstm ? 5 : cell == CellKind::kGru ? 4 : 0;
}

// A (T, B, width) view: padded data address a row by (t, b), packed data by its row number.
template <class T>
struct StepRows {
  T* data = nullptr;
  int64_t step_stride = 0;  // unused for packed data
  int64_t row_stride = 0;

  RNN_EXT_SHARED_INLINE T* at(const SequenceShape& shape, int64_t t, int64_t b) const {
    return shape.offsets && !shape.order ? data + (shape.offsets[t] + b) * row_stride
                                         : data + t * step_stride + shape.row(b) * row_stride;
  }
};

template <class T>
struct DirectionWeights {
  const T* w_ih = nullptr;  // (G*H, I)
  const T* w_hh = nullptr;  // (G*H, R)
  const T* b_ih = nullptr;  // (G*H), null without bias
  const T* b_hh = nullptr;  // (G*H), null without bias
  const T* w_hr = nullptr;  // (P, H), null without projection
  int64_t ld_ih = 0, ld_hh = 0, ld_hr = 0;
};

// What a call may ask for beyond the plain recurrence. The CPU engine knows these; all of them may
// stay as they are. Data is padded.
template <class T>
struct Features {
  // An episode begins at step t: direction 0 comes to it, and direction 1 goes on to step t-1, not
  // with the state before but with the reset state.
  StepRows<const bool> resets;            // (T, B)
  const T* reset_h[kMaxDirections] = {};  // (B, R) contiguous, null means zeros
  const T* reset_c[kMaxDirections] = {};  // (B, H)
  // Factors of the h_{t-1} that the recurrent product reads (variational dropout).
  const T* hidden_mask[kMaxDirections] = {};  // (B, R) contiguous
  // Zoneout (Krueger et al. 2017): h_t = h~ + z * (h_{t-1} - h~), c_t likewise, where h~ comes from
  // the c~ before it. An RNN then keeps its h~ in the reserve, one value per unit.
  StepRows<const T> zoneout_h, zoneout_c;  // (T, B, D*H)
  // Layer normalization inside the cell (Ba et al. 2016): of a row's W_ih x_t and W_hh h_{t-1}
  // each, the G*H values become (v - mean) / sqrt(variance + eps) * gain before the bias is added,
  // and the LSTM's output reads c_t normalized likewise, with norm_c and its bias; c_t itself stays
  // what it is.
  const T* norm_ih[kMaxDirections] = {};      // (G*H), null: no normalization
  const T* norm_hh[kMaxDirections] = {};      // (G*H)
  const T* norm_c[kMaxDirections] = {};       // (H), LSTM only
  const T* norm_c_bias[kMaxDirections] = {};  // (H)
  double norm_eps = 0;
  // GRU: the reset gate before the product (GruResetBefore in cells/gru.h).
  bool reset_before = false;
  // Gradients stop between every so many positions of a direction's own order; 0: nowhere.
  int64_t detach_steps = 0;
  // The part of the sequence that a call runs, in positions of the directions' own order: it begins
  // at a whole number of the plan's chunks. Forward starts from h_0, c_0 there and leaves the state
  // at the end in h_n, c_n.
  int64_t first_position = 0, last_position = INT64_MAX;
  // Forward only: the outputs are there already, and y is a place for one step's.
  bool again = false;

  RNN_EXT_SHARED_INLINE int64_t end(const SequenceShape& shape) const {
    return last_position < shape.steps ? last_position : shape.steps;
  }
  // Does a step have a second part, which reads whole rows of what the first one makes?
  RNN_EXT_SHARED_INLINE bool two_parts() const { return norm_ih[0] || reset_before; }
  // Values kept per hidden unit, row and direction between forward and backward: the cell's (an
  // RNN's own output where zoneout mixes it), then both sides' normalized products and, in the
  // place of a value per unit, the statistics.
  RNN_EXT_SHARED_INLINE int kept_of_cell(CellKind cell) const {
    return num_saved(cell) > 0 ? num_saved(cell) : zoneout_h.data || norm_ih[0] ? 1 : 0;
  }
  RNN_EXT_SHARED_INLINE int kept(CellKind cell) const {
    return kept_of_cell(cell) + (norm_ih[0] ? 2 * num_gates(cell) + 1 : 0);
  }
  // Does direction d come to the b-th row's step t, where it is active, with the reset state?
  RNN_EXT_SHARED_INLINE bool starts_anew(const SequenceShape& shape, int d, int64_t t,
                                         int64_t b) const {
    if (!resets.data) return false;
    if (d == 0) return *resets.at(shape, t, b);
    return t + 1 < shape.steps && b < shape.active(t + 1) && *resets.at(shape, t + 1, b);
  }
};

// T is the type of the tensors, Saved the one that the reserve keeps: wider where T is narrow.
template <class T, class Saved = T>
struct ForwardCall {
  SequenceShape shape;
  Rounding rounding = Rounding::kNone;
  bool bf16_products = false;       // round what products read to bfloat16, if that is faster here
  bool linear_activations = false;  // tests only: see cpu/activations.h
  DirectionWeights<T> weights[kMaxDirections];
  StepRows<const T> x;                  // (T, B, I)
  StepRows<T> y;                        // (T, B, D*R), direction d in columns d*R..
  const T* h_0[kMaxDirections] = {};    // (B, R) contiguous, null means zeros
  const T* c_0[kMaxDirections] = {};    // (B, H) likewise
  T* h_n[kMaxDirections] = {};          // (B, R) contiguous
  T* c_n[kMaxDirections] = {};          // (B, H)
  Saved* reserve[kMaxDirections] = {};  // (N, num_saved, padded(H)), null in inference
  Features<T> features;
  StepRows<T> cells;                               // (T, B, D*H): every c_t, null: not asked for
  int64_t reserve_first_row[kMaxDirections] = {};  // of N, where the reserve holds but a part
};

template <class T>
struct DirectionGradients {
  // Contiguous, written not accumulated; null where the gradient is not asked for.
  T* w_ih = nullptr;  // (G*H, I)
  T* w_hh = nullptr;  // (G*H, R)
  T* b_ih = nullptr;  // (G*H)
  T* b_hh = nullptr;  // (G*H)
  T* w_hr = nullptr;  // (P, H)
  T* h_0 = nullptr;   // (B, R)
  T* c_0 = nullptr;   // (B, H)
  // Of Features::reset_h and reset_c.
  T* reset_h = nullptr;  // (B, R)
  T* reset_c = nullptr;  // (B, H)
  // Of Features::norm_ih, norm_hh, norm_c and norm_c_bias.
  T* norm_ih = nullptr;      // (G*H)
  T* norm_hh = nullptr;      // (G*H)
  T* norm_c = nullptr;       // (H)
  T* norm_c_bias = nullptr;  // (H)
};

// Where the gradients of the gates are to be left, rows in time order, for products other than
// those of DirectionGradients. CPU only, in a call of one chunk.
template <class T>
struct GateGradients {
  T* dgx = nullptr;  // (N, G*H): of the input side, null: not asked for
  T* dgh = nullptr;  // (N, G*H): of the recurrent side, where the cell tells them apart
};

// Gradients of the gates that are known before backward begins, rows in time order; with them it is
// only the products over all rows, and writes no gradients of h_0 and c_0. CPU only.
template <class T>
struct KnownGradients {
  const T* dgx = nullptr;  // (N, G*H): of the input side, null: not known
  const T* dgh = nullptr;  // (N, G*H): of the recurrent side; read if the cell tells them apart
  const T* dh = nullptr;   // (N, P): dL/dh after the projection, only with one
  int64_t row_stride = 0;  // between rows of dgx and dgh, 0: there is nothing between them
};

template <class T, class Saved = T>
struct BackwardCall {
  SequenceShape shape;
  bool bf16_products = false;  // as in forward
  bool linear_activations = false;
  DirectionWeights<T> weights[kMaxDirections];
  StepRows<const T> x;                        // (T, B, I)
  StepRows<const T> y;                        // (T, B, D*R), as forward wrote it
  StepRows<const T> dy;                       // (T, B, D*R), null data means zeros
  StepRows<T> dx;                             // (T, B, I), null data: not asked for
  const T* h_0[kMaxDirections] = {};          // (B, R), null means zeros
  const T* dh_n[kMaxDirections] = {};         // (B, R), null means zeros
  const T* dc_n[kMaxDirections] = {};         // (B, H), null means zeros
  const Saved* reserve[kMaxDirections] = {};  // (N, num_saved, padded(H)), read only
  DirectionGradients<T> gradients[kMaxDirections];
  KnownGradients<T> known[kMaxDirections];  // of all directions or none
  Features<T> features;
  StepRows<const T> dcells;                        // (T, B, D*H), null data means zeros
  int64_t reserve_first_row[kMaxDirections] = {};  // as in forward
  GateGradients<T> gates[kMaxDirections];
};

}  // namespace rnn_ext
