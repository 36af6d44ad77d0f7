// The cost model.
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/plan.h"

using namespace rnn_ext;

namespace {

PlanInput input(int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
                int max_threads = 1) {
  PlanInput in;
  in.shape = {CellKind::kLstm, steps, batch, input_size, hidden_size};
  in.vector_bytes = 32;
  in.max_threads = max_threads;
  return in;
}

// Calls check(input) for all kinds of calls.
template <class Check>
void for_each_input(Check&& check) {
  for (CellKind cell : {CellKind::kRnnTanh, CellKind::kRnnRelu, CellKind::kLstm, CellKind::kGru})
    for (int64_t steps : {1, 2, 100, 100000})
      for (int64_t batch : {1, 2, 11, 12, 13, 48, 49, 97, 1000})
        for (int64_t hidden_size : {1, 31, 64, 1024})
          for (int64_t input_size : {1, 100, 3000})
            for (int64_t proj_size : {int64_t(0), cell == CellKind::kLstm ? hidden_size / 2 : 0})
              for (int directions : {1, 2})
                for (int element_bytes : {4, 8})
                  for (int vector_bytes : {16, 32, 64})
                    for (bool backward : {false, true}) {
                      PlanInput in;
                      in.shape = {cell,        steps,     batch,     input_size,
                                  hidden_size, proj_size, directions};
                      in.element_bytes = element_bytes;
                      in.vector_bytes = vector_bytes;
                      in.backward = backward;
                      check(in);
                    }
}

std::string describe(const PlanInput& in) {
  std::string text;
  for (int64_t number :
       {int64_t(in.shape.cell), in.shape.steps, in.shape.batch, in.shape.input_size,
        in.shape.hidden_size, in.shape.proj_size, int64_t(in.shape.directions),
        int64_t(in.element_bytes), int64_t(in.vector_bytes), int64_t(in.backward)})
    text += std::to_string(number) + ' ';
  return text;
}

}  // namespace

TEST(within_limits) {
  for_each_input([](PlanInput in) {
    check::Scope scope(describe(in));
    for (int max_threads : {1, 2, 64}) {
      in.max_threads = max_threads;
      const Plan plan = make_plan(in);
      CHECK(plan.threads >= 1 && plan.threads <= max_threads);
      CHECK(plan.chunk_steps >= 1 && plan.chunk_steps <= in.shape.steps);
      CHECK(plan.row_block >= 1 && plan.row_block <= 48);
      CHECK(plan.step_seconds > 0);
      CHECK(!std::string(plan.reason).empty());
    }
  });
}

// What changes a rounding depends on the shape alone: not on the threads on offer, and not on the
// instruction set.
TEST(same_rounding) {
  for_each_input([](PlanInput in) {
    check::Scope scope(describe(in));
    in.max_threads = 1;
    const Plan one = make_plan(in);
    const auto check_same = [&] {
      const Plan plan = make_plan(in);
      CHECK_EQ(plan.packed_weights, one.packed_weights);
      CHECK_EQ(plan.packed_recurrent, one.packed_recurrent);
      CHECK_EQ(plan.chunk_steps, one.chunk_steps);
      CHECK_EQ(plan.row_block, one.row_block);
      CHECK_EQ(plan.deal_rows, one.deal_rows);
      CHECK_EQ(plan.groups, one.groups);
      CHECK_EQ(plan.project_in_step_rows, one.project_in_step_rows);
    };
    for (int max_threads : {2, 3, 64}) {
      in.max_threads = max_threads;
      check_same();
    }
    in.vector_bytes = 16;
    check_same();
  });
}

