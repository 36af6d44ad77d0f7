// rnn_ext::recurrent_layer: one layer, one or both directions, with what a call may ask for beyond
// the plain recurrence (csrc/sequence.h, Features). rnn_ext/layer.py has its autograd formula and
// the shapes of its results; stacks of layers are walked in Python.
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu_backend.h"
#include "layers.h"

namespace rnn_ext {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr double kBytesPerSecond = 10e9;  // written by one thread

constexpr int64_t kBytesOfAJob = 1 << 18;

using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Zeros, by the threads of a call: torch's own hang in a forked child where a tensor is large.
void clear(const at::Tensor& t) {
  char* const data = static_cast<char*>(t.mutable_data_ptr());
  const int64_t bytes = int64_t(t.nbytes());
  share_out((bytes + kBytesOfAJob - 1) / kBytesOfAJob, double(bytes) / kBytesPerSecond,
            [&](int64_t job) {
              const int64_t begin = job * kBytesOfAJob;
              std::memset(data + begin, 0, size_t(std::min(bytes - begin, kBytesOfAJob)));
            });
}

// The operators' arguments that forward and backward share, in schema order.
struct LayerInputs {
  const at::Tensor& input;  // (T, B, I), with batch_first (B, T, I)
  at::TensorList params;    // of one layer, in the order of _flat_weights
  const Optional& lengths;  // (B) int64 on the CPU
  const Optional& resets;   // (T, B), with batch_first (B, T), bool
  const Optional &h_0, &c_0, &reset_h, &reset_c;
  const Optional& hidden_mask;            // (D, B, R)
  const Optional &zoneout_h, &zoneout_c;  // (T, B, D*H), with batch_first (B, T, D*H)
  const Optional &norm_ih, &norm_hh;      // (D, G*H)
  const Optional &norm_c, &norm_c_bias;   // (D, H)
  CellKind cell;
  bool has_biases, bidirectional, batch_first;
  int64_t detach_steps, checkpoint_steps;
  double norm_eps;
  bool reset_before;

  Inputs plain() const { return {input, std::nullopt, h_0, c_0, params}; }
  Options options() const { return {cell, has_biases, 1, bidirectional, batch_first, 0.0, false}; }
};

// Rows that end at steps of their own, longest first.
struct Schedule {
  std::vector<int64_t> lengths, order, batch_sizes, offsets;

  // Makes the shape one of the steps that there are.
  Schedule(const Optional& from, SequenceShape& shape) {
    if (!from) return;
    TORCH_CHECK(from->dim() == 1 && from->scalar_type() == at::kLong && from->device().is_cpu(),
                "lengths must be a 1-D int64 tensor on the CPU, got a ", from->dim(),
                "-D tensor of ", from->scalar_type(), " on ", from->device());
    TORCH_CHECK(from->size(0) == shape.batch, "Expected `len(lengths)` to be equal to batch_size, ",
                "but got ", from->size(0), " (batch_size=", shape.batch, ")");
    const at::Tensor dense = from->contiguous();
    const int64_t* data = dense.const_data_ptr<int64_t>();
    lengths.assign(data, data + shape.batch);
    for (const int64_t length : lengths)
      TORCH_CHECK(length >= 0 && length <= shape.steps, "lengths must be between 0 and ",
                  shape.steps, ", the number of steps, got ", length);
    order.resize(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[size_t(a)] > lengths[size_t(b)]; });
    shape.steps = order.empty() ? 0 : lengths[size_t(order[0])];
    int64_t active = shape.batch;
    offsets.push_back(0);
    for (int64_t t = 0; t < shape.steps; ++t) {
      while (lengths[size_t(order[size_t(active - 1)])] <= t) --active;
      batch_sizes.push_back(active);
      offsets.push_back(offsets.back() + active);
    }
    shape.order = order.data();
    shape.batch_sizes = batch_sizes.data();
    shape.offsets = offsets.data();
  }
};

