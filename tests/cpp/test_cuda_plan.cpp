// How the CUDA engine would run layers on devices of the tables: plain host code, no GPU.
#include <initializer_list>

#include "check.h"
#include "cuda/plan.h"

using namespace rnn_ext;        // NOLINT
using namespace rnn_ext::cuda;  // NOLINT

namespace {

constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
constexpr CellKind kCells[] = {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm,
                               CellKind::kGru};

PlanInput input(const char* device, DType dtype, int64_t T, int64_t B, int64_t H,
                bool backward = false, CellKind cell = CellKind::kLstm, int directions = 1) {
  PlanInput in;
  in.shape = {cell, T, B, H, H, 0, directions};
  in.dtype = dtype;
  in.backward = backward;
  in.save_reserve = true;
  const Device* const found = find_device(device);
  CHECK(found != nullptr);
  if (found) in.device = *found;
  return in;
}

template <class Check>
void for_each_input(Check&& check) {
  int count = 0;
  const Device* const devices = known_devices(count);
  for (int i = 0; i < count; ++i)
    for (DType dtype : kTypes)
      for (CellKind cell : kCells)
        for (int64_t T : {1, 100, 1000000})
          for (int64_t B : {1, 7, 8, 33, 128, 1000, 65536})
            for (int64_t H : {1, 7, 8, 64, 100, 768, 1024, 2048, 8192})
              for (int directions : {1, 2})
                for (bool backward : {false, true}) {
                  check::Scope scope(devices[i].name, " bytes ", int64_t(bytes_of(dtype)), " cell ",
                                     int(cell), " T ", T, " B ", B, " H ", H, " D ", directions,
                                     " backward ", int(backward));
                  check(input(devices[i].name, dtype, T, B, H, backward, cell, directions));
                }
}

}  // namespace

// Whatever is planned as persistent is resident at once, covers all units and rows, and none twice.
TEST(persistent_plans_fit) {
  int persistent = 0;
  for_each_input([&](const PlanInput& in) {
    const Plan plan = make_plan(in, Method::kPersistent);
    if (plan.method == Method::kRefused) {
      CHECK(!std::string(plan.reason).empty());
      return;
    }
    ++persistent;
    const Device& device = in.device;
    const int gates = num_gates(in.shape.cell);
    CHECK_EQ(plan.shared_bytes,
             shared_layout(gates, num_saved(in.shape.cell), in.backward, in.dtype, plan.cut,
                           Exchange::kMemory, 1, in.shape.hidden_size, plan.group_rows)
                 .bytes);
    CHECK(plan.shared_bytes <= device.shared_per_block);
    CHECK(plan.grid <= plan.blocks_per_sm * device.sms);
    CHECK(plan.blocks_per_sm * (plan.shared_bytes + 1024) <= device.shared_per_sm);
    CHECK(plan.blocks_per_sm * kThreads <= device.threads_per_sm);
    CHECK(plan.blocks_per_sm <= kBlocksByRegisters);
    CHECK_EQ(plan.grid, plan.unit_blocks * plan.groups * plan.directions_at_once);
    CHECK(plan.unit_blocks * plan.units >= in.shape.hidden_size);
    CHECK((plan.unit_blocks - 1) * plan.units < in.shape.hidden_size);
    CHECK(plan.groups * plan.group_rows >= in.shape.batch);
    CHECK((plan.groups - 1) * plan.group_rows < in.shape.batch);
    CHECK(plan.group_rows >= 1 && plan.group_rows <= kMaxGroupRows);
    CHECK(plan.groups == 1 || plan.group_rows % kRowTile == 0);
    CHECK(in.shape.directions % plan.directions_at_once == 0);
  });
  CHECK(persistent > 1000);
}