TEST(small_steps_stay_alone) {
  for (int max_threads : {2, 8, 64}) {
    check::Scope scope("of ", max_threads);
    CHECK_EQ(make_plan(input(100, 1, 8, 8, max_threads)).threads, 1);
    CHECK_EQ(make_plan(input(1, 1, 32, 32, max_threads)).threads, 1);
    CHECK_EQ(make_plan(input(1, 1, 64, 64, max_threads)).threads, 1);
    CHECK_EQ(make_plan(input(100000, 1, 16, 16, max_threads)).threads, 1);
    // One unit cannot be shared, however large its inputs are.
    CHECK_EQ(make_plan(input(100, 1, 100000, 1, max_threads)).threads, 1);
  }
}

TEST(large_steps_use_all_threads) {
  for (int max_threads : {2, 4, 8}) {
    check::Scope scope("of ", max_threads);
    CHECK_EQ(make_plan(input(100, 64, 512, 512, max_threads)).threads, max_threads);
    CHECK_EQ(make_plan(input(100, 1, 1024, 1024, max_threads)).threads, max_threads);
    PlanInput backward = input(100, 64, 512, 512, max_threads);
    backward.backward = true;
    CHECK_EQ(make_plan(backward).threads, max_threads);
  }
}

// Two directions of short steps: one each. Not where a core's cache is too small for one's weights,
// and not without a second thread.
TEST(a_direction_each) {
  PlanInput in = input(100, 1, 64, 64, 2);
  in.shape.directions = 2;
  CHECK_EQ(make_plan(in).shares, 1);
  CHECK_EQ(make_plan(in).threads, 2);
  in.backward = true;
  CHECK_EQ(make_plan(in).shares, 1);
  in.max_threads = 1;
  CHECK_EQ(make_plan(in).shares, 0);
  in.max_threads = 2;
  in.shape.hidden_size = 1024;
  CHECK_EQ(make_plan(in).shares, 0);
  in.shape.directions = 1;
  in.shape.hidden_size = 64;
  CHECK_EQ(make_plan(in).shares, 0);
}

// Long steps of two directions: both at once only where the caches hold the weights of both.
TEST(directions_in_turn) {
  PlanInput in = input(100, 1, 1024, 1024, 2);
  CHECK(!make_plan(in).directions_in_turn);
  in.shape.directions = 2;
  CHECK(make_plan(in).directions_in_turn);
  in.shape.hidden_size = 128;
  CHECK(!make_plan(in).directions_in_turn);
}

// Gradients of larger weights are not worth a copy for each group.
TEST(groups_of_rows) {
  for (int64_t hidden : {64, 256, 257, 512}) {
    check::Scope scope("hidden size ", hidden);
    PlanInput in = input(50, 64, hidden, hidden, 2);
    in.backward = true;
    CHECK_EQ(make_plan(in).groups, hidden <= 256 ? 2 : 1);
  }
}

// Only beside weights that the caches have to hold, too, and with rows enough.
TEST(reserve_past_the_caches) {
  PlanInput in = input(50, 32, 128, 128, 2);
  in.streamed_reserve_bytes = 12345;
  CHECK_EQ(make_plan(in).streamed_reserve_bytes, INT64_MAX);
  in.shape.hidden_size = in.shape.input_size = 256;
  CHECK_EQ(make_plan(in).streamed_reserve_bytes, 12345);
  in.shape.batch = 8;
  CHECK_EQ(make_plan(in).streamed_reserve_bytes, INT64_MAX);
}