void check_shape(const Optional& t, at::IntArrayRef sizes, const char* name,
                 const at::Tensor& input) {
  if (!t) return;
  TORCH_CHECK(t->sizes() == sizes, name, " must have size ", sizes, ", got ", t->sizes());
  TORCH_CHECK(t->scalar_type() == input.scalar_type(), name, " must have the dtype of the input, ",
              input.scalar_type(), ", got ", t->scalar_type());
  TORCH_CHECK(t->device() == input.device(), name, " must be on the device of the input, ",
              input.device(), ", got ", t->device());
}

// A checked call.
struct Layer {
  const LayerInputs& in;
  Problem problem;
  const int64_t T;  // of the tensors; the shape's steps may be fewer
  SequenceShape shape;
  const Schedule schedule;

  explicit Layer(const LayerInputs& inputs)
      : in(inputs),
        problem(inputs.plain(), inputs.options()),
        T(problem.shape.steps),
        shape(problem.shape),
        schedule(inputs.lengths, shape) {
    const int64_t D = shape.directions, B = shape.batch, H = shape.hidden_size;
    const int64_t R = shape.state_size();
    if (in.resets) {
      const std::array<int64_t, 2> sizes = {in.batch_first ? B : T, in.batch_first ? T : B};
      TORCH_CHECK(in.resets->sizes() == at::IntArrayRef(sizes), "resets must have size ",
                  at::IntArrayRef(sizes), ", got ", in.resets->sizes());
      TORCH_CHECK_TYPE(in.resets->scalar_type() == at::kBool, "resets must be bool, got ",
                       in.resets->scalar_type());
    }
    TORCH_CHECK(in.resets || (!in.reset_h && !in.reset_c), "a reset state needs resets");
    check_shape(in.reset_h, {D, B, R}, "reset_h", in.input);
    check_shape(in.reset_c, {D, B, H}, "reset_c", in.input);
    TORCH_CHECK(
        in.cell == CellKind::kLstm ? in.reset_h.has_value() == in.reset_c.has_value() : !in.reset_c,
        "a reset state is a pair (h, c) for the LSTM, h alone for the others");
    check_shape(in.hidden_mask, {D, B, R}, "hidden_mask", in.input);
    check_shape(in.zoneout_h, rows_sizes(D * H), "zoneout_h", in.input);
    check_shape(in.zoneout_c, rows_sizes(D * H), "zoneout_c", in.input);
    TORCH_CHECK(!in.zoneout_c || in.cell == CellKind::kLstm, "zoneout_c is for LSTM only");
    TORCH_CHECK_VALUE(R == H || (!in.zoneout_h && !in.zoneout_c),
                      "zoneout of an LSTM with projections is not defined");
    const int64_t G = num_gates(in.cell);
    check_shape(in.norm_ih, {D, G * H}, "norm_ih", in.input);
    check_shape(in.norm_hh, {D, G * H}, "norm_hh", in.input);
    check_shape(in.norm_c, {D, H}, "norm_c", in.input);
    check_shape(in.norm_c_bias, {D, H}, "norm_c_bias", in.input);
    TORCH_CHECK(in.norm_ih.has_value() == in.norm_hh.has_value(),
                "layer normalization needs norm_ih and norm_hh");
    const bool norm_of_cell = in.norm_hh && in.cell == CellKind::kLstm;
    TORCH_CHECK(norm_of_cell == in.norm_c.has_value() && norm_of_cell == in.norm_c_bias.has_value(),
                "norm_c and norm_c_bias belong to the layer normalization of an LSTM");
    TORCH_CHECK_VALUE(R == H || !in.norm_hh,
                      "layer normalization of an LSTM with projections is not defined");
    TORCH_CHECK_VALUE(!in.reset_before || (in.cell == CellKind::kGru && !in.norm_hh),
                      "the reset gate can be before the product in a GRU without layer "
                      "normalization only");
    TORCH_CHECK_VALUE(in.detach_steps >= 0 && in.checkpoint_steps >= 0,
                      "detach_steps and checkpoint_steps must not be negative");
  }

