// What a call must look like, and the sizes that follow from it.
#include <ATen/ATen.h>

#include "ops.h"

namespace rnn_ext {
namespace {

std::string list(at::IntArrayRef sizes, const char* open = "[", const char* close = "]") {
  std::ostringstream out;
  out << open;
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << close;
  return out.str();
}

// As the Python checks of torch.nn print a size: (2, 3, 20).
std::string tuple(at::IntArrayRef sizes) { return list(sizes, "(", ")"); }

std::string dtype_name(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kLong:
      return "torch.int64";
    case at::kInt:
      return "torch.int32";
    case at::kShort:
      return "torch.int16";
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kBool:
      return "torch.bool";
    case at::kComplexFloat:
      return "torch.complex64";
    case at::kComplexDouble:
      return "torch.complex128";
    default:
      return c10::toString(t.scalar_type());
  }
}

void check_param(const at::Tensor& p, const char* name, int64_t layer, at::IntArrayRef expected,
                 const at::Tensor& first) {
  TORCH_CHECK(p.sizes() == expected, name, " of layer ", layer, " must have size ", tuple(expected),
              ", got ", list(p.sizes()));
  TORCH_CHECK(p.scalar_type() == first.scalar_type(), name, " of layer ", layer, " has dtype ",
              dtype_name(p), ", the first weight ", dtype_name(first));
  TORCH_CHECK(p.device() == first.device(), name, " of layer ", layer, " is on ", p.device(),
              ", the first weight on ", first.device());
}

}  // namespace

Problem::Problem(const Inputs& inputs, const Options& o)
    : options(o), packed(inputs.batch_sizes.has_value()) {
  TORCH_CHECK(int(o.cell) >= 0 && int(o.cell) < kNumCellKinds, "cell must be in 0..",
              kNumCellKinds - 1, ", got ", int(o.cell));
  TORCH_CHECK(o.num_layers >= 1, "num_layers must be greater than zero, got ", o.num_layers);
  TORCH_CHECK(o.dropout >= 0 && o.dropout <= 1, "dropout must be in [0, 1], got ", o.dropout);
  shape.cell = o.cell;
  shape.directions = o.directions();
  check_params(inputs);
  check_input(inputs);
  check_states(inputs);
}

void Problem::check_params(const Inputs& inputs) {
  const at::TensorList params = inputs.params;
  const int64_t slots = options.num_layers * options.directions();
  const int64_t plain = options.has_biases ? 4 : 2;
  const int64_t count = int64_t(params.size());
  const bool projected = options.is_lstm() && count == slots * (plain + 1);
  TORCH_CHECK(count == slots * plain || projected, "expected ", slots * plain,
              options.is_lstm() ? " parameters (one more per layer and direction with proj_size)"
                                : " parameters",
              ", got ", count);
  params_per_direction_ = plain + projected;
  const at::Tensor& first = params[0];
  const at::Tensor& first_hh = params[1];
  TORCH_CHECK(first.dim() == 2 && first_hh.dim() == 2,
              "weight_ih and weight_hh must have 2 dimensions, got ", first.dim(), " and ",
              first_hh.dim());
  const at::ScalarType dtype = first.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "weights must be float32, float64, bfloat16 or float16, got ", dtype_name(first));
  const int64_t gates = num_gates(options.cell), rows = first.size(0);
  TORCH_CHECK(rows > 0 && rows % gates == 0, "weight_ih must have a multiple of ", gates,
              " rows, got ", rows);
  shape.hidden_size = rows / gates;
  shape.input_size = first.size(1);
  shape.proj_size = projected ? first_hh.size(1) : 0;
  const int64_t R = shape.state_size();
  TORCH_CHECK(!projected || (R > 0 && R < shape.hidden_size),
              "proj_size has to be smaller than hidden_size, got ", R, " and ", shape.hidden_size);
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    const int64_t width = layer == 0 ? shape.input_size : output_width();
    for (int d = 0; d < options.directions(); ++d) {
      const ParamIndex i = param(layer, d);
      check_param(params[i.w_ih], "weight_ih", layer, {rows, width}, first);
      check_param(params[i.w_hh], "weight_hh", layer, {rows, R}, first);
      if (i.b_ih >= 0) {
        check_param(params[i.b_ih], "bias_ih", layer, {rows}, first);
        check_param(params[i.b_hh], "bias_hh", layer, {rows}, first);
      }
      if (i.w_hr >= 0)
        check_param(params[i.w_hr], "weight_hr", layer, {R, shape.hidden_size}, first);
    }
  }
}

