#include "small_kernels.h"

#include <cstdlib>

#include "../../csrc/cuda/portable.h"
#include "beyond_kernels.h"

namespace {

using namespace rnn_ext::cuda;  // NOLINT
using host::Buffer;
using host::Fault;

// A kernel's template argument: nothing wrong, or what is wrong with it.
enum Bug {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kNoGridBarrier,
  kNoArrivalBarrier,
  kNoDepartureBarrier,
  kRelaxedArrival,
  kRelaxedPoll,
  kNoFence,
  kNoAcquiringFence,
  kNoWait,
  kTooEarly,
  kSourceChanges,
  kReadOutside,
  kWriteOutside,
  kSharedOutside,
  kHostMemory,
  kOtherStack,
  kEarlyReturn,
  kTwoLines,
  kNobodySignals,
  kSomeLanes,
  kWrongLane,
  kNoClusterBarrier,
  kTwoArrivals,
  kNoArrival,
  kWrongRank,
  kNoLastBarrier,
};

constexpr int kThreads = 64;

std::vector<float> counting(int n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) values[size_t(i)] = float(i);
  return values;
}

// --- One block -----------------------------------------------------------------------------------

// Reverses 64 values, twice, through one array.
template <Bug kBug>
RNN_EXT_KERNEL void reverse_kernel(float* values) {
  using Row = float[kThreads];
  RNN_EXT_SHARED(Row, row);
  const int t = thread_index();
  for (int round = 0; round < 2; ++round) {
    row[t] = values[t] + float(round);  // <- reverse write
    if (kBug != kNoBarrier) block_barrier();
    values[t] = row[block_size() - 1 - t];  // <- reverse read
    if (kBug != kNoSecondBarrier) block_barrier();
  }
}
template <Bug kBug>
bool run_reverse() {
  Buffer<float> values(counting(kThreads), "values");
  launch({.threads = kThreads}, reverse_kernel<kBug>, values.data());
  for (int i = 0; i < kThreads; ++i)
    if (values.data()[i] != float(i + 1)) return false;
  return true;
}

// A barrier of the warp is enough for what the warp's own lanes exchange.
template <Bug kBug>
RNN_EXT_KERNEL void rotate_in_warp_kernel(float* values) {
  float* row = dynamic_shared<float>();
  const int t = thread_index(), from = t / kWarpSize * kWarpSize + (t + 1) % kWarpSize;
  row[t] = values[t];
  if (kBug != kNoBarrier) warp_barrier();
  values[t] = row[kBug == kWrongLane ? (t + kWarpSize) % kThreads : from];  // <- rotate read
}
template <Bug kBug>
bool run_rotate() {
  Buffer<float> values(counting(kThreads), "values");
  launch({.threads = kThreads, .shared_bytes = kThreads * sizeof(float)},
         rotate_in_warp_kernel<kBug>, values.data());
  return values.data()[31] == 0 && values.data()[32] == 33;
}

RNN_EXT_KERNEL void uninitialized_shared_kernel(float* out) {
  float* row = dynamic_shared<float>();
  const int t = thread_index();
  if (t > 0) row[t] = 1;
  block_barrier();
  out[t] = row[t];  // <- uninitialized shared
}
RNN_EXT_KERNEL void uninitialized_global_kernel(float* out, const float* in) {
  out[thread_index()] = in[thread_index()];  // <- uninitialized global
}

template <Bug kBug>
RNN_EXT_KERNEL void bounds_kernel(float* out, const float* in, int n) {
  float* row = dynamic_shared<float>();
  const int t = thread_index(), beyond = t == 0 ? n : 0;
  if (kBug == kWriteOutside) out[t + beyond] = 1;   // <- write outside
  if (kBug == kSharedOutside) row[t + beyond] = 1;  // <- shared outside
  if (kBug == kReadOutside || kBug == kHostMemory)
    out[t] = in[t + (kBug == kReadOutside ? beyond : 0)];  // <- read outside
}
template <Bug kBug>
bool run_bounds() {
  Buffer<float> out(kThreads, "out"), in(counting(kThreads), "in");
  const std::vector<float> on_host = counting(kThreads);
  launch({.threads = kThreads, .shared_bytes = kThreads * sizeof(float)}, bounds_kernel<kBug>,
         out.data(), kBug == kHostMemory ? on_host.data() : in.data(), kThreads);
  return true;
}