  bool lstm() const { return in.cell == CellKind::kLstm; }
  bool empty() const { return shape.batch == 0 || shape.steps == 0; }
  // Of a tensor with a row for every step, in the input's layout.
  std::array<int64_t, 3> rows_sizes(int64_t width) const {
    if (in.batch_first) return {shape.batch, T, width};
    return {T, shape.batch, width};
  }
  template <class V, class U>
  StepRows<V> rows(U* data, at::IntArrayRef strides) const {
    return {data, strides[in.batch_first ? 1 : 0], strides[in.batch_first ? 0 : 1]};
  }
  template <class V>
  StepRows<const V> optional_rows(const Optional& t) const {
    return t ? rows<const V>(const_data<V>(*t), t->strides()) : StepRows<const V>{};
  }

  // Zeros in the rows of steps beyond a row's length. The tensor is contiguous.
  void clear_padding(const at::Tensor& t) const {
    if (schedule.lengths.empty() || t.numel() == 0) return;
    const int64_t width = t.size(2);
    const size_t row_bytes = size_t(width * t.element_size());
    char* const data = static_cast<char*>(t.mutable_data_ptr());
    const int64_t* const lengths = schedule.lengths.data();
    const int64_t rows = T * shape.batch;
    const int64_t rows_of_job = std::max<int64_t>(at::internal::GRAIN_SIZE / width, 1);
    const double seconds = double(t.nbytes()) / kBytesPerSecond;
    share_out((rows + rows_of_job - 1) / rows_of_job, seconds, [&](int64_t job) {
      const int64_t first = job * rows_of_job, end = std::min(rows, first + rows_of_job);
      const int64_t inner = in.batch_first ? T : shape.batch;
      int64_t i = first / inner, k = first % inner;
      for (int64_t row = first; row < end; ++row) {
        const int64_t step = in.batch_first ? k : i, b = in.batch_first ? i : k;
        if (step >= lengths[b]) std::memset(data + size_t(row) * row_bytes, 0, row_bytes);
        if (++k == inner) {
          k = 0;
          ++i;
        }
      }
    });
  }

  // Values kept per unit, row and direction.
  int64_t kept() const {
    Features<float> features;  // of which only what is there counts
    static constexpr float kThere = 0;
    if (in.zoneout_h) features.zoneout_h.data = &kThere;
    if (in.norm_ih) features.norm_ih[0] = &kThere;
    return features.kept(in.cell);
  }
  // Segments between which only the states are kept, 0: everything is.
  int64_t segments() const {
    if (in.checkpoint_steps == 0 || kept() == 0 || empty()) return 0;
    return (shape.steps + in.checkpoint_steps - 1) / in.checkpoint_steps;
  }
  // Kept of each of them: the states it starts from.
  int64_t snapshot_size() const {
    const int64_t H = lstm() ? shape.hidden_size : 0;
    return shape.directions * shape.batch * (shape.state_size() + H);
  }
  // For the steps of the tensors, whatever the lengths: the sizes of results must not depend on
  // the values of tensors if they can help it.
  int64_t reserve_size() const {
    if (in.checkpoint_steps > 0 && kept() > 0)
      return (T + in.checkpoint_steps - 1) / in.checkpoint_steps * snapshot_size();
    return shape.directions * saved_size(shape.rows());
  }
  int64_t saved_size(int64_t rows) const { return rows * kept() * padded(shape.hidden_size); }
};

// A snapshot's states of direction d.
template <class T>
struct Snapshot {
  T *h, *c;
  Snapshot(const Layer& layer, T* reserve, int64_t segment, int d) {
    const SequenceShape& s = layer.shape;
    T* const base = reserve + segment * layer.snapshot_size();
    h = base + d * s.batch * s.state_size();
    c = layer.lstm() ? base + s.directions * s.batch * s.state_size() + d * s.batch * s.hidden_size
                     : nullptr;
  }
};

