// torch.func.vmap over rnn_ext::recurrent and its backward.
//
// What is mapped decides: examples (input, states) become more rows of the batch; models (any
// weight) become one call of several models, as do gradients that are mapped alone. Gradients of
// weights per example are made of the gate gradients of one call for all examples.
#include <ATen/ATen.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include "ops.h"

namespace rnn_ext {
namespace {

using at::functorch::makeBatched;
using at::functorch::maybeGetBatchedImpl;

// The innermost vmap that maps any of these tensors; 0 if none does. (torch's own question for the
// current level is behind a header that needs one which torch does not install.)
int64_t innermost_level(const Inputs& in, std::initializer_list<at::Tensor> more) {
  int64_t level = 0;
  const auto look = [&](const at::Tensor& t) {
    if (!t.defined()) return;
    if (const auto* batched = maybeGetBatchedImpl(t)) level = std::max(level, batched->level());
  };
  look(in.input);
  for (const auto& t : {in.batch_sizes, in.h_0, in.c_0})
    if (t) look(*t);
  for (const at::Tensor& t : in.params) look(t);
  for (const at::Tensor& t : more) look(t);
  return level;
}

// An operand below the level of the vmap: the tensor with the mapped dimension in it, if any.
struct Operand {
  at::Tensor value;
  std::optional<int64_t> dim;

