// The CUDA engine on the host executor as a shared library, for tests/test_cuda_emulated.py, which
// describes the one function from its side. All arrays are dense and of doubles, whatever the type
// that the engine computes in; null means absent.
#include <cstring>

#include "layer_runs.h"

using namespace rnn_ext;           // NOLINT
using namespace rnn_ext::testing;  // NOLINT
namespace host = rnn_ext::cuda::host;

namespace {

struct Request {
  int64_t type;    // cuda::DType
  int64_t method;  // cuda::Method
  int64_t cell;    // CellKind
  int64_t steps, batch, input_size, hidden_size, proj_size, directions;
  int64_t order, seed;         // of the schedule
  const int64_t* batch_sizes;  // (T) for packed data
  const double *x, *dy;        // (N, I), (N, D*R)
  double *y, *dx;              // likewise
  struct Direction {
    const double *w_ih, *w_hh, *b_ih, *b_hh, *w_hr, *h_0, *c_0, *dh_n, *dc_n;
    double *h_n, *c_n, *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr, *dh_0, *dc_0;
  } directions_[kMaxDirections];
};

Array array(const double* from, int64_t count) {
  return from ? Array(from, from + count) : Array();
}

void copy(const Array& from, double* to) {
  if (to) std::copy(from.begin(), from.end(), to);
}

template <class T>
void run(Layer& layer, const Request& r) {
  cuda::testing::Way way;
  way.method = cuda::Method(r.method);
  const cuda::testing::Results results = cuda::testing::run_layer<T>(layer, way);
  copy(results.outputs.y, r.y);
  copy(results.gradients.dx, r.dx);
  for (int d = 0; d < r.directions; ++d) {
    const Request::Direction& to = r.directions_[d];
    const Gradients::Direction& g = results.gradients.directions[d];
    copy(results.outputs.h_n[d], to.h_n);
    copy(results.outputs.c_n[d], to.c_n);
    copy(g.w_ih, to.dw_ih);
    copy(g.w_hh, to.dw_hh);
    copy(g.b_ih, to.db_ih);
    copy(g.b_hh, to.db_hh);
    copy(g.w_hr, to.dw_hr);
    copy(g.h_0, to.dh_0);
    copy(g.c_0, to.dc_0);
  }
}

}  // namespace

// Forward and backward. Returns 0, or 1 with what went wrong in `text`.
extern "C" __attribute__((visibility("default"))) int rnn_ext_host_run(const Request* request,
                                                                       char* text,
                                                                       size_t text_bytes) {
  const Request& r = *request;
  Layer layer;
  std::vector<int64_t> offsets{0};
  SequenceShape& s = layer.shape;
  s = {CellKind(r.cell), r.steps,     r.batch,          r.input_size,
       r.hidden_size,    r.proj_size, int(r.directions)};
  if (r.batch_sizes) {
    for (int64_t t = 0; t < r.steps; ++t) offsets.push_back(offsets.back() + r.batch_sizes[t]);
    s.batch_sizes = r.batch_sizes;
    s.offsets = offsets.data();
  }
  const int64_t R = s.state_size(), H = r.hidden_size, gate_rows = num_gates(s.cell) * H;
  layer.x = array(r.x, s.rows() * r.input_size);
  layer.dy = array(r.dy, s.rows() * r.directions * R);
  for (int d = 0; d < r.directions; ++d) {
    const Request::Direction& from = r.directions_[d];
    Layer::Direction& to = layer.directions[d];
    to.w_ih = array(from.w_ih, gate_rows * r.input_size);
    to.w_hh = array(from.w_hh, gate_rows * R);
    to.b_ih = array(from.b_ih, gate_rows);
    to.b_hh = array(from.b_hh, gate_rows);
    to.w_hr = array(from.w_hr, r.proj_size * H);
    to.h_0 = array(from.h_0, r.batch * R);
    to.c_0 = array(from.c_0, r.batch * H);
    to.dh_n = array(from.dh_n, r.batch * R);
    to.dc_n = array(from.dc_n, r.batch * H);
  }
  host::set_schedule({.order = host::Order(r.order), .seed = uint64_t(r.seed)});
  const int failures = check::failures;
  switch (cuda::DType(r.type)) {
    case cuda::DType::kFloat32:
      run<float>(layer, r);
      break;
    case cuda::DType::kFloat64:
      run<double>(layer, r);
      break;
    case cuda::DType::kFloat16:
      run<cuda::Float16>(layer, r);
      break;
    case cuda::DType::kBFloat16:
      run<cuda::BFloat16>(layer, r);
      break;
  }
  std::string found;
  for (const host::Report& report : host::take_reports()) found += report.text + '\n';
  if (found.empty() && check::failures > failures) found = "the plan or a launch failed";
  std::strncpy(text, found.c_str(), text_bytes - 1);
  text[text_bytes - 1] = 0;
  return found.empty() ? 0 : 1;
}