// What forward and backward read, in the engine's type.
template <class T>
struct LayerOperands {
  const at::ScalarType element = c10::CppTypeToScalarType<T>::value;
  const Operands plain;
  const Optional reset_h, reset_c, hidden_mask, zoneout_h, zoneout_c;
  const Optional norm_ih, norm_hh, norm_c, norm_c_bias;

  explicit LayerOperands(const LayerInputs& in)
      : plain(in.plain(), element),
        reset_h(dense(in.reset_h, element)),
        reset_c(dense(in.reset_c, element)),
        hidden_mask(dense(in.hidden_mask, element)),
        zoneout_h(in.zoneout_h ? Optional(readable(*in.zoneout_h, element)) : std::nullopt),
        zoneout_c(in.zoneout_c ? Optional(readable(*in.zoneout_c, element)) : std::nullopt),
        norm_ih(dense(in.norm_ih, element)),
        norm_hh(dense(in.norm_hh, element)),
        norm_c(dense(in.norm_c, element)),
        norm_c_bias(dense(in.norm_c_bias, element)) {}

  // What the calls of both ways have in common.
  template <class Call>
  void fill(const Layer& layer, Call& call) const {
    call.shape = layer.shape;
    call.linear_activations = linear_activations();
    call.x = layer.rows<const T>(const_data<T>(plain.input), plain.input.strides());
    Features<T>& f = call.features;
    f.resets = layer.optional_rows<bool>(layer.in.resets);
    f.zoneout_h = layer.optional_rows<T>(zoneout_h);
    f.zoneout_c = layer.optional_rows<T>(zoneout_c);
    f.detach_steps = layer.in.detach_steps;
    f.norm_eps = layer.in.norm_eps;
    f.reset_before = layer.in.reset_before;
    const auto row = [](const Optional& t, int d) {
      return t ? const_data<T>(*t) + d * t->size(1) : nullptr;
    };
    for (int d = 0; d < layer.shape.directions; ++d) {
      call.weights[d] = weights_of<T>(plain.params, layer.problem.param(0, d));
      call.h_0[d] = slice<T>(plain.h_0, d);
      f.hidden_mask[d] = slice<T>(hidden_mask, d);
      f.norm_ih[d] = row(norm_ih, d);
      f.norm_hh[d] = row(norm_hh, d);
      f.norm_c[d] = row(norm_c, d);
      f.norm_c_bias[d] = row(norm_c_bias, d);
      if (!layer.in.resets) continue;
      f.reset_h[d] = slice<T>(reset_h ? reset_h : plain.h_0, d);
      f.reset_c[d] = slice<T>(reset_c ? reset_c : plain.c_0, d);
    }
  }
};

// Steps of a segment: a whole number of the forward plan's chunks, so that a product is cut into
// the same tiles as without segments. They may be more than were asked for.
int64_t segment_steps(const Layer& layer, const Plan& plan) {
  const int64_t k = layer.in.checkpoint_steps;
  return (k + plan.chunk_steps - 1) / plan.chunk_steps * plan.chunk_steps;
}

