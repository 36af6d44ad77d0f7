// The walk through the layers of a call, which the backends share: allocate, fill the structs of
// sequence.h layer by layer, hand them to the engine.
//
// A Backend names the types of its engine's calls, Element for tensors and Saved for the reserve,
// and runs them:
//   static at::ScalarType element_type(at::ScalarType dtype);   of Element, for tensors of `dtype`
//   static at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
//   Backend(const Problem& problem, at::ScalarType dtype);
//   void run(ForwardCall<Element, Saved>& call);   at once, or
//   void finish();                                 at the latest here, after the last layer
//   void run(BackwardCall<Element, Saved>& call);
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <type_traits>
#include <utility>

#include "ops.h"

namespace rnn_ext {

// T may be an engine's own name for a type, so torch's check of it is passed by.
template <class T>
const T* const_data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The engines read rows with any strides between them, but consecutive elements within.
inline at::Tensor readable(const at::Tensor& t, at::ScalarType element) {
  const at::Tensor converted = t.scalar_type() == element ? t : t.to(element);
  const bool rows_ok = converted.dim() == 0 || converted.size(-1) == 1 || converted.stride(-1) == 1;
  return rows_ok ? converted : converted.contiguous();
}

inline std::optional<at::Tensor> dense(const std::optional<at::Tensor>& t, at::ScalarType element) {
  if (!t || !t->defined()) return std::nullopt;
  return t->to(element).contiguous();
}

template <class T>
const T* slice(const std::optional<at::Tensor>& state, int64_t index) {
  if (!state) return nullptr;
  return const_data<T>(*state) + index * state->size(1) * state->size(2);
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
  const auto data = [&](int64_t i) { return i < 0 ? nullptr : const_data<T>(params[size_t(i)]); };
  const auto ld = [&](int64_t i) { return i < 0 ? 0 : params[size_t(i)].stride(0); };
  return {data(index.w_ih), data(index.w_hh), data(index.b_ih), data(index.b_hh),
          data(index.w_hr), ld(index.w_ih),   ld(index.w_hh),   ld(index.w_hr)};
}

// Everything the engine reads, in its type; the tensors keep converted copies alive.
struct Operands {
  at::Tensor input;
  std::optional<at::Tensor> h_0, c_0;
  std::vector<at::Tensor> params;