// Hands the address of a local variable to another thread.
RNN_EXT_KERNEL void other_stack_kernel(float* out) {
  float** slot = dynamic_shared<float*>();
  float own = float(thread_index());
  if (thread_index() == 0) *slot = &own;
  block_barrier();
  if (thread_index() == 1) out[0] = **slot;  // <- other stack
  block_barrier();
  out[thread_index()] = own;
}

RNN_EXT_KERNEL void misaligned_kernel(float* out, const float* in) {
  const Vector<float, 4> v = load_vector<float, 4>(in + 1);  // <- misaligned
  out[thread_index()] = v.v[0];
}

template <Bug kBug>
RNN_EXT_KERNEL void divergent_kernel(float* out) {
  const int t = thread_index();
  if (kBug == kEarlyReturn && t >= kWarpSize) return;
  if (kBug == kTwoLines && t >= kWarpSize) {
    out[t] = 2;
    block_barrier();  // <- divergent two
  } else {
    out[t] = 1;
    block_barrier();  // <- divergent one
  }
}
template <Bug kBug>
bool run_divergent() {
  Buffer<float> out(kThreads, "out");
  launch({.threads = kThreads}, divergent_kernel<kBug>, out.data());
  return true;
}

template <Bug kBug>
RNN_EXT_KERNEL void warp_sum_kernel(float* values) {
  const int t = thread_index();
  float sum = values[t];
  if (kBug != kSomeLanes || t % kWarpSize < 16)
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);  // <- some lanes
  values[t] = sum;
}
// Half a warp adds up, the other half multiplies.
RNN_EXT_KERNEL void two_warp_operations_kernel(float* values) {
  const int t = thread_index();
  float v = values[t];
  if (t % 2 == 0)
    v += shuffle_xor(v, 2);  // <- warp operation one
  else
    v *= shuffle_xor(v, 2);
  values[t] = v;
}
template <Bug kBug>
bool run_warp_sum() {
  Buffer<float> values(counting(kThreads), "values");
  launch({.threads = kThreads}, warp_sum_kernel<kBug>, values.data());
  return values.data()[5] == 496;
}

template <Bug kBug>
RNN_EXT_KERNEL void copy_kernel(float* out, float* in) {
  float* row = dynamic_shared<float>();
  const int t = thread_index(), n = block_size();
  copy_async<16>(row + 4 * t, in + 4 * t);  // <- copy
  copy_async_commit();
  copy_async<4>(row + 4 * n + t, in + t, t < 3 ? 4 : 0);
  copy_async_commit();
  if (kBug == kSourceChanges && t == 0) in[4 * n - 1] = -1;  // <- source
  copy_async_wait<1>();
  if (kBug != kTooEarly) block_barrier();
  out[t] = row[4 * (n - 1 - t)];  // <- copy first read
  if (kBug != kNoWait) copy_async_wait<0>();
  out[n + t] = row[4 * n + t];  // <- copy second read
}
template <Bug kBug>
bool run_copy() {
  Buffer<float> in(counting(4 * kThreads), "in"), out(2 * kThreads, "out");
  launch({.threads = kThreads, .shared_bytes = 5 * kThreads * sizeof(float)}, copy_kernel<kBug>,
         out.data(), in.data());
  const std::vector<float> values = out.values();
  for (int i = 0; i < kThreads; ++i)
    if (values[size_t(i)] != float(4 * (kThreads - 1 - i)) ||
        values[size_t(kThreads + i)] != (i < 3 ? float(i) : 0))
      return false;
  return true;
}

RNN_EXT_KERNEL void streaming_kernel(float* values) {
  const int t = thread_index();
  const float v = load_streaming(values + t);
  values[t] = v + 1;  // <- streaming
}

// --- Several blocks ------------------------------------------------------------------------------