template <class T>
Results forward_layer(const Layer& layer, bool return_cells, bool save_reserve) {
  using Backend = CpuBackend<T>;
  const at::ScalarType dtype = layer.in.input.scalar_type();
  const LayerOperands<T> operands(layer.in);
  const at::TensorOptions plain = layer.in.input.options().dtype(operands.element);
  const SequenceShape& s = layer.shape;
  const int64_t D = s.directions, B = s.batch, H = s.hidden_size, R = s.state_size();
  const at::Tensor output = Backend::empty(layer.rows_sizes(D * R), plain);
  const at::Tensor h_n = Backend::empty({D, B, R}, plain);
  const at::Tensor c_n =
      layer.lstm() ? Backend::empty({D, B, H}, plain) : Backend::empty({0}, plain);
  const at::Tensor cells =
      return_cells ? Backend::empty(layer.rows_sizes(D * H), plain) : Backend::empty({0}, plain);
  const at::Tensor reserve = Backend::empty({save_reserve ? layer.reserve_size() : 0}, plain);
  // Padding and places of segments that there are not: results hold nothing by chance.
  if (H % kPad != 0 || layer.in.checkpoint_steps > 0) clear(reserve);

  if (layer.empty()) {
    const auto set = [](const at::Tensor& to, const Optional& from) {
      from ? void(to.copy_(*from)) : void(to.zero_());
    };
    set(h_n, operands.plain.h_0);
    set(c_n, operands.plain.c_0);
  } else {
    ForwardCall<T> call;
    operands.fill(layer, call);
    call.y = layer.rows<T>(mutable_data<T>(output), output.strides());
    if (return_cells) call.cells = layer.rows<T>(mutable_data<T>(cells), cells.strides());
    for (int d = 0; d < D; ++d) {
      call.c_0[d] = slice<T>(operands.plain.c_0, d);
      call.h_n[d] = mutable_data<T>(h_n) + d * B * R;
      if (layer.lstm()) call.c_n[d] = mutable_data<T>(c_n) + d * B * H;
    }
    Backend backend(layer.problem, dtype);
    T* const kept = save_reserve && layer.kept() > 0 ? mutable_data<T>(reserve) : nullptr;
    if (kept && layer.segments() > 0) {
      const Plan plan = backend.plan(call);
      const int64_t steps = segment_steps(layer, plan);
      const ForwardCall<T> whole = call;
      for (int64_t i = 0; i * steps < s.steps; ++i) {
        call.features.first_position = i * steps;
        call.features.last_position = (i + 1) * steps;
        const bool last = (i + 1) * steps >= s.steps;
        for (int d = 0; d < D; ++d) {
          const Snapshot<T> start(layer, kept, i, d), end(layer, kept, i + 1, d);
          if (i > 0) {
            call.h_0[d] = start.h;
            call.c_0[d] = start.c;
          }
          call.h_n[d] = last ? whole.h_n[d] : end.h;
          call.c_n[d] = last ? whole.c_n[d] : end.c;
        }
        backend.run(call, plan);
      }
    } else {
      for (int d = 0; kept && d < D; ++d) call.reserve[d] = kept + d * layer.saved_size(s.rows());
      backend.run(call, backend.plan(call));
    }
  }
  if (layer.shape.steps == 0) {
    output.zero_();
    cells.zero_();
  } else {
    layer.clear_padding(output);
    layer.clear_padding(cells);
  }
  const auto narrow = [&](const at::Tensor& t) { return t.to(dtype); };
  return {narrow(output), narrow(h_n), narrow(c_n), narrow(cells), reserve};
}

// Results of backward before the parameters: input, h_0, c_0, reset_h, reset_c, norm_ih, norm_hh,
// norm_c and norm_c_bias.
constexpr size_t kStates = 9;

// The gradients that backward starts from, undefined means zeros.
struct LayerGrads {
  Optional output, h_n, c_n, cells;
};

