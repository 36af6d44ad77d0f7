// The operators' schemas and their CPU kernels.
#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <pthread.h>
#include <torch/library.h>

#include <atomic>

#include "cpu_backend.h"
#include "layers.h"

namespace rnn_ext {
namespace {

std::atomic<bool> g_linear_activations{false};

// A forked child inherits torch's OpenMP pool without its threads, and a parallel region in it
// waits for them for ever. Whether the parent had started the pool cannot be told, so a child uses
// none.
std::atomic<bool> g_forked{false};
[[maybe_unused]] const int g_watching_forks =
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });

ForwardResult recurrent_cpu(const Inputs& inputs, const Options& options, bool save_reserve) {
  const auto run = [&](const Inputs& one, const ForwardResult* into) {
    const Problem problem(one, options);
    if (at::toOpMathType(one.input.scalar_type()) == at::kDouble)
      return forward_layers<CpuBackend<double>>(problem, one, save_reserve, into);
    return forward_layers<CpuBackend<float>>(problem, one, save_reserve, into);
  };
  if (!has_members(inputs)) return run(inputs, nullptr);
  return members_forward(inputs, options, save_reserve,
                         [&](const Inputs& one, const ForwardResult& into) { run(one, &into); });
}

std::vector<at::Tensor> backward_cpu(const Gradients& grads, const Inputs& inputs,
                                     const at::Tensor& output, const at::Tensor& reserve,
                                     const Options& options, const c10::List<bool>& output_mask,
                                     const std::vector<at::Tensor>* into, int64_t examples) {
  const Problem problem(inputs, options);
  const BackwardArguments arguments(problem, inputs, output, reserve, grads, output_mask);
  if (at::toOpMathType(inputs.input.scalar_type()) == at::kDouble)
    return backward_layers<CpuBackend<double>>(problem, inputs, output, reserve, arguments, into,
                                               examples);
  return backward_layers<CpuBackend<float>>(problem, inputs, output, reserve, arguments, into,
                                            examples);
}

std::vector<at::Tensor> recurrent_backward_cpu(const Gradients& grads, const Inputs& inputs,
                                               const at::Tensor& output, const at::Tensor& reserve,
                                               const Options& options,
                                               const c10::List<bool>& output_mask) {
  if (!has_members(inputs))
    return backward_cpu(grads, inputs, output, reserve, options, output_mask, nullptr, 0);
  return members_backward(grads, inputs, output, reserve, options, output_mask,
                          [&](const Gradients& own, const Inputs& one, const at::Tensor& y,
                              const at::Tensor& kept, const std::vector<at::Tensor>& into) {
                            backward_cpu(own, one, y, kept, options, output_mask, &into, 0);
                          });
}

std::vector<at::Tensor> recurrent_backward_per_example_cpu(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_h_n,
    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
    const std::optional<at::Tensor>& batch_sizes, const std::optional<at::Tensor>& h_0,
    const std::optional<at::Tensor>& c_0, at::TensorList params, const at::Tensor& output,
    const at::Tensor& reserve, int64_t cell, bool has_biases, int64_t num_layers,
    bool bidirectional, bool batch_first, double dropout, bool training,
    c10::List<bool> output_mask, int64_t examples) {
  const Inputs inputs{input, batch_sizes, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
  TORCH_CHECK_NOT_IMPLEMENTED(!options.drops() && !has_members(inputs),
                              "gradients per example with dropout, or of several models");
  const Problem problem(inputs, options);
  const SequenceShape& s = problem.shape;
  TORCH_CHECK_NOT_IMPLEMENTED(s.proj_size == 0, "gradients per example with proj_size");
  bool even = examples > 0 && s.batch % examples == 0;
  for (int64_t t = 0; even && problem.packed && t < s.steps; ++t)
    even = s.active(t) % examples == 0;
  TORCH_CHECK(even, "every step must have as many rows of each example, got ", examples,
              " examples for a batch of ", s.batch);
  return backward_cpu({grad_output, grad_h_n, grad_c_n}, inputs, output, reserve, options,
                      output_mask, nullptr, examples);
}

}  // namespace

BackwardArguments::BackwardArguments(const Problem& p, const Inputs& inputs,
                                     const at::Tensor& output, const at::Tensor& reserve,
                                     const std::array<std::optional<at::Tensor>, 3>& from,
                                     const c10::List<bool>& output_mask)
    : wanted{{}, {}, p} {
  const size_t count = 3 + inputs.params.size();
  TORCH_CHECK(output_mask.size() == count, "output_mask must have ", count, " entries, got ",
              output_mask.size());
  TORCH_CHECK(output.sizes() == at::IntArrayRef(p.output_sizes()), "output must have size ",
              p.output_sizes(), ", got ", output.sizes());
  TORCH_CHECK(reserve.numel() == p.reserve_size(),
              "reserve is not the one of this call's forward: expected ", p.reserve_size(),
              " elements, got ", reserve.numel());
  const auto check_grad = [](const std::optional<at::Tensor>& g, at::IntArrayRef sizes) {
    if (!g || !g->defined()) return at::Tensor();
    TORCH_CHECK(g->sizes() == sizes, "gradient must have size ", sizes, ", got ", g->sizes());
    return *g;
  };
  const SequenceShape& s = p.shape;
  const int64_t slots = p.options.num_layers * s.directions;
  grads = {
      check_grad(from[0], p.output_sizes()), check_grad(from[1], {slots, s.batch, s.state_size()}),
      p.options.is_lstm() ? check_grad(from[2], {slots, s.batch, s.hidden_size}) : at::Tensor()};
  wanted.state = {output_mask[0], output_mask[1], output_mask[2]};
  for (size_t i = 3; i < count; ++i) wanted.params.push_back(output_mask[i]);
}

