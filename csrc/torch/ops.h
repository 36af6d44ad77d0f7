// Shared by the files of the torch layer: how a call is described, checked and passed on.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/engine.h"

namespace rnn_ext {

// The operator's non-tensor arguments, in schema order.
struct Options {
  CellKind cell;
  bool has_biases;
  int64_t num_layers;
  bool bidirectional;
  bool batch_first;
  double dropout;
  bool training;

  int directions() const { return bidirectional ? 2 : 1; }
  bool is_lstm() const { return cell == CellKind::kLstm; }
  // Is anything dropped between the layers of this call?
  bool drops() const { return training && dropout > 0 && num_layers > 1; }
};

struct Inputs {
  at::Tensor input;                       // (T, B, I), (B, T, I) or packed (N, I)
  std::optional<at::Tensor> batch_sizes;  // (T) int64 on the CPU, packed data only
  std::optional<at::Tensor> h_0, c_0;     // (L*D, B, R), (L*D, B, H); none means zeros
  at::TensorList params;                  // torch.nn.RNNBase._flat_weights
};

// One layer's parameters of one direction, as positions in Inputs::params; -1 where there is none.
struct ParamIndex {
  int64_t w_ih, w_hh, b_ih = -1, b_hh = -1, w_hr = -1;
};

// A checked call: sizes, and where everything stands.
class Problem {
 public:
  // Raises what torch.nn raises, with the wording it uses where it has one.
  Problem(const Inputs& inputs, const Options& options);

  Options options;
  SequenceShape shape;  // of layer 0; batch_sizes and offsets point into this object
  bool packed;

  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  ParamIndex param(int64_t layer, int direction) const;
  SequenceShape layer_shape(int64_t layer) const;
  int64_t output_width() const { return shape.directions * shape.state_size(); }  // D*R
  std::vector<int64_t> output_sizes() const;

  // The reserve is one flat array: per layer and direction what the cell saves, then the outputs of
  // all layers but the last, then the dropout masks that were multiplied into them.
  int64_t reserve_size() const;
  int64_t saved_offset(int64_t layer, int direction) const;
  int64_t layer_output_offset(int64_t layer) const;
  int64_t mask_offset(int64_t layer) const;
  int64_t layer_output_size() const { return shape.rows() * output_width(); }

 private:
  void check_params(const Inputs& inputs);
  void check_input(const Inputs& inputs);
  void check_states(const Inputs& inputs) const;

  int64_t params_per_direction_;
  at::Tensor batch_sizes_;
  std::vector<int64_t> offsets_;
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The registered operators, through the dispatcher.
ForwardResult call_recurrent(const Inputs& inputs, const Options& options, bool save_reserve);
std::vector<at::Tensor> call_recurrent_backward(const std::array<at::Tensor, 3>& grads,
                                                const Inputs& inputs, const at::Tensor& output,
                                                const at::Tensor& reserve, const Options& options,
                                                const std::array<bool, 3>& state_mask,
                                                const std::vector<bool>& param_mask);
// Where no operand is mapped or tracked: gradients of the parameters (examples, ...), of each
// example alone; row b of the batch is of example b % examples. CPU only.
std::vector<at::Tensor> call_recurrent_backward_per_example(
    const std::array<at::Tensor, 3>& grads, const Inputs& inputs, const at::Tensor& output,
    const at::Tensor& reserve, const Options& options, const std::vector<bool>& mask,
    int64_t examples);

// The same call written in differentiable ATen operations, step by step: what double backward and
// forward-mode differentiation are made of. `masks` are the dropout masks, one per layer but the
// last, empty where nothing is dropped. Returns output, h_n, c_n.
std::tuple<at::Tensor, at::Tensor, at::Tensor> composite_forward(
    const Inputs& inputs, const Options& options, const std::vector<at::Tensor>& masks);
std::vector<at::Tensor> dropout_masks(const Problem& problem, const at::Tensor& reserve);
at::Tensor draw_dropout_mask(const at::Tensor& like, double dropout);

// The operators as torch calls them, of a kernel that takes what they are about: a description of
// the call and its options.
template <ForwardResult (*kernel)(const Inputs&, const Options&, bool save_reserve)>
ForwardResult recurrent_operator(const at::Tensor& input,
                                 const std::optional<at::Tensor>& batch_sizes,
                                 const std::optional<at::Tensor>& h_0,
                                 const std::optional<at::Tensor>& c_0, at::TensorList params,
                                 int64_t cell, bool has_biases, int64_t num_layers,
                                 bool bidirectional, bool batch_first, double dropout,
                                 bool training, bool save_reserve) {
  return kernel(
      {input, batch_sizes, h_0, c_0, params},
      {CellKind(cell), has_biases, num_layers, bidirectional, batch_first, dropout, training},
      save_reserve);
}

using Gradients = std::array<std::optional<at::Tensor>, 3>;  // of output, h_n, c_n

template <std::vector<at::Tensor> (*kernel)(const Gradients&, const Inputs&,
                                            const at::Tensor& output, const at::Tensor& reserve,
                                            const Options&, const c10::List<bool>& output_mask)>
std::vector<at::Tensor> recurrent_backward_operator(
    const std::optional<at::Tensor>& grad_output, const std::optional<at::Tensor>& grad_h_n,
    const std::optional<at::Tensor>& grad_c_n, const at::Tensor& input,
    const std::optional<at::Tensor>& batch_sizes, const std::optional<at::Tensor>& h_0,
    const std::optional<at::Tensor>& c_0, at::TensorList params, const at::Tensor& output,
    const at::Tensor& reserve, int64_t cell, bool has_biases, int64_t num_layers,
    bool bidirectional, bool batch_first, double dropout, bool training,
    c10::List<bool> output_mask) {
  return kernel(
      {grad_output, grad_h_n, grad_c_n}, {input, batch_sizes, h_0, c_0, params}, output, reserve,
      {CellKind(cell), has_biases, num_layers, bidirectional, batch_first, dropout, training},
      output_mask);
}

// composite_forward with the dropout drawn here; its reserve is empty.
ForwardResult composite(const Inputs& inputs, const Options& options);

// Several models in one call: every tensor but batch_sizes has a leading dimension, one entry per
// model, and so have the results. The kernels of both operators hand such calls on to these.
inline bool has_members(const Inputs& in) { return !in.params.empty() && in.params[0].dim() == 3; }
struct SingleModel {
  std::vector<at::Tensor> params;
  Inputs inputs;
  SingleModel(const Inputs& all, int64_t index);
  SingleModel(const SingleModel&) = delete;  // inputs points into params
};
// `run` computes one of them into the given tensors.
using MemberForward = std::function<void(const Inputs&, const ForwardResult& into)>;
using MemberBackward =
    std::function<void(const Gradients&, const Inputs&, const at::Tensor& output,
                       const at::Tensor& reserve, const std::vector<at::Tensor>& into)>;
ForwardResult members_forward(const Inputs& inputs, const Options& options, bool save_reserve,
                              const MemberForward& run);
std::vector<at::Tensor> members_backward(const Gradients& grads, const Inputs& inputs,
                                         const at::Tensor& output, const at::Tensor& reserve,
                                         const Options& options, const c10::List<bool>& output_mask,
                                         const MemberBackward& run);
// How many threads a call made here and now may start: one in a parallel region or a forked child.
int offered_threads();

// Tests only: see VectorMath in cpu/activations.h.
bool linear_activations();
void set_linear_activations(bool linear);

}  // namespace rnn_ext