// Whatever is planned for clusters covers all units and rows, and no rows twice; a cluster is one
// that every device allows.
TEST(cluster_plans_fit) {
  int clusters = 0;
  for_each_input([&](const PlanInput& in) {
    const Plan plan = make_plan(in, Method::kCluster);
    if (plan.method == Method::kRefused) {
      CHECK(!std::string(plan.reason).empty());
      return;
    }
    ++clusters;
    const Device& device = in.device;
    const int gates = num_gates(in.shape.cell);
    CHECK(device.capability >= 90);
    CHECK(plan.unit_blocks >= 1 && plan.unit_blocks <= device.max_cluster);
    CHECK_EQ(
        plan.shared_bytes,
        shared_layout(gates, num_saved(in.shape.cell), in.backward, in.dtype, plan.cut,
                      Exchange::kCluster, plan.unit_passes, in.shape.hidden_size, plan.group_rows)
            .bytes);
    CHECK(plan.shared_bytes <= device.shared_per_block);
    CHECK_EQ(plan.blocks_per_sm, 1);
    CHECK_EQ(plan.grid, plan.unit_blocks * plan.groups * in.shape.directions);
    CHECK_EQ(plan.directions_at_once, in.shape.directions);
    CHECK_EQ(plan.units, plan.unit_passes * tiling(gates, in.backward, plan.cut).units);
    CHECK(plan.unit_passes >= 1 && plan.unit_passes <= kMaxPasses);
    CHECK(plan.unit_blocks * plan.units >= in.shape.hidden_size);
    CHECK(plan.groups * plan.group_rows >= in.shape.batch);
    CHECK((plan.groups - 1) * plan.group_rows < in.shape.batch);
    CHECK(plan.group_rows >= 1 && plan.group_rows <= kPassRows);
    CHECK(plan.groups == 1 || plan.group_rows % kRowTile == 0);
    CHECK_EQ(workspace(in, plan).exchange_bytes, 0);
    CHECK_EQ(workspace(in, plan).counters_bytes, 0);
  });
  CHECK(clusters > 1000);
}

// Clusters where a device has them and W_hh fits in one without a second pass over units; they wait
// for nobody, so more of them than are resident at once take turns.
TEST(clusters_where_they_fit) {
  for (bool backward : {false, true}) {
    check::Scope scope("backward ", int(backward));
    for (const char* device : {"h100", "b200"}) {
      const PlanInput in = input(device, DType::kBFloat16, 1000, 64, 32, backward);
      const Plan plan = make_plan(in);
      CHECK(plan.method == Method::kCluster);
      CHECK(plan.costs.total() < make_plan(in, Method::kPersistent).costs.total());
    }
    CHECK(make_plan(input("a100", DType::kBFloat16, 1000, 64, 32, backward)).method ==
          Method::kPersistent);
    const PlanInput large = input("h100", DType::kBFloat16, 1000, 64, 768, backward);
    CHECK(make_plan(large, Method::kCluster).method == Method::kRefused);
    const PlanInput many = input("h100", DType::kBFloat16, 1000, 8192, 128, backward);
    const Plan plan = make_plan(many, Method::kCluster);
    CHECK(plan.method == Method::kCluster);
    CHECK(plan.grid > many.device.sms);
    CHECK(make_plan(many, Method::kPersistent).method == Method::kRefused);
  }
  PlanInput in = input("h100", DType::kBFloat16, 100, 8, 128);
  in.device.cooperative = false;
  CHECK(make_plan(in).method == Method::kCluster);
  for (int size : {1, 2, 4, 8}) {
    const Plan plan = make_plan(in, Method::kCluster, nullptr, size);
    if (plan.method == Method::kCluster) CHECK_EQ(plan.unit_blocks, size);
  }
  CHECK_EQ(make_plan(in, Method::kCluster, nullptr, 8).unit_blocks, 8);
}

TEST(plans_are_within_limits) {
  for_each_input([&](const PlanInput& in) {
    const Plan plan = make_plan(in);
    CHECK(!std::string(plan.reason).empty());
    if (in.device.capability < 75) {
      CHECK(plan.method == Method::kRefused);
      return;
    }
    CHECK(plan.method != Method::kRefused);
    CHECK(plan.chunk_steps >= 1 && plan.chunk_steps <= in.shape.steps);
    CHECK(plan.floor_seconds > 0);
    CHECK(plan.costs.total() > plan.floor_seconds);
    const Workspace w = workspace(in, plan);
    CHECK_EQ(w.bytes, plan.workspace_bytes);
    for (int64_t offset :
         {w.counters, w.exchange, w.x, w.gates_x, w.gates_h, w.state, w.hidden, w.carry, w.product,
          w.dgates_x, w.dgates_h, w.dhidden, w.previous, w.dx, w.sums})
      CHECK(offset >= 0 && offset % 256 == 0 && offset <= w.bytes);
  });
}

