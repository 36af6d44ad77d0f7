// Differentiation and autocast of rnn_ext::recurrent and its backward.
//
// The nodes are written out instead of using torch::autograd::Function: saving and unpacking
// go without a dictionary and boxed values (a step at T = 1 costs less than those), and nothing in
// it depends on the C++ Function's restrictions under functorch.
#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "ops.h"

namespace rnn_ext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// By the vmap behind is_grads_batched, which is not that of torch.func.
bool any_batched(at::TensorList tensors) {
  for (const at::Tensor& t : tensors)
    if (t.defined() && t.key_set().has(c10::DispatchKey::Batched)) return true;
  return false;
}

// The tensor operands of a call in a list: input, h_0, c_0, parameters; undefined if not there.
variable_list operands_of(const Inputs& in) {
  variable_list all = {in.input, in.h_0.value_or(at::Tensor()), in.c_0.value_or(at::Tensor())};
  all.insert(all.end(), in.params.begin(), in.params.end());
  return all;
}
Inputs inputs_of(const variable_list& operands, const std::optional<at::Tensor>& batch_sizes) {
  const auto optional = [](const at::Tensor& t) {
    return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
  };
  return {operands[0], batch_sizes, optional(operands[1]), optional(operands[2]),
          at::TensorList(operands).slice(3)};
}

// Views that autograd can tell apart and derive by, whatever the tensors are: one used twice (tied
// weights) gets a gradient of its own per use.
variable_list differentiable_views(at::TensorList tensors) {
  variable_list views;
  for (const at::Tensor& t : tensors) {
    views.push_back(t.defined() ? t.view_as(t) : t);
    if (t.defined() && !views.back().requires_grad()) views.back().set_requires_grad(true);
  }
  return views;
}

// Gradients by the operands (views of them, see above) where `wanted`, undefined elsewhere: the
// composite form, derived by autograd. Differentiable themselves if create_graph.
variable_list composite_backward(at::TensorList grads, const variable_list& operands,
                                 const std::optional<at::Tensor>& batch_sizes,
                                 const at::Tensor& reserve, const Options& options,
                                 const std::vector<bool>& wanted, bool create_graph) {
  const Inputs inputs = inputs_of(operands, batch_sizes);
  std::vector<at::Tensor> masks;
  if (options.drops()) masks = dropout_masks(Problem(inputs, options), reserve);
  const auto [y, h_n, c_n] = composite_forward(inputs, options, masks);
  variable_list outputs, output_grads, sources, gradients(operands.size());
  const std::array<at::Tensor, 3> results = {y, h_n, c_n};
  for (size_t i = 0; i < 3; ++i) {
    if (!grads[i].defined() || !results[i].requires_grad()) continue;
    outputs.push_back(results[i]);
    output_grads.push_back(grads[i]);
  }
  std::vector<size_t> index;
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!operands[i].defined() || !wanted[i]) continue;
    sources.push_back(operands[i]);
    index.push_back(i);
  }
  if (outputs.empty() || sources.empty()) return gradients;
  const variable_list found = torch::autograd::grad(
      outputs, sources, output_grads, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
  for (size_t i = 0; i < index.size(); ++i) gradients[index[i]] = found[i];
  return gradients;
}

// What the nodes of both derivatives save: the operands and how they were used.
struct SavingNode : torch::autograd::Node {
  Options options;
  SavedVariable batch_sizes, reserve, output;
  std::vector<SavedVariable> operands;  // input, h_0, c_0, parameters
  std::vector<bool> present;            // which of them were there
  bool has_batch_sizes = false;

