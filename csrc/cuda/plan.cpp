// The cost model: it ranks the ways. Its constants fit the times of one H100; for other devices
// nothing was measured but what their data sheets say.
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <iterator>

namespace rnn_ext::cuda {
namespace {

std::atomic<Method> chosen_method = Method::kRefused;

constexpr int64_t kKiB = 1024, kMiB = kKiB * kKiB;

// name, capability, SMs, shared memory of a block and of an SM, registers, threads, L2, its rate,
// clock, memory, multiply-adds per clock and SM: f32, f64, tensor; cooperative, largest cluster.
// The rates of L2 are published measurements for v100 to h100 and estimates for the others.
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
    {"h100", 90, 132, 227 * kKiB, 228 * kKiB, 65536, 2048, 50 * kMiB, 5.6e12, 1.98e9, 3.35e12, 128,
     64, 2048, true, kMaxCluster},
    {"b200", 100, 148, 227 * kKiB, 228 * kKiB, 65536, 2048, 126 * kMiB, 8.0e12, 1.85e9, 8.0e12, 128,
     64, 4096, true, kMaxCluster},
    {"rtx5090", 120, 170, 99 * kKiB, 100 * kKiB, 65536, 1536, 96 * kMiB, 6.0e12, 2.41e9, 1.79e12,
     128, 2, 256, true, kMaxCluster},
};

// Fitted to an H100 (docs/cuda.md): clocks inside the kernels for the parts, whole calls for sums.
constexpr double kL2Cycles = 600;        // from a load to its value, in a product's first fragment
constexpr double kBarrierTrips = 3.3;    // to L2: what was stored arrives, the release, the poll
constexpr double kCyclesPerArrival = 2;  // additions to one counter are done one by one
constexpr double kL2BytesPerClock = 64;  // into one SM
constexpr double kSharedBytesPerClock = 128;
constexpr double kClusterCycles = 1000;  // between blocks of a cluster: arrival, wait, ...
constexpr double kClusterTrips = 3;      // ... and the copies that go before
constexpr double kClusterBytesPerClock = 11;
constexpr double kClustersResident = 0.9;  // of what the multiprocessors would hold
constexpr double kPassCycles = 200;        // partial sums through shared memory ...
constexpr double kPairCycles = 700;        // ... and a unit and row of a thread: all wait for one
constexpr double kLaunchSeconds = 2.5e-6;  // between kernels of a stream
constexpr double kCooperativeSeconds = 20e-6;
constexpr double kProductShare = 0.6;       // of the peak that a large product reaches
constexpr double kStepProductShare = 0.33;  // and one of few rows
constexpr double kMmaShare = 0.5;           // of the peak that mma.sync reaches on its own
constexpr double kLaneShare = 0.4;          // of the peak of plain multiply-adds
constexpr int64_t kReservedShared = kKiB;   // of a block, by the driver
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
  // load. A store is half a trip.
  const bool alone = s.gates * s.H * s.R * s.e <= in.device.shared_per_block;
  const double chain = alone ? 0 : 1.5 * kL2Cycles / in.device.clock * double(s.T);
  return std::max({arithmetic, traffic, chain});
}

int64_t chunk_steps(const PlanInput& in) {
  const Sizes s(in);
  if (in.backward) return s.T;
  const int64_t step = s.D * s.B * s.gates * s.H * s.c;
  return std::clamp<int64_t>(kMaxProjectionBytes / step, 1, s.T);
}

