// Gradients of parameters for every example of a batch alone. The engine sums over the batch, so
// they are made here, from the gradients of the gates.
#include <ATen/ATen.h>

#include "layers.h"

namespace rnn_ext {
namespace {

// (T, B, width) or packed (N, width) with the examples in turns: (examples, rows of each, width).
at::Tensor by_example(const at::Tensor& t, int64_t examples) {
  const int64_t dim = t.dim() - 2;
  const at::Tensor apart = t.unflatten(dim, {t.size(dim) / examples, examples});
  return apart.movedim(dim + 1, 0).flatten(1, -2);
}

// For every row of packed data, which row of [h_0; y] holds h_{t-1}: one of h_0 where a sequence
// begins.
at::Tensor previous_rows(const SequenceShape& s, int direction) {
  std::vector<int64_t> index;
  index.reserve(size_t(s.rows()));
  for (int64_t t = 0; t < s.steps; ++t) {
    const int64_t before = direction == 0 ? t - 1 : t + 1;
    for (int64_t b = 0; b < s.active(t); ++b) {
      const bool begins = before < 0 || before >= s.steps || b >= s.active(before);
      index.push_back(begins ? b : s.batch + s.first_row(before) + b);
    }
  }
  return at::tensor(index, at::kLong);
}

}  // namespace

void parameter_gradients_per_example(const Problem& p, const LayerValues& v, int direction,
                                     const ParamIndex& index, int64_t examples,
                                     const Wanted& wanted, std::vector<at::Tensor>& results) {
  const SequenceShape& s = p.shape;
  const auto result = [&](int64_t i) { return wanted.of(i) ? &results[size_t(3 + i)] : nullptr; };
  const auto product = [&](at::Tensor& to, const at::Tensor& dg, const at::Tensor& by) {
    at::bmm_out(to, by_example(dg, examples).transpose(1, 2), by_example(by, examples));
  };

  if (at::Tensor* const w_ih = result(index.w_ih)) product(*w_ih, v.dgx, v.x);
  if (at::Tensor* const w_hh = result(index.w_hh)) {
    if (p.packed) {
      const at::Tensor start = v.h_0 ? *v.h_0 : v.y.new_zeros({s.batch, s.hidden_size});
      product(*w_hh, v.dgh, at::cat({start, v.y}).index_select(0, previous_rows(s, direction)));
    } else {  // every step but the first by the output of the one before
      const bool backwards = direction == 1;
      const int64_t others = s.steps - 1;
      product(*w_hh, v.dgh.narrow(0, backwards ? 0 : 1, others),
              v.y.narrow(0, backwards ? 1 : 0, others));
      if (v.h_0)
        w_hh->baddbmm_(
            by_example(v.dgh.select(0, backwards ? others : 0), examples).transpose(1, 2),
            by_example(*v.h_0, examples));
    }
  }
  at::Tensor *const b_ih = result(index.b_ih), *const b_hh = result(index.b_hh);
  const auto sum = [&](at::Tensor& to, const at::Tensor& dg) {
    at::sum_out(to, by_example(dg, examples), at::IntArrayRef(1));
  };
  if (b_ih) sum(*b_ih, v.dgx);
  if (b_hh && b_ih && v.dgh.is_same(v.dgx))
    b_hh->copy_(*b_ih);
  else if (b_hh)
    sum(*b_hh, v.dgh);
}

}  // namespace rnn_ext