template <class T>
std::vector<at::Tensor> backward_layer(const Layer& layer, const LayerGrads& grads,
                                       const at::Tensor& output_, const at::Tensor& reserve,
                                       const c10::List<bool>& wanted) {
  using Backend = CpuBackend<T>;
  const at::ScalarType dtype = layer.in.input.scalar_type();
  const LayerOperands<T> operands(layer.in);
  const at::ScalarType element = operands.element;
  const at::TensorOptions plain = layer.in.input.options().dtype(element);
  const SequenceShape& s = layer.shape;
  const int64_t D = s.directions, B = s.batch, H = s.hidden_size, R = s.state_size();
  const at::Tensor output = readable(output_, element);
  const auto rows_or_none = [&](const Optional& t) {
    return t && t->defined() ? Optional(readable(*t, element)) : std::nullopt;
  };
  const Optional dy = rows_or_none(grads.output), dcells = rows_or_none(grads.cells);
  const Optional dh_n = dense(grads.h_n, element), dc_n = dense(grads.c_n, element);

  const auto& params = operands.plain.params;
  std::vector<at::Tensor> results;
  const auto result = [&](bool asked, at::IntArrayRef sizes) {
    results.push_back(Backend::empty(asked ? sizes : at::IntArrayRef{0}, plain));
    if (layer.empty()) results.back().zero_();
    return asked ? mutable_data<T>(results.back()) : nullptr;
  };
  T* const dx = result(wanted[0], layer.in.input.sizes());
  T* const dh_0 = result(wanted[1] && layer.in.h_0, {D, B, R});
  T* const dc_0 = result(wanted[2] && layer.in.c_0, {D, B, H});
  T* dreset_h = result(wanted[3] && layer.in.reset_h, {D, B, R});
  T* dreset_c = result(wanted[4] && layer.in.reset_c, {D, B, H});
  const int64_t GH = num_gates(layer.in.cell) * H;
  T* const dnorm_ih = result(wanted[5] && layer.in.norm_ih, {D, GH});
  T* const dnorm_hh = result(wanted[6] && layer.in.norm_hh, {D, GH});
  T* const dnorm_c = result(wanted[7] && layer.in.norm_c, {D, H});
  T* const dnorm_c_bias = result(wanted[8] && layer.in.norm_c_bias, {D, H});
  std::vector<T*> dparams;
  for (size_t i = 0; i < params.size(); ++i)
    dparams.push_back(result(wanted[kStates + i], params[i].sizes()));
  // Where rows restart from h_0 and c_0 themselves, those get both gradients.
  at::Tensor from_resets_h, from_resets_c;
  const auto beside = [&](at::Tensor& t, T* own, int64_t width) {
    if (!layer.in.resets || layer.in.reset_h || !own) return static_cast<T*>(nullptr);
    t = at::zeros({D, B, width}, plain);
    return mutable_data<T>(t);
  };
  if (T* p = beside(from_resets_h, dh_0, R)) dreset_h = p;
  if (T* p = beside(from_resets_c, dc_0, H)) dreset_c = p;

  if (layer.empty()) {
    if (dh_0 && dh_n) results[1].copy_(*dh_n);
    if (dc_0 && dc_n) results[2].copy_(*dc_n);
  } else {
    BackwardCall<T> call;
    operands.fill(layer, call);
    call.y = layer.rows<const T>(const_data<T>(output), output.strides());
    call.dy = layer.optional_rows<T>(dy);
    call.dcells = layer.optional_rows<T>(dcells);
    if (dx) call.dx = layer.rows<T>(dx, results[0].strides());
    const T* const kept = const_data<T>(reserve);
    for (int d = 0; d < D; ++d) {
      const ParamIndex index = layer.problem.param(0, d);
      const auto gradient = [&](int64_t i) { return i < 0 ? nullptr : dparams[size_t(i)]; };
      const auto part = [&](T* state, int64_t size) { return state ? state + d * size : nullptr; };
      call.dh_n[d] = slice<T>(dh_n, d);
      call.dc_n[d] = slice<T>(dc_n, d);
      call.reserve[d] = kept + d * layer.saved_size(s.rows());
      call.gradients[d] = {gradient(index.w_ih), gradient(index.w_hh),  gradient(index.b_ih),
                           gradient(index.b_hh), gradient(index.w_hr),  part(dh_0, B * R),
                           part(dc_0, B * H),    part(dreset_h, B * R), part(dreset_c, B * H),
                           part(dnorm_ih, GH),   part(dnorm_hh, GH),    part(dnorm_c, H),
                           part(dnorm_c_bias, H)};
    }
    Backend backend(layer.problem, dtype);
    if (layer.segments() == 0) {
      backend.run(call, backend.plan(call));
    } else {
      ForwardCall<T> again;
      operands.fill(layer, again);
      const Plan forward_plan = backend.plan(again), plan = backend.plan(call);
      const int64_t steps = segment_steps(layer, forward_plan);
      const int64_t saved = layer.saved_size(std::min(steps, s.steps) * B);
      const at::Tensor segment = Backend::empty({D * saved}, plain);
      // Outputs are there already: what the second run makes of them goes to one step's place.
      const at::Tensor outputs = Backend::empty({B, D * R}, plain);
      again.y = {mutable_data<T>(outputs), 0, D * R};
      again.features.again = true;
      const c10::DataPtr workspace = backend.workspace(call, plan);
      for (int64_t i = (s.steps - 1) / steps; i >= 0; --i) {
        const int64_t first = i * steps, last = std::min(first + steps, s.steps);
        again.features.first_position = first;
        again.features.last_position = last;
        for (int d = 0; d < D; ++d) {
          const Snapshot<const T> start(layer, kept, i, d);
          again.h_0[d] = i > 0 ? start.h : slice<T>(operands.plain.h_0, d);
          again.c_0[d] = i > 0 ? start.c : slice<T>(operands.plain.c_0, d);
          again.reserve[d] = mutable_data<T>(segment) + d * saved;
          again.reserve_first_row[d] = s.first_row(d == 0 ? first : s.steps - last);
          call.reserve[d] = again.reserve[d];
          call.reserve_first_row[d] = again.reserve_first_row[d];
        }
        backend.run(again, forward_plan);
        backend.run(call, plan, workspace, s.steps - last, s.steps - first);
      }
    }
    if (dx) layer.clear_padding(results[0]);
    if (from_resets_h.defined()) results[1].add_(from_resets_h);
    if (from_resets_c.defined()) results[2].add_(from_resets_c);
  }
  for (at::Tensor& t : results) t = t.to(dtype);
  return results;
}

