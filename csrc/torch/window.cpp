// rnn_ext::recurrent_window_backward: the backward of rnn_ext::recurrent in which the gradient of
// the loss at every step flows back through a window of steps only.
#include <torch/library.h>

#include "cpu_backend.h"
#include "layers.h"

namespace rnn_ext {
namespace {

// The gate gradients of all layers and directions, from the chains of all steps.
template <class T>
void run_chains(WindowCall<T>& call, std::vector<WindowLayer<T>>& layers) {
  call.layers = layers.data();
  call.num_layers = int64_t(layers.size());
  const Threads threads = threads_of_call();
  WindowPlan plan = plan_window(call, threads.granted);
  plan.stands_in = threads.granted < threads.offered && plan.threads == 1 &&
                   plan_window(call, threads.offered).threads > 1;
  const c10::DataPtr workspace = pooled_workspace(workspace_bytes(call, plan));
  run(call, plan, workspace.get(), run_on_torch_threads);
}

// As backward_layers.
template <class T>
std::vector<at::Tensor> window_backward(const Problem& p, const Inputs& inputs,
                                        const at::Tensor& output_, const at::Tensor& reserve,
                                        const BackwardArguments& arguments, int64_t window) {
  const Options& o = p.options;
  const std::array<at::Tensor, 3>& grads = arguments.grads;
  const Wanted& wanted = arguments.wanted;
  const at::ScalarType dtype = inputs.input.scalar_type(), element = at::toOpMathType(dtype);
  const Operands in(inputs, element);
  const int64_t R = p.shape.state_size(), H = p.shape.hidden_size, B = p.shape.batch;
  const int64_t L = o.num_layers, D = o.directions(), N = p.shape.rows();
  const at::Tensor output = readable(output_, element);
  const at::Tensor dy = grads[0].defined() ? readable(grads[0], element) : at::Tensor();
  const std::optional<at::Tensor> dh_n = dense(grads[1], element), dc_n = dense(grads[2], element);

  std::vector<at::Tensor> results;
  const auto result = [&](bool asked, at::IntArrayRef sizes) {
    results.push_back(pooled_empty(asked ? sizes : at::IntArrayRef{0}, element));
    if (B == 0) results.back().zero_();
    return asked ? mutable_data<T>(results.back()) : nullptr;
  };
  T* dx = result(wanted.state[0], inputs.input.sizes());
  T* dh_0 = result(wanted.state[1], {L * D, B, R});
  T* dc_0 = result(wanted.state[2] && o.is_lstm(), {L * D, B, H});
  std::vector<T*> dparams;
  for (size_t i = 0; i < in.params.size(); ++i)
    dparams.push_back(result(wanted.params[i], in.params[i].sizes()));

  const T* saved = const_data<T>(reserve);
  const auto y_of = [&](int64_t layer) {
    return layer == L - 1 ? step_rows<const T>(p, const_data<T>(output), output.strides())
                          : dense_rows<const T>(p, saved + p.layer_output_offset(layer));
  };
  const int64_t gate_rows = num_gates(o.cell) * H;
  std::vector<at::Tensor> memory;  // of the sums
  const auto sums = [&](int64_t width) {
    memory.push_back(pooled_empty({N, width}, element));
    return mutable_data<T>(memory.back());
  };
  std::vector<KnownGradients<T>> known(size_t(L * D));
  for (int d = 0; B > 0 && d < D; ++d) {
    WindowCall<T> call;
    call.shape = p.shape;
    call.shape.directions = 1;
    call.reversed = d == 1;
    call.window = window;
    call.linear_activations = linear_activations();
    if (dy.defined()) call.dy = step_rows<const T>(p, const_data<T>(dy) + d * R, dy.strides());
    std::vector<WindowLayer<T>> layers(static_cast<size_t>(L));
    for (int64_t layer = 0; layer < L; ++layer) {
      const int64_t slot = layer * D + d;
      WindowLayer<T>& l = layers[size_t(layer)];
      l.weights = weights_of<T>(in.params, p.param(layer, d));
      l.reserve = saved + p.saved_offset(layer, d);
      l.y = y_of(layer);
      l.y.data += d * R;
      if (o.drops() && layer < L - 1) l.mask = saved + p.mask_offset(layer);
      l.h_0 = slice<T>(in.h_0, slot);
      l.dh_n = slice<T>(dh_n, slot);
      l.dc_n = slice<T>(dc_n, slot);
      l.dgx = sums(gate_rows);
      l.dgh = o.cell == CellKind::kGru ? sums(gate_rows) : l.dgx;
      if (p.shape.proj_size > 0) l.dh = sums(R);
      if (dh_0) l.dh_0 = dh_0 + slot * B * R;
      if (dc_0) l.dc_0 = dc_0 + slot * B * H;
      known[size_t(slot)] = {l.dgx, l.dgh, l.dh};
    }
    run_chains(call, layers);
  }

  for (int64_t layer = 0; B > 0 && layer < L; ++layer) {
    BackwardCall<T> call;
    call.shape = p.layer_shape(layer);
    call.linear_activations = linear_activations();
    at::Tensor dropped;
    if (layer == 0) {
      call.x = step_rows<const T>(p, const_data<T>(in.input), in.input.strides());
      if (dx) call.dx = step_rows<T>(p, dx, results[0].strides());
    } else {
      const T* x = saved + p.layer_output_offset(layer - 1);
      if (o.drops()) {
        dropped = reserve.narrow(0, p.layer_output_offset(layer - 1), p.layer_output_size()) *
                  reserve.narrow(0, p.mask_offset(layer - 1), p.layer_output_size());
        x = const_data<T>(dropped);
      }
      call.x = dense_rows<const T>(p, x);
    }
    call.y = y_of(layer);
    for (int d = 0; d < D; ++d) {
      const int64_t slot = layer * D + d;
      const ParamIndex index = p.param(layer, d);
      const auto gradient = [&](int64_t i) { return i < 0 ? nullptr : dparams[size_t(i)]; };
      call.weights[d] = weights_of<T>(in.params, index);
      call.h_0[d] = slice<T>(in.h_0, slot);
      call.reserve[d] = saved + p.saved_offset(layer, d);
      call.known[d] = known[size_t(slot)];
      call.gradients[d] = {gradient(index.w_ih), gradient(index.w_hh), gradient(index.b_ih),
                           gradient(index.b_hh), gradient(index.w_hr)};
    }
    run_call(call, plan_on<T>(threads_of_call(), call.shape, true, /*bf16_products=*/false));
  }
  if (dtype != element)
    for (at::Tensor& t : results) t = t.to(dtype);
  return results;
}

std::vector<at::Tensor> recurrent_window_backward_cpu(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_h_n,
    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
    const std::optional<at::Tensor>& h_0, const std::optional<at::Tensor>& c_0,
    at::TensorList params, const at::Tensor& output, const at::Tensor& reserve, int64_t cell,
    bool has_biases, int64_t num_layers, bool bidirectional, bool batch_first, double dropout,
    bool training, int64_t window, c10::List<bool> output_mask) {
  const Inputs inputs{input, std::nullopt, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
  TORCH_CHECK_VALUE(window >= 1, "the window must have at least one step, got ", window);
  TORCH_CHECK_VALUE(num_layers == 1 || !bidirectional,
                    "a window of steps has no single meaning for several bidirectional layers");
  const Problem problem(inputs, options);
  const BackwardArguments arguments(problem, inputs, output, reserve,
                                    {grad_output, grad_h_n, grad_c_n}, output_mask);
  if (at::toOpMathType(input.scalar_type()) == at::kDouble)
    return window_backward<double>(problem, inputs, output, reserve, arguments, window);
  return window_backward<float>(problem, inputs, output, reserve, arguments, window);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  // Gradients as recurrent_backward returns them, of padded data: that of the loss at step t
  // (output[t]; h_n and c_n: the last step) flows back through `window` steps, in each direction's
  // own order, and into h_0 and c_0 where the window reaches them.
  m.def(
      "recurrent_window_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor input, Tensor? h_0, Tensor? c_0, Tensor[] params, Tensor output, Tensor reserve, "
      "int cell, bool has_biases, int num_layers, bool bidirectional, bool batch_first, "
      "float dropout, bool training, int window, bool[] output_mask) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("recurrent_window_backward", recurrent_window_backward_cpu);
}

}  // namespace rnn_ext
