// The operators' schemas and their CPU kernels: allocate, fill the structs, run the engine.
#include "ops.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <torch/library.h>

#include <atomic>

#include "../cpu/governor.h"

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
  const c10::DataPtr workspace = c10::GetCPUAllocator()->allocate(workspace_bytes(call, plan));
  run(call, plan, workspace.get(), run_on_torch_threads);
}

// The engine reads rows with any strides between them, but consecutive elements within.
at::Tensor readable(const at::Tensor& t, at::ScalarType compute) {
  const at::Tensor wide = t.scalar_type() == compute ? t : t.to(compute);
  const bool rows_ok = wide.dim() == 0 || wide.size(-1) == 1 || wide.stride(-1) == 1;
  return rows_ok ? wide : wide.contiguous();
}

std::optional<at::Tensor> dense(const std::optional<at::Tensor>& t, at::ScalarType compute) {
  if (!t || !t->defined()) return std::nullopt;
  return t->to(compute).contiguous();
}

template <class T>
const T* slice(const std::optional<at::Tensor>& state, int64_t index) {
  if (!state) return nullptr;
  return state->const_data_ptr<T>() + index * state->size(1) * state->size(2);
}

// (T, B, width) view of a padded or packed tensor, or of a dense array in time order.
template <class T, class U>
StepRows<T> step_rows(const Problem& p, U* data, at::IntArrayRef strides) {
  if (p.packed) return {data, 0, strides[0]};
  if (p.options.batch_first) return {data, strides[1], strides[0]};
  return {data, strides[0], strides[1]};
}
template <class T, class U>
StepRows<T> dense_rows(const Problem& p, U* data) {
  return {data, p.shape.batch * p.output_width(), p.output_width()};
}

template <class T>
DirectionWeights<T> weights_of(const std::vector<at::Tensor>& params, const ParamIndex& index) {
  const auto data = [&](int64_t i) {
    return i < 0 ? nullptr : params[size_t(i)].const_data_ptr<T>();
  };
  const auto ld = [&](int64_t i) { return i < 0 ? 0 : params[size_t(i)].stride(0); };
  return {data(index.w_ih), data(index.w_hh), data(index.b_ih), data(index.b_hh),
          data(index.w_hr), ld(index.w_ih),   ld(index.w_hh),   ld(index.w_hr)};
}

// Everything the engine reads, in the compute dtype; the tensors keep converted copies alive.
struct Operands {
  at::Tensor input;
  std::optional<at::Tensor> h_0, c_0;
  std::vector<at::Tensor> params;

  Operands(const Inputs& from, at::ScalarType compute)
      : input(readable(from.input, compute)),
        h_0(dense(from.h_0, compute)),
        c_0(dense(from.c_0, compute)) {
    params.reserve(from.params.size());
    for (const at::Tensor& p : from.params) params.push_back(readable(p, compute));
  }
};

Rounding rounding_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? Rounding::kBFloat16
         : dtype == at::kHalf   ? Rounding::kFloat16
                                : Rounding::kNone;
}

// All layers of a stack, by the wavefront that its shapes call for.
template <class T>
void run_wavefront(const std::vector<ForwardCall<T>>& calls, const Wavefront& wave) {
  std::vector<Plan> plans;
  std::vector<c10::DataPtr> memory;
  std::vector<void*> workspaces;
  for (const ForwardCall<T>& call : calls) {
    plans.push_back(plan_call<T>(call.shape, false, 1, call.bf16_products));
    plans.back().chunk_steps = wave.chunk_steps;
    memory.push_back(c10::GetCPUAllocator()->allocate(workspace_bytes(call, plans.back())));
    workspaces.push_back(memory.back().get());
  }
  run_stack(calls.data(), plans.data(), workspaces.data(), int(calls.size()), wave,
            run_on_torch_threads);
}

template <class T>
Wavefront wavefront_of(const Problem& p, at::ScalarType dtype, int threads) {
  const Options& o = p.options;
  if (o.num_layers < 2 || o.drops()) return {};
  std::vector<SequenceShape> shapes;
  for (int64_t layer = 0; layer < o.num_layers; ++layer) shapes.push_back(p.layer_shape(layer));
  return plan_stack<T>(shapes.data(), int(o.num_layers), threads, bf16_products(dtype));
}