// A barrier like GridBarrier with one thing missing.
template <Bug kBug>
RNN_EXT_DEVICE void meet_blocks(uint32_t* counter, uint32_t round) {
  if (kBug == kNoGridBarrier) return;
  if (kBug != kNoArrivalBarrier) block_barrier();
  if (thread_index() == 0) {
    if (kBug == kRelaxedArrival)
      fetch_add_relaxed(counter, 1);
    else
      add_release(counter, 1);
    const uint32_t all = round * uint32_t(grid_size());
    while ((kBug == kRelaxedPoll ? load_relaxed(counter) : load_acquire(counter)) < all) {
    }
  }
  if (kBug != kNoDepartureBarrier) block_barrier();
}

// Every block adds up what all wrote in the round before.
template <Bug kBug>
RNN_EXT_KERNEL void rounds_kernel(float* sums, uint32_t* counter, int rounds) {
  const int blocks = grid_size(), threads = block_size(), t = thread_index();
  for (int round = 1; round <= rounds; ++round) {
    float* now = sums + (round % 2) * blocks * threads;
    const float* before = sums + (1 - round % 2) * blocks * threads;
    float sum = 1;
    for (int b = 0; b < blocks; ++b) sum += before[b * threads + (t + 1) % threads];  // <- sum read
    now[block_index() * threads + t] = sum;  // <- sum write
    meet_blocks<kBug>(counter, uint32_t(round));
  }
}
template <Bug kBug>
bool run_rounds() {
  constexpr int kBlocks = 3, kRounds = 4;
  Buffer<float> sums(std::vector<float>(2 * kBlocks * kThreads), "sums");
  Buffer<uint32_t> counter(std::vector<uint32_t>(1), "counter");
  launch({.blocks = kBlocks, .threads = kThreads, .cooperative = true}, rounds_kernel<kBug>,
         sums.data(), counter.data(), kRounds);
  return sums.data()[7] == 40;  // 1 + 3 (1 + 3 (1 + 3))
}

RNN_EXT_KERNEL void grid_barrier_kernel(float* sums, uint32_t* counter, int before, int rounds) {
  const int blocks = grid_size(), threads = block_size(), t = thread_index();
  GridBarrier barrier{counter, uint32_t(blocks), block_index() == 0,
                      before % 2 ? GridBarrier::kTurn : 0u};
  for (int round = 1; round <= rounds; ++round) {
    float* now = sums + (round % 2) * blocks * threads;
    const float* before = sums + (1 - round % 2) * blocks * threads;
    float sum = 1;
    for (int b = 0; b < blocks; ++b) sum += before[b * threads + (t + 1) % threads];
    now[block_index() * threads + t] = sum;
    barrier.arrive();
    barrier.wait();
  }
}
bool run_grid_barrier() {
  constexpr int kBlocks = 3;
  Buffer<uint32_t> counter(std::vector<uint32_t>(1), "counter");
  for (int replay = 0; replay < 3; ++replay) {  // an odd number of rounds, the counter as it is
    Buffer<float> sums(std::vector<float>(2 * kBlocks * kThreads), "sums");
    launch({.blocks = kBlocks, .threads = kThreads, .cooperative = true}, grid_barrier_kernel,
           sums.data(), counter.data(), 3 * replay, 3);
    if (sums.data()[kBlocks * kThreads + 7] != 13) return false;
  }
  return true;
}

// One thread to one of another block, by fences around relaxed accesses.
template <Bug kBug>
RNN_EXT_KERNEL void message_kernel(float* message, float* out, uint32_t* flag) {
  if (thread_index() > 0) return;
  if (block_index() == 0) {
    *message = 42;  // <- message write
    if (kBug != kNoFence) device_fence();
    if (kBug != kNobodySignals) store_relaxed(flag, 1);
  } else {
    while (load_relaxed(flag) == 0) {  // <- message poll
    }
    if (kBug != kNoAcquiringFence) device_fence();
    *out = *message;  // <- message read
  }
}
template <Bug kBug>
bool run_message(bool cooperative = true) {
  Buffer<float> message(1, "message"), out(1, "out");
  Buffer<uint32_t> flag(std::vector<uint32_t>(1), "flag");
  launch({.blocks = 2, .threads = 32, .cooperative = cooperative}, message_kernel<kBug>,
         message.data(), out.data(), flag.data());
  return out.data()[0] == 42;
}

