// The operators' schemas and their CPU kernels.
#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <pthread.h>
#include <torch/library.h>

#include <atomic>

#include "../cpu/governor.h"
#include "layers.h"
#include "memory.h"

namespace rnn_ext {
namespace {

std::atomic<bool> g_linear_activations{false};

// The team of a call is torch's own: one pool of threads in the process, torch.set_num_threads
// honored. Inside somebody else's parallel region at::parallel_for runs inline and starts one
// member only, which does all the work.
void run_on_torch_threads(int members, void (*body)(int, void*), void* context) {
  at::parallel_for(0, members, 1, [&](int64_t begin, int64_t) { body(int(begin), context); });
}

// A forked child inherits torch's OpenMP pool without its threads, and a parallel region in it
// waits for them for ever. Whether the parent had started the pool cannot be told, so a child uses
// none.
std::atomic<bool> g_forked{false};
[[maybe_unused]] const int g_watching_forks =
    pthread_atfork(nullptr, nullptr, [] { g_forked.store(true, std::memory_order_relaxed); });

struct Threads {
  int offered, granted;
};
Threads threads_of_call() {
  const int offered = offered_threads();
  return {offered, offered > 1 ? governor().grant(offered) : 1};
}

template <class T>
Plan plan_on(Threads threads, const SequenceShape& shape, bool backward, bool bf16_products) {
  Plan plan = plan_call<T>(shape, backward, threads.granted, bf16_products);
  plan.stands_in = threads.granted < threads.offered && plan.threads == 1 &&
                   plan_call<T>(shape, backward, threads.offered, bf16_products).threads > 1;
  return plan;
}

// Does this call round what its products read to bfloat16? Models of that type do; for float32 it
// is the user's choice, torch.backends.mkldnn.rnn.fp32_precision or, where that is not set, what
// torch.set_float32_matmul_precision chose for products ("medium").
bool bf16_products(at::ScalarType dtype) {
  if (dtype != at::kFloat) return dtype == at::kBFloat16;
  const at::Context& context = at::globalContext();
  auto precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN);
  if (precision == at::Float32Precision::NONE || precision == at::Float32Precision::DEFAULT)
    precision = context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::BF16;
}

template <class Call>
void run_call(const Call& call, const Plan& plan) {
  const c10::DataPtr workspace = pooled_workspace(workspace_bytes(call, plan));
  run(call, plan, workspace.get(), run_on_torch_threads);
}

Rounding rounding_of(at::ScalarType dtype) {
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
  return plan_stack<T>(shapes.data(), int(o.num_layers), threads, bf16_products(dtype));
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
    call.bf16_products = bf16_products(dtype_);
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
    call.bf16_products = bf16_products(dtype_);
    Plan plan = plan_on<T>(threads_of_call(), call.shape, true, call.bf16_products);
    if (call.gates[0].dgx) plan.chunk_steps = call.shape.steps;
    run_call(call, plan);
  }

 private:
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

ForwardResult recurrent_cpu(const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes,
                            const std::optional<at::Tensor>& h_0,
                            const std::optional<at::Tensor>& c_0, at::TensorList params,
                            int64_t cell, bool has_biases, int64_t num_layers, bool bidirectional,
                            bool batch_first, double dropout, bool training, bool save_reserve) {
  const Inputs inputs{input, batch_sizes, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
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

std::vector<at::Tensor> recurrent_backward_cpu(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_h_n,
    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
    const std::optional<at::Tensor>& batch_sizes, const std::optional<at::Tensor>& h_0,
    const std::optional<at::Tensor>& c_0, at::TensorList params, const at::Tensor& output,
    const at::Tensor& reserve, int64_t cell, bool has_biases, int64_t num_layers,
    bool bidirectional, bool batch_first, double dropout, bool training,
    c10::List<bool> output_mask) {
  const Inputs inputs{input, batch_sizes, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
  const Gradients grads = {grad_output, grad_h_n, grad_c_n};
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
                             .typed<decltype(recurrent_cpu)>();
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rnn_ext::recurrent_backward", "")
                             .typed<decltype(recurrent_backward_cpu)>();
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
  m.impl("recurrent", recurrent_cpu);
  m.impl("recurrent_backward", recurrent_backward_cpu);
  m.impl("recurrent_backward_per_example", recurrent_backward_per_example_cpu);
}

}  // namespace rnn_ext
