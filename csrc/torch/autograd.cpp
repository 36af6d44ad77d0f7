// Differentiation and autocast of rnn_ext::recurrent.
//
// The backward node is written out instead of using torch::autograd::Function: saving and unpacking
// go without a dictionary and boxed values (a step at T = 1 costs less than those), and nothing in
// it depends on the C++ Function's restrictions under functorch.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "ops.h"

namespace rnn_ext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// By torch.func.vmap, or by the older one behind is_grads_batched.
bool any_batched(at::TensorList tensors) {
  for (const at::Tensor& t : tensors)
    if (t.defined() && (t.key_set().has(c10::DispatchKey::FuncTorchBatched) ||
                        t.key_set().has(c10::DispatchKey::Batched)))
      return true;
  return false;
}

struct RecurrentBackward : torch::autograd::Node {
  Options options;
  bool has_h_0 = false, has_c_0 = false, has_batch_sizes = false;
  SavedVariable input, h_0, c_0, output, reserve, batch_sizes;
  std::vector<SavedVariable> params;

  std::string name() const override { return "RecurrentBackward"; }

  // Threads may go backward through the same graph at once: one must not release what another is
  // unpacking.
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* v : {&input, &h_0, &c_0, &output, &reserve, &batch_sizes}) v->reset_data();
    for (SavedVariable& v : params) v.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::unique_lock<std::mutex> lock(mutex_);
    std::vector<at::Tensor> weights;
    weights.reserve(params.size());
    for (SavedVariable& v : params) weights.push_back(v.unpack());
    const auto unpacked = [](SavedVariable& v, bool has) {
      return has ? std::optional<at::Tensor>(v.unpack()) : std::nullopt;
    };
    const Inputs inputs{input.unpack(), unpacked(batch_sizes, has_batch_sizes),
                        unpacked(h_0, has_h_0), unpacked(c_0, has_c_0), weights};
    const at::Tensor kept = reserve.unpack(), unpacked_output = output.unpack(getptr());
    lock.unlock();
    if (at::GradMode::is_enabled() || any_batched(grads))
      return differentiable(grads, inputs, kept);

    const auto wanted = [&](size_t i) { return task_should_compute_output(i); };
    std::vector<bool> param_mask;
    for (size_t i = 0; i < params.size(); ++i) param_mask.push_back(wanted(3 + i));
    variable_list results = call_recurrent_backward(
        {grads[0], grads[1], grads[2]}, inputs, unpacked_output, kept, options,
        {wanted(0), has_h_0 && wanted(1), has_c_0 && wanted(2)}, param_mask);
    for (size_t i = 0; i < results.size(); ++i)
      if (!wanted(i) || (i == 1 && !has_h_0) || (i == 2 && !has_c_0)) results[i] = at::Tensor();
    return results;
  }

  // create_graph=True: the gradient has to be differentiable itself (or, for a batch of gradients,
  // made of operations with batching rules). Run the composite form from the same inputs and let
  // autograd derive it.
  variable_list differentiable(const variable_list& grads, const Inputs& inputs,
                               const at::Tensor& kept) {
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    // Views, so that a tensor used twice (tied weights) gets a gradient of its own per use.
    const auto own = [](const at::Tensor& t) { return t.view_as(t); };
    std::vector<at::Tensor> weights;
    for (const at::Tensor& w : inputs.params) weights.push_back(own(w));
    Inputs copies{own(inputs.input), inputs.batch_sizes, {}, {}, weights};
    if (inputs.h_0) copies.h_0 = own(*inputs.h_0);
    if (inputs.c_0) copies.c_0 = own(*inputs.c_0);

    const auto [y, h_n, c_n] =
        composite_forward(copies, options, dropout_masks(Problem(copies, options), kept));
    variable_list outputs, output_grads;
    const std::array<at::Tensor, 3> results = {y, h_n, c_n};
    for (size_t i = 0; i < 3; ++i) {
      if (!grads[i].defined() || !results[i].requires_grad()) continue;
      outputs.push_back(results[i]);
      output_grads.push_back(grads[i]);
    }
    variable_list all = {copies.input, copies.h_0.value_or(at::Tensor()),
                         copies.c_0.value_or(at::Tensor())};
    all.insert(all.end(), weights.begin(), weights.end());
    variable_list sources, gradients(all.size());
    std::vector<size_t> index;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].defined() || !all[i].requires_grad() || !task_should_compute_output(i)) continue;
      sources.push_back(all[i]);
      index.push_back(i);
    }
    if (outputs.empty() || sources.empty()) return gradients;
    const variable_list found = torch::autograd::grad(
        outputs, sources, output_grads, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
    for (size_t i = 0; i < index.size(); ++i) gradients[index[i]] = found[i];
    return gradients;
  }
};