  void save(const Inputs& in, const Options& o) {
    options = o;
    if ((has_batch_sizes = in.batch_sizes.has_value()))
      batch_sizes = SavedVariable(*in.batch_sizes, false);
    const auto add = [&](const at::Tensor& t, bool there) {
      operands.emplace_back(there ? SavedVariable(t, false) : SavedVariable());
      present.push_back(there);
    };
    const size_t count = 3 + in.params.size();
    operands.reserve(count);
    present.reserve(count);
    const at::Tensor none;
    add(in.input, true);
    add(in.h_0 ? *in.h_0 : none, in.h_0.has_value());
    add(in.c_0 ? *in.c_0 : none, in.c_0.has_value());
    for (const at::Tensor& p : in.params) add(p, true);
  }
  variable_list unpack_operands() {
    variable_list all;
    all.reserve(operands.size());
    for (size_t i = 0; i < operands.size(); ++i)
      all.push_back(present[i] ? operands[i].unpack() : at::Tensor());
    return all;
  }
  std::optional<at::Tensor> unpack_batch_sizes() {
    return has_batch_sizes ? std::optional<at::Tensor>(batch_sizes.unpack()) : std::nullopt;
  }
  std::vector<bool> wanted_operands(size_t offset = 0) const {
    std::vector<bool> wanted(operands.size());
    for (size_t i = 0; i < operands.size(); ++i)
      wanted[i] = present[i] && task_should_compute_output(offset + i);
    return wanted;
  }

  // Threads may go backward through the same graph at once: one must not release what another is
  // unpacking.
  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* v : {&batch_sizes, &reserve, &output}) v->reset_data();
    for (SavedVariable& v : operands) v.reset_data();
  }

  // Compiled autograd: what the graph of this node depends on, and a run on stand-ins.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(int64_t(options.cell));
    args.collect(options.has_biases);
    args.collect(options.num_layers);
    args.collect(options.bidirectional);
    args.collect(options.batch_first);
    args.collect(options.dropout);
    args.collect(options.training);
    args.collect(has_batch_sizes);
    for (const bool there : present) args.collect(there);
    args.collect(batch_sizes, false);
    args.collect(reserve, false);
    args.collect(output, output_is_result());
    args.collect(operands, false);
  }
  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    saved.before(batch_sizes);
    saved.before(reserve);
    saved.before(output);
    saved.before(operands);
    variable_list results = apply(variable_list(inputs));
    saved.after(batch_sizes);
    saved.after(reserve);
    saved.after(output);
    saved.after(operands);
    return results;
  }
  virtual bool output_is_result() const { return false; }
};

struct RecurrentBackward final : SavingNode {
  bool saved_as_result = false;  // of this node, not as a copy

  std::string name() const override { return "RecurrentBackward"; }
  bool output_is_result() const override { return saved_as_result; }

  variable_list apply(variable_list&& grads) override {
    std::unique_lock<std::mutex> lock(mutex_);
    const variable_list all = unpack_operands();
    const std::optional<at::Tensor> sizes = unpack_batch_sizes();
    const at::Tensor kept = reserve.unpack(), unpacked_output = output.unpack(getptr());
    lock.unlock();
    const std::vector<bool> wanted = wanted_operands();
    if (any_batched(grads)) {
      const bool create_graph = at::GradMode::is_enabled();
      const at::AutoGradMode record(true);
      return composite_backward(grads, differentiable_views(all), sizes, kept, options, wanted,
                                create_graph);
    }
    variable_list results = call_recurrent_backward(
        {grads[0], grads[1], grads[2]}, inputs_of(all, sizes), unpacked_output, kept, options,
        {wanted[0], wanted[1], wanted[2]}, {wanted.begin() + 3, wanted.end()});
    for (size_t i = 0; i < results.size(); ++i)
      if (!wanted[i]) results[i] = at::Tensor();
    return results;
  }
};

// The derivative of recurrent_backward by the gradients it starts from and by the operands.
struct RecurrentDoubleBackward final : SavingNode {
  std::vector<SavedVariable> grads;
  std::vector<bool> mask;  // of the operands: which gradients were asked for

  std::string name() const override { return "RecurrentDoubleBackward"; }

