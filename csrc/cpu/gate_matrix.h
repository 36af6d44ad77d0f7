// The weights of all gates as one matrix of products.
#pragma once

#include "product.h"

namespace rnn_ext::RNN_EXT_ISA {

// A gate matrix with its bias, in the two forms it can be used in: panels, or as it is.
template <class P, int kGates>
struct GateMatrix {
  using T = typename P::Value;
  using Element = typename P::Element;

  GateColumns<T, kGates> columns;
  int64_t depth;
  const T* weights;  // (G*H, depth), leading dimension ld
  int64_t ld;
  T* bias;                        // (width) in panel order
  const T* plain_bias = nullptr;  // (G*H), where weights and it are used as they are

  int64_t size() const { return columns.width() * elements<P>(depth); }  // of all panels
  int64_t panel_offset(int64_t panel) const { return columns.column(panel) * elements<P>(depth); }
  // One of the packed panels, null where there are none.
  const Element* panel(const Element* packed, int64_t i) const {
    return packed ? packed + panel_offset(i) : nullptr;
  }
  // Panel `next`, which is likely to be read after panel i: null where it is none or a smaller one.
  const Element* panel_ahead(const Element* packed, int64_t i, int64_t next) const {
    if (next < 0 || next >= columns.panels() || columns.vectors(next) < columns.vectors(i))
      return nullptr;
    return panel(packed, next);
  }

  // A panel's part of a (G*H) row in panel order, zeros where there is none.
  void load_row(int64_t panel, const T* plain, T* to) const {
    for_vectors(panel, [&](int v, int64_t row, int64_t count) {
      store(to + columns.column(panel) + v * kLanes<T>,
            plain ? load_upto(plain + row, count) : Vec<T>{});
    });
  }

  void pack(int64_t panel, Element* to) const {
    for_vectors(panel, [&](int v, int64_t row, int64_t count) {
      pack_transposed<P>(weights + row * ld, ld, count, depth, to + v * kLanes<T>,
                         columns.vectors(panel) * kLanes<T>);
    });
  }

  // out (rows, width of the panel) = bias + a * W^T. `packed` is the panel, or null to use the
  // weights as they are: rows of a must then be zero up to padded(depth). `ahead`: as in
  // multiply_panel.
  void multiply(int64_t panel, const Element* packed, int64_t rows, const Element* a,
                int64_t row_stride, T* out, int64_t out_stride,
                const Element* ahead = nullptr) const {
    const T* init = bias + columns.column(panel);
    if (packed) {
      multiply_panel<P>(columns.vectors(panel), rows, elements<P>(depth), {a, row_stride}, packed,
                        init, 0, out, out_stride, ahead);
    } else if constexpr (P::kPerElement == 1) {
      for_vectors(panel, [&](int v, int64_t row, int64_t count) {
        multiply_unpacked<T>(count, rows, depth, a, row_stride, weights + row * ld, ld,
                             plain_bias ? plain_bias + row : init + v * kLanes<T>,
                             out + v * kLanes<T>, out_stride);
      });
    }
  }

 private:
  // visit(vector of the panel, first weight row, rows that exist)
  template <class Visit>
  void for_vectors(int64_t panel, Visit&& visit) const {
    const int unit_vectors = columns.unit_vectors(panel);
    for (int g = 0; g < kGates; ++g) {
      for (int u = 0; u < unit_vectors; ++u) {
        const int64_t unit = columns.first_unit(panel) + u * kLanes<T>;
        const int64_t rest = columns.hidden_size - unit;
        visit(g * unit_vectors + u, g * columns.hidden_size + unit,
              rest < kLanes<T> ? rest : kLanes<T>);
      }
    }
  }
};

}  // namespace rnn_ext::RNN_EXT_ISA