TEST(old_devices) {
  CHECK(make_plan(input("v100", DType::kFloat32, 100, 1, 64)).method == Method::kRefused);
  // No cp.async and no bfloat16 products on 7.5: half precision goes step by step there.
  CHECK(make_plan(input("t4", DType::kFloat16, 100, 1, 64)).method == Method::kStepwise);
  CHECK(make_plan(input("t4", DType::kFloat32, 100, 1, 64)).method == Method::kPersistent);
  PlanInput in = input("h100", DType::kBFloat16, 100, 1, 64);
  in.device.cooperative = false;
  in.device.max_cluster = 0;
  CHECK(make_plan(in).method == Method::kStepwise);
}

TEST(weights_on_chip_where_they_fit) {
  for (bool backward : {false, true}) {
    for (const char* device : {"a100", "rtx3090", "rtx4090", "h100", "b200", "rtx5090"})
      CHECK(make_plan(input(device, DType::kBFloat16, 100, 1, 512, backward)).method ==
            Method::kPersistent);
    // 33.5 MB in bfloat16.
    CHECK(make_plan(input("h100", DType::kBFloat16, 100, 1, 2048, backward)).method ==
          Method::kStepwise);
  }
  PlanInput projected = input("h100", DType::kBFloat16, 100, 1, 512);
  projected.shape.proj_size = 100;
  CHECK(make_plan(projected).method == Method::kStepwise);
}

// Tensor cores multiply float32 where the caller allows tf32 and the device has it: only there.
TEST(tf32_only_where_allowed) {
  for (bool backward : {false, true}) {
    for (const char* device : {"t4", "a100", "h100"}) {
      check::Scope scope(device, " backward ", int(backward));
      PlanInput in = input(device, DType::kFloat32, 100, 32, 256, backward);
      CHECK(make_plan(in).cut == Cut::kLanes);
      const Cut tensor_cores = Cut::kTensorCores;
      CHECK(make_plan(in, Method::kPersistent, &tensor_cores).method == Method::kRefused);
      const double exact = make_plan(in).costs.total();
      in.allow_tf32 = true;
      const Plan plan = make_plan(in);
      CHECK_EQ(plan.cut == Cut::kTensorCores, in.device.capability >= 80);
      if (in.device.capability >= 80) CHECK(plan.costs.total() < exact);
      in.dtype = DType::kFloat64;
      CHECK(make_plan(in).cut == Cut::kLanes);
    }
  }
}

// 8 units a block are 128 blocks of one layer with H = 1024, which has room on the 108
// multiprocessors of an A100 only in blocks of 16.
TEST(wide_blocks_where_there_are_few_multiprocessors) {
  const PlanInput in = input("a100", DType::kFloat16, 100, 16, 1024);
  const Cut tensor_cores = Cut::kTensorCores;
  CHECK(make_plan(in, Method::kPersistent, &tensor_cores).method == Method::kRefused);
  const Plan plan = make_plan(in);
  CHECK(plan.method == Method::kPersistent);
  CHECK(plan.cut == Cut::kWide);
  CHECK_EQ(plan.units, 16);
  // 24 rows of partial sums have no room beside the weights, a second group no multiprocessors.
  CHECK(make_plan(input("a100", DType::kFloat16, 100, 17, 1024)).method == Method::kStepwise);
  CHECK(make_plan(input("a100", DType::kFloat16, 100, 16, 1024, true)).method ==
        Method::kPersistent);
}

