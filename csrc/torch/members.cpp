// A call of several models: each is a call of its own, and they share out the threads. One model
// per thread needs no waiting within a step, which is what a small model's time goes into.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ThreadLocalState.h>

#include "cpu_backend.h"

namespace rnn_ext {
namespace {

int64_t count_members(const Inputs& in, const Options& options) {
  TORCH_CHECK_NOT_IMPLEMENTED(!options.drops(), "dropout in a call of several models");
  const int64_t count = in.params[0].size(0);
  const auto check = [&](const at::Tensor& t, const char* name) {
    TORCH_CHECK(t.dim() > 0 && t.size(0) == count, name, " must have ", count,
                " entries in dimension 0, one per model, got size ", t.sizes());
  };
  check(in.input, "input");
  if (in.h_0) check(*in.h_0, "h_0");
  if (in.c_0) check(*in.c_0, "c_0");
  for (const at::Tensor& p : in.params) check(p, "every parameter");
  TORCH_CHECK(count > 0, "expected at least one model");
  return count;
}

// run(member) for every member, a thread each where there are members enough for all threads.
template <class F>
void for_each_member(const Inputs& in, const Problem& one, bool backward, int64_t count,
                     const F& run) {
  if (count < offered_threads() || !in.input.is_cpu()) {
    for (int64_t m = 0; m < count; ++m) run(m);  // each with all threads
    return;
  }
  double work = 0;
  for (int64_t layer = 0; layer < one.options.num_layers; ++layer) {
    const SequenceShape shape = one.layer_shape(layer);
    work += plan_call<float>(shape, backward, 1).step_seconds * double(shape.steps * count);
  }
  const at::ThreadLocalState state;
  share_out(count, work, [&](int64_t m) {
    const at::ThreadLocalStateGuard same(state);
    run(m);
  });
}

std::vector<int64_t> with_front(int64_t count, at::IntArrayRef sizes) {
  std::vector<int64_t> all = {count};
  all.insert(all.end(), sizes.begin(), sizes.end());
  return all;
}

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return options.device().is_cpu() ? pooled_empty(sizes, c10::typeMetaToScalarType(options.dtype()))
                                   : at::empty(sizes, options);
}

std::optional<at::Tensor> entry(const std::optional<at::Tensor>& t, int64_t m) {
  return t ? std::optional<at::Tensor>(t->select(0, m)) : std::nullopt;
}

}  // namespace

SingleModel::SingleModel(const Inputs& all, int64_t index) {
  for (const at::Tensor& p : all.params) params.push_back(p.select(0, index));
  inputs = {all.input.select(0, index), all.batch_sizes, entry(all.h_0, index),
            entry(all.c_0, index), params};
}

ForwardResult members_forward(const Inputs& inputs, const Options& options, bool save_reserve,
                              const MemberForward& run) {
  const int64_t count = count_members(inputs, options);
  const SingleModel first(inputs, 0);
  const Problem p(first.inputs, options);
  const int64_t slots = options.num_layers * options.directions();
  const at::TensorOptions like = inputs.input.options();
  const auto of_all = [&](at::IntArrayRef sizes) { return empty(with_front(count, sizes), like); };
  const at::Tensor output = of_all(p.output_sizes());
  const at::Tensor h_n = of_all({slots, p.shape.batch, p.shape.state_size()});
  const at::Tensor c_n =
      options.is_lstm() ? of_all({slots, p.shape.batch, p.shape.hidden_size}) : of_all({0});
  const at::Tensor reserve = empty({count, save_reserve ? p.reserve_size() : 0},
                                   like.dtype(at::toOpMathType(inputs.input.scalar_type())));
  for_each_member(inputs, p, /*backward=*/false, count, [&](int64_t m) {
    run(SingleModel(inputs, m).inputs,
        {output.select(0, m), h_n.select(0, m), c_n.select(0, m), reserve.select(0, m)});
  });
  return {output, h_n, c_n, reserve};
}

std::vector<at::Tensor> members_backward(const Gradients& grads, const Inputs& inputs,
                                         const at::Tensor& output, const at::Tensor& reserve,
                                         const Options& options, const c10::List<bool>& output_mask,
                                         const MemberBackward& run) {
  TORCH_CHECK(output_mask.size() == 3 + inputs.params.size(), "output_mask must have ",
              3 + inputs.params.size(), " entries, got ", output_mask.size());
  const int64_t count = count_members(inputs, options);
  const auto check = [&](const at::Tensor& t) {
    TORCH_CHECK(!t.defined() || (t.dim() > 0 && t.size(0) == count),
                "gradients, output and reserve must have ", count, " entries, one per model");
    return t;
  };
  for (const auto& t : grads) check(t.value_or(at::Tensor()));
  check(output);
  check(reserve);
  std::vector<at::Tensor> results;
  const auto add = [&](const std::optional<at::Tensor>& like) {
    const bool asked = output_mask[results.size()] && like;
    results.push_back(empty(asked ? like->sizes() : at::IntArrayRef{0}, inputs.input.options()));
  };
  add(inputs.input);
  add(inputs.h_0);
  add(inputs.c_0);
  for (const at::Tensor& p : inputs.params) add(p);
  const SingleModel first(inputs, 0);
  const Problem p(first.inputs, options);
  for_each_member(inputs, p, /*backward=*/true, count, [&](int64_t m) {
    Gradients own;
    for (size_t i = 0; i < 3; ++i)
      if (grads[i] && grads[i]->defined()) own[i] = grads[i]->select(0, m);
    std::vector<at::Tensor> into;
    for (const at::Tensor& t : results) into.push_back(t.numel() > 0 ? t.select(0, m) : t);
    run(own, SingleModel(inputs, m).inputs, output.select(0, m), reserve.select(0, m), into);
  });
  return results;
}

}  // namespace rnn_ext