  Operand() = default;
  Operand(const at::Tensor& t, int64_t level) : value(t) {
    const auto* batched = t.defined() ? maybeGetBatchedImpl(t) : nullptr;
    if (!batched || batched->level() != level) return;
    value = batched->value();
    dim = batched->bdim();
  }
  bool mapped() const { return dim.has_value(); }
};

at::Tensor with_dim_at(const Operand& t, int64_t position, int64_t size) {
  if (!t.value.defined()) return t.value;
  if (t.mapped()) return t.value.movedim(*t.dim, position);
  std::vector<int64_t> sizes = t.value.sizes().vec();
  sizes.insert(sizes.begin() + position, size);
  return t.value.unsqueeze(position).expand(sizes);
}

at::Tensor or_none(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }
std::optional<at::Tensor> optional(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

// The operands of a call under one level of vmap.
struct MappedCall {
  int64_t level;
  int64_t size = 0;  // M, of the mapped dimension
  Options options;
  Operand input, h_0, c_0;
  std::vector<Operand> params;
  std::optional<at::Tensor> batch_sizes;
  int64_t lead = 0;  // 1 if the call is one of several models already

  MappedCall(const Inputs& in, const Options& o, int64_t of_level) : level(of_level), options(o) {
    input = wrap(in.input);
    h_0 = wrap(or_none(in.h_0));
    c_0 = wrap(or_none(in.c_0));
    for (const at::Tensor& p : in.params) params.push_back(wrap(p));
    if (in.batch_sizes) {
      const Operand sizes = wrap(*in.batch_sizes);
      TORCH_CHECK_NOT_IMPLEMENTED(!sizes.mapped(), "vmap over the batch_sizes of packed sequences");
      batch_sizes = sizes.value;
    }
    lead = in.params[0].dim() - 2;
  }

  Operand wrap(const at::Tensor& t) {
    Operand operand(t, level);
    if (operand.mapped()) size = operand.value.size(*operand.dim);
    return operand;
  }
  bool params_mapped() const {
    return std::any_of(params.begin(), params.end(), [](const Operand& p) { return p.mapped(); });
  }

  // Dimension of the rows that a batch has one of per example: those of a step in packed data.
  int64_t row_dim() const { return lead + (batch_sizes || options.batch_first ? 0 : 1); }
  int64_t state_row_dim() const { return lead + 1; }
};

// ------------------------------------------------------------------- examples as rows of a batch
// Row b of example m becomes row b*M + m: then rows that a packed step does not have are the last
// ones still.

at::Tensor fold(const Operand& t, int64_t row_dim, int64_t size) {
  return t.value.defined() ? with_dim_at(t, row_dim + 1, size).flatten(row_dim, row_dim + 1)
                           : t.value;
}
at::Tensor unfold(const at::Tensor& t, int64_t row_dim, const MappedCall& call) {
  return makeBatched(t.unflatten(row_dim, {t.size(row_dim) / call.size, call.size}), row_dim + 1,
                     call.level);
}

// The reserve is opaque: any split of it will do that comes back the same.
at::Tensor fold_reserve(const Operand& reserve, const MappedCall& call) {
  return with_dim_at(reserve, call.lead, call.size).flatten(call.lead, call.lead + 1);
}
at::Tensor unfold_reserve(const at::Tensor& reserve, const MappedCall& call) {
  if (reserve.numel() == 0) return reserve;
  return makeBatched(reserve.unflatten(call.lead, {call.size, reserve.size(call.lead) / call.size}),
                     call.lead, call.level);
}

struct Folded {
  std::vector<at::Tensor> params;
  Inputs inputs;

  explicit Folded(const MappedCall& call) {
    for (const Operand& p : call.params) params.push_back(p.value);
    inputs = {fold(call.input, call.row_dim(), call.size),
              call.batch_sizes ? optional(*call.batch_sizes * call.size) : std::nullopt,
              optional(fold(call.h_0, call.state_row_dim(), call.size)),
              optional(fold(call.c_0, call.state_row_dim(), call.size)), params};
  }
  Folded(const Folded&) = delete;
};

// ----------------------------------------------------------------------------- several models

at::Tensor as_members(const Operand& t, const MappedCall& call) {
  const at::Tensor front = with_dim_at(t, 0, call.size);
  return front.defined() && call.lead == 1 ? front.flatten(0, 1) : front;
}
at::Tensor from_members(const at::Tensor& t, const MappedCall& call) {
  const bool nested = call.lead == 1 && t.dim() > 0 && t.size(0) > 0;
  return makeBatched(nested ? t.unflatten(0, {call.size, t.size(0) / call.size}) : t, 0,
                     call.level);
}

struct Members {
  std::vector<at::Tensor> params;
  Inputs inputs;

  explicit Members(const MappedCall& call) {
    for (const Operand& p : call.params) params.push_back(as_members(p, call));
    inputs = {as_members(call.input, call), call.batch_sizes, optional(as_members(call.h_0, call)),
              optional(as_members(call.c_0, call)), params};
  }
  Members(const Members&) = delete;
};

// --------------------------------------------------------------------------------- the operators

ForwardResult recurrent_vmap(const Inputs& inputs, const Options& options, bool save_reserve) {
  // vmap's `randomness` says what is drawn anew for whom: left to the operations that draw.
  if (options.drops()) return composite(inputs, options);
  const int64_t level = innermost_level(inputs, {});
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
  const MappedCall call(inputs, options, level);
  if (call.size == 0) return call_recurrent(inputs, options, save_reserve);
  if (call.params_mapped()) {
    const auto [output, h_n, c_n, reserve] =
        call_recurrent(Members(call).inputs, options, save_reserve);
    return {from_members(output, call), from_members(h_n, call), from_members(c_n, call),
            from_members(reserve, call)};
  }
  const auto [output, h_n, c_n, reserve] =
      call_recurrent(Folded(call).inputs, options, save_reserve);
  return {unfold(output, call.row_dim(), call), unfold(h_n, call.state_row_dim(), call),
          options.is_lstm() ? unfold(c_n, call.state_row_dim(), call) : c_n,
          unfold_reserve(reserve, call)};
}

bool requires_grad_below(const at::Tensor& t) {
  if (!t.defined()) return false;
  if (const auto* batched = maybeGetBatchedImpl(t)) return requires_grad_below(batched->value());
  return t.requires_grad() || t._fw_grad(/*level=*/0).defined();
}

std::vector<at::Tensor> recurrent_backward_vmap(const Gradients& from, const Inputs& inputs,
                                                const at::Tensor& output_,
                                                const at::Tensor& reserve_, const Options& options,
                                                const c10::List<bool>& output_mask) {
  const int64_t level = innermost_level(
      inputs, {or_none(from[0]), or_none(from[1]), or_none(from[2]), output_, reserve_});
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::FuncTorchBatched);
  MappedCall call(inputs, options, level);
  const bool forward_mapped = call.size > 0;
  std::array<Operand, 3> grads;
  for (size_t i = 0; i < 3; ++i) grads[i] = call.wrap(or_none(from[i]));
  const Operand output = call.wrap(output_), reserve = call.wrap(reserve_);
  const std::vector<bool> mask(output_mask.begin(), output_mask.end());
  const std::array<bool, 3> state_mask = {mask[0], mask[1], mask[2]};
  const std::vector<bool> param_mask(mask.begin() + 3, mask.end());

  // Gradients by examples that forward took as rows of a batch.
  if (forward_mapped && !call.params_mapped()) {
    const bool of_params =
        std::find(param_mask.begin(), param_mask.end(), true) != param_mask.end();
    std::vector<at::Tensor> values = {call.input.value, call.h_0.value, call.c_0.value,
                                      output.value, reserve.value};
    for (const Operand& p : call.params) values.push_back(p.value);
    for (const Operand& g : grads) values.push_back(g.value);
    const auto any = [&](const auto& is) { return std::any_of(values.begin(), values.end(), is); };
    const auto differentiable = [&] {
      return at::GradMode::is_enabled() && any(requires_grad_below);
    };
    const auto mapped_again = [&] {
      return any([](const at::Tensor& t) { return t.defined() && maybeGetBatchedImpl(t); });
    };
    const int64_t plain = (options.has_biases ? 4 : 2) * options.num_layers * options.directions();
    const bool projected = int64_t(inputs.params.size()) != plain;
    const bool one_model = call.lead == 0 && !projected && call.input.value.is_cpu();
    if (!of_params || (one_model && !mapped_again() && !differentiable())) {
      const Folded folded(call);
      const std::array<at::Tensor, 3> rows = {fold(grads[0], call.row_dim(), call.size),
                                              fold(grads[1], call.state_row_dim(), call.size),
                                              fold(grads[2], call.state_row_dim(), call.size)};
      const at::Tensor y = fold(output, call.row_dim(), call.size);
      const at::Tensor kept = fold_reserve(reserve, call);
      std::vector<at::Tensor> results =
          of_params ? call_recurrent_backward_per_example(rows, folded.inputs, y, kept, options,
                                                          mask, call.size)
                    : call_recurrent_backward(rows, folded.inputs, y, kept, options, state_mask,
                                              param_mask);
      for (size_t i = 0; i < results.size(); ++i) {
        if (results[i].numel() == 0) continue;
        results[i] = i >= 3   ? makeBatched(results[i], 0, level)
                     : i == 0 ? unfold(results[i], call.row_dim(), call)
                              : unfold(results[i], call.state_row_dim(), call);
      }
      return results;
    }
  }

  const Members members(call);
  std::array<at::Tensor, 3> own;
  for (size_t i = 0; i < 3; ++i) own[i] = as_members(grads[i], call);
  at::Tensor y = as_members(output, call), kept = as_members(reserve, call);
  if (forward_mapped && !call.params_mapped()) {  // the reserve is of one large batch: once more
    const ForwardResult again = call_recurrent(members.inputs, options, /*save_reserve=*/true);
    y = std::get<0>(again);
    kept = std::get<3>(again);
  }
  std::vector<at::Tensor> results =
      call_recurrent_backward(own, members.inputs, y, kept, options, state_mask, param_mask);
  for (at::Tensor& t : results)
    if (t.numel() > 0) t = from_members(t, call);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(rnn_ext, FuncTorchBatched, m) {
  m.impl("recurrent", recurrent_operator<recurrent_vmap>);
  m.impl("recurrent_backward", recurrent_backward_operator<recurrent_backward_vmap>);
}

}  // namespace rnn_ext