template <class T>
ForwardResult forward(const Problem& p, const Inputs& inputs, bool save_reserve) {
  const Options& o = p.options;
  const at::ScalarType dtype = inputs.input.scalar_type(), compute = at::toOpMathType(dtype);
  const at::TensorOptions wide = inputs.input.options().dtype(compute);
  const Operands in(inputs, compute);
  const int64_t slots = o.num_layers * o.directions(), R = p.shape.state_size();
  const int64_t H = p.shape.hidden_size, B = p.shape.batch;

  // Past the dispatcher, whose way to an empty tensor takes longer than the rest of making one.
  const auto empty = [&](at::IntArrayRef sizes) { return at::detail::empty_cpu(sizes, wide); };
  at::Tensor output = empty(p.output_sizes());
  at::Tensor h_n = empty({slots, B, R});
  at::Tensor c_n = o.is_lstm() ? empty({slots, B, H}) : empty({0});
  at::Tensor reserve = empty({save_reserve ? p.reserve_size() : 0});
  if (B > 0) {
    // Outputs of the layers. In training they are part of the reserve (what dropout leaves of them
    // is not: backward derives it again), else only the last one outlives the call.
    at::Tensor inner[2], dropped;
    if (!save_reserve && o.num_layers > 1)
      for (int i = 0; i < (o.num_layers > 2 ? 2 : 1); ++i)
        inner[i] = at::empty({p.layer_output_size()}, wide);
    const T* layer_input = nullptr;
    const Threads threads = threads_of_call();
    const Wavefront wave = wavefront_of<T>(p, dtype, threads.granted);
    std::vector<ForwardCall<T>> waiting;
    for (int64_t layer = 0; layer < o.num_layers; ++layer) {
      const bool last = layer == o.num_layers - 1;
      ForwardCall<T> call;
      call.shape = p.layer_shape(layer);
      call.rounding = rounding_of(dtype);
      call.bf16_products = bf16_products(dtype);
      call.linear_activations = linear_activations();
      call.x = layer == 0 ? step_rows<const T>(p, in.input.const_data_ptr<T>(), in.input.strides())
                          : dense_rows<const T>(p, layer_input);
      T* y = last           ? output.mutable_data_ptr<T>()
             : save_reserve ? reserve.mutable_data_ptr<T>() + p.layer_output_offset(layer)
                            : inner[layer & 1].mutable_data_ptr<T>();
      call.y = last ? step_rows<T>(p, y, output.strides()) : dense_rows<T>(p, y);
      for (int d = 0; d < o.directions(); ++d) {
        const int64_t slot = layer * o.directions() + d;
        call.weights[d] = weights_of<T>(in.params, p.param(layer, d));
        call.h_0[d] = slice<T>(in.h_0, slot);
        call.c_0[d] = slice<T>(in.c_0, slot);
        call.h_n[d] = h_n.mutable_data_ptr<T>() + slot * B * R;
        if (o.is_lstm()) call.c_n[d] = c_n.mutable_data_ptr<T>() + slot * B * H;
        if (save_reserve && num_saved(o.cell) > 0)
          call.reserve[d] = reserve.mutable_data_ptr<T>() + p.saved_offset(layer, d);
      }
      layer_input = y;
      if (wave.threads > 1) {
        waiting.push_back(call);
        continue;
      }
      Plan plan = plan_on<T>(threads, call.shape, false, call.bf16_products);
      if (wave.chunk_steps > 0) plan.chunk_steps = wave.chunk_steps;
      run_call(call, plan);
      if (!last && o.drops()) {
        // Drawn like torch.nn draws it, so that the same seed drops the same values.
        const at::Tensor from = at::from_blob(y, {p.layer_output_size()}, wide);
        const at::Tensor mask = draw_dropout_mask(from, o.dropout);
        if (save_reserve)
          reserve.narrow(0, p.mask_offset(layer), p.layer_output_size()).copy_(mask);
        dropped = from * mask;
        layer_input = dropped.const_data_ptr<T>();
      }
    }
    if (!waiting.empty()) run_wavefront(waiting, wave);
  }
  if (dtype == compute) return {output, h_n, c_n, reserve};
  return {output.to(dtype), h_n.to(dtype), c_n.to(dtype), reserve};
}

