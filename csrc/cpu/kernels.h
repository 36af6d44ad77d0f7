// The table through which the rest of the engine calls the kernels of one instruction set.
#pragma once

#include "../sequence.h"
#include "plan.h"
#include "team.h"
#include "window.h"

namespace rnn_ext {

template <class T>
struct KernelsOf {
  size_t (*forward_workspace)(const ForwardCall<T>&, const Plan&);
  void (*forward)(const ForwardCall<T>&, const Plan&, void* workspace, Member&);
  // Only the chunk that begins at a position; chunks in order.
  void (*forward_chunk)(const ForwardCall<T>&, const Plan&, void* workspace, Member&, int64_t);
  size_t (*backward_workspace)(const BackwardCall<T>&, const Plan&);
  // Positions [from, to) of the way back; all of them in order, in one run or in several.
  void (*backward)(const BackwardCall<T>&, const Plan&, void* workspace, Member&, int64_t from,
                   int64_t to);
  // Null where products are of bfloat16.
  size_t (*window_workspace)(const WindowCall<T>&, const WindowPlan&);
  void (*window)(const WindowCall<T>&, const WindowPlan&, void* workspace, Member&);
  // Elementwise, for the accuracy tests: y[i] = f(x[i]).
  void (*sigmoid)(const T* x, T* y, int64_t n);
  void (*tanh)(const T* x, T* y, int64_t n);
};

struct Kernels {
  const char* name;
  int vector_bytes;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  // Products of bfloat16 operands; null where the instruction set has none.
  const KernelsOf<float>* bf16_products;
  // Up to how many batch rows they are faster than those of float32.
  int64_t bf16_products_rows = INT64_MAX;
  // Plan::streamed_reserve_bytes
  int64_t streamed_reserve_bytes = INT64_MAX;

  template <class T>
  const KernelsOf<T>& of() const {
    if constexpr (sizeof(T) == 4)
      return f32;
    else
      return f64;
  }
};

// Defined by kernels.cpp, once per instruction set.
namespace scalar {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const KernelsOf<float> kBFloat16Products;
}
namespace amx {
extern const KernelsOf<float> kBFloat16Products;
}

}  // namespace rnn_ext