bool in_double(const LayerInputs& in) {
  return at::toOpMathType(in.input.scalar_type()) == at::kDouble;
}

Results recurrent_layer_cpu(const at::Tensor& input, at::TensorList params, const Optional& lengths,
                            const Optional& resets, const Optional& h_0, const Optional& c_0,
                            const Optional& reset_h, const Optional& reset_c,
                            const Optional& hidden_mask, const Optional& zoneout_h,
                            const Optional& zoneout_c, const Optional& norm_ih,
                            const Optional& norm_hh, const Optional& norm_c,
                            const Optional& norm_c_bias, int64_t cell, bool has_biases,
                            bool bidirectional, bool batch_first, int64_t detach_steps,
                            int64_t checkpoint_steps, double norm_eps, bool reset_before,
                            bool return_cells, bool save_reserve) {
  const LayerInputs in{
      input,       params,       lengths,          resets,         h_0,         c_0,
      reset_h,     reset_c,      hidden_mask,      zoneout_h,      zoneout_c,   norm_ih,
      norm_hh,     norm_c,       norm_c_bias,      CellKind(cell), has_biases,  bidirectional,
      batch_first, detach_steps, checkpoint_steps, norm_eps,       reset_before};
  const Layer layer(in);
  TORCH_CHECK(!return_cells || layer.lstm(), "cell states are the LSTM's only");
  return in_double(in) ? forward_layer<double>(layer, return_cells, save_reserve)
                       : forward_layer<float>(layer, return_cells, save_reserve);
}