  void release_variables() override {
    SavingNode::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& v : grads) v.reset_data();
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    SavingNode::compiled_args(args);
    for (const bool asked : mask) args.collect(asked);
    args.collect(grads, false);
  }
  // What is traced are stand-ins of no shape, and this derivative is a loop over the steps.
  variable_list apply_with_saved(const variable_list&,
                                 torch::dynamo::autograd::SwapSavedVariables&) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "compiled autograd does not take second derivatives of rnn_ext's "
                                "modules: leave it before the backward pass that needs them");
  }

  variable_list apply(variable_list&& grad_gradients) override {
    std::unique_lock<std::mutex> lock(mutex_);
    variable_list all;
    for (SavedVariable& v : grads) all.push_back(v.unpack());
    for (const at::Tensor& t : unpack_operands()) all.push_back(t);
    const std::optional<at::Tensor> sizes = unpack_batch_sizes();
    const at::Tensor kept = reserve.unpack();
    lock.unlock();
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    all = differentiable_views(all);
    const variable_list starts(all.begin(), all.begin() + 3), rest(all.begin() + 3, all.end());
    const variable_list gradients =
        composite_backward(starts, rest, sizes, kept, options, mask, /*create_graph=*/true);
    variable_list outputs, output_grads, sources, results(all.size());
    size_t next = 0;  // the results of recurrent_backward that were asked for, in order
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (!mask[i]) continue;
      const at::Tensor& grad = grad_gradients[next++];
      if (!grad.defined() || !gradients[i].defined() || !gradients[i].requires_grad()) continue;
      outputs.push_back(gradients[i]);
      output_grads.push_back(grad);
    }
    std::vector<size_t> index;
    for (size_t i = 0; i < all.size(); ++i) {
      if (!all[i].defined() || !task_should_compute_output(i)) continue;
      sources.push_back(all[i]);
      index.push_back(i);
    }
    if (outputs.empty() || sources.empty()) return results;
    const variable_list found =
        torch::autograd::grad(outputs, sources, output_grads, /*retain_graph=*/true, create_graph,
                              /*allow_unused=*/true);
    for (size_t i = 0; i < index.size(); ++i) results[index[i]] = found[i];
    return results;
  }
};

// A tensor with values of its own, not a stand-in that is being traced.
bool is_plain(const at::Tensor& t) {
  return t.has_storage() && !t.key_set().has_any(c10::DispatchKeySet(
                                {c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                 c10::DispatchKey::FuncTorchGradWrapper}));
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

void add_edge(torch::autograd::edge_list& edges, const at::Tensor& t) {
  edges.push_back(t.defined() && t.requires_grad() ? torch::autograd::impl::gradient_edge(t)
                                                   : torch::autograd::Edge());
}

// Does f hold for any floating-point operand?
template <class F>
bool any_operand(const Inputs& in, F&& f) {
  if (f(in.input) || (in.h_0 && f(*in.h_0)) || (in.c_0 && f(*in.c_0))) return true;
  for (const at::Tensor& p : in.params)
    if (f(p)) return true;
  return false;
}

bool has_tangent(const at::Tensor& t) { return t.defined() && t._fw_grad(/*level=*/0).defined(); }

// Forward-mode differentiation: every ATen operation knows how, so use those. So do the transforms
// of torch.func where something is dropped: they decide what is drawn anew for whom.
bool takes_composite(const Inputs& in, const Options& options) {
  return any_operand(in, [&](const at::Tensor& t) {
    return has_tangent(t) ||
           (options.drops() && t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper));
  });
}

}  // namespace

ForwardResult composite(const Inputs& inputs, const Options& options) {
  std::vector<at::Tensor> masks;
  if (options.drops()) {
    const Problem p(inputs, options);
    // Made of a mapped operand, if there is one: vmap may want to draw for each example.
    at::Tensor base = inputs.input;
    any_operand(inputs, [&](const at::Tensor& t) {
      if (!t.key_set().has(c10::DispatchKey::FuncTorchBatched)) return false;
      base = t;
      return true;
    });
    const at::Tensor like = base.detach().new_empty({p.shape.rows(), p.output_width()});
    for (int64_t layer = 0; layer + 1 < options.num_layers; ++layer)
      masks.push_back(draw_dropout_mask(like, options.dropout));
  }
  auto [output, h_n, c_n] = composite_forward(inputs, options, masks);
  return {output, h_n, c_n, at::empty({0}, inputs.input.options())};
}

