// The recurrence in differentiable ATen operations: slow, and exact to any order of derivative.
#include <ATen/ATen.h>

#include "ops.h"

namespace rnn_ext {
namespace {

at::Tensor sigmoid_gate(const at::Tensor& x) {
  return linear_activations() ? x * 0.25 + 0.5 : at::sigmoid(x);
}
at::Tensor tanh_gate(const at::Tensor& x) { return linear_activations() ? x : at::tanh(x); }

struct State {
  at::Tensor h, c;
};

// The equations of csrc/cells/, on (B, G*H) gate values.
State cell_step(CellKind kind, const at::Tensor& gx, const at::Tensor& gh, const State& state) {
  switch (kind) {
    case CellKind::kRnnTanh:
      return {tanh_gate(gx + gh), {}};
    case CellKind::kRnnRelu:
      return {at::relu(gx + gh), {}};
    case CellKind::kGru: {
      const auto x = gx.chunk(3, 1), h = gh.chunk(3, 1);
      const at::Tensor r = sigmoid_gate(x[0] + h[0]), z = sigmoid_gate(x[1] + h[1]);
      const at::Tensor n = tanh_gate(x[2] + r * h[2]);
      return {n + z * (state.h - n), {}};
    }
    case CellKind::kLstm:
      break;
  }
  const auto a = (gx + gh).chunk(4, 1);
  const at::Tensor c = sigmoid_gate(a[1]) * state.c + sigmoid_gate(a[0]) * tanh_gate(a[2]);
  return {sigmoid_gate(a[3]) * tanh_gate(c), c};
}

// Rows beyond the active ones keep the state they had.
at::Tensor with_rest(const at::Tensor& active, const at::Tensor& all) {
  const int64_t n = active.size(0), batch = all.size(0);
  return n == batch ? active : at::cat({active, all.narrow(0, n, batch - n)});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_forward(
    const Inputs& inputs, const Options& options, const std::vector<at::Tensor>& masks) {
  if (has_members(inputs)) {
    TORCH_CHECK_NOT_IMPLEMENTED(!options.drops(), "dropout in a call of several models");
    std::vector<at::Tensor> outputs, h_n, c_n;
    for (int64_t m = 0; m < inputs.params[0].size(0); ++m) {
      auto [output, h, c] = composite_forward(SingleModel(inputs, m).inputs, options, {});
      outputs.push_back(output);
      h_n.push_back(h);
      c_n.push_back(c);
    }
    return {at::stack(outputs), at::stack(h_n), at::stack(c_n)};
  }
  const Problem p(inputs, options);
  const SequenceShape& s = p.shape;
  const at::ScalarType dtype = inputs.input.scalar_type();
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  const auto wide = [&](const at::Tensor& t) { return narrow ? t.to(at::kFloat) : t; };
  const int64_t slots = options.num_layers * s.directions;

  at::Tensor x = wide(inputs.input);  // (N, width) in time order
  if (!p.packed && options.batch_first) x = x.transpose(0, 1);
  x = p.packed ? x.narrow(0, 0, s.rows()) : x.reshape({s.rows(), s.input_size});
  const auto initial = [&](const std::optional<at::Tensor>& state, int64_t width) {
    return state ? wide(*state) : at::zeros({slots, s.batch, width}, x.options());
  };
  const at::Tensor h_0 = initial(inputs.h_0, s.state_size());
  const at::Tensor c_0 = options.is_lstm() ? initial(inputs.c_0, s.hidden_size) : at::Tensor();

  std::vector<at::Tensor> h_n, c_n;
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    std::vector<at::Tensor> outputs;
    for (int d = 0; d < s.directions; ++d) {
      const int64_t slot = layer * s.directions + d;
      const ParamIndex index = p.param(layer, d);
      const auto param = [&](int64_t i) {
        return i < 0 ? at::Tensor() : wide(inputs.params[size_t(i)]);
      };
      const at::Tensor w_hh = param(index.w_hh), b_hh = param(index.b_hh);
      const at::Tensor gx = at::linear(x, param(index.w_ih), param(index.b_ih));
      State state{h_0[slot], options.is_lstm() ? c_0[slot] : at::Tensor()};
      std::vector<at::Tensor> steps(size_t(s.steps));
      for (int64_t i = 0; i < s.steps; ++i) {
        const int64_t t = d == 0 ? i : s.steps - 1 - i, n = s.active(t);
        State now{state.h.narrow(0, 0, n),
                  options.is_lstm() ? state.c.narrow(0, 0, n) : at::Tensor()};
        now = cell_step(options.cell, gx.narrow(0, s.first_row(t), n),
                        at::linear(now.h, w_hh, b_hh), now);
        if (index.w_hr >= 0) now.h = at::linear(now.h, param(index.w_hr));
        steps[size_t(t)] = now.h;
        state.h = with_rest(now.h, state.h);
        if (options.is_lstm()) state.c = with_rest(now.c, state.c);
      }
      outputs.push_back(s.steps > 0 ? at::cat(steps) : x.new_zeros({0, s.state_size()}));
      h_n.push_back(state.h);
      if (options.is_lstm()) c_n.push_back(state.c);
    }
    x = s.directions == 2 ? at::cat(outputs, 1) : outputs[0];
    if (size_t(layer) < masks.size()) x = x * masks[size_t(layer)];
  }
  at::Tensor output = x;
  if (!p.packed) {
    output = output.view({s.steps, s.batch, p.output_width()});
    if (options.batch_first) output = output.transpose(0, 1);
  }
  const auto narrowed = [&](const at::Tensor& t) { return narrow ? t.to(dtype) : t; };
  return {narrowed(output), narrowed(at::stack(h_n)),
          options.is_lstm() ? narrowed(at::stack(c_n)) : at::empty({0}, inputs.input.options())};
}

}  // namespace rnn_ext
