// The CUDA engine as the outside sees it: free of torch. Everything is queued on the caller's
// stream; nothing is allocated, waited for or kept between calls, so a call may be captured into a
// CUDA graph. (The tables of packed data are read from the host while the call is queued.)
#pragma once

#include "plan.h"
#include "types.h"

namespace rnn_ext::cuda {

// C (m, n) = op(A) (m, k) op(B) (k, n), or C += the same. All row by row with the given strides;
// transposed operands are stored as (k, m) and (n, k). Sums are kept in the compute type.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  int64_t lda = 0;
  bool transpose_a = false;
  const void* b = nullptr;
  int64_t ldb = 0;
  bool transpose_b = false;
  void* c = nullptr;
  int64_t ldc = 0;
  bool accumulate = false;
  DType type = DType::kFloat32;  // of A and B
  bool wide = false;             // is C of the compute type? Else of `type`
};

// Who multiplies: cuBLAS, by way of the torch layer; plain loops in the tests.
struct Multiplier {
  Status (*multiply)(void* context, const Gemm& gemm, Stream stream) = nullptr;
  void* context = nullptr;
};

template <class T>
using Forward = ForwardCall<T, Compute<T>>;
template <class T>
using Backward = BackwardCall<T, Compute<T>>;

// T is float, double, Float16 or BFloat16. shape: steps >= 1, batch >= 1. Pointers of a call are
// the device's but for shape.batch_sizes and shape.offsets; h_n and for the LSTM c_n must be given.
template <class T>
PlanInput plan_input(const Forward<T>& call, const Device& device);
template <class T>
PlanInput plan_input(const Backward<T>& call, const Device& device);

// `workspace`: plan.workspace_bytes, 256-byte aligned, uninitialized. Returns the first error of a
// launch; nothing is queued after it.
template <class T>
Status run(const Forward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream);
template <class T>
Status run(const Backward<T>& call, const PlanInput& input, const Plan& plan, void* workspace,
           const Multiplier& multiplier, Stream stream);

}  // namespace rnn_ext::cuda