namespace {

ForwardResult recurrent_autograd(const Inputs& inputs, const Options& options, bool save_reserve) {
  if (takes_composite(inputs, options)) return composite(inputs, options);
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
  torch::autograd::edge_list edges;
  edges.reserve(3 + inputs.params.size());
  const at::Tensor none;
  add_edge(edges, inputs.input);
  add_edge(edges, inputs.h_0 ? *inputs.h_0 : none);
  add_edge(edges, inputs.c_0 ? *inputs.c_0 : none);
  for (const at::Tensor& p : inputs.params) add_edge(edges, p);
  node->set_next_edges(std::move(edges));

  node->save(inputs, options);
  node->reserve = SavedVariable(reserve, false);
  if (is_plain(output)) node->output = SavedVariable(kept_output(output), false);
  torch::autograd::set_history(output, node);
  torch::autograd::set_history(h_n, node);
  torch::autograd::set_history(c_n, node);
  if ((node->saved_as_result = !is_plain(output))) node->output = SavedVariable(output, true);
  return result;
}

std::vector<at::Tensor> recurrent_backward_autograd(const Gradients& from, const Inputs& inputs,
                                                    const at::Tensor& output,
                                                    const at::Tensor& reserve,
                                                    const Options& options,
                                                    const c10::List<bool>& output_mask) {
  std::array<at::Tensor, 3> grads;
  for (size_t i = 0; i < 3; ++i) grads[i] = from[i].value_or(at::Tensor());
  const std::vector<bool> mask(output_mask.begin(), output_mask.end());
  const bool of_grads = std::any_of(grads.begin(), grads.end(), has_tangent);
  if (of_grads || any_operand(inputs, has_tangent)) {
    const at::AutoGradMode record(true);
    variable_list results =
        composite_backward(grads, differentiable_views(operands_of(inputs)), inputs.batch_sizes,
                           reserve, options, mask, /*create_graph=*/true);
    const variable_list all = operands_of(inputs);
    for (size_t i = 0; i < results.size(); ++i)
      if (!results[i].defined())
        results[i] = mask[i] && all[i].defined() ? at::zeros_like(all[i])
                                                 : at::empty({0}, inputs.input.options());
    return results;
  }
  const auto requires_grad = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
  const bool track =
      at::GradMode::is_enabled() && (std::any_of(grads.begin(), grads.end(), requires_grad) ||
                                     any_operand(inputs, requires_grad));
  std::vector<at::Tensor> results;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    results = call_recurrent_backward(grads, inputs, output, reserve, options,
                                      {mask[0], mask[1], mask[2]}, {mask.begin() + 3, mask.end()});
  }
  if (!track) return results;
  const auto node = make_node<RecurrentDoubleBackward>(torch::autograd::Edge().function);
  torch::autograd::edge_list edges;
  for (const at::Tensor& t : grads) add_edge(edges, t);
  for (const at::Tensor& t : operands_of(inputs)) add_edge(edges, t);
  node->set_next_edges(std::move(edges));
  node->save(inputs, options);
  for (size_t i = 0; i < results.size(); ++i) node->mask.push_back(mask[i] && node->present[i]);
  for (const at::Tensor& t : grads) node->grads.emplace_back(t, false);
  node->reserve = SavedVariable(reserve, false);
  for (size_t i = 0; i < results.size(); ++i)
    if (node->mask[i]) torch::autograd::set_history(results[i], node);
  return results;
}

// The product of a mixed-precision region is computed as torch computes its own RNNs there: all
// floating-point operands in the region's dtype.
ForwardResult recurrent_autocast(const Inputs& inputs, const Options& options, bool save_reserve) {
  const auto device = inputs.input.device().type();
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
  cast_params.reserve(inputs.params.size());
  for (const at::Tensor& p : inputs.params) cast_params.push_back(cast(p));
  return call_recurrent({cast(inputs.input), inputs.batch_sizes, cast_optional(inputs.h_0),
                         cast_optional(inputs.c_0), cast_params},
                        options, save_reserve);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, Autograd, m) {
  m.impl("recurrent", recurrent_operator<recurrent_autograd>);
  m.impl("recurrent_backward", recurrent_backward_operator<recurrent_backward_autograd>);
  m.impl("recurrent_backward_per_example", torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(rnn_ext, AutocastCPU, m) {
  m.impl("recurrent", recurrent_operator<recurrent_autocast>);
}
TORCH_LIBRARY_IMPL(rnn_ext, AutocastCUDA, m) {
  m.impl("recurrent", recurrent_operator<recurrent_autocast>);
}

}  // namespace rnn_ext