// Blocks of a launch that is not cooperative wait for blocks that need not be resident.
RNN_EXT_KERNEL void not_resident_kernel(uint32_t* counter) {
  if (thread_index() == 0) {
    add_release(counter, 1);
    while (load_acquire(counter) < uint32_t(grid_size())) {  // <- not resident
    }
  }
}

// --- Clusters ------------------------------------------------------------------------------------

// Every block hands its values to the next one of its cluster, `rounds` times, in two slots.
template <Bug kBug>
RNN_EXT_KERNEL void ring_kernel(float* out, int blocks, int rounds) {
  float* slots = dynamic_shared<float>();
  const int t = thread_index(), n = block_size(), rank = block_index() % blocks;
  ClusterBarrier barrier;
  for (int i = 0; i < 4; ++i) slots[4 * t + i] = float(rank);
  if (kBug == kEarlyReturn && rank == 1) return;
  barrier.arrive();  // <- ring first arrival
  barrier.wait();
  for (int round = 0; round < rounds; ++round) {
    const float* const read = slots + round % 2 * 4 * n + 4 * t;
    const int slot = (round + 1) % 2 * (kBug == kSharedOutside ? 8 : 4) * n;
    const int next = (rank + 1) % blocks + (kBug == kWrongRank ? blocks : 0);
    Vector<float, 4> v = load_vector<float, 4>(read);  // <- ring read
    for (float& value : v.v) value += 1;
    store_to_block(slots + slot + 4 * t, next, v);  // <- ring write
    if (kBug == kNoLastBarrier && round == rounds - 1) return;
    if (kBug == kRelaxedArrival)
      host::cluster_arrive(false);
    else if (kBug != kNoClusterBarrier && !(kBug == kNoArrival && rank == 1))
      barrier.arrive();
    if (kBug == kTwoArrivals) barrier.arrive();  // <- ring two arrivals
    if (kBug == kSomeLanes && t < kWarpSize) block_barrier();
    if (kBug != kNoClusterBarrier) barrier.wait();  // <- ring wait
  }
  out[block_index() * n + t] = slots[rounds % 2 * 4 * n + 4 * t];
}
template <Bug kBug>
bool run_ring(int rounds = 3, int clusters = 2) {
  constexpr int kBlocks = 4;
  const auto blocks = unsigned(clusters * kBlocks);
  Buffer<float> out(blocks * kThreads, "out");
  launch({.blocks = blocks,
          .threads = kThreads,
          .shared_bytes = 8 * kThreads * sizeof(float),
          .cluster = kBlocks},
         ring_kernel<kBug>, out.data(), kBlocks, rounds);
  for (int b = 0; b < int(blocks); ++b)
    for (int t = 0; t < kThreads; ++t)
      if (out.data()[b * kThreads + t] != float((b - rounds + 4 * kBlocks) % kBlocks + rounds))
        return false;
  return true;
}

RNN_EXT_KERNEL void blocks_race_kernel(float* out) {
  out[thread_index()] = float(block_index());  // <- blocks race
}

// A thread that left the barrier's arrival out: the others wait for ever.
RNN_EXT_KERNEL void missing_arrival_kernel(uint32_t* counter) {
  GridBarrier barrier{counter, uint32_t(grid_size()), block_index() == 0};
  if (block_index() > 0) {
    barrier.arrive();
    barrier.wait();  // <- missing arrival
  }
}

SmallKernel clean(const std::string& name, std::function<bool()> run) {
  return {name, true, Fault::kRace, "", false, std::move(run)};
}
SmallKernel planted(const std::string& name, Fault fault, const std::string& mark,
                    std::function<bool()> run, bool needs_instrumentation = true) {
  return {name, false, fault, mark, needs_instrumentation, std::move(run)};
}

}  // namespace