ForwardResult recurrent_cpu(const at::Tensor& input, const std::optional<at::Tensor>& batch_sizes,
                            const std::optional<at::Tensor>& h_0,
                            const std::optional<at::Tensor>& c_0, at::TensorList params,
                            int64_t cell, bool has_biases, int64_t num_layers, bool bidirectional,
                            bool batch_first, double dropout, bool training, bool save_reserve) {
  const Inputs inputs{input, batch_sizes, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
  if (has_members(inputs)) return members_forward(inputs, options, save_reserve);
  const Problem problem(inputs, options);
  if (at::toOpMathType(input.scalar_type()) == at::kDouble)
    return forward<double>(problem, inputs, save_reserve);
  return forward<float>(problem, inputs, save_reserve);
}

// What of the gradients is asked for, by layer.
struct Wanted {
  std::array<bool, 3> state;  // input, h_0, c_0
  std::vector<bool> params;
  const Problem& p;

  bool of(int64_t i) const { return i >= 0 && params[size_t(i)]; }
  bool below(int64_t layer) const {  // anything that dL/d(input of `layer`) leads to
    if (layer == 0) return state[0];
    if (state[0] || state[1] || state[2]) return true;
    for (int64_t i = 0; i < p.param(layer, 0).w_ih; ++i)
      if (of(i)) return true;
    return false;
  }
};

template <class T>
std::vector<at::Tensor> backward(const std::array<at::Tensor, 3>& grads, const Problem& p,
                                 const Inputs& inputs, const at::Tensor& output_,
                                 const at::Tensor& reserve, const Wanted& wanted) {
  const Options& o = p.options;
  const at::ScalarType dtype = inputs.input.scalar_type(), compute = at::toOpMathType(dtype);
  const at::TensorOptions wide = inputs.input.options().dtype(compute);
  const Operands in(inputs, compute);
  const int64_t R = p.shape.state_size(), H = p.shape.hidden_size, B = p.shape.batch;
  const int64_t slots = o.num_layers * o.directions();
  const at::Tensor output = readable(output_, compute);
  const at::Tensor dy = grads[0].defined() ? readable(grads[0], compute) : at::Tensor();
  const std::optional<at::Tensor> dh_n = dense(grads[1], compute), dc_n = dense(grads[2], compute);

  // Results in the order input, h_0, c_0, parameters; empty where not asked for.
  std::vector<at::Tensor> results;
  results.reserve(3 + in.params.size());
  const auto result = [&](bool asked, at::IntArrayRef sizes) {
    results.push_back(!asked  ? at::empty({0}, wide)
                      : B > 0 ? at::empty(sizes, wide)
                              : at::zeros(sizes, wide));
    return asked ? results.back().mutable_data_ptr<T>() : nullptr;
  };
  T* dx = result(wanted.state[0], inputs.input.sizes());
  if (dx && p.packed && inputs.input.size(0) > p.shape.rows())  // rows that no step reads
    results[0].narrow(0, p.shape.rows(), inputs.input.size(0) - p.shape.rows()).zero_();
  T* dh_0 = result(wanted.state[1], {slots, B, R});
  T* dc_0 = result(wanted.state[2] && o.is_lstm(), {slots, B, H});
  std::vector<T*> dparams;
  for (size_t i = 0; i < in.params.size(); ++i)
    dparams.push_back(result(wanted.params[i], in.params[i].sizes()));

  at::Tensor from_above;  // dL/dy of the layer, dense in time order
  for (int64_t layer = o.num_layers - 1; B > 0 && layer >= 0; --layer) {
    const bool last = layer == o.num_layers - 1;
    const int64_t first_param = p.param(layer, 0).w_ih;
    bool here = wanted.state[1] || wanted.state[2];
    for (int64_t i = 0; i < int64_t(in.params.size()) / o.num_layers; ++i)
      here = here || wanted.of(first_param + i);
    const bool below = wanted.below(layer);
    if (!here && !below) break;

    BackwardCall<T> call;
    call.shape = p.layer_shape(layer);
    call.bf16_products = bf16_products(dtype);
    call.linear_activations = linear_activations();
    const T* saved = reserve.const_data_ptr<T>();
    at::Tensor dropped;
    if (layer == 0) {
      call.x = step_rows<const T>(p, in.input.const_data_ptr<T>(), in.input.strides());
      if (dx) call.dx = step_rows<T>(p, dx, results[0].strides());
    } else {
      const T* x = saved + p.layer_output_offset(layer - 1);
      if (o.drops()) {
        dropped = reserve.narrow(0, p.layer_output_offset(layer - 1), p.layer_output_size()) *
                  reserve.narrow(0, p.mask_offset(layer - 1), p.layer_output_size());
        x = dropped.const_data_ptr<T>();
      }
      call.x = dense_rows<const T>(p, x);
    }
    if (last) {
      call.y = step_rows<const T>(p, output.const_data_ptr<T>(), output.strides());
      if (dy.defined()) call.dy = step_rows<const T>(p, dy.const_data_ptr<T>(), dy.strides());
    } else {
      call.y = dense_rows<const T>(p, saved + p.layer_output_offset(layer));
      call.dy = dense_rows<const T>(p, from_above.const_data_ptr<T>());
    }
    at::Tensor to_below;
    if (layer > 0 && below) {
      to_below = at::empty({p.layer_output_size()}, wide);
      call.dx = dense_rows<T>(p, to_below.mutable_data_ptr<T>());
    }
    for (int d = 0; d < o.directions(); ++d) {
      const int64_t slot = layer * o.directions() + d;
      const ParamIndex index = p.param(layer, d);
      const auto gradient = [&](int64_t i) { return i < 0 ? nullptr : dparams[size_t(i)]; };
      call.weights[d] = weights_of<T>(in.params, index);
      call.h_0[d] = slice<T>(in.h_0, slot);
      call.dh_n[d] = slice<T>(dh_n, slot);
      call.dc_n[d] = slice<T>(dc_n, slot);
      call.reserve[d] = saved + p.saved_offset(layer, d);
      call.gradients[d] = {gradient(index.w_ih),
                           gradient(index.w_hh),
                           gradient(index.b_ih),
                           gradient(index.b_hh),
                           gradient(index.w_hr),
                           dh_0 ? dh_0 + slot * B * R : nullptr,
                           dc_0 ? dc_0 + slot * B * H : nullptr};
    }
    run_call(call, plan_on<T>(threads_of_call(), call.shape, true, call.bf16_products));
    if (layer > 0 && below) {
      if (o.drops())
        to_below.mul_(reserve.narrow(0, p.mask_offset(layer - 1), p.layer_output_size()));
      from_above = to_below;
    }
  }
  if (dtype != compute)
    for (at::Tensor& t : results) t = t.to(dtype);
  return results;
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
  TORCH_CHECK(output_mask.size() == 3 + params.size(), "output_mask must have ", 3 + params.size(),
              " entries, got ", output_mask.size());
  if (has_members(inputs)) {
    const auto or_none = [](const std::optional<at::Tensor>& t) {
      return t.value_or(at::Tensor());
    };
    return members_backward({or_none(grad_output), or_none(grad_h_n), or_none(grad_c_n)}, inputs,
                            output, reserve, options, {output_mask.begin(), output_mask.end()});
  }
  const Problem problem(inputs, options);
  TORCH_CHECK(output.sizes() == at::IntArrayRef(problem.output_sizes()), "output must have size ",
              problem.output_sizes(), ", got ", output.sizes());
  TORCH_CHECK(reserve.numel() == problem.reserve_size(),
              "reserve is not the one of this call's forward: expected ", problem.reserve_size(),
              " elements, got ", reserve.numel());
  const auto check_grad = [](const std::optional<at::Tensor>& g, at::IntArrayRef sizes) {
    if (!g || !g->defined()) return at::Tensor();
    TORCH_CHECK(g->sizes() == sizes, "gradient must have size ", sizes, ", got ", g->sizes());
    return *g;
  };
  const SequenceShape& s = problem.shape;
  const int64_t slots = num_layers * s.directions;
  const std::array<at::Tensor, 3> grads = {
      check_grad(grad_output, problem.output_sizes()),
      check_grad(grad_h_n, {slots, s.batch, s.state_size()}),
      s.cell == CellKind::kLstm ? check_grad(grad_c_n, {slots, s.batch, s.hidden_size})
                                : at::Tensor()};
  Wanted wanted{{output_mask[0], output_mask[1], output_mask[2]}, {}, problem};
  for (size_t i = 3; i < output_mask.size(); ++i) wanted.params.push_back(output_mask[i]);
  if (at::toOpMathType(input.scalar_type()) == at::kDouble)
    return backward<double>(grads, problem, inputs, output, reserve, wanted);
  return backward<float>(grads, problem, inputs, output, reserve, wanted);
}

}  // namespace

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
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
  };
  return op.call(optional(grads[0]), optional(grads[1]), optional(grads[2]), in.input,
                 in.batch_sizes, in.h_0, in.c_0, in.params, output, reserve, int64_t(o.cell),
                 o.has_biases, o.num_layers, o.bidirectional, o.batch_first, o.dropout, o.training,
                 mask);
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
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("recurrent", recurrent_cpu);
  m.impl("recurrent_backward", recurrent_backward_cpu);
}

}  // namespace rnn_ext