// A part of the batch each, where each has rows enough.
TEST(a_part_of_the_batch_each) {
  for (bool backward : {false, true}) {
    for (int64_t batch : {16, 32, 64, 100, 128}) {
      check::Scope scope("batch ", batch, backward ? ", backward" : ", forward");
      PlanInput in = input(50, batch, 128, 128, 2);
      in.backward = backward;
      const Plan plan = make_plan(in);
      CHECK_EQ(plan.project_in_step_rows <= batch, !backward);
      CHECK_EQ(plan.threads, 2);
      CHECK_EQ(plan.shares, 2);
      CHECK((batch + plan.row_block - 1) / plan.row_block % 2 == 0);  // and as many each
      CHECK_EQ(plan.own_weights, !backward);
      if (!backward)
        CHECK_EQ(plan.chunk_steps, std::min<int64_t>(50, 2048 / batch));  // 1 MB of output
      CHECK_EQ(plan.groups, !backward ? 1 : batch > 96 ? 4 : 2);
      in.shape.directions = 2;
      CHECK_EQ(make_plan(in).shares, 1);
    }
    PlanInput in = input(50, 8, 128, 128, 2);
    in.backward = backward;
    CHECK_EQ(make_plan(in).shares, 0);
    in = input(50, 16, 512, 512, 2);  // ... or too large weights for so few
    in.backward = backward;
    CHECK_EQ(make_plan(in).shares, 0);
    CHECK_EQ(make_plan(in).row_block, 16);
    in = input(50, 32, 256, 256, 2);  // weights that do not stay in a core's own cache
    in.backward = backward;
    CHECK_EQ(make_plan(in).shares, 2);
    CHECK_EQ(make_plan(in).groups, backward ? 2 : 1);
    if (backward) CHECK_EQ(make_plan(in).chunk_steps, 16);  // 256 rows of each group
    CHECK(make_plan(in).project_in_step_rows > 32);
    in = input(50, 64, 256, 256, 2);  // rows enough to read W_ih again at every step
    in.backward = backward;
    CHECK_EQ(make_plan(in).project_in_step_rows <= 64, !backward);
  }
}

// Rows of very different lengths, of which the first half has most of the steps.
TEST(rows_that_end_one_by_one) {
  const std::vector<int64_t> sizes = {32, 32, 16, 16, 16, 16, 16, 16};
  const std::vector<int64_t> offsets = {0, 32, 64, 80, 96, 112, 128, 144, 160};
  for (bool backward : {false, true}) {
    const auto plan_of = [&](int64_t hidden_size) {
      PlanInput in = input(int64_t(sizes.size()), 32, hidden_size, hidden_size, 2);
      in.backward = backward;
      in.shape.batch_sizes = sizes.data();
      in.shape.offsets = offsets.data();
      return make_plan(in);
    };
    const Plan small = plan_of(128);  // dealt out: each half has as many
    CHECK(small.deal_rows);
    CHECK_EQ(small.shares, 2);
    CHECK_EQ(small.groups, backward ? 2 : 1);
    if (!backward) {  // fewer rows a step are enough to read W_ih at each of them
      const Plan together = make_plan(input(int64_t(sizes.size()), 32, 128, 128, 2));
      CHECK(small.project_in_step_rows < together.project_in_step_rows);
    }
    const Plan large = plan_of(512);  // weights that are too large for each member to read
    CHECK(!large.deal_rows);
    CHECK_EQ(large.threads, 2);
    CHECK_EQ(large.shares, 0);
    CHECK_EQ(large.groups, 1);
  }
  CHECK(!make_plan(input(8, 32, 128, 128, 2)).deal_rows);
}

// Where a step has two parts, fewer rows are enough: nobody then waits between them.
TEST(two_parts_of_a_step) {
  for (bool backward : {false, true}) {
    for (int64_t batch : {1, 4, 7, 8, 16, 21, 64}) {
      check::Scope scope("batch ", batch, backward ? ", backward" : ", forward");
      PlanInput in = input(50, batch, 128, 128, 2);
      in.backward = backward;
      in.two_parts = true;
      const Plan plan = make_plan(in);
      CHECK_EQ(plan.shares, batch < 8 ? 0 : 2);
      in.max_threads = 1;
      CHECK_EQ(make_plan(in).row_block, plan.row_block);
      CHECK_EQ(make_plan(in).chunk_steps, plan.chunk_steps);
    }
    PlanInput in = input(50, 16, 1024, 1024, 2);  // weights that every member would have to read
    in.backward = backward;
    in.two_parts = true;
    CHECK_EQ(make_plan(in).shares, 0);
  }
}

