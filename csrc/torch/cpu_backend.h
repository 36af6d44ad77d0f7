// How the torch layer runs a call on the CPU engine: torch's threads, pooled memory, the precision
// that torch's settings ask for.
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "../cpu/governor.h"
#include "memory.h"
#include "ops.h"

namespace rnn_ext {

// The team of a call is torch's own: one pool of threads in the process, torch.set_num_threads
// honored. Inside somebody else's parallel region at::parallel_for runs inline and starts one
// member only, which does all the work.
inline void run_on_torch_threads(int members, void (*body)(int, void*), void* context) {
  at::parallel_for(0, members, 1, [&](int64_t begin, int64_t) { body(int(begin), context); });
}

struct Threads {
  int offered, granted;
};
inline Threads threads_of_call() {
  const int offered = offered_threads();
  return {offered, offered > 1 ? governor().grant(offered) : 1};
}

// job(i) for 0 <= i < jobs, whole ones shared out over the threads of a call. `work`: the seconds
// that the cost model expects of one thread for all of them.
template <class Job>
void share_out(int64_t jobs, double work, const Job& job) {
  const int threads = int(std::min<int64_t>(threads_of_call().granted, jobs));
  if (threads <= 1) {
    for (int64_t i = 0; i < jobs; ++i) job(i);
    return;
  }
  std::mutex mutex;
  std::exception_ptr error;
  run_jobs(jobs, threads, work, run_on_torch_threads, [&](int64_t i) {
    try {
      job(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

template <class T>
Plan plan_on(Threads threads, const SequenceShape& shape, bool backward, bool bf16_products,
             bool two_parts = false) {
  Plan plan = plan_call<T>(shape, backward, threads.granted, bf16_products, two_parts);
  plan.stands_in =
      threads.granted < threads.offered && plan.threads == 1 &&
      plan_call<T>(shape, backward, threads.offered, bf16_products, two_parts).threads > 1;
  return plan;
}

// Does this call multiply in bfloat16? Models of that type have nothing to round and do so where it
// is faster; for float32 it is the user's choice, torch.backends.mkldnn.rnn.fp32_precision or,
// where that is not set, what torch.set_float32_matmul_precision chose for products ("medium").
inline bool bf16_products(at::ScalarType dtype, int64_t batch) {
  if (dtype != at::kFloat)
    return dtype == at::kBFloat16 && batch <= current_kernels().bf16_products_rows;
  const at::Context& context = at::globalContext();
  using Precision = at::Float32Precision;
  auto precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN);
  // Not set is NONE, and DEFAULT where torch has that: 2.11 has not.
  if (precision != Precision::IEEE && precision != Precision::TF32 && precision != Precision::BF16)
    precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == Precision::BF16;
}

template <class Call>
void run_call(const Call& call, const Plan& plan) {
  const c10::DataPtr workspace = pooled_workspace(workspace_bytes(call, plan));
  rnn_ext::run(call, plan, workspace.get(), run_on_torch_threads);
}

inline Rounding rounding_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Rounding::kBFloat16
         : dtype == at::kHalf   ? Rounding::kFloat16
                                : Rounding::kNone;
}

template <class T>
Wavefront wavefront_of(const Problem& p, at::ScalarType dtype, int threads) {
  const Options& o = p.options;
  if (o.num_layers < 2 || o.drops()) return {};
  std::vector<SequenceShape> shapes;
  for (int64_t layer = 0; layer < o.num_layers; ++layer) shapes.push_back(p.layer_shape(layer));
  return plan_stack<T>(shapes.data(), int(o.num_layers), threads,
                       bf16_products(dtype, shapes[0].batch));
}

// Half precision is widened: the engine computes in float or double throughout.
template <class T>
class CpuBackend {
 public:
  using Element = T;
  using Saved = T;

  static at::ScalarType element_type(at::ScalarType dtype) { return at::toOpMathType(dtype); }
  static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return pooled_empty(sizes, c10::typeMetaToScalarType(options.dtype()));
  }

  CpuBackend(const Problem& problem, at::ScalarType dtype) : problem_(problem), dtype_(dtype) {}

  void run(ForwardCall<T>& call) {
    if (!started_) start();
    call.rounding = rounding_of(dtype_);
    call.bf16_products = bf16_products(dtype_, call.shape.batch);
    if (wave_.threads > 1) {
      waiting_.push_back(call);
      return;
    }
    Plan plan = plan_on<T>(threads_, call.shape, false, call.bf16_products);
    if (wave_.chunk_steps > 0) plan.chunk_steps = wave_.chunk_steps;
    run_call(call, plan);
  }

  // All layers of a stack, by the wavefront that its shapes call for.
  void finish() {
    if (waiting_.empty()) return;
    std::vector<Plan> plans;
    std::vector<c10::DataPtr> memory;
    std::vector<void*> workspaces;
    for (const ForwardCall<T>& call : waiting_) {
      plans.push_back(plan_call<T>(call.shape, false, 1, call.bf16_products));
      plans.back().chunk_steps = wave_.chunk_steps;
      memory.push_back(pooled_workspace(workspace_bytes(call, plans.back())));
      workspaces.push_back(memory.back().get());
    }
    run_stack(waiting_.data(), plans.data(), workspaces.data(), int(waiting_.size()), wave_,
              run_on_torch_threads);
  }

  void run(BackwardCall<T>& call) {
    Plan p = plan(call);
    if (call.gates[0].dgx) p.chunk_steps = call.shape.steps;
    run(call, p);
  }

  // One call by a plan that the caller knows.
  Plan plan(ForwardCall<T>& call) const {
    call.rounding = rounding_of(dtype_);
    return plan_any(call, false);
  }
  Plan plan(BackwardCall<T>& call) const { return plan_any(call, true); }
  template <class Call>
  void run(const Call& call, const Plan& plan) const {
    run_call(call, plan);
  }
  // Backward in parts, [from, to) of the positions each, with one workspace.
  c10::DataPtr workspace(const BackwardCall<T>& call, const Plan& plan) const {
    return pooled_workspace(workspace_bytes(call, plan));
  }
  void run(const BackwardCall<T>& call, const Plan& plan, const c10::DataPtr& workspace,
           int64_t from, int64_t to) const {
    rnn_ext::run(call, plan, workspace.get(), run_on_torch_threads, from, to);
  }

 private:
  template <class Call>
  Plan plan_any(Call& call, bool backward) const {
    call.bf16_products = bf16_products(dtype_, call.shape.batch);
    return plan_on<T>(threads_of_call(), call.shape, backward, call.bf16_products,
                      call.features.two_parts());
  }
  void start() {
    started_ = true;
    threads_ = threads_of_call();
    wave_ = wavefront_of<T>(problem_, dtype_, threads_.granted);
  }

  const Problem& problem_;
  const at::ScalarType dtype_;
  bool started_ = false;
  Threads threads_{1, 1};
  Wavefront wave_;
  std::vector<ForwardCall<T>> waiting_;
};

}  // namespace rnn_ext