  Operands(const Inputs& from, at::ScalarType element)
      : input(readable(from.input, element)),
        h_0(dense(from.h_0, element)),
        c_0(dense(from.c_0, element)) {
    params.reserve(from.params.size());
    for (const at::Tensor& p : from.params) params.push_back(readable(p, element));
  }
};

// The output of a layer but the last, kept in the reserve. Where Element is narrower than Saved it
// takes the first part of its place.
inline at::Tensor kept_layer_output(const Problem& p, const at::Tensor& reserve, int64_t layer,
                                    at::ScalarType element) {
  return reserve.narrow(0, p.layer_output_offset(layer), p.layer_output_size())
      .view(element)
      .narrow(0, 0, p.layer_output_size());
}

// With `into` the results are written there: tensors of their sizes and dtypes.
template <class Backend>
ForwardResult forward_layers(const Problem& p, const Inputs& inputs, bool save_reserve,
                             const ForwardResult* into) {
  using T = typename Backend::Element;
  using Saved = typename Backend::Saved;
  const Options& o = p.options;
  const at::ScalarType dtype = inputs.input.scalar_type();
  const at::ScalarType element = Backend::element_type(dtype);
  const at::TensorOptions plain = inputs.input.options().dtype(element);
  const at::TensorOptions wide = plain.dtype(at::toOpMathType(dtype));
  const Operands in(inputs, element);
  const int64_t slots = o.num_layers * o.directions(), R = p.shape.state_size();
  const int64_t H = p.shape.hidden_size, B = p.shape.batch;

  const bool in_place = into && dtype == element;
  at::Tensor output = in_place ? std::get<0>(*into) : Backend::empty(p.output_sizes(), plain);
  at::Tensor h_n = in_place ? std::get<1>(*into) : Backend::empty({slots, B, R}, plain);
  at::Tensor c_n = in_place      ? std::get<2>(*into)
                   : o.is_lstm() ? Backend::empty({slots, B, H}, plain)
                                 : Backend::empty({0}, plain);
  at::Tensor reserve =
      into ? std::get<3>(*into) : Backend::empty({save_reserve ? p.reserve_size() : 0}, wide);
  if (B > 0) {
    // Outputs of the layers. In training they are part of the reserve (what dropout leaves of them
    // is not: backward derives it again), else only the last one outlives the call.
    at::Tensor inner[2], dropped;
    if (!save_reserve && o.num_layers > 1)
      for (int i = 0; i < (o.num_layers > 2 ? 2 : 1); ++i)
        inner[i] = Backend::empty({p.layer_output_size()}, plain);
    const T* layer_input = nullptr;
    Backend backend(p, dtype);
    for (int64_t layer = 0; layer < o.num_layers; ++layer) {
      const bool last = layer == o.num_layers - 1;
      ForwardCall<T, Saved> call;
      call.shape = p.layer_shape(layer);
      call.linear_activations = linear_activations();
      call.x = layer == 0 ? step_rows<const T>(p, const_data<T>(in.input), in.input.strides())
                          : dense_rows<const T>(p, layer_input);
      T* y = last ? mutable_data<T>(output)
             : save_reserve
                 ? reinterpret_cast<T*>(mutable_data<Saved>(reserve) + p.layer_output_offset(layer))
                 : mutable_data<T>(inner[layer & 1]);
      call.y = last ? step_rows<T>(p, y, output.strides()) : dense_rows<T>(p, y);
      for (int d = 0; d < o.directions(); ++d) {
        const int64_t slot = layer * o.directions() + d;
        call.weights[d] = weights_of<T>(in.params, p.param(layer, d));
        call.h_0[d] = slice<T>(in.h_0, slot);
        call.c_0[d] = slice<T>(in.c_0, slot);
        call.h_n[d] = mutable_data<T>(h_n) + slot * B * R;
        if (o.is_lstm()) call.c_n[d] = mutable_data<T>(c_n) + slot * B * H;
        if (save_reserve && num_saved(o.cell) > 0)
          call.reserve[d] = mutable_data<Saved>(reserve) + p.saved_offset(layer, d);
      }
      layer_input = y;
      backend.run(call);
      if (!last && o.drops()) {
        // Drawn like torch.nn draws it, so that the same seed drops the same values.
        const at::Tensor from = at::from_blob(y, {p.layer_output_size()}, plain);
        const at::Tensor mask = draw_dropout_mask(from, o.dropout);
        if (save_reserve)
          reserve.narrow(0, p.mask_offset(layer), p.layer_output_size()).copy_(mask);
        dropped = from * mask;
        layer_input = const_data<T>(dropped);
      }
    }
    backend.finish();
  }
  if (dtype == element) return {output, h_n, c_n, reserve};
  if (!into) return {output.to(dtype), h_n.to(dtype), c_n.to(dtype), reserve};
  std::get<0>(*into).copy_(output);
  std::get<1>(*into).copy_(h_n);
  std::get<2>(*into).copy_(c_n);
  return *into;
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

// The arguments of recurrent_backward, checked.
struct BackwardArguments {
  std::array<at::Tensor, 3> grads;  // of output, h_n, c_n; undefined means zeros
  Wanted wanted;

  BackwardArguments(const Problem& p, const Inputs& inputs, const at::Tensor& output,
                    const at::Tensor& reserve, const std::array<std::optional<at::Tensor>, 3>& from,
                    const c10::List<bool>& output_mask);
};

// Gradients of a layer's parameters, of each example alone: what is left to do of `all`, a call for
// the whole batch that has made all.gates; row b of the batch is of example b % examples. To
// results[direction]: (examples, ...). CPU only, and not for layers with projection.
template <class T>
void parameter_gradients_per_example(const BackwardCall<T>& all,
                                     const DirectionGradients<T>* results, int64_t examples);

// With `into` the results are written there: tensors of their sizes and dtypes, empty where a
// result is not there. With `examples`, gradients of parameters are those of each example alone.
template <class Backend>
std::vector<at::Tensor> backward_layers(const Problem& p, const Inputs& inputs,
                                        const at::Tensor& output_, const at::Tensor& reserve,
                                        const BackwardArguments& arguments,
                                        const std::vector<at::Tensor>* into, int64_t examples = 0) {
  using T = typename Backend::Element;
  using Saved = typename Backend::Saved;
  const Options& o = p.options;
  const std::array<at::Tensor, 3>& grads = arguments.grads;
  const Wanted& wanted = arguments.wanted;
  const at::ScalarType dtype = inputs.input.scalar_type();
  const at::ScalarType element = Backend::element_type(dtype);
  const at::TensorOptions plain = inputs.input.options().dtype(element);
  const Operands in(inputs, element);
  const int64_t R = p.shape.state_size(), H = p.shape.hidden_size, B = p.shape.batch;
  const int64_t slots = o.num_layers * o.directions();
  const at::Tensor output = readable(output_, element);
  const at::Tensor dy = grads[0].defined() ? readable(grads[0], element) : at::Tensor();
  const std::optional<at::Tensor> dh_n = dense(grads[1], element), dc_n = dense(grads[2], element);

  // Results in the order input, h_0, c_0, parameters; empty where not asked for.
  std::vector<at::Tensor> results;
  results.reserve(3 + in.params.size());
  const bool in_place = into && dtype == element;
  const auto result = [&](bool asked, at::IntArrayRef sizes) {
    results.push_back(in_place ? (*into)[results.size()]
                               : Backend::empty(asked ? sizes : at::IntArrayRef{0}, plain));
    if (B == 0) results.back().zero_();
    return asked && results.back().numel() > 0 ? mutable_data<T>(results.back()) : nullptr;
  };
  T* dx = result(wanted.state[0], inputs.input.sizes());
  if (dx && p.packed && inputs.input.size(0) > p.shape.rows())  // rows that no step reads
    results[0].narrow(0, p.shape.rows(), inputs.input.size(0) - p.shape.rows()).zero_();
  T* dh_0 = result(wanted.state[1], {slots, B, R});
  T* dc_0 = result(wanted.state[2] && o.is_lstm(), {slots, B, H});
  std::vector<T*> dparams;
  for (size_t i = 0; i < in.params.size(); ++i) {
    std::vector<int64_t> sizes = in.params[i].sizes().vec();
    if (examples > 0) sizes.insert(sizes.begin(), examples);
    dparams.push_back(result(wanted.params[i], sizes));
  }

  const Saved* saved = const_data<Saved>(reserve);
  const auto kept = [&](int64_t layer) {
    return reinterpret_cast<const T*>(saved + p.layer_output_offset(layer));
  };
  const auto mask = [&](int64_t layer) {
    return reserve.narrow(0, p.mask_offset(layer), p.layer_output_size()).to(element);
  };
  Backend backend(p, dtype);
  at::Tensor from_above;  // dL/dy of the layer, dense in time order
  for (int64_t layer = o.num_layers - 1; B > 0 && layer >= 0; --layer) {
    const bool last = layer == o.num_layers - 1;
    const int64_t first_param = p.param(layer, 0).w_ih;
    bool here = wanted.state[1] || wanted.state[2];
    for (int64_t i = 0; i < int64_t(in.params.size()) / o.num_layers; ++i)
      here = here || wanted.of(first_param + i);
    const bool below = wanted.below(layer);
    if (!here && !below) break;

    BackwardCall<T, Saved> call;
    call.shape = p.layer_shape(layer);
    call.linear_activations = linear_activations();
    at::Tensor dropped;
    if (layer == 0) {
      call.x = step_rows<const T>(p, const_data<T>(in.input), in.input.strides());
      if (dx) call.dx = step_rows<T>(p, dx, results[0].strides());
    } else {
      const T* x = kept(layer - 1);
      if (o.drops()) {
        dropped = kept_layer_output(p, reserve, layer - 1, element) * mask(layer - 1);
        x = const_data<T>(dropped);
      }
      call.x = dense_rows<const T>(p, x);
    }
    if (last) {
      call.y = step_rows<const T>(p, const_data<T>(output), output.strides());
      if (dy.defined()) call.dy = step_rows<const T>(p, const_data<T>(dy), dy.strides());
    } else {
      call.y = dense_rows<const T>(p, kept(layer));
      call.dy = dense_rows<const T>(p, const_data<T>(from_above));
    }
    at::Tensor to_below;
    if (layer > 0 && below) {
      to_below = Backend::empty({p.layer_output_size()}, plain);
      call.dx = dense_rows<T>(p, mutable_data<T>(to_below));
    }
    DirectionGradients<T> of_each[kMaxDirections];
    at::Tensor gates[kMaxDirections][2];
    for (int d = 0; d < o.directions(); ++d) {
      const int64_t slot = layer * o.directions() + d;
      const ParamIndex index = p.param(layer, d);
      const auto gradient = [&](int64_t i) { return i < 0 ? nullptr : dparams[size_t(i)]; };
      call.weights[d] = weights_of<T>(in.params, index);
      call.h_0[d] = slice<T>(in.h_0, slot);
      call.dh_n[d] = slice<T>(dh_n, slot);
      call.dc_n[d] = slice<T>(dc_n, slot);
      call.reserve[d] = saved + p.saved_offset(layer, d);
      DirectionGradients<T>& gradients = call.gradients[d];
      gradients = {gradient(index.w_ih), gradient(index.w_hh), gradient(index.b_ih),
                   gradient(index.b_hh), gradient(index.w_hr)};
      if (examples > 0 && here) {
        of_each[d] = std::exchange(gradients, {});
        const int64_t width = num_gates(o.cell) * H;
        gates[d][0] = gates[d][1] = Backend::empty({p.shape.rows(), width}, plain);
        if (o.cell == CellKind::kGru) gates[d][1] = Backend::empty(gates[d][0].sizes(), plain);
        call.gates[d] = {mutable_data<T>(gates[d][0]), mutable_data<T>(gates[d][1])};
      }
      gradients.h_0 = dh_0 ? dh_0 + slot * B * R : nullptr;
      gradients.c_0 = dc_0 ? dc_0 + slot * B * H : nullptr;
    }
    backend.run(call);
    if constexpr (std::is_same_v<T, Saved>)
      if (examples > 0 && here) parameter_gradients_per_example(call, of_each, examples);
    if (layer > 0 && below) {
      if (o.drops()) to_below.mul_(mask(layer - 1));
      from_above = to_below;
    }
  }
  if (dtype == element) return results;
  if (!into) {
    for (at::Tensor& t : results) t = t.to(dtype);
    return results;
  }
  for (size_t i = 0; i < results.size(); ++i)
    if ((*into)[i].numel() > 0) (*into)[i].copy_(results[i]);
  return *into;
}

}  // namespace rnn_ext