std::vector<SmallKernel> small_kernels() {
  const auto out_and_in = [](auto kernel, bool written) {
    return [=] {
      Buffer<float> out(kThreads, "out"), in(counting(2 * kThreads), "in"), unwritten(64, "in");
      launch({.threads = kThreads}, kernel, out.data(),
             static_cast<const float*>(written ? in.data() : unwritten.data()));
      return true;
    };
  };
  return {
      clean("reverse", run_reverse<kNone>),
      clean("rotate in a warp", run_rotate<kNone>),
      clean("warp sum", run_warp_sum<kNone>),
      clean("copy", run_copy<kNone>),
      clean("rounds", run_rounds<kNone>),
      clean("grid barrier, three launches", run_grid_barrier),
      clean("message", [] { return run_message<kNone>(); }),
      clean("ring of a cluster", [] { return run_ring<kNone>(); }),
      clean("ring of many clusters", [] { return run_ring<kNone>(4, 5); }),
      clean("bounds", run_bounds<kNone>),
      clean("one barrier", run_divergent<kNone>),

      planted("missing block barrier", Fault::kRace, "reverse read", run_reverse<kNoBarrier>),
      planted("missing block barrier before reuse", Fault::kRace, "reverse write",
              run_reverse<kNoSecondBarrier>),
      planted("missing warp barrier", Fault::kRace, "rotate read", run_rotate<kNoBarrier>),
      planted("warp barrier where a block barrier is needed", Fault::kRace, "rotate read",
              run_rotate<kWrongLane>),
      planted("missing grid barrier", Fault::kRace, "sum read", run_rounds<kNoGridBarrier>),
      planted("grid barrier without the block's before it", Fault::kRace, "sum read",
              run_rounds<kNoArrivalBarrier>),
      planted("grid barrier without the block's after it", Fault::kRace, "sum read",
              run_rounds<kNoDepartureBarrier>),
      planted("grid barrier that does not release", Fault::kRace, "sum read",
              run_rounds<kRelaxedArrival>),
      planted("grid barrier that does not acquire", Fault::kRace, "sum read",
              run_rounds<kRelaxedPoll>),
      planted("missing fence", Fault::kRace, "message read",
              [] { return run_message<kNoFence>(); }),
      planted("missing fence of the reader", Fault::kRace, "message read",
              [] { return run_message<kNoAcquiringFence>(); }),
      planted("missing barrier of a cluster", Fault::kRace, "ring read",
              [] { return run_ring<kNoClusterBarrier>(); }),
      planted("barrier of a cluster that does not release", Fault::kRace, "ring read",
              [] { return run_ring<kRelaxedArrival>(); }),
      planted("block that returns before another has stored to it", Fault::kReturned, "ring write",
              [] { return run_ring<kNoLastBarrier>(); }),
      planted(
          "block that returns before its cluster's barrier", Fault::kDivergentBarrier,
          "ring first arrival", [] { return run_ring<kEarlyReturn>(); }, false),
      planted(
          "two arrivals at the barrier of a cluster", Fault::kDivergentBarrier, "ring two arrivals",
          [] { return run_ring<kTwoArrivals>(); }, false),
      planted(
          "wait without an arrival", Fault::kDivergentBarrier, "ring wait",
          [] { return run_ring<kNoArrival>(); }, false),
      planted(
          "warp that waits elsewhere while its cluster meets", Fault::kDeadlock, "ring wait",
          [] { return run_ring<kSomeLanes>(); }, false),
      planted(
          "block that is not of the cluster", Fault::kOutOfBounds, "ring write",
          [] { return run_ring<kWrongRank>(); }, false),
      planted(
          "outside of another block's shared memory", Fault::kOutOfBounds, "ring write",
          [] { return run_ring<kSharedOutside>(); }, false),
      planted(
          "clusters that do not divide the launch", Fault::kLaunch, "",
          [] {
            Buffer<float> out(3 * kThreads, "out");
            launch({.blocks = 3,
                    .threads = kThreads,
                    .shared_bytes = 8 * kThreads * sizeof(float),
                    .cluster = 2},
                   ring_kernel<kNone>, out.data(), 2, 1);
            return true;
          },
          false),
      planted(
          "barrier of a cluster in a launch that has none", Fault::kLaunch, "ring first arrival",
          [] {
            Buffer<float> out(2 * kThreads, "out");
            launch({.blocks = 2, .threads = kThreads, .shared_bytes = 8 * kThreads * sizeof(float)},
                   ring_kernel<kNone>, out.data(), 2, 1);
            return true;
          },
          false),
      planted("uninitialized shared memory", Fault::kUninitialized, "uninitialized shared",
              [] {
                Buffer<float> out(kThreads, "out");
                launch({.threads = kThreads, .shared_bytes = 4 * kThreads},
                       uninitialized_shared_kernel, out.data());
                return true;
              }),
      planted("uninitialized global memory", Fault::kUninitialized, "uninitialized global",
              out_and_in(uninitialized_global_kernel, false)),
      planted("read outside", Fault::kOutOfBounds, "read outside", run_bounds<kReadOutside>),
      planted("write outside", Fault::kOutOfBounds, "write outside", run_bounds<kWriteOutside>),
      planted("shared memory outside", Fault::kOutOfBounds, "shared outside",
              run_bounds<kSharedOutside>),
      planted("host memory", Fault::kOutOfBounds, "read outside", run_bounds<kHostMemory>),
      planted("another thread's local variable", Fault::kOutOfBounds, "other stack",
              [] {
                Buffer<float> out(kThreads, "out");
                launch({.threads = kThreads, .shared_bytes = 8}, other_stack_kernel, out.data());
                return true;
              }),
      planted("misaligned vector", Fault::kMisaligned, "misaligned",
              out_and_in(misaligned_kernel, true), false),
      planted("barrier that some have returned before", Fault::kDivergentBarrier, "divergent one",
              run_divergent<kEarlyReturn>, false),
      planted("barriers of two lines", Fault::kDivergentBarrier, "divergent one",
              run_divergent<kTwoLines>, false),
      planted("shuffle of half a warp", Fault::kDeadlock, "some lanes", run_warp_sum<kSomeLanes>,
              false),
      planted(
          "half warps in shuffles of two lines", Fault::kDivergentWarp, "warp operation one",
          [] {
            Buffer<float> values(counting(kThreads), "values");
            launch({.threads = kThreads}, two_warp_operations_kernel, values.data());
            return true;
          },
          false),
      planted(
          "block that is not made of whole warps", Fault::kLaunch, "",
          [] {
            Buffer<float> values(counting(kThreads), "values");
            launch({.threads = 48}, two_warp_operations_kernel, values.data());
            return true;
          },
          false),
      planted("missing wait for a copy", Fault::kAsyncNotWaited, "copy second read",
              run_copy<kNoWait>),
      planted("missing barrier after a copy", Fault::kRace, "copy first read", run_copy<kTooEarly>),
      planted("source of a copy that changes", Fault::kRace, "source", run_copy<kSourceChanges>),
      planted("streaming load of what is written", Fault::kStreamingNotConst, "streaming",
              [] {
                Buffer<float> values(counting(kThreads), "values");
                launch({.threads = kThreads}, streaming_kernel, values.data());
                return true;
              }),
      planted(
          "signal that nobody sends", Fault::kDeadlock, "message poll",
          [] { return run_message<kNobodySignals>(); }, false),
      planted(
          "blocks that are not resident", Fault::kDeadlock, "not resident",
          [] {
            Buffer<uint32_t> counter(std::vector<uint32_t>(1), "counter");
            launch({.blocks = 5, .threads = 32}, not_resident_kernel, counter.data());
            return true;
          },
          false),
      planted(
          "block that does not arrive", Fault::kDeadlock, "missing arrival",
          [] {
            Buffer<uint32_t> counter(std::vector<uint32_t>(1), "counter");
            launch({.blocks = 3, .threads = 32, .cooperative = true}, missing_arrival_kernel,
                   counter.data());
            return true;
          },
          false),
      planted("race between blocks", Fault::kRace, "blocks race",
              [] {
                Buffer<float> out(kThreads, "out");
                launch({.blocks = 2, .threads = kThreads}, blocks_race_kernel, out.data());
                return true;
              }),
  };
}