// A tensor with values of its own, not a stand-in that is being traced.
bool is_plain(const at::Tensor& t) {
  return t.has_storage() && !t.key_set().has_any(c10::DispatchKeySet(
                                {c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// Backward reads the output, and the caller may change it in place, as torch.nn allows on the CPU
// (out += x). A lazy clone serves both: it shares the memory until somebody writes.
at::Tensor kept_output(const at::Tensor& output) {
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_lazy_clone(output);
}

// torch 2.13 holds its nodes by intrusive_ptr, earlier versions by shared_ptr: the kind of pointer
// is taken from an edge.
template <class N, class Base>
std::shared_ptr<N> make_node(const std::shared_ptr<Base>&) {
  return std::make_shared<N>();
}
template <class N, class Base>
c10::intrusive_ptr<N> make_node(const c10::intrusive_ptr<Base>&) {
  return c10::make_intrusive<N>();
}

// Does f hold for any floating-point operand?
template <class F>
bool any_operand(const Inputs& in, F&& f) {
  if (f(in.input) || (in.h_0 && f(*in.h_0)) || (in.c_0 && f(*in.c_0))) return true;
  for (const at::Tensor& p : in.params)
    if (f(p)) return true;
  return false;
}

// Forward-mode differentiation and torch.func's transforms: every ATen operation knows how, so use
// those. (A node of ours would outlive the transform's level and lose what it saved there.)
bool takes_composite(const Inputs& in) {
  return any_operand(in, [](const at::Tensor& t) {
    return t._fw_grad(/*level=*/0).defined() ||
           t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
  });
}

ForwardResult composite(const Inputs& inputs, const Options& options) {
  std::vector<at::Tensor> masks;
  if (options.drops()) {
    const Problem p(inputs, options);
    const at::Tensor like =
        at::empty({p.shape.rows(), p.output_width()}, inputs.input.options().requires_grad(false));
    for (int64_t layer = 0; layer + 1 < options.num_layers; ++layer)
      masks.push_back(draw_dropout_mask(like, options.dropout));
  }
  auto [output, h_n, c_n] = composite_forward(inputs, options, masks);
  return {output, h_n, c_n, at::empty({0}, inputs.input.options())};
}

ForwardResult recurrent_composite(const at::Tensor& input,
                                  const std::optional<at::Tensor>& batch_sizes,
                                  const std::optional<at::Tensor>& h_0,
                                  const std::optional<at::Tensor>& c_0, at::TensorList params,
                                  int64_t cell, bool has_biases, int64_t num_layers,
                                  bool bidirectional, bool batch_first, double dropout,
                                  bool training, bool /*save_reserve*/) {
  return composite(
      {input, batch_sizes, h_0, c_0, params},
      {CellKind(cell), has_biases, num_layers, bidirectional, batch_first, dropout, training});
}

ForwardResult recurrent_autograd(const at::Tensor& input,
                                 const std::optional<at::Tensor>& batch_sizes,
                                 const std::optional<at::Tensor>& h_0,
                                 const std::optional<at::Tensor>& c_0, at::TensorList params,
                                 int64_t cell, bool has_biases, int64_t num_layers,
                                 bool bidirectional, bool batch_first, double dropout,
                                 bool training, bool save_reserve) {
  const Inputs inputs{input, batch_sizes, h_0, c_0, params};
  const Options options{CellKind(cell), has_biases, num_layers, bidirectional,
                        batch_first,    dropout,    training};
  if (takes_composite(inputs)) return composite(inputs, options);
  const bool track = at::GradMode::is_enabled() &&
                     any_operand(inputs, [](const at::Tensor& t) { return t.requires_grad(); });
  ForwardResult result;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    result = call_recurrent(inputs, options, save_reserve || track);
  }
  if (!track) return result;

  auto& [output, h_n, c_n, reserve] = result;
  const auto node = make_node<RecurrentBackward>(torch::autograd::Edge().function);
  node->options = options;
  torch::autograd::edge_list edges;
  edges.reserve(3 + params.size());
  const auto edge = [&](const at::Tensor& t) {
    edges.push_back(t.requires_grad() ? torch::autograd::impl::gradient_edge(t)
                                      : torch::autograd::Edge());
  };
  const at::Tensor none;
  edge(input);
  edge(h_0 ? *h_0 : none);
  edge(c_0 ? *c_0 : none);
  for (const at::Tensor& p : params) edge(p);
  node->set_next_edges(std::move(edges));

  node->input = SavedVariable(input, false);
  if ((node->has_batch_sizes = batch_sizes.has_value()))
    node->batch_sizes = SavedVariable(*batch_sizes, false);
  if ((node->has_h_0 = h_0.has_value())) node->h_0 = SavedVariable(*h_0, false);
  if ((node->has_c_0 = c_0.has_value())) node->c_0 = SavedVariable(*c_0, false);
  node->params.reserve(params.size());
  for (const at::Tensor& p : params) node->params.emplace_back(p, false);
  node->reserve = SavedVariable(reserve, false);
  if (is_plain(output)) node->output = SavedVariable(kept_output(output), false);
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(h_n, node);
  torch::autograd::set_history(c_n, node);
  if (!is_plain(output)) node->output = SavedVariable(output, true);
  return result;
}

// The product of a mixed-precision region is computed as torch computes its own RNNs there: all
// floating-point operands in the region's dtype.
ForwardResult recurrent_autocast(const at::Tensor& input,
                                 const std::optional<at::Tensor>& batch_sizes,
                                 const std::optional<at::Tensor>& h_0,
                                 const std::optional<at::Tensor>& c_0, at::TensorList params,
                                 int64_t cell, bool has_biases, int64_t num_layers,
                                 bool bidirectional, bool batch_first, double dropout,
                                 bool training, bool save_reserve) {
  const auto device = input.device().type();
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const at::Tensor& t) {
    return at::autocast::cached_cast(dtype, t, device);
  };
  const auto cast_optional = [&](const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(cast(*t)) : std::nullopt;
  };
  std::vector<at::Tensor> cast_params;
  cast_params.reserve(params.size());
  for (const at::Tensor& p : params) cast_params.push_back(cast(p));
  return call_recurrent(
      {cast(input), batch_sizes, cast_optional(h_0), cast_optional(c_0), cast_params},
      {CellKind(cell), has_biases, num_layers, bidirectional, batch_first, dropout, training},
      save_reserve);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, Autograd, m) { m.impl("recurrent", recurrent_autograd); }

// torch.vmap: through the composite form, whose operations have batching rules.
TORCH_LIBRARY_IMPL(rnn_ext, FuncTorchBatched, m) { m.impl("recurrent", recurrent_composite); }

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) { m.impl("recurrent", recurrent_autocast); }
TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) { m.impl("recurrent", recurrent_autocast); }

}  // namespace rnn_ext
