// Gradients of parameters for every example of a batch alone. The engine sums over the batch, so
// each example's rows are a call of their own here: the products of the gate gradients, which are
// known, shared out over the threads by the example.
#include "cpu_backend.h"
#include "layers.h"

namespace rnn_ext {
namespace {

template <class T>
T* advanced(T* data, int64_t elements) {
  return data ? data + elements : nullptr;
}

// Every `examples`-th row, of padded and packed data alike.
template <class T>
StepRows<const T> rows_of(const StepRows<const T>& all, int64_t example, int64_t examples) {
  return {all.data + example * all.row_stride, all.step_stride, all.row_stride * examples};
}

}  // namespace

template <class T>
void parameter_gradients_per_example(const BackwardCall<T>& all,
                                     const DirectionGradients<T>* results, int64_t examples) {
  const SequenceShape& s = all.shape;
  const int64_t G = num_gates(s.cell) * s.hidden_size, R = s.state_size();
  BackwardCall<T> common;
  common.shape = s;
  common.shape.batch = s.batch / examples;
  const int64_t B = common.shape.batch;
  std::vector<int64_t> batch_sizes, offsets;
  if (s.batch_sizes) {
    for (int64_t t = 0; t < s.steps; ++t) batch_sizes.push_back(s.batch_sizes[t] / examples);
    for (int64_t t = 0; t <= s.steps; ++t) offsets.push_back(s.offsets[t] / examples);
    common.shape.batch_sizes = batch_sizes.data();
    common.shape.offsets = offsets.data();
  }
  std::vector<T> h_0[kMaxDirections];  // (examples, B, R)
  for (int d = 0; d < s.directions; ++d)
    for (int64_t row = 0; all.h_0[d] && row < s.batch; ++row) {
      const T* const from = all.h_0[d] + (row % B * examples + row / B) * R;
      h_0[d].insert(h_0[d].end(), from, from + R);
    }

  const auto of_example = [&](int64_t e) {
    BackwardCall<T> call = common;
    call.x = rows_of(all.x, e, examples);
    call.y = rows_of(all.y, e, examples);
    for (int d = 0; d < s.directions; ++d) {
      const DirectionGradients<T>& to = results[d];
      if (!h_0[d].empty()) call.h_0[d] = h_0[d].data() + e * B * R;
      call.known[d] = {all.gates[d].dgx + e * G, all.gates[d].dgh + e * G, nullptr, examples * G};
      call.gradients[d] = {advanced(to.w_ih, e * G * s.input_size), advanced(to.w_hh, e * G * R),
                           advanced(to.b_ih, e * G), advanced(to.b_hh, e * G)};
    }
    return call;
  };
  const Plan plan = plan_call<T>(common.shape, /*backward=*/true, /*max_threads=*/1);
  // The products are half of what a backward call is expected to take.
  const double work = plan.step_seconds / 2 * double(s.steps * examples);
  share_out(examples, work, [&](int64_t e) { run_call(of_example(e), plan); });
}

template void parameter_gradients_per_example(const BackwardCall<float>&,
                                              const DirectionGradients<float>*, int64_t);
template void parameter_gradients_per_example(const BackwardCall<double>&,
                                              const DirectionGradients<double>*, int64_t);

}  // namespace rnn_ext
