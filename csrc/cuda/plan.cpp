// The cost model. Its constants are orders of magnitude from data sheets and published
// measurements, not fitted on a device by this project: predictions rank the ways, no more.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

namespace rnn_ext::cuda {
namespace {

constexpr int64_t kKiB = 1024, kMiB = kKiB * kKiB;

// name, capability, SMs, shared memory of a block and of an SM, registers, threads, L2, its rate,
// clock, memory, multiply-adds per clock and SM: f32, f64, tensor. The rates of L2 are published
// measurements for v100 to h100 and estimates for the others.
constexpr Device kDevices[] = {
    {"v100", 70, 80, 96 * kKiB, 96 * kKiB, 65536, 2048, 6 * kMiB, 2.1e12, 1.53e9, 0.90e12, 64, 32,
     512},
    {"t4", 75, 40, 64 * kKiB, 64 * kKiB, 65536, 1024, 4 * kMiB, 1.2e12, 1.59e9, 0.32e12, 64, 2,
     512},
    {"a100", 80, 108, 163 * kKiB, 164 * kKiB, 65536, 2048, 40 * kMiB, 4.0e12, 1.41e9, 1.55e12, 64,
     32, 1024},
    {"rtx3090", 86, 82, 99 * kKiB, 100 * kKiB, 65536, 1536, 6 * kMiB, 2.0e12, 1.70e9, 0.94e12, 128,
     2, 256},
    {"rtx4090", 89, 128, 99 * kKiB, 100 * kKiB, 65536, 1536, 72 * kMiB, 4.0e12, 2.52e9, 1.01e12,
     128, 2, 256},
    {"h100", 90, 132, 227 * kKiB, 228 * kKiB, 65536, 2048, 50 * kMiB, 5.6e12, 1.83e9, 3.35e12, 128,
     64, 2048},
    {"b200", 100, 148, 227 * kKiB, 228 * kKiB, 65536, 2048, 126 * kMiB, 8.0e12, 1.85e9, 8.0e12, 128,
     64, 4096},
    {"rtx5090", 120, 170, 99 * kKiB, 100 * kKiB, 65536, 1536, 96 * kMiB, 6.0e12, 2.41e9, 1.79e12,
     128, 2, 256},
};

constexpr double kL2Cycles = 270;    // from a load to its value
constexpr double kBarrierTrips = 4;  // to L2: the last store, the release, the poll that sees it
constexpr double kCyclesPerArrival = 2;  // additions to one counter are done one by one
constexpr double kL2BytesPerClock = 64;  // into one SM
constexpr double kSharedBytesPerClock = 128;
constexpr double kPassCycles = 300;  // partial sums through shared memory, activations, stores
constexpr double kPairCycles = 60;   // for every further unit and row of a thread
constexpr double kLaunchSeconds = 2.5e-6;  // between kernels of a stream
constexpr double kCooperativeSeconds = 8e-6;
constexpr double kProductShare = 0.6;      // of the peak that a large product reaches
constexpr double kMmaShare = 0.5;          // of the peak that mma.sync reaches on its own
constexpr int64_t kReservedShared = kKiB;  // of a block, by the driver
constexpr int64_t kMaxProjectionBytes = 256 * kMiB;

struct Sizes {
  int gates, saved;
  int64_t T, B, I, H, R, D, N;
  int64_t e, c;  // bytes of a stored and of a computed value

