// Index arithmetic where sizes leave 32 bits: the stepwise kernels on arrays that are address space
// only, with some of the blocks at either end of every grid.
#include "../cpp/check.h"
#include "cuda/engine.h"
#include "executor.h"

using namespace rnn_ext;        // NOLINT
using namespace rnn_ext::cuda;  // NOLINT

namespace {

constexpr int64_t T = 2, B = 140288, I = 1, H = 8192, G = 4;
static_assert(T * B * H > int64_t(1) << 31 && B * G * H > int64_t(1) << 32);

template <class V>
class Virtual {
 public:
  Virtual(int64_t count, const char* name)
      : data_(static_cast<V*>(host::allocate_virtual(size_t(count) * sizeof(V), name))) {}
  ~Virtual() { host::release_virtual(data_); }
  Virtual(const Virtual&) = delete;
  Virtual& operator=(const Virtual&) = delete;
  V* data() { return data_; }
  V& operator[](int64_t i) { return data_[i]; }

 private:
  V* data_;
};

// Grids end at 2^14 blocks of 256 threads, each of which strides over what is left. A thread of the
// cell kernels takes 4 units, of the others one value: the first and the last 4 blocks of those
// meet the first and the last block of these.
constexpr int64_t kStride = int64_t(1) << 24, kBlock = 1024;
static_assert(B * H % (kStride / 4) == 0);
constexpr host::Schedule kSampled{.sampled_blocks = 4};

// Calls visit(batch row, unit) for what both have written.
template <class Visit>
void for_sampled(Visit&& visit) {
  for (int64_t base = 0; base < B * H; base += kStride)
    for (const int64_t first : {base, base + kStride - kBlock})
      for (int64_t i = first; i < first + kBlock; i += 97)
        if (i < B * H) visit(i / H, i % H);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// All that is not bias is 0, so a unit's values depend on the unit alone.
struct Unit {
  double i, f, g, o, c[T + 1] = {}, h[T + 1] = {};

  explicit Unit(const float* bias, int64_t unit)
      : i(sigmoid(bias[unit])),
        f(sigmoid(bias[H + unit])),
        g(std::tanh(bias[2 * H + unit])),
        o(sigmoid(bias[3 * H + unit])) {
    for (int64_t t = 0; t < T; ++t) {
      c[t + 1] = f * c[t] + i * g;
      h[t + 1] = o * std::tanh(c[t + 1]);
    }
  }
};

Status no_product(void*, const Gemm&, Stream) { return 0; }

template <class Call>
void run_sampled(const Call& call, const Plan& plan, const PlanInput& input, void* workspace) {
  host::set_schedule(kSampled);
  CHECK_EQ(run(call, input, plan, workspace, {no_product, nullptr}, nullptr), 0);
  host::set_schedule({});
  for (const host::Report& report : host::take_reports()) CHECK_EQ(report.text, "");
}

}  // namespace

TEST(stepwise_lstm_beyond_32_bits) {
  std::vector<float> values;
  for (int64_t i = 0; i < G * H; ++i) values.push_back(float(i * 7 % 1000) / 500 - 1);
  host::Buffer<float> bias(values, "bias");
  host::Buffer<float> no_bias(std::vector<float>(size_t(G * H)), "bias");
  Virtual<float> x(T * B * I, "x"), y(T * B * H, "y"), weights(G * H * H, "weights"),
      h_n(B * H, "h_n"), c_n(B * H, "c_n"), reserve(T * B * 5 * H, "reserve"), dh_n(B * H, "dh_n"),
      dc_0(B * H, "dc_0");

  Forward<float> forward;
  forward.shape = {CellKind::kLstm, T, B, I, H, 0, 1};
  forward.weights[0] = {
      weights.data(), weights.data(), bias.data(), no_bias.data(), nullptr, I, H, 0};
  forward.x = {x.data(), B * I, I};
  forward.y = {y.data(), B * H, H};
  forward.h_n[0] = h_n.data();
  forward.c_n[0] = c_n.data();
  forward.reserve[0] = reserve.data();
  const Device& device = *find_device("h100");
  {
    const PlanInput input = plan_input<float>(forward, device);
    const Plan plan = make_plan(input, Method::kStepwise);
    Virtual<char> memory(workspace(input, plan).bytes, "workspace");
    run_sampled(forward, plan, input, memory.data());
  }
  int64_t sampled = 0;
  for_sampled([&](int64_t b, int64_t unit) {
    const check::Scope scope("row ", b, " unit ", unit);
    const Unit expected(values.data(), unit);
    for (int64_t t = 0; t < T; ++t) {
      CHECK_NEAR(y[(t * B + b) * H + unit], expected.h[t + 1], 1e-6);
      CHECK_NEAR(reserve[((t * B + b) * 5 + 4) * H + unit], expected.c[t], 1e-6);
    }
    CHECK_NEAR(c_n[b * H + unit], expected.c[T], 1e-6);
    ++sampled;
  });
  CHECK(sampled > 1000);

  Backward<float> backward;
  backward.shape = forward.shape;
  backward.weights[0] = forward.weights[0];
  backward.x = {x.data(), B * I, I};
  backward.y = {y.data(), B * H, H};
  backward.reserve[0] = reserve.data();
  backward.dh_n[0] = dh_n.data();
  host::Buffer<float> dw_hh(1,
                            "dw_hh");  // asked for, so that its operands are made; not multiplied
  backward.gradients[0].w_hh = dw_hh.data();
  backward.gradients[0].c_0 = dc_0.data();
  for_sampled([&](int64_t b, int64_t unit) { dh_n[b * H + unit] = 1; });
  const PlanInput input = plan_input<float>(backward, device);
  const Plan plan = make_plan(input, Method::kStepwise);
  const Workspace w = workspace(input, plan);
  Virtual<char> memory(w.bytes, "workspace");
  run_sampled(backward, plan, input, memory.data());
  const float* const dgates = reinterpret_cast<const float*>(memory.data() + w.dgates_x);
  const float* const previous = reinterpret_cast<const float*>(memory.data() + w.previous);
  for_sampled([&](int64_t b, int64_t unit) {
    const check::Scope scope("row ", b, " unit ", unit);
    const Unit u(values.data(), unit);
    // dL/dh is 1 at the last step and 0 before: the products were left out.
    double dc = 0;
    for (int64_t t = T - 1; t >= 0; --t) {
      const double dh = t == T - 1 ? 1 : 0, tanh_c = std::tanh(u.c[t + 1]);
      dc += dh * u.o * (1 - tanh_c * tanh_c);
      const double expected[] = {dc * u.g * u.i * (1 - u.i), dc * u.c[t] * u.f * (1 - u.f),
                                 dc * u.i * (1 - u.g * u.g), dh * tanh_c * u.o * (1 - u.o)};
      for (int64_t g = 0; g < G; ++g)
        CHECK_NEAR(dgates[((t * B + b) * G + g) * H + unit], expected[g], 1e-6);
      dc *= u.f;
    }
    CHECK_NEAR(dc_0[b * H + unit], dc, 1e-6);
    CHECK_EQ(previous[(B + b) * H + unit], y[b * H + unit]);
  });
}
