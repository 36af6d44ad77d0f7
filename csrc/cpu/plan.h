// The choice of how to run a call: a small cost model in one place. It depends on the shape and on
// the number of threads on offer; everything that could change a rounding (packing, chunks) depends
// on the shape alone, so that results are the same for any number of threads.
#pragma once

#include "../sequence.h"

namespace rnn_ext {

// Rows of the largest tile that a job works on: a multiple of every tile height, and few enough for
// the tile's buffer to stay in the L1 cache.
inline constexpr int64_t kMaxRowBlock = 48;

struct Plan {
  int threads = 1;
  // Forward only. Packed, or dot products on the weights as they are? Of W_hh alone where a step
  // has so few rows that reading the weights is all that counts.
  bool packed_weights = true;
  bool packed_recurrent = true;
  // Forward only. From how many rows a step on (the mean of a chunk) is a tile's input projected at
  // its step, rather than the whole chunk's first?
  int64_t project_in_step_rows = INT64_MAX;
  int64_t chunk_steps = 1;  // steps whose input projection (weight gradient) is done at once
  int64_t row_block = 1;    // batch rows of one job, at most
  // Are rows dealt out to the blocks one by one? For rows that end one by one: each block has its
  // share of the long ones.
  bool deal_rows = false;
  // Into how many parts the batch of each direction is shared out, whose members go through all
  // steps of a chunk without waiting for each other. 0: every step is shared by the whole team.
  int64_t shares = 0;
  // Forward only. Does each of them pack the weights for itself? They are read where they were
  // written, and of weights this small a core packs all sooner than two do half each, over what the
  // other has read.
  bool own_weights = false;
  // Backward only, of layers whose steps have one part. Into how many groups of row blocks the
  // batch is divided for sums over its rows: each has weight gradients of its own, which are added
  // up at the end. Where every share of the batch is a number of whole groups, nobody reads what
  // another member wrote until then.
  int64_t groups = 1;
  // Where the team shares every step: one direction through the whole chunk, then the other?
  bool directions_in_turn = false;
  // Forward only: from how much on what it keeps for the way back is written past the caches.
  int64_t streamed_reserve_bytes = INT64_MAX;
  // Is this one thread where there would be a team, had the governor not held it back?
  bool stands_in = false;
  double step_seconds = 0;   // predicted, of one thread
  double total_seconds = 0;  // predicted, of the team
  const char* reason = "";
};

struct PlanInput {
  SequenceShape shape;
  int element_bytes = 4;
  int vector_bytes = 16;
  bool backward = false;
  bool bf16_products = false;
  int max_threads = 1;
  bool two_parts = false;  // Features::two_parts
  int64_t streamed_reserve_bytes = INT64_MAX;
};

Plan make_plan(const PlanInput& input);

// A stack of layers, forward, one direction: member by member through layers and chunks, layer l at
// chunk k beside layer l + 1 at chunk k - 1.
struct Wavefront {
  int64_t chunk_steps = 0;  // of every layer; 0: layer after layer, as each one's own plan says
  int threads = 1;
};

Wavefront plan_wavefront(const PlanInput* layers, int count);

// Truncated backpropagation over a window: see window_pass.h.
struct WindowPlan {
  int threads = 1;
  bool stands_in = false;  // as in Plan
  int64_t tile_rows = 1;   // chains of one job; decides roundings, so by the shape alone
  int64_t block_rows = 1;  // chains that go through all depths together, a multiple of tile_rows
  double seconds = 0;      // predicted, of one thread
};

struct WindowPlanInput {
  SequenceShape shape;
  int element_bytes = 4;
  int vector_bytes = 16;
  int64_t window = 1;
  int64_t num_layers = 1;
  int max_threads = 1;
};

WindowPlan make_window_plan(const WindowPlanInput& input);

}  // namespace rnn_ext