  explicit Sizes(const PlanInput& in)
      : gates(num_gates(in.shape.cell)),
        saved(num_saved(in.shape.cell)),
        T(in.shape.steps),
        B(in.shape.batch),
        I(in.shape.input_size),
        H(in.shape.hidden_size),
        R(in.shape.state_size()),
        D(in.shape.directions),
        N(in.shape.rows()),
        e(bytes_of(in.dtype)),
        c(compute_bytes_of(in.dtype)) {}
};

bool has_tf32(const PlanInput& in) {
  return in.allow_tf32 && in.dtype == DType::kFloat32 && in.device.capability >= 80;
}

double peak(const PlanInput& in) {  // multiply-adds per second of the device
  const Device& d = in.device;
  const double per_clock = is_narrow(in.dtype)           ? d.fma_tensor
                           : in.dtype == DType::kFloat64 ? d.fma_f64
                           : has_tf32(in)                ? d.fma_tensor / 2
                                                         : d.fma_f32;
  return per_clock * double(d.sms) * d.clock;
}

// (m, k) by (k, n), all operands met in memory once.
double product_seconds(const PlanInput& in, double m, double n, double k) {
  const double e = double(bytes_of(in.dtype));
  return std::max(m * n * k / (peak(in) * kProductShare),
                  (m * k + k * n + m * n) * e / in.device.memory_rate);
}

// Products over all steps, which both methods need.
double large_products(const PlanInput& in) {
  const Sizes s(in);
  const double gate_rows = double(s.gates * s.H), N = double(s.N);
  double seconds = product_seconds(in, N, gate_rows, double(s.I));  // forward x, backward dW_ih
  if (in.backward)                                                  // dx, dW_hh
    seconds += product_seconds(in, N, double(s.I), gate_rows) +
               product_seconds(in, gate_rows, double(s.R), N);
  return seconds * double(s.D);
}

// Bytes of one step that go to or come from memory whatever the method: projections, what is saved,
// outputs and their gradients.
double streamed_bytes(const PlanInput& in) {
  const Sizes s(in);
  const double saved = double(s.saved * s.c);
  const double per_unit = in.backward ? saved + double(2 * s.gates * s.e + s.e)
                                      : double(s.gates * s.c + s.e) + (in.save_reserve ? saved : 0);
  return per_unit * double(s.N) / double(s.T) * double(s.H * s.D);
}

double floor_seconds(const PlanInput& in) {
  const Sizes s(in);
  const double fma = double(s.N) * double(s.gates * s.H) * double(s.R) * double(s.D);
  const double weights = double(s.gates * s.H * (s.I + s.R) * s.D * s.e);
  const double arithmetic = large_products(in) * kProductShare + fma / peak(in);
  const double traffic = (weights + double(s.N * s.I * s.e) + streamed_bytes(in) * double(s.T)) /
                         in.device.memory_rate;
  // A step follows the other: where W_hh needs more than one SM, what one has stored the others
  // load.
  const bool alone = s.gates * s.H * s.R * s.e <= in.device.shared_per_block;
  const double chain = alone ? 0 : 2 * kL2Cycles / in.device.clock * double(s.T);
  return std::max({arithmetic, traffic, chain});
}

int64_t chunk_steps(const PlanInput& in) {
  const Sizes s(in);
  if (in.backward) return s.T;
  const int64_t step = s.D * s.B * s.gates * s.H * s.c;
  return std::clamp<int64_t>(kMaxProjectionBytes / step, 1, s.T);
}

Costs persistent_costs(const PlanInput& in, const Plan& plan) {
  const Sizes s(in);
  const Device& device = in.device;
  const bool lanes = plan.cut == Cut::kLanes;
  const Tiling t = tiling(s.gates, in.backward, plan.cut);
  const double depth_bytes = double(depth(s.gates, in.backward, s.H) * s.e);
  const double launches = double(s.D / plan.directions_at_once);    // one after the other
  const double sharing = double(blocks_of(plan.grid, device.sms));  // blocks of an SM
  const double rows = double(rounded_up(plan.group_rows, kRowTile));
  const double passes = double(blocks_of(plan.group_rows, kPassRows));
  const double steps = double(s.T) * launches;

  Costs costs;
  costs.products = large_products(in);
  costs.start = launches * double(blocks_of(s.T, plan.chunk_steps)) *
                (kCooperativeSeconds + kLaunchSeconds +
                 double(plan.grid) * double(t.rows()) * depth_bytes / device.memory_rate);
  const double read = depth_bytes * rows * kWarps / t.slots;  // each value by so many warps
  costs.exchange = steps * (kL2Cycles / device.clock +
                            std::max(read * sharing / (kL2BytesPerClock * device.clock),
                                     read * double(plan.grid) / device.l2_rate));
  costs.barrier =
      steps * (kBarrierTrips * kL2Cycles + kCyclesPerArrival * plan.unit_blocks) / device.clock;
  // Weights are read from shared memory once for each pass, without tensor cores for every few
  // rows.
  const double weight_reads = lanes ? rows / (in.dtype == DType::kFloat64 ? 2 : 4) : passes;
  const double fma = double(t.rows()) * depth_bytes / double(s.e) * rows;
  const double per_clock = in.dtype == DType::kFloat64 ? device.fma_f64 : device.fma_f32;
  const double rate = lanes ? per_clock * device.clock : peak(in) / double(device.sms) * kMmaShare;
  costs.multiply = steps * sharing *
                   std::max(double(t.rows()) * depth_bytes * weight_reads /
                                (kSharedBytesPerClock * device.clock),
                            fma / rate);
  const double pairs = rows * t.units / kThreads;
  costs.cell = steps * ((passes * kPassCycles + pairs * kPairCycles * sharing) / device.clock +
                        streamed_bytes(in) / launches / device.memory_rate);
  return costs;
}

Costs stepwise_costs(const PlanInput& in) {
  const Sizes s(in);
  const Device& device = in.device;
  const double steps = double(s.T * s.D);
  const int kernels = in.shape.proj_size > 0 ? 4 : 2;
  const double weights = double(s.gates * s.H * s.R * s.e);
  const bool cached = weights <= double(device.l2_bytes) / 2;
  Costs costs;
  costs.products = large_products(in);
  costs.start = 2 * kLaunchSeconds + double(s.D) * weights / device.memory_rate;  // the first time
  costs.multiply = steps * std::max(weights / (cached ? device.l2_rate : device.memory_rate),
                                    double(s.N) / double(s.T) * weights / double(s.e) /
                                        (peak(in) * kProductShare));
  costs.barrier = steps * kernels * kLaunchSeconds;
  costs.cell = double(s.T) * streamed_bytes(in) / device.memory_rate;
  return costs;
}

Plan refused(const PlanInput& in, const char* reason) {
  Plan plan;
  plan.reason = reason;
  plan.floor_seconds = floor_seconds(in);
  return plan;
}

Plan finished(const PlanInput& in, Plan plan) {
  plan.chunk_steps = chunk_steps(in);
  plan.costs = plan.method == Method::kPersistent ? persistent_costs(in, plan) : stepwise_costs(in);
  plan.floor_seconds = floor_seconds(in);
  plan.workspace_bytes = workspace(in, plan).bytes;
  return plan;
}

Plan plan_stepwise(const PlanInput& in) {
  if (in.device.capability < 75) return refused(in, "compute capability below 7.5");
  Plan plan;
  plan.method = Method::kStepwise;
  plan.reason = "a product and a cell kernel for each step";
  return finished(in, plan);
}

Plan plan_persistent(const PlanInput& in, Cut cut) {
  const Sizes s(in);
  const Device& device = in.device;
  if (!has_cut(in.dtype, s.gates, in.backward, cut)) return refused(in, "no such kernel");
  if (device.capability < 75) return refused(in, "compute capability below 7.5");
  if (!device.cooperative) return refused(in, "the device has no cooperative launches");
  if (cut != Cut::kLanes && device.capability < 80)
    return refused(in, "tensor cores before compute capability 8.0");
  if (cut != Cut::kLanes && in.dtype == DType::kFloat32 && !in.allow_tf32)
    return refused(in, "float32 products are not to be rounded to tf32");
  if (in.shape.proj_size > 0) return refused(in, "a projection is a second product in each step");
  const Tiling t = tiling(s.gates, in.backward, cut);
  const int64_t unit_blocks = blocks_of(s.H, t.units);
  Plan best = refused(in, "W_hh does not fit on the chip");
  for (int together = int(s.D); together >= 1; --together) {
    for (int64_t groups = blocks_of(s.B, kMaxGroupRows); groups <= blocks_of(s.B, kRowTile);
         ++groups) {
      const int64_t rows = groups == 1 ? s.B : rounded_up(blocks_of(s.B, groups), kRowTile);
      if (blocks_of(s.B, rows) != groups) continue;  // the last ones would be empty
      const int64_t shared =
          shared_layout(s.gates, s.saved, in.backward, in.dtype, cut, s.H, rows).bytes;
      const int64_t per_sm =
          std::min<int64_t>({device.shared_per_sm / (shared + kReservedShared),
                             device.threads_per_sm / kThreads, kBlocksByRegisters});
      const int64_t grid = unit_blocks * groups * together;
      if (shared > device.shared_per_block || grid > per_sm * device.sms) continue;
      Plan plan;
      plan.method = Method::kPersistent;
      plan.reason = "W_hh stays on the chip for all steps";
      plan.cut = cut;
      plan.units = t.units;
      plan.unit_blocks = int(unit_blocks);
      plan.groups = int(groups);
      plan.group_rows = rows;
      plan.directions_at_once = together;
      plan.grid = int(grid);
      plan.blocks_per_sm = int(per_sm);
      plan.shared_bytes = shared;
      plan = finished(in, plan);
      if (best.method == Method::kRefused || plan.costs.total() < best.costs.total()) best = plan;
    }
  }
  return best;
}

Plan plan_persistent(const PlanInput& in) {
  Plan best;
  for (const Cut cut : kCuts) {
    if (!has_cut(in.dtype, num_gates(in.shape.cell), in.backward, cut)) continue;
    const Plan plan = plan_persistent(in, cut);
    const bool fits = plan.method == Method::kPersistent;
    const bool first = best.reason[0] == 0;
    if (first ||
        (fits && (best.method == Method::kRefused || plan.costs.total() < best.costs.total())))
      best = plan;
  }
  return best;
}

}  // namespace

const Device* known_devices(int& count) {
  count = int(std::size(kDevices));
  return kDevices;
}

const Device* find_device(const char* name) {
  for (const Device& device : kDevices)
    if (std::strcmp(device.name, name) == 0) return &device;
  return nullptr;
}

Device with_rates(Device limits) {
  const Device* like = kDevices;
  for (const Device& device : kDevices)
    if (device.capability <= limits.capability) like = &device;
  Device device = limits;
  device.name = like->name;
  if (device.clock <= 0) device.clock = like->clock;
  device.memory_rate = like->memory_rate;
  device.l2_rate = like->l2_rate;
  device.fma_f32 = like->fma_f32;
  device.fma_f64 = like->fma_f64;
  device.fma_tensor = like->fma_tensor;
  return device;
}

Plan make_plan(const PlanInput& in, Method method, const Cut* cut) {
  return method == Method::kPersistent ? (cut ? plan_persistent(in, *cut) : plan_persistent(in))
         : method == Method::kStepwise ? plan_stepwise(in)
                                       : refused(in, "asked to refuse");
}

Plan make_plan(const PlanInput& in) {
  const Plan persistent = plan_persistent(in);
  Plan stepwise = plan_stepwise(in);
  if (persistent.method == Method::kRefused) {
    if (stepwise.method == Method::kStepwise) stepwise.reason = persistent.reason;
    return stepwise;
  }
  if (persistent.costs.total() < stepwise.costs.total()) return persistent;
  stepwise.reason = "predicted to be faster than to keep W_hh on the chip";
  return stepwise;
}

Workspace workspace(const PlanInput& in, const Plan& plan) {
  const Sizes s(in);
  const bool persistent = plan.method == Method::kPersistent;
  const int64_t P = in.shape.proj_size, gate_rows = s.gates * s.H;
  const bool lstm = in.shape.cell == CellKind::kLstm, gru = in.shape.cell == CellKind::kGru;
  Workspace w;
  const auto take = [&](int64_t bytes, bool wanted = true) {
    const int64_t at = w.bytes;
    if (wanted) w.bytes += rounded_up(bytes, 256);
    return at;
  };
  const bool packed = in.shape.offsets != nullptr;
  w.batch_sizes = take(s.T * 8, packed);
  w.offsets = take((s.T + 1) * 8, packed);
  if (persistent) {
    w.counters_bytes = s.D * plan.groups * kCounterBytes;
    w.exchange_bytes =
        s.D * plan.groups * 2 * exchange_slot(s.gates, in.backward, s.H, plan.group_rows) * s.e;
    w.counters = take(w.counters_bytes);
    w.exchange = take(w.exchange_bytes);
  }
  const int64_t chunk_rows = std::min(plan.chunk_steps * s.B, s.N);
  w.x = take((in.backward ? s.N : chunk_rows) * s.I * s.e, in.copy_x);
  w.state = take(s.D * s.B * s.H * s.c, lstm);
  if (!in.backward) {
    w.gates_x = take(s.D * chunk_rows * gate_rows * s.c);
    w.gates_h = take(s.B * gate_rows * s.c, !persistent);
    w.hidden = take(s.B * s.H * s.e, P > 0);
    return w;
  }
  w.carry = take(s.D * s.B * s.R * s.c);
  w.product = take(s.B * std::max(s.R, s.H) * s.c, !persistent);
  w.dgates_x = take(s.D * s.N * gate_rows * s.e);
  w.dgates_h = gru ? take(s.D * s.N * gate_rows * s.e) : w.dgates_x;
  w.hidden = take(s.N * s.H * s.e, P > 0);
  w.dhidden = take(s.N * P * s.e, P > 0);
  w.previous = take(s.N * s.R * s.e);
  w.dx = take(s.N * s.I * s.e, in.copy_dx);
  w.sums = take(kSumParts * gate_rows * s.c);
  return w;
}

}  // namespace rnn_ext::cuda