TEST(both_directions_in_one_launch_where_they_fit) {
  CHECK_EQ(make_plan(input("h100", DType::kFloat16, 100, 8, 256, false, CellKind::kGru, 2))
               .directions_at_once,
           2);
  // 72 blocks each, of 132, cut as wide as can be.
  CHECK_EQ(make_plan(input("h100", DType::kFloat16, 100, 8, 1152, false, CellKind::kLstm, 2))
               .directions_at_once,
           1);
}

// The figure that the engine is designed for: what was measured on an H100 (docs/cuda.md), 2.81 ms
// forward and 7.03 ms with backward, and what is predicted.
TEST(prediction_for_the_design_point) {
  const PlanInput forward = input("h100", DType::kBFloat16, 1024, 16, 768);
  const PlanInput backward = input("h100", DType::kBFloat16, 1024, 16, 768, true);
  const double f = make_plan(forward).costs.total(), b = make_plan(backward).costs.total();
  CHECK(make_plan(forward).method == Method::kPersistent);
  CHECK(make_plan(backward).method == Method::kPersistent);
  CHECK(f > 0.85 * 2.81e-3 && f < 1.15 * 2.81e-3);
  CHECK(f + b > 0.85 * 7.03e-3 && f + b < 1.15 * 7.03e-3);
}

TEST(longer_and_wider_takes_longer) {
  for (bool backward : {false, true}) {
    const auto seconds = [&](int64_t T, int64_t B, int64_t H) {
      return make_plan(input("h100", DType::kBFloat16, T, B, H, backward)).costs.total();
    };
    CHECK(seconds(200, 16, 256) > seconds(100, 16, 256));
    CHECK(seconds(100, 128, 256) > seconds(100, 16, 256));
    CHECK(seconds(100, 16, 768) > seconds(100, 16, 256));
  }
}

TEST(rates_for_a_device_that_the_driver_described) {
  Device limits;
  limits.capability = 90;
  limits.sms = 114;
  limits.shared_per_block = 227 << 10;
  limits.shared_per_sm = 228 << 10;
  limits.clock = 1.7e9;
  const Device device = with_rates(limits);
  CHECK_EQ(std::string(device.name), "h100");
  CHECK_EQ(device.sms, 114);
  CHECK_EQ(device.clock, 1.7e9);
  CHECK_EQ(device.fma_tensor, find_device("h100")->fma_tensor);
  limits.capability = 110;  // not in the table
  CHECK_EQ(std::string(with_rates(limits).name), "b200");
}

// Sizes whose products pass 2^31 and 2^32 elements: offsets are what 64-bit arithmetic makes them.
TEST(sizes_beyond_32_bits) {
  const int64_t T = 1 << 16, B = 1 << 10, H = 8192;  // T*B*H = 2^39
  PlanInput in = input("h100", DType::kBFloat16, T, B, H, true);
  const Plan plan = make_plan(in);
  CHECK(plan.method == Method::kStepwise);
  const Workspace w = workspace(in, plan);
  const int64_t dgates = T * B * 4 * H * 2;
  CHECK_EQ(dgates, int64_t(1) << 42);
  CHECK(w.dgates_x > 0 && w.hidden - w.dgates_x == dgates);
  CHECK(w.bytes > dgates);
  float dummy = 0;
  const StepRows<float> rows{&dummy, B * H, H};
  const SequenceShape& shape = in.shape;
  CHECK_EQ(reinterpret_cast<uintptr_t>(rows.at(shape, T - 1, B - 1)) -
               reinterpret_cast<uintptr_t>(&dummy),
           uintptr_t(((T - 1) * B + B - 1) * H) * sizeof(float));
  CHECK_EQ(shape.rows(), T * B);
  CHECK_EQ(exchange_slot(4, true, 8192, 128), int64_t(4) * 8192 * 128);
  CHECK(shared_layout(4, 5, true, DType::kFloat64, Cut::kLanes, Exchange::kMemory, 1,
                      int64_t(1) << 28, 128)
            .bytes > (int64_t(1) << 35));
  // Forward never holds more projections than its share, and the last chunk is whole.
  in = input("h100", DType::kBFloat16, T, B, H);
  const Plan forward = make_plan(in);
  CHECK(forward.chunk_steps >= 1 && forward.chunk_steps < T);
}