// Whether a stack is cut into chunks depends on the shapes alone, who works on them also on the
// threads on offer.
TEST(wavefront) {
  const auto stack = [](int layers, int64_t steps, int64_t hidden_size, int threads) {
    const std::vector<PlanInput> inputs(size_t(layers),
                                        input(steps, 1, hidden_size, hidden_size, threads));
    return plan_wavefront(inputs.data(), layers);
  };
  for (int threads : {1, 2, 8}) {
    check::Scope scope("of ", threads);
    CHECK_EQ(stack(3, 100, 64, threads).chunk_steps, stack(3, 100, 64, 1).chunk_steps);
    CHECK_EQ(stack(3, 100, 48, threads).threads, threads < 3 ? threads : 3);
    CHECK_EQ(stack(1, 100, 64, threads).chunk_steps, 0);    // nothing beside it
    CHECK_EQ(stack(3, 8, 64, threads).chunk_steps, 0);      // too few steps
    CHECK_EQ(stack(3, 100, 1024, threads).chunk_steps, 0);  // long steps are shared
  }
  CHECK(stack(3, 100, 64, 1).chunk_steps > 0);
  CHECK(stack(3, 100, 64, 1).chunk_steps < 100);
}

TEST(more_work_never_fewer_threads) {
  int before = 1;
  for (int64_t hidden_size = 8; hidden_size <= 2048; hidden_size *= 2) {
    const int threads = make_plan(input(100, 4, hidden_size, hidden_size, 8)).threads;
    CHECK(threads >= before);
    before = threads;
  }
}

TEST(packing) {
  // Read once, the weights are used as they are; a sequence pays for packing them.
  CHECK(!make_plan(input(1, 1, 64, 64)).packed_weights);
  CHECK(!make_plan(input(1, 1, 512, 512)).packed_weights);
  CHECK(make_plan(input(100, 1, 512, 512)).packed_weights);
  CHECK(make_plan(input(1, 64, 512, 512)).packed_weights);
  CHECK(!make_plan(input(100, 1, 512, 512)).packed_recurrent);
  CHECK(make_plan(input(100, 1, 64, 64)).packed_recurrent);
  CHECK(make_plan(input(100, 2, 512, 512)).packed_recurrent);
  PlanInput backward = input(1, 1, 512, 512);
  backward.backward = true;
  CHECK(make_plan(backward).packed_weights);
}

TEST(window) {
  for (CellKind cell : {CellKind::kRnnTanh, CellKind::kLstm, CellKind::kGru})
    for (int64_t steps : {1, 7, 200, 100000})
      for (int64_t batch : {1, 16, 1000})
        for (int64_t hidden_size : {1, 128, 4096})
          for (int64_t num_layers : {1, 4}) {
            WindowPlanInput in;
            in.shape = {cell, steps, batch, 1, hidden_size};
            in.window = 20;
            in.num_layers = num_layers;
            const int64_t tile = make_window_plan(in).tile_rows, rows = steps * batch;
            for (int max_threads : {1, 2, 64}) {
              in.max_threads = max_threads;
              const WindowPlan plan = make_window_plan(in);
              CHECK_EQ(plan.tile_rows, tile);  // whatever decides roundings
              CHECK_EQ(plan.block_rows % tile, 0);
              CHECK(plan.threads >= 1 && plan.threads <= max_threads);
              CHECK(plan.threads == 1 || (plan.threads - 1) * tile < rows);  // nobody without work
              CHECK(plan.block_rows - tile < rows);
              CHECK(plan.seconds > 0);
            }
          }
  WindowPlanInput in;
  in.shape = {CellKind::kLstm, 200, 16, 128, 128};
  in.window = 20;
  in.max_threads = 2;
  CHECK_EQ(make_window_plan(in).threads, 2);
  in.shape = {CellKind::kLstm, 3, 1, 2, 2};
  CHECK_EQ(make_window_plan(in).threads, 1);
}
