#include "plan.h"

#include <algorithm>
#include <cmath>

namespace rnn_ext {
namespace {

// Order-of-magnitude figures of a current server core, not fitted to any one machine.
constexpr double kFlopsPerVectorByte = 1.1e9;  // f32 multiply-add rate / vector width
constexpr double kL2BytesPerSecond = 60e9;
constexpr double kBarrierSeconds = 0.5e-6;
constexpr double kTeamStartSeconds = 4e-6;
constexpr double kOwnCacheBytes = 1 << 20;  // of one core

constexpr int64_t kWaves = 16;  // chunks of a wavefront: the first and last ones find idle members
constexpr int64_t kForwardChunkBytes = 1024 * 1024;
constexpr int64_t kLongRow = 256;  // not tuned: see docs/performance.md
// Rows for which dot products on unpacked weights cost as much as packing them saves.
constexpr int64_t kRowsThatPayForPacking = 40;
constexpr int64_t kBackwardChunkRows = 256;
// Weight gradients beyond the last level of cache are written and read again for every chunk: fewer
// and larger ones then.
constexpr int64_t kLargeGradients = 24 << 20;
// At least: every member reads all of W_hh. Fewer than 8 were not tried where a step has one part.
constexpr int64_t kRowsOfAShare = 8;
// ... half as many where a step has two parts, and whole rows would go from core to core,
constexpr int64_t kRowsOfAShareInTwoParts = 4;
// ... more where W_hh does not stay in a core's own cache.
constexpr int64_t kRowsOfAShareOfLargeWeights = 16;
// W_ih and W_hh together that a step may read for every so many rows.
constexpr double kBytesOfBothWeights = kOwnCacheBytes * 3 / 4;
constexpr int64_t kRowsOfBothWeights = 16;
// ... half as many where x must be gathered before a chunk's product, or gx goes from core to core.
constexpr int64_t kRowsOfBothWeightsIfDealt = 8;
constexpr double kMostTimesOfBothWeights = 4;
constexpr int64_t kRowsOfStreamedReserve = 16;
constexpr int64_t kMostGroups = 4;  // each has gradients of its own: not of larger weights than
constexpr double kGroupedWeightsBytes = 2 * kOwnCacheBytes;
constexpr int64_t kTilesOfChains = 8;  // fewer full ones than that are halved

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What part of all rows of all steps the first rows of the batch have: those of packed data are the
// longest.
double part_of_work(const SequenceShape& s, int64_t rows) {
  int64_t own = 0, all = 0;
  for (int64_t t = 0; t < s.steps && s.batch_sizes; ++t) {
    own += std::min(s.active(t), rows);
    all += s.active(t);
  }
  return all > 0 ? double(own) / double(all) : 0;
}

}  // namespace

Plan make_plan(const PlanInput& input) {
  const SequenceShape& s = input.shape;
  const int64_t gates = num_gates(s.cell);
  const int64_t steps = std::max<int64_t>(s.steps, 1), batch = std::max<int64_t>(s.batch, 1);
  const double weights =
      double(gates) * s.hidden_size * s.state_size() + double(s.proj_size) * s.hidden_size;
  const bool large = weights * input.element_bytes > kOwnCacheBytes;
  const int64_t least = large             ? kRowsOfAShareOfLargeWeights
                        : input.two_parts ? kRowsOfAShareInTwoParts
                                          : kRowsOfAShare;
  Plan plan;

  // An even number of blocks, where each has rows enough to reuse what it reads of the weights:
  // they are also what the batch is shared out in.
  int64_t blocks = ceil_div(batch, kMaxRowBlock);
  if (batch >= 2 * least) blocks += blocks % 2;
  plan.row_block = std::min(kMaxRowBlock, ceil_div(ceil_div(batch, blocks), 4) * 4);
  blocks = ceil_div(batch, plan.row_block);
  // Where a member is to read all of W_hh at every step, each has its share of the long rows.
  plan.deal_rows = s.batch_sizes && !large && blocks > 1;

  // Packing costs as much as a handful of rows of the product; what it saves is a part of each row,
  // the larger the shorter the rows of the weights are (a horizontal sum ends each of them).
  const int64_t products = steps * batch;
  plan.packed_weights =
      input.backward ||
      products > std::min(kRowsThatPayForPacking, std::max(s.state_size(), s.input_size) / 8);

  // At batch 1 a step reads W_hh once, packed or not. Long rows hide the horizontal sums, and then
  // packing (read, write, read again) only adds traffic, unless it halves what every step reads.
  plan.packed_recurrent = plan.packed_weights && (input.backward || batch > 1 ||
                                                  s.state_size() < kLongRow || input.bf16_products);

  // By the shape alone, too: it is an order of summation.
  const double inputs = double(gates) * s.hidden_size * s.input_size;
  const double both_bytes = (weights + inputs) * input.element_bytes;
  const bool exceeds_own_cache = both_bytes > kOwnCacheBytes;
  const bool can_group = !s.batch_sizes || (plan.deal_rows && blocks <= kMostGroups);
  if (input.backward && can_group && s.proj_size == 0 && s.directions == 1 && batch >= 2 * least &&
      both_bytes <= kGroupedWeightsBytes)
    plan.groups = std::min(blocks, kMostGroups);

  // With small weights the caches have nothing better to hold, and with few rows backward waits for
  // what it has to fetch from memory.
  if (exceeds_own_cache && batch >= kRowsOfStreamedReserve)
    plan.streamed_reserve_bytes = input.streamed_reserve_bytes;

  const int64_t row_bytes = gates * padded(s.hidden_size) * input.element_bytes;
  if (input.backward) {
    const bool large_gradients = row_bytes * (s.input_size + s.state_size()) > kLargeGradients;
    const bool large_groups = plan.groups > (exceeds_own_cache ? 1 : 2);
    const int64_t rows = kBackwardChunkRows * (large_gradients || large_groups ? 2 : 1);
    plan.chunk_steps = ceil_div(rows, batch);
  } else {
    plan.chunk_steps = kForwardChunkBytes / std::max<int64_t>(row_bytes * batch, 1);
  }
  plan.chunk_steps = std::clamp<int64_t>(plan.chunk_steps, 1, steps);

  // One step of one thread: the larger of arithmetic and reading the recurrent weights.
  const double flops = 2.0 * (weights + inputs) * batch * s.directions * (input.backward ? 2 : 1);
  const bool narrow = input.bf16_products && plan.packed_weights;
  const int operand_bytes = narrow ? 2 : input.element_bytes;
  const double peak = kFlopsPerVectorByte * input.vector_bytes * 4 / operand_bytes;
  const double bytes = weights * operand_bytes * s.directions;
  // By the shape alone, like all that cuts products into tiles. The more rows a step has, the less
  // it matters that it reads W_ih again.
  const double times = std::ceil((weights + inputs) * operand_bytes / kBytesOfBothWeights);
  if (!input.backward && plan.packed_weights && times <= kMostTimesOfBothWeights)
    plan.project_in_step_rows = std::max<int64_t>(int64_t(times), 1) *
                                (plan.deal_rows ? kRowsOfBothWeightsIfDealt : kRowsOfBothWeights);
  // A single step reads both once in any case.
  if (s.steps == 1 && !plan.packed_weights) plan.project_in_step_rows = 1;
  // Then nothing is made ahead for a chunk but its output's pages.
  if (plan.project_in_step_rows <= batch && !s.batch_sizes && !input.two_parts) {
    const int64_t output_bytes = s.state_size() * s.directions * batch * input.element_bytes;
    plan.chunk_steps = std::clamp<int64_t>(kForwardChunkBytes / output_bytes, 1, steps);
  }
  plan.step_seconds = std::max(flops / peak, bytes / kL2BytesPerSecond);

  // Jobs of a step, the grain of the split.
  const int64_t units = input.vector_bytes / input.element_bytes * (gates == 1 ? 4 : 1);
  const int64_t jobs = ceil_div(s.hidden_size, units) * blocks * s.directions;
  plan.reason = "one thread: a step is too short to be shared";
  const double alone = plan.step_seconds * steps;
  double best = alone;
  for (int threads = 2; threads <= std::min<int64_t>(input.max_threads, jobs); ++threads) {
    const double share = double(ceil_div(jobs, threads)) / double(jobs);
    const double waits = kBarrierSeconds * (input.two_parts ? 2 : 1);
    const double together = kTeamStartSeconds + (plan.step_seconds * share + waits) * steps;
    if (together < best && together < 0.85 * alone) {
      best = together;
      plan.threads = threads;
      plan.reason = "hidden units and batch rows of a step shared by the team";
    }
  }
  // Shared out for a whole chunk: a direction each, or a part of the batch.
  const int64_t chunks = ceil_div(steps, plan.chunk_steps);
  for (int64_t shares = 1; shares <= (batch >= 2 * least ? blocks : 1); ++shares) {
    const int64_t parts = s.directions * shares;
    if (parts < 2 || parts > input.max_threads) continue;
    // Every part reads all weights of its direction at every step.
    if (large && batch / shares < least) continue;
    const double of_blocks = double(ceil_div(blocks, shares)) / double(blocks);
    const double of_rows = plan.deal_rows ? 0 : part_of_work(s, blocks / shares * plan.row_block);
    const double share = std::max(of_blocks, of_rows) / s.directions;
    const double apart = kTeamStartSeconds + alone * share + kBarrierSeconds * chunks;
    if (apart < best && apart < 0.85 * alone) {
      best = apart;
      plan.threads = int(parts);
      plan.shares = shares;
      plan.reason = shares == 1 ? "one direction each" : "a part of the batch each";
    }
  }
  plan.own_weights = plan.shares > 1 && !input.backward && !input.two_parts && !exceeds_own_cache;
  // Both directions at every step would drive each other's weights out of the cores' caches.
  plan.directions_in_turn =
      s.directions == 2 && plan.shares == 0 && bytes / plan.threads > kOwnCacheBytes / 4 * 3;
  if (input.max_threads <= 1) plan.reason = "one thread: no more on offer";
  plan.total_seconds = best;
  return plan;
}

Wavefront plan_wavefront(const PlanInput* layers, int count) {
  // Whether there are chunks, and which, changes how products are cut into tiles: it may depend on
  // the shapes alone. They are for layers whose steps are too short to be shared well.
  Wavefront wave;
  double alone = 0, layer_by_layer = 0;
  for (int i = 0; i < count; ++i) {
    const SequenceShape& s = layers[i].shape;
    const double weights =
        double(num_gates(s.cell)) * s.hidden_size * (s.state_size() + s.input_size);
    const Plan plan = make_plan(layers[i]);
    if (count < 2 || s.directions != 1 || s.steps < 2 * kWaves || !plan.packed_weights ||
        weights * layers[i].element_bytes > kOwnCacheBytes)
      return {};
    alone += plan.step_seconds * s.steps;
    layer_by_layer += plan.total_seconds;
  }
  wave.chunk_steps = ceil_div(layers[0].shape.steps, kWaves);
  const int threads = std::min(layers[0].max_threads, count);
  if (threads < 2) return wave;
  const double share = double(ceil_div(count, threads)) / count;
  const double together = kTeamStartSeconds + alone * share * (kWaves + count - 1) / kWaves +
                          kBarrierSeconds * (kWaves + count - 1);
  if (together < 0.85 * layer_by_layer) wave.threads = threads;
  return wave;
}

WindowPlan make_window_plan(const WindowPlanInput& input) {
  const SequenceShape& s = input.shape;
  const int64_t gates = num_gates(s.cell), rows = std::max<int64_t>(s.rows(), 1);
  WindowPlan plan;
  plan.tile_rows = rows < kTilesOfChains * kMaxRowBlock ? kMaxRowBlock / 2 : kMaxRowBlock;
  const int64_t tiles = ceil_div(rows, plan.tile_rows);

  const double weights =
      double(gates) * s.hidden_size * s.state_size() * (2 * input.num_layers - 1) +
      double(s.proj_size) * s.hidden_size * input.num_layers;
  const double peak = kFlopsPerVectorByte * input.vector_bytes * 4 / input.element_bytes;
  const int64_t depths = std::min(input.window, s.steps);
  plan.seconds = 2 * weights * double(rows) * double(depths) / peak;
  const int64_t threads = std::min<int64_t>(input.max_threads, tiles);
  const double share = double(ceil_div(tiles, threads)) / double(tiles);
  const double waits = kTeamStartSeconds + kBarrierSeconds * double(depths);
  if (threads > 1 && plan.seconds * share + waits < 0.85 * plan.seconds)
    plan.threads = int(threads);

  // What a chain touches at a depth: reserve, sums, what it carries. Blocks of about one size, so
  // that the last one has work for everybody, too.
  const int64_t values = num_saved(s.cell) + (s.cell == CellKind::kGru ? 2 : 1) * gates + 2;
  const int64_t row_bytes = values * padded(s.hidden_size) * input.element_bytes * input.num_layers;
  const int64_t own = std::max<int64_t>(int64_t(kOwnCacheBytes) / row_bytes / plan.tile_rows, 2);
  const int64_t blocks = ceil_div(tiles, own * plan.threads);
  plan.block_rows = ceil_div(tiles, blocks) * plan.tile_rows;
  return plan;
}

}  // namespace rnn_ext