void Problem::check_input(const Inputs& inputs) {
  const at::Tensor& input = inputs.input;
  const at::Tensor& weight = inputs.params[0];
  TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "RNN input dtype (", dtype_name(input),
              ") does not match weight dtype (", dtype_name(weight), "). Convert input: input.to(",
              dtype_name(weight), "), or convert model: model.to(", dtype_name(input), ")");
  const int64_t dims = packed ? 2 : 3;
  TORCH_CHECK(input.dim() == dims, "input must have ", dims, " dimensions, got ", input.dim());
  TORCH_CHECK(input.size(-1) == shape.input_size,
              "input.size(-1) must be equal to input_size. Expected ", shape.input_size, ", got ",
              input.size(-1));
  TORCH_CHECK(input.device() == weight.device(),
              "Input and parameter tensors are not at the same device, found input tensor at ",
              input.device(), " and parameter tensor at ", weight.device());
  if (!packed) {
    shape.steps = input.size(options.batch_first ? 1 : 0);
    shape.batch = input.size(options.batch_first ? 0 : 1);
    TORCH_CHECK(shape.steps > 0, "Expected sequence length to be larger than 0 in RNN");
    return;
  }
  const at::Tensor& sizes = *inputs.batch_sizes;
  TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu(),
              "batch_sizes must be a 1-D int64 tensor on the CPU, got a ", sizes.dim(),
              "-D tensor of ", dtype_name(sizes), " on ", sizes.device());
  batch_sizes_ = sizes.contiguous();
  shape.batch_sizes = batch_sizes_.const_data_ptr<int64_t>();
  shape.batch = sizes.size(0) > 0 ? shape.batch_sizes[0] : 0;
  offsets_.push_back(0);
  for (int64_t t = 0; t < sizes.size(0); ++t) {
    const int64_t rows = shape.batch_sizes[t];
    TORCH_CHECK(rows >= 0, "batch_sizes must not be negative, got ", rows, " at step ", t);
    TORCH_CHECK(t == 0 || rows <= shape.batch_sizes[t - 1], "batch_sizes must not increase, got ",
                rows, " after ", t ? shape.batch_sizes[t - 1] : 0, " at step ", t);
    if (rows == 0) continue;  // torch.nn lets steps without rows stand at the end
    offsets_.push_back(offsets_.back() + rows);
  }
  shape.steps = int64_t(offsets_.size()) - 1;
  shape.offsets = offsets_.data();
  TORCH_CHECK(sizes.size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
  TORCH_CHECK(offsets_.back() <= input.size(0), "batch_sizes must sum to at most input.size(0), ",
              input.size(0), ", got ", offsets_.back());
}

void Problem::check_states(const Inputs& inputs) const {
  const bool lstm = options.is_lstm();
  TORCH_CHECK(lstm || !inputs.c_0, "c_0 is for LSTM only");
  TORCH_CHECK(!lstm || inputs.h_0.has_value() == inputs.c_0.has_value(),
              "LSTM expects both h_0 and c_0, or none of them");
  const int64_t slots = options.num_layers * options.directions();
  const auto check = [&](const std::optional<at::Tensor>& state, int64_t width, const char* name) {
    if (!state) return;
    const std::array<int64_t, 3> expected = {slots, shape.batch, width};
    TORCH_CHECK(state->sizes() == at::IntArrayRef(expected), "Expected ", name, " size ",
                tuple(expected), ", got ", list(state->sizes()));
    TORCH_CHECK(state->scalar_type() == inputs.input.scalar_type(),
                "Input and hidden tensors are not the same dtype, found input tensor with ",
                dtype_name(inputs.input), " and hidden tensor with ", dtype_name(*state));
    TORCH_CHECK(state->device() == inputs.input.device(),
                "Input and hidden tensors are not at the same device, found input tensor at ",
                inputs.input.device(), " and hidden tensor at ", state->device());
  };
  check(inputs.h_0, shape.state_size(), lstm ? "hidden[0]" : "hidden");
  check(inputs.c_0, shape.hidden_size, "hidden[1]");
}

ParamIndex Problem::param(int64_t layer, int direction) const {
  int64_t next = (layer * options.directions() + direction) * params_per_direction_;
  ParamIndex index{next, next + 1};
  next += 2;
  if (options.has_biases) {
    index.b_ih = next++;
    index.b_hh = next++;
  }
  if (params_per_direction_ % 2 == 1) index.w_hr = next;
  return index;
}

SequenceShape Problem::layer_shape(int64_t layer) const {
  SequenceShape s = shape;
  if (layer > 0) s.input_size = output_width();
  return s;
}

std::vector<int64_t> Problem::output_sizes() const {
  if (packed) return {shape.rows(), output_width()};
  if (options.batch_first) return {shape.batch, shape.steps, output_width()};
  return {shape.steps, shape.batch, output_width()};
}

int64_t Problem::saved_offset(int64_t layer, int direction) const {
  const int64_t one = shape.rows() * num_saved(shape.cell) * padded(shape.hidden_size);
  return (layer * shape.directions + direction) * one;
}
int64_t Problem::layer_output_offset(int64_t layer) const {
  return saved_offset(options.num_layers, 0) + layer * layer_output_size();
}
int64_t Problem::mask_offset(int64_t layer) const {
  return layer_output_offset(options.num_layers - 1) + layer * layer_output_size();
}
int64_t Problem::reserve_size() const {
  return options.drops() ? mask_offset(options.num_layers - 1) : mask_offset(0);
}

}  // namespace rnn_ext