// Of a persistent kernel, however its blocks exchange.
Costs persistent_costs(const PlanInput& in, const Plan& plan) {
  const Sizes s(in);
  const Device& device = in.device;
  const bool lanes = plan.cut == Cut::kLanes, clusters = plan.method == Method::kCluster;
  const Tiling t = tiling(s.gates, in.backward, plan.cut);
  const double depth_bytes = double(depth(s.gates, in.backward, s.H) * s.e);
  // How often all steps are done, one after the other: for each direction, or because no more
  // clusters are resident.
  // A cluster's multiprocessors are neighbours on the chip: the last ones may find no room.
  const double neighbours = plan.unit_blocks > 1 ? kClustersResident : 1;
  const int64_t resident = std::max<int64_t>(
      1, int64_t(device.sms * neighbours / plan.unit_blocks) * plan.blocks_per_sm);
  const double launches = clusters ? double(blocks_of(plan.groups * s.D, resident))
                                   : double(s.D / plan.directions_at_once);
  const double sharing =
      clusters ? 1 : double(blocks_of(plan.grid, device.sms));  // blocks of an SM
  const double rows = double(rounded_up(plan.group_rows, kRowTile));
  const double unit_passes = plan.unit_passes;
  const double passes = double(blocks_of(plan.group_rows, kPassRows)) * unit_passes;
  const double steps = double(s.T) * launches;

  Costs costs;
  costs.products = large_products(in);
  costs.start =
      launches * double(blocks_of(s.T, plan.chunk_steps)) *
      ((clusters ? kLaunchSeconds : kCooperativeSeconds) + kLaunchSeconds +
       double(plan.grid) * unit_passes * double(t.rows()) * depth_bytes / device.memory_rate);
  const double read = depth_bytes * rows * kWarps / t.slots;  // each value by so many warps
  double shared_reads = 0;
  if (clusters) {
    const double peers = plan.unit_blocks - 1;
    const double own = unit_passes * t.units * (in.backward ? s.gates : 1) * rows * double(s.e);
    costs.exchange = steps * own * peers / (kClusterBytesPerClock * device.clock);
    costs.barrier = peers > 0 ? steps * kClusterTrips * kClusterCycles / device.clock : 0;
    shared_reads = read * unit_passes;
  } else {
    costs.exchange = steps * (kL2Cycles / device.clock +
                              std::max(read * sharing / (kL2BytesPerClock * device.clock),
                                       read * double(plan.grid) / device.l2_rate));
    costs.barrier =
        steps * (kBarrierTrips * kL2Cycles + kCyclesPerArrival * plan.unit_blocks) / device.clock;
  }
  // Weights are read from shared memory once for each pass, without tensor cores for some of its
  // rows.
  const double weight_reads =
      lanes ? double(blocks_of(plan.group_rows, lane_columns(s.e))) * unit_passes : passes;
  const double fma = unit_passes * double(t.rows()) * depth_bytes / double(s.e) * rows;
  const double per_clock = in.dtype == DType::kFloat64 ? device.fma_f64 : device.fma_f32;
  const double rate =
      lanes ? per_clock * device.clock * kLaneShare : peak(in) / double(device.sms) * kMmaShare;
  shared_reads += double(t.rows()) * depth_bytes * weight_reads;
  costs.multiply =
      steps * sharing * std::max(shared_reads / (kSharedBytesPerClock * device.clock), fma / rate);
  const double pairs = std::max(passes, rows * t.units * unit_passes / kThreads);
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
                                        (peak(in) * kStepProductShare));
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
  plan.costs = plan.method == Method::kStepwise ? stepwise_costs(in) : persistent_costs(in, plan);
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

// Why kernels of this cut do not run, whatever their size; null if they do.
const char* refusal(const PlanInput& in, Cut cut) {
  const Device& device = in.device;
  if (!has_cut(in.dtype, num_gates(in.shape.cell), in.backward, cut)) return "no such kernel";
  if (device.capability < 75) return "compute capability below 7.5";
  if (cut != Cut::kLanes && device.capability < 80)
    return "tensor cores before compute capability 8.0";
  if (cut != Cut::kLanes && in.dtype == DType::kFloat32 && !in.allow_tf32)
    return "float32 products are not to be rounded to tf32";
  if (in.shape.proj_size > 0) return "a projection is a second product in each step";
  return nullptr;
}

bool is_better(const Plan& plan, const Plan& best) {
  return plan.method != Method::kRefused &&
         (best.method == Method::kRefused || plan.costs.total() < best.costs.total());
}

// Calls visit(groups, rows of a group) for every way to cut the batch.
template <class Visit>
void for_groups(int64_t batch, Exchange exchange, Visit&& visit) {
  for (int64_t rows = max_group_rows(exchange); rows > 0; rows -= kRowTile) {
    const int64_t groups = blocks_of(batch, rows);
    if (rounded_up(blocks_of(batch, groups), kRowTile) != rows) continue;  // fewer rows do as well
    visit(groups, groups == 1 ? batch : rows);
  }
}

// Whether blocks of this plan fit a multiprocessor; says what they take.
bool fits(const PlanInput& in, Plan& plan) {
  const Sizes s(in);
  plan.shared_bytes =
      shared_layout(s.gates, s.saved, in.backward, in.dtype, plan.cut, exchange_of(plan.method),
                    plan.unit_passes, s.H, plan.group_rows)
          .bytes;
  plan.blocks_per_sm =
      int(std::min<int64_t>({in.device.shared_per_sm / (plan.shared_bytes + kReservedShared),
                             in.device.threads_per_sm / kThreads, kBlocksByRegisters}));
  return plan.shared_bytes <= in.device.shared_per_block && plan.blocks_per_sm > 0;
}

Plan plan_persistent(const PlanInput& in, Cut cut) {
  const Sizes s(in);
  const Device& device = in.device;
  if (const char* reason = refusal(in, cut)) return refused(in, reason);
  if (!device.cooperative) return refused(in, "the device has no cooperative launches");
  const Tiling t = tiling(s.gates, in.backward, cut);
  const int64_t unit_blocks = blocks_of(s.H, t.units);
  Plan best = refused(in, "W_hh does not fit on the chip");
  for (int together = int(s.D); together >= 1; --together)
    for_groups(s.B, Exchange::kMemory, [&](int64_t groups, int64_t rows) {
      Plan plan;
      plan.method = Method::kPersistent;
      plan.reason = "W_hh stays on the chip for all steps";
      plan.cut = cut;
      plan.units = t.units;
      plan.unit_blocks = int(unit_blocks);
      plan.groups = int(groups);
      plan.group_rows = rows;
      plan.directions_at_once = together;
      const int64_t grid = unit_blocks * groups * together;
      if (!fits(in, plan) || grid > int64_t(plan.blocks_per_sm) * device.sms) return;
      plan.grid = int(grid);
      plan = finished(in, plan);
      if (is_better(plan, best)) best = plan;
    });
  return best;
}

