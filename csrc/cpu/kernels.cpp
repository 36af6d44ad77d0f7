// Compiled once per instruction set, with RNN_EXT_ISA naming its namespace. Nothing here may
// instantiate inline code that another unit could pick up at link time: no torch, no STL.
#include "kernels.h"

#include "backward.h"
#include "cell_rows.h"
#include "forward.h"
#include "input_projection.h"
#include "layer_norm.h"
#include "reset_before.h"
#include "weight_gradients.h"
#include "window_pass.h"

namespace rnn_ext::RNN_EXT_ISA {
namespace {

// Calls f(Cell{}) with the cell of that kind.
template <class F>
auto with_cell(CellKind kind, F&& f) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return f(RnnCell<false>{});
    case CellKind::kRnnRelu:
      return f(RnnCell<true>{});
    case CellKind::kGru:
      return f(GruCell{});
    case CellKind::kLstm:
      break;
  }
  return f(LstmCell{});
}

template <class P>
size_t forward_workspace(const ForwardCall<Value<P>>& call, const Plan& plan) {
  return with_cell(call.shape.cell, [&](auto cell) {
    return ForwardPass<P, decltype(cell)>(call, plan, nullptr).workspace_bytes;
  });
}

template <class P>
void forward(const ForwardCall<Value<P>>& call, const Plan& plan, void* workspace, Member& team) {
  with_cell(call.shape.cell,
            [&](auto cell) { ForwardPass<P, decltype(cell)>(call, plan, workspace).run(team); });
}

template <class P>
void forward_chunk(const ForwardCall<Value<P>>& call, const Plan& plan, void* workspace,
                   Member& team, int64_t position) {
  with_cell(call.shape.cell, [&](auto cell) {
    ForwardPass<P, decltype(cell)>(call, plan, workspace).run_chunk(team, position);
  });
}

template <class P>
size_t backward_workspace(const BackwardCall<Value<P>>& call, const Plan& plan) {
  return with_cell(call.shape.cell, [&](auto cell) {
    return BackwardPass<P, decltype(cell)>(call, plan, nullptr).workspace_bytes;
  });
}

template <class P>
void backward(const BackwardCall<Value<P>>& call, const Plan& plan, void* workspace, Member& team,
              int64_t from, int64_t to) {
  with_cell(call.shape.cell, [&](auto cell) {
    const BackwardPass<P, decltype(cell)> pass(call, plan, workspace);
    call.known[0].dgx ? pass.run_known(team) : pass.run(team, from, to);
  });
}

template <class T>
size_t window_workspace(const WindowCall<T>& call, const WindowPlan& plan) {
  return with_cell(call.shape.cell, [&](auto cell) {
    return WindowPass<T, decltype(cell)>(call, plan, nullptr).workspace_bytes;
  });
}

template <class T>
void window(const WindowCall<T>& call, const WindowPlan& plan, void* workspace, Member& team) {
  with_cell(call.shape.cell,
            [&](auto cell) { WindowPass<T, decltype(cell)>(call, plan, workspace).run(team); });
}

template <class T, Vec<T> (*kFunction)(Vec<T>)>
void elementwise(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>)
    store_upto(y + i, kFunction(load_upto(x + i, n - i)), n - i);
}

template <class P>
constexpr KernelsOf<Value<P>> table() {
  using T = Value<P>;
  KernelsOf<T> kernels = {forward_workspace<P>,
                          forward<P>,
                          forward_chunk<P>,
                          backward_workspace<P>,
                          backward<P>,
                          nullptr,
                          nullptr,
                          elementwise<T, &sigmoid<T, Vec<T>>>,
                          elementwise<T, &tanh<T, Vec<T>>>};
  if constexpr (P::kPerElement == 1) {
    kernels.window_workspace = window_workspace<T>;
    kernels.window = window<T>;
  }
  return kernels;
}

#define RNN_EXT_STRING(x) #x
#define RNN_EXT_NAME(x) RNN_EXT_STRING(x)

}  // namespace

#if defined(__AVX512BF16__)
// Everything else such a processor takes from avx512.
extern const KernelsOf<float> kBFloat16Products = table<BFloat16Products>();
#else
extern const Kernels kKernels = {RNN_EXT_NAME(RNN_EXT_ISA), kVectorBytes,
                                 table<FullPrecision<float>>(), table<FullPrecision<double>>(),
                                 nullptr};
#endif

}  // namespace rnn_ext::RNN_EXT_ISA