// --- Fragments and shuffles ----------------------------------------------------------------------

namespace {

// out (16, 8) = a (16, 16) b (16, 8), a by load_matrix, b transposed by it: the usual way.
template <class T>
RNN_EXT_KERNEL void product_kernel(float* out, const T* a, const T* b) {
  T* rows = dynamic_shared<T>();  // a (16, 16), b (16, 8)
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += kWarpSize) rows[i] = a[i];
  for (int i = lane; i < 128; i += kWarpSize) rows[256 + i] = b[i];
  warp_barrier();
  uint32_t a_registers[4], b_registers[2];
  load_matrix<4>(a_registers, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrix<2, true>(b_registers, rows + 256 + lane % 16 * 8);
  float acc[4] = {1, 1, 1, 1};
  mma_m16n8k16<T>(acc, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

// out (16, 8) = a (16, 8) b (8, 8)
RNN_EXT_KERNEL void tf32_product_kernel(float* out, const float* a, const float* b) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  uint32_t a_registers[4], b_registers[2];
  for (int i = 0; i < 4; ++i) a_registers[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) b_registers[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  float acc[4] = {};
  mma_m16n8k8_tf32(acc, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}

// Small integers: exact in every type.
std::vector<float> integers(int n, int seed) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = float((seed = (seed * 37 + 11) % 101) % 13 - 6);
  return values;
}

bool is_product(const std::vector<float>& out, const std::vector<float>& a,
                const std::vector<float>& b, size_t depth, float start) {
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      float sum = start;
      for (size_t k = 0; k < depth; ++k) sum += a[i * depth + k] * b[k * 8 + j];
      if (out[i * 8 + j] != sum) return false;
    }
  return true;
}

template <class T>
bool product_is_right() {
  const std::vector<float> a = integers(256, 1), b = integers(128, 2);
  std::vector<T> narrow_a, narrow_b;
  for (const float v : a) narrow_a.push_back(from_compute<T>(v));
  for (const float v : b) narrow_b.push_back(from_compute<T>(v));
  Buffer<T> device_a(narrow_a, "a"), device_b(narrow_b, "b");
  Buffer<float> out(128, "out");
  const Error error =
      launch({.threads = 32, .shared_bytes = 384 * sizeof(T)}, product_kernel<T>, out.data(),
             static_cast<const T*>(device_a.data()), static_cast<const T*>(device_b.data()));
  return error == kSuccess && is_product(out.values(), a, b, 16, 1);
}

RNN_EXT_KERNEL void shuffle_kernel(int* out) {
  const int t = thread_index(), n = block_size();
  out[t] = shuffle(t, 3);
  out[n + t] = shuffle_xor(t, 5);
  out[2 * n + t] = shuffle_down(t, 4);
  out[3 * n + t] = int(shuffle(double(t), t + 1));
  out[4 * n + t] = int(vote_ballot(t % 2 == 1));
  out[5 * n + t] = vote_any(t == 40) * 2 + vote_all(t < 32);
}

}  // namespace

bool products_are_right() {
  const std::vector<float> a = integers(128, 3), b = integers(64, 4);
  Buffer<float> device_a(a, "a"), device_b(b, "b"), out(128, "out");
  const Error error = launch({.threads = 32}, tf32_product_kernel, out.data(),
                             static_cast<const float*>(device_a.data()),
                             static_cast<const float*>(device_b.data()));
  return product_is_right<Float16>() && product_is_right<BFloat16>() && error == kSuccess &&
         is_product(out.values(), a, b, 8, 0);
}

bool shuffles_are_right() {
  constexpr int n = 64;
  Buffer<int> out(6 * n, "out");
  if (launch({.threads = n}, shuffle_kernel, out.data()) != kSuccess) return false;
  const int* v = out.data();
  for (int t = 0; t < n; ++t) {
    const int base = t / 32 * 32, lane = t % 32;
    if (v[t] != base + 3 || v[n + t] != base + (lane ^ 5) ||
        v[2 * n + t] != (lane + 4 < 32 ? t + 4 : t) || v[3 * n + t] != base + (lane + 1) % 32 ||
        uint32_t(v[4 * n + t]) != 0xaaaaaaaau || v[5 * n + t] != (base == 0 ? 1 : 2))
      return false;
  }
  return true;
}