// Clusters of 1, 2, 4 ... blocks, or of `size`: the fewer blocks, the more units each of them owns.
Plan plan_cluster(const PlanInput& in, Cut cut, int size) {
  const Sizes s(in);
  const Device& device = in.device;
  if (const char* reason = refusal(in, cut)) return refused(in, reason);
  if (device.max_cluster < 1 || device.capability < 90)
    return refused(in, "the device has no thread-block clusters");
  const Tiling t = tiling(s.gates, in.backward, cut);
  Plan best = refused(in, "W_hh does not fit in the shared memory of a cluster");
  for (int blocks = 1; blocks <= std::min(device.max_cluster, kMaxCluster); blocks *= 2) {
    const int64_t unit_passes = blocks_of(s.H, int64_t(blocks) * t.units);
    if ((size > 0 && blocks != size) || unit_passes > max_unit_passes(Exchange::kCluster)) continue;
    for_groups(s.B, Exchange::kCluster, [&](int64_t groups, int64_t rows) {
      constexpr int64_t kMaxGrid = int64_t(1) << 30;
      Plan plan;
      plan.method = Method::kCluster;
      plan.reason = "W_hh stays in a cluster for all steps";
      plan.cut = cut;
      plan.unit_passes = int(unit_passes);
      plan.units = int(unit_passes) * t.units;
      plan.unit_blocks = blocks;
      plan.groups = int(groups);
      plan.group_rows = rows;
      plan.directions_at_once = int(s.D);
      const int64_t grid = blocks * groups * s.D;
      if (!fits(in, plan) || blocks > device.sms || grid > kMaxGrid) return;
      plan.grid = int(grid);
      plan = finished(in, plan);
      if (is_better(plan, best)) best = plan;
    });
  }
  return best;
}

// The best of `plan_cut` over the cuts of the type; else why the first does not run.
template <class PlanCut>
Plan best_cut(const PlanInput& in, PlanCut&& plan_cut) {
  Plan best;
  for (const Cut cut : kCuts) {
    if (!has_cut(in.dtype, num_gates(in.shape.cell), in.backward, cut)) continue;
    const Plan plan = plan_cut(cut);
    if (best.reason[0] == 0 || is_better(plan, best)) best = plan;
  }
  return best;
}
Plan plan_persistent(const PlanInput& in) {
  return best_cut(in, [&](Cut cut) { return plan_persistent(in, cut); });
}
Plan plan_cluster(const PlanInput& in, int size) {
  return best_cut(in, [&](Cut cut) { return plan_cluster(in, cut, size); });
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

Plan make_plan(const PlanInput& in, Method method, const Cut* cut, int cluster) {
  switch (method) {
    case Method::kStepwise:
      return plan_stepwise(in);
    case Method::kPersistent:
      return cut ? plan_persistent(in, *cut) : plan_persistent(in);
    case Method::kCluster:
      return cut ? plan_cluster(in, *cut, cluster) : plan_cluster(in, cluster);
    case Method::kRefused:
      break;
  }
  return refused(in, "asked to refuse");
}

void set_method(Method method) { chosen_method = method; }

Plan make_plan(const PlanInput& in) {
  if (const Method method = chosen_method; method != Method::kRefused)
    if (const Plan plan = make_plan(in, method); plan.method == method) return plan;
  const Plan persistent = plan_persistent(in), cluster = plan_cluster(in, 0);
  const Plan& on_chip = is_better(cluster, persistent) ? cluster : persistent;
  Plan stepwise = plan_stepwise(in);
  if (on_chip.method == Method::kRefused) {
    if (stepwise.method == Method::kStepwise) stepwise.reason = persistent.reason;
    return stepwise;
  }
  if (is_better(on_chip, stepwise)) return on_chip;
  stepwise.reason = "predicted to be faster than to keep W_hh on the chip";
  return stepwise;
}

Workspace workspace(const PlanInput& in, const Plan& plan) {
  const Sizes s(in);
  const bool persistent = plan.method == Method::kPersistent;
  const bool stepwise = plan.method == Method::kStepwise;
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
    w.gates_h = take(s.B * gate_rows * s.c, stepwise);
    w.hidden = take(s.B * s.H * s.e, P > 0);
    return w;
  }
  w.carry = take(s.D * s.B * s.R * s.c);
  w.product = take(s.B * std::max(s.R, s.H) * s.c, stepwise);
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