int offered_threads() {
  if (at::in_parallel_region() || g_forked.load(std::memory_order_relaxed)) return 1;
  return at::get_num_threads();
}

bool linear_activations() { return g_linear_activations.load(std::memory_order_relaxed); }
void set_linear_activations(bool linear) {
  g_linear_activations.store(linear, std::memory_order_relaxed);
}

at::Tensor draw_dropout_mask(const at::Tensor& like, double dropout) {
  at::Tensor mask = at::empty_like(like);
  if (dropout == 1) return mask.zero_();
  return mask.bernoulli_(1 - dropout).div_(1 - dropout);
}

std::vector<at::Tensor> dropout_masks(const Problem& p, const at::Tensor& reserve) {
  std::vector<at::Tensor> masks;
  if (p.options.drops())
    for (int64_t layer = 0; layer + 1 < p.options.num_layers; ++layer)
      masks.push_back(reserve.narrow(0, p.mask_offset(layer), p.layer_output_size())
                          .view({p.shape.rows(), p.output_width()}));
  return masks;
}

ForwardResult call_recurrent(const Inputs& in, const Options& o, bool save_reserve) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnn_ext::recurrent", "")
                             .typed<decltype(recurrent_operator<recurrent_cpu>)>();
  return op.call(in.input, in.batch_sizes, in.h_0, in.c_0, in.params, int64_t(o.cell), o.has_biases,
                 o.num_layers, o.bidirectional, o.batch_first, o.dropout, o.training, save_reserve);
}

namespace {
std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}
}  // namespace

std::vector<at::Tensor> call_recurrent_backward(const std::array<at::Tensor, 3>& grads,
                                                const Inputs& in, const at::Tensor& output,
                                                const at::Tensor& reserve, const Options& o,
                                                const std::array<bool, 3>& state_mask,
                                                const std::vector<bool>& param_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rnn_ext::recurrent_backward", "")
          .typed<decltype(recurrent_backward_operator<recurrent_backward_cpu>)>();
  c10::List<bool> mask;
  mask.reserve(3 + param_mask.size());
  for (bool m : state_mask) mask.push_back(m);
  for (bool m : param_mask) mask.push_back(m);
  return op.call(if_defined(grads[0]), if_defined(grads[1]), if_defined(grads[2]), in.input,
                 in.batch_sizes, in.h_0, in.c_0, in.params, output, reserve, int64_t(o.cell),
                 o.has_biases, o.num_layers, o.bidirectional, o.batch_first, o.dropout, o.training,
                 mask);
}

std::vector<at::Tensor> call_recurrent_backward_per_example(
    const std::array<at::Tensor, 3>& grads, const Inputs& in, const at::Tensor& output,
    const at::Tensor& reserve, const Options& o, const std::vector<bool>& mask, int64_t examples) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnn_ext::recurrent_backward_per_example", "")
                             .typed<decltype(recurrent_backward_per_example_cpu)>();
  c10::List<bool> list;
  for (bool m : mask) list.push_back(m);
  return op.call(if_defined(grads[0]), if_defined(grads[1]), if_defined(grads[2]), in.input,
                 in.batch_sizes, in.h_0, in.c_0, in.params, output, reserve, int64_t(o.cell),
                 o.has_biases, o.num_layers, o.bidirectional, o.batch_first, o.dropout, o.training,
                 list, examples);
}

TORCH_LIBRARY(rnn_ext, m) {
  // A whole stack of layers and directions in one call. input is (T, B, I), with batch_first
  // (B, T, I), with batch_sizes the packed (N, I). cell: 0 tanh RNN, 1 relu RNN, 2 LSTM, 3 GRU.
  // c_n is empty unless LSTM, reserve unless save_reserve (autograd sets it where it needs it).
  m.def(
      "recurrent(Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] params, "
      "int cell, bool has_biases, int num_layers, bool bidirectional, bool batch_first, "
      "float dropout, bool training, bool save_reserve=False) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)",
      {at::Tag::nondeterministic_seeded});
  // Gradients of input, h_0, c_0 and every parameter, in that order; an empty tensor stands where
  // output_mask says that one is not wanted.
  m.def(
      "recurrent_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, "
      "Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] params, Tensor output, "
      "Tensor reserve, int cell, bool has_biases, int num_layers, bool bidirectional, "
      "bool batch_first, float dropout, bool training, bool[] output_mask) -> Tensor[]");
  // For the batching rule of torch.func.vmap: the same with the gradients of the parameters of each
  // example alone, (examples, ...); row b of the batch belongs to example b % examples.
  m.def(
      "recurrent_backward_per_example(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] params, "
      "Tensor output, Tensor reserve, int cell, bool has_biases, int num_layers, "
      "bool bidirectional, bool batch_first, float dropout, bool training, bool[] output_mask, "
      "int examples) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("recurrent", recurrent_operator<recurrent_cpu>);
  m.impl("recurrent_backward", recurrent_backward_operator<recurrent_backward_cpu>);
  m.impl("recurrent_backward_per_example", recurrent_backward_per_example_cpu);
}

}  // namespace rnn_ext