std::vector<at::Tensor> recurrent_layer_backward_cpu(
    const Optional& grad_output, const Optional& grad_h_n, const Optional& grad_c_n,
    const Optional& grad_cells, const at::Tensor& input, at::TensorList params,
    const Optional& lengths, const Optional& resets, const Optional& h_0, const Optional& c_0,
    const Optional& reset_h, const Optional& reset_c, const Optional& hidden_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, const Optional& norm_ih,
    const Optional& norm_hh, const Optional& norm_c, const Optional& norm_c_bias,
    const at::Tensor& output, const at::Tensor& reserve, int64_t cell, bool has_biases,
    bool bidirectional, bool batch_first, int64_t detach_steps, int64_t checkpoint_steps,
    double norm_eps, bool reset_before, c10::List<bool> output_mask) {
  const LayerInputs in{
      input,       params,       lengths,          resets,         h_0,         c_0,
      reset_h,     reset_c,      hidden_mask,      zoneout_h,      zoneout_c,   norm_ih,
      norm_hh,     norm_c,       norm_c_bias,      CellKind(cell), has_biases,  bidirectional,
      batch_first, detach_steps, checkpoint_steps, norm_eps,       reset_before};
  const Layer layer(in);
  const SequenceShape& s = layer.shape;
  TORCH_CHECK(output_mask.size() == kStates + params.size(), "output_mask must have ",
              kStates + params.size(), " entries, got ", output_mask.size());
  TORCH_CHECK(reserve.numel() == layer.reserve_size(),
              "reserve is not the one of this call's forward: expected ", layer.reserve_size(),
              " elements, got ", reserve.numel());
  const std::array<int64_t, 3> rows = layer.rows_sizes(s.directions * s.state_size());
  TORCH_CHECK(output.sizes() == at::IntArrayRef(rows), "output must have size ",
              at::IntArrayRef(rows), ", got ", output.sizes());
  check_shape(grad_output, rows, "grad_output", input);
  check_shape(grad_h_n, {s.directions, s.batch, s.state_size()}, "grad_h_n", input);
  if (layer.lstm()) {
    check_shape(grad_c_n, {s.directions, s.batch, s.hidden_size}, "grad_c_n", input);
    check_shape(grad_cells, layer.rows_sizes(s.directions * s.hidden_size), "grad_cells", input);
  }
  const LayerGrads grads{grad_output, grad_h_n, layer.lstm() ? grad_c_n : std::nullopt,
                         layer.lstm() ? grad_cells : std::nullopt};
  return in_double(in) ? backward_layer<double>(layer, grads, output, reserve, output_mask)
                       : backward_layer<float>(layer, grads, output, reserve, output_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rnn_ext, m) {
  // lengths: steps of each row; resets: where a row's state returns to the reset state (h_0, c_0 if
  // none is given) before a step; hidden_mask: factors of what the recurrent product reads;
  // zoneout: how much of a state stays what it was. detach_steps: gradients stop between every so
  // many steps; checkpoint_steps: keep the states between segments of so many steps instead of
  // everything. norm_*: gains (and the LSTM's bias of c) of layer normalization in the cell.
  // reset_before: the GRU's reset gate before the product. cells is every c_t where return_cells
  // asks for it, else empty.
  m.def(
      "recurrent_layer(Tensor input, Tensor[] params, Tensor? lengths, Tensor? resets, "
      "Tensor? h_0, Tensor? c_0, Tensor? reset_h, Tensor? reset_c, Tensor? hidden_mask, "
      "Tensor? zoneout_h, Tensor? zoneout_c, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, "
      "Tensor? norm_c_bias, int cell, bool has_biases, bool bidirectional, bool batch_first, "
      "int detach_steps, int checkpoint_steps, float norm_eps, bool reset_before, "
      "bool return_cells, bool save_reserve) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor reserve)");
  // Gradients of input, h_0, c_0, reset_h, reset_c, norm_ih, norm_hh, norm_c, norm_c_bias and
  // every parameter; an empty tensor stands where output_mask says that one is not wanted.
  m.def(
      "recurrent_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor input, Tensor[] params, Tensor? lengths, Tensor? resets, "
      "Tensor? h_0, Tensor? c_0, Tensor? reset_h, Tensor? reset_c, Tensor? hidden_mask, "
      "Tensor? zoneout_h, Tensor? zoneout_c, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, "
      "Tensor? norm_c_bias, Tensor output, Tensor reserve, int cell, bool has_biases, "
      "bool bidirectional, bool batch_first, int detach_steps, int checkpoint_steps, "
      "float norm_eps, bool reset_before, bool[] output_mask) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(rnn_ext, CPU, m) {
  m.impl("recurrent_layer", recurrent_layer_cpu);
  m.impl("recurrent_layer_backward", recurrent_layer_backward_cpu);
}

}  // namespace rnn_ext
