// The choice of how to run a layer on a device: a stated cost model in plain host code. No CUDA, so
// that every device can be planned for on any machine; docs/cuda.md explains the model.
#pragma once

#include "../sequence.h"
#include "tiles.h"

namespace rnn_ext::cuda {

// Properties of a device: the limits as its driver reports them, the rates from its data sheet.
struct Device {
  const char* name = "";
  int capability = 0;  // 10 * major + minor
  int sms = 0;
  int64_t shared_per_block = 0;  // most that a block may opt in to, bytes
  int64_t shared_per_sm = 0;
  int64_t registers_per_sm = 65536;
  int64_t threads_per_sm = 2048;
  int64_t l2_bytes = 0;
  double l2_rate = 0;      // bytes/s, all multiprocessors together
  double clock = 0;        // Hz
  double memory_rate = 0;  // bytes/s
  double fma_f32 = 0;      // multiply-adds per clock and SM
  double fma_f64 = 0;
  double fma_tensor = 0;    // f16 and bf16 with f32 sums, as large products reach them; tf32: half
  bool cooperative = true;  // can a launch have all its blocks resident?
  int max_cluster = 0;      // blocks of a thread-block cluster; 0: it has none
};

// Tables by name: v100 t4 a100 rtx3090 rtx4090 h100 b200 rtx5090. Null if there is no such name.
const Device* find_device(const char* name);
const Device* known_devices(int& count);
// A device of which the driver told the limits and the clock, with the rates of the table's device
// that is nearest to it: the newest one of no higher compute capability.
Device with_rates(Device limits);

enum class Method : int {
  kRefused = 0,     // the engine does not run on this device
  kStepwise = 1,    // a product and a cell kernel for each step
  kPersistent = 2,  // one cooperative launch for all steps
  kCluster = 3      // one launch for all steps, in which every group is a thread-block cluster
};
RNN_EXT_SHARED_INLINE constexpr Exchange exchange_of(Method method) {
  return method == Method::kCluster ? Exchange::kCluster : Exchange::kMemory;
}

struct PlanInput {
  SequenceShape shape;
  DType dtype = DType::kFloat32;
  bool backward = false;
  bool save_reserve = false;
  bool allow_tf32 = false;  // may operands of float32 products be rounded to tf32?
  // Is x (dx) to be copied because its rows are not evenly spaced in time order?
  bool copy_x = false, copy_dx = false;
  Device device;
};

// Seconds of the parts of a call, predicted.
struct Costs {
  double products = 0;  // all large products over many steps
  double start = 0;     // launches, and weights brought on chip
  double exchange = 0;  // the rest: all steps together. State read from L2, ...
  double barrier = 0;
  double multiply = 0;
  double cell = 0;  // ... sums of partial sums, activations, what is stored

  double total() const { return products + start + exchange + barrier + multiply + cell; }
};

struct Plan {
  Method method = Method::kRefused;
  const char* reason = "";
  // Persistent and in clusters:
  Cut cut = Cut::kLanes;
  int units = 0;           // of a block
  int unit_passes = 1;     // of a block, over its units; more than one only in clusters
  int unit_blocks = 0;     // blocks of a group, for all units of a direction: the cluster's size
  int groups = 0;          // the batch rows of a direction are cut into this many groups
  int64_t group_rows = 0;  // rows of each, but for the last one
  int directions_at_once = 1;
  int grid = 0;
  int blocks_per_sm = 0;  // that fit
  int64_t shared_bytes = 0;
  // Both:
  int64_t chunk_steps = 1;  // forward: steps whose x-projections are in the workspace at once
  int64_t workspace_bytes = 0;
  Costs costs;
  double floor_seconds = 0;  // no engine with this arithmetic is faster on this device
};

// shape: steps >= 1, batch >= 1, input_size >= 1, hidden_size >= 1.
Plan make_plan(const PlanInput& input);
// The same with the method given, the cut if one is and the cluster's size if one is; kRefused if
// it cannot be.
Plan make_plan(const PlanInput& input, Method method, const Cut* cut = nullptr, int cluster = 0);

// make_plan(input) takes this method wherever a layer can run by it; kRefused: the fastest one
// predicted, as it is at first. For the whole process: for tests, measurements and bug reports.
void set_method(Method method);

// Parts of the workspace, as byte offsets, each a multiple of 256. A part that is not needed has no
// bytes. The letters are those of sequence.h; T is the storage type, C the compute type.
struct Workspace {
  int64_t batch_sizes = 0;  // (steps) int64, packed data only: the host's table on the device
  int64_t offsets = 0;      // (steps + 1) int64
  int64_t counters = 0;     // persistent: (directions, groups) barrier counters, set to 0 first
  int64_t counters_bytes = 0;
  int64_t exchange = 0;  // (directions, groups, 2, slot) T
  int64_t exchange_bytes = 0;
  int64_t x = 0;         // (rows of a chunk, I) T: x in time order where it is not so already
  int64_t gates_x = 0;   // forward (directions, rows of a chunk, G*H) C: W_ih x_t
  int64_t gates_h = 0;   // forward, stepwise: (B, G*H) C: W_hh h_{t-1}
  int64_t state = 0;     // forward: (directions, B, H) C: c. Backward: dL/dc
  int64_t hidden = 0;    // stepwise with projection: forward (B, H) T, backward (N, H) T
  int64_t carry = 0;     // backward: (directions, B, R) C: dL/dh without the product
  int64_t product = 0;   // backward, stepwise: (B, max(R, H)) C
  int64_t dgates_x = 0;  // backward: (directions, N, G*H) T
  int64_t dgates_h = 0;  // the same array unless the cell tells the two apart
  int64_t dhidden = 0;   // backward with projection: (N, P) T: dL/dh after the projection
  int64_t previous = 0;  // backward: (N, R) T: h_{t-1}
  int64_t dx = 0;        // backward: (N, I) T: dL/dx in time order where dx is not so
  int64_t sums = 0;      // backward: (kSumParts, G*H) C: parts of bias gradients
  int64_t bytes = 0;
};

// Rows are summed for a bias gradient in this many parts, one after the other within each: the
// order never depends on the device.
inline constexpr int64_t kSumParts = 64;

Workspace workspace(const PlanInput& input, const Plan& plan);

}  // namespace rnn_ext::cuda
