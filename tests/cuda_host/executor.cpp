#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <utility>

#include "../../csrc/cuda/portable.h"
#include "fiber.h"
#include "hooks.h"
#include "memory.h"

namespace rnn_ext::cuda::host {

ThreadPlace place;

namespace {

// --- State ---------------------------------------------------------------------------------------

// What lanes of a warp do together. The last to come does it for all.
struct WarpOperation {
  const char* name;
  void (*run)(void* const* lanes);  // null: nothing
  bool orders_memory;
};

struct AsyncCopy {
  char* shared;
  const char* global;
  int size, bytes;
  const void* site;
};

struct Block;

enum class State { kReady, kAtBlockBarrier, kInWarp, kSpinning, kDone };

struct Thread : Accessor {
  Context context;
  Block* home = nullptr;
  State state = State::kReady;
  const void* site = nullptr;  // of what it waits in
  const WarpOperation* operation = nullptr;
  void* argument = nullptr;
  // Its last load of a signal, with nothing done since: a second one of the same value is a spin.
  const uint32_t* polled = nullptr;
  uint32_t polled_value = 0;
  std::vector<AsyncCopy> open;                // not committed
  std::deque<std::vector<AsyncCopy>> groups;  // committed, oldest first
  char* stack = nullptr;
};

struct Block {
  int index = 0;
  std::vector<Thread*> threads;
  std::vector<int> in_warp;  // lanes waiting, by warp
  int at_barrier = 0, done = 0;
  Allocation* dynamic = nullptr;
  std::map<const void*, Allocation*> statics;
};

struct Signal {
  SharedClock published;
};

constexpr size_t kGuard = 4 << 10;  // below each stack: one that overflows ends the program
constexpr size_t kStack = (kInstrumented ? 64 << 10 : 256 << 10) - kGuard;

struct Executor {
  Memory memory;
  Schedule schedule;
  std::mt19937_64 random;

  // Of the running launch.
  const LaunchConfig* config = nullptr;
  void (*body)(const void*) = nullptr;
  const void* parameters = nullptr;
  size_t parameter_bytes = 0;
  size_t thread_count = 0;
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  std::deque<Thread*> ready;
  std::vector<Thread*> spinning;
  std::unordered_map<const uint32_t*, Signal> signals;
  uint64_t progress = 0;
  bool aborted = false;

  Context main;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Thread>> idle;  // with stacks to use again
  std::vector<std::unique_ptr<Thread>> busy;
};

Executor& executor() {
  static Executor e;
  return e;
}

// --- Scheduling ----------------------------------------------------------------------------------

void set_preemption() {
  Executor& e = executor();
  hooks.until_preemption = e.schedule.order == Order::kRandom && e.schedule.preempt_every > 0
                               ? 1 + int64_t(e.random() % uint64_t(2 * e.schedule.preempt_every))
                               : INT64_MAX;
}

Thread* next_ready() {
  Executor& e = executor();
  if (e.ready.empty()) return nullptr;
  if (e.schedule.order == Order::kRandom)
    std::swap(e.ready[e.random() % e.ready.size()], e.ready.back());
  Thread* thread;
  if (e.schedule.order == Order::kForward) {
    thread = e.ready.front();
    e.ready.pop_front();
  } else {
    thread = e.ready.back();
    e.ready.pop_back();
  }
  return thread;
}

void make_ready(Thread* thread) {
  thread->state = State::kReady;
  executor().ready.push_back(thread);
}

void make_current(Thread* thread) {
  executor().current = thread;
  place = {thread->thread, int(executor().config->threads), thread->block,
           int(executor().config->blocks)};
  hooks.stack_begin = thread->stack;
  hooks.stack_size = kStack;
  set_preemption();
}

// Leaves the running thread, which is in some list or waits for something.
void leave(bool dying = false) {
  Executor& e = executor();
  Thread* self = e.current;
  Thread* next = e.aborted || dying ? nullptr : next_ready();
  if (next == self) return make_current(self);
  if (next) {
    make_current(next);
    switch_context(self->context, next->context);
  } else {
    e.current = nullptr;
    switch_context(self->context, e.main, dying);
  }
}

void yield() {
  make_ready(executor().current);
  leave();
}

// The launch cannot go on: every thread is abandoned where it is.
[[noreturn]] void abort_launch() {
  executor().aborted = true;
  leave(true);
  std::abort();
}

// Executor code runs with the hooks off.
struct Inside {
  Inside() { hooks.active = false; }
  ~Inside() { hooks.active = true; }
};

void moved() {
  Thread* self = executor().current;
  self->polled = nullptr;
  ++executor().progress;
}

void wake_spinning() {
  Executor& e = executor();
  std::vector<Thread*> woken;
  woken.swap(e.spinning);
  for (Thread* thread : woken) make_ready(thread);
}
void wake_spinning(const uint32_t* signal) {
  Executor& e = executor();
  size_t kept = 0;
  for (Thread* thread : e.spinning)
    if (thread->polled == signal)
      make_ready(thread);
    else
      e.spinning[kept++] = thread;
  e.spinning.resize(kept);
}

// --- Meetings ------------------------------------------------------------------------------------

void compare_sites(Fault fault, const char* what, const std::vector<Thread*>& threads) {
  const void* site = threads[0]->site;
  for (const Thread* thread : threads)
    if (thread->site != site && line_of(thread->site) != line_of(site)) {
      report(fault,
             std::string("threads of block ") + std::to_string(thread->block) + " meet in " + what +
                 " of different lines",
             site, thread->site);
      return;
    }
}

void meet(const std::vector<Thread*>& threads) {
  std::vector<ThreadClock*> clocks;
  for (Thread* thread : threads) clocks.push_back(&thread->clock);
  if (kInstrumented) ThreadClock::meet(clocks, executor().thread_count);
}

void check_barrier(Block& block) {
  const int size = int(block.threads.size());
  if (block.at_barrier == 0 || block.at_barrier + block.done < size) return;
  std::vector<Thread*> waiting;
  for (Thread* thread : block.threads)
    if (thread->state == State::kAtBlockBarrier) waiting.push_back(thread);
  if (block.done > 0)
    report(Fault::kDivergentBarrier,
           std::to_string(block.at_barrier) + " threads of block " + std::to_string(block.index) +
               " wait in a barrier, the other " + std::to_string(block.done) + " have returned",
           waiting[0]->site);
  compare_sites(Fault::kDivergentBarrier, "barriers", waiting);
  meet(waiting);
  block.at_barrier = 0;
  for (Thread* thread : waiting) make_ready(thread);
}

void finish_warp(Block& block, int warp) {
  std::vector<Thread*> lanes(block.threads.begin() + warp * kWarpSize,
                             block.threads.begin() + (warp + 1) * kWarpSize);
  const WarpOperation* operation = lanes[0]->operation;
  compare_sites(Fault::kDivergentWarp, "warp operations", lanes);
  for (const Thread* lane : lanes)
    if (lane->operation != operation) {
      report(Fault::kDivergentWarp,
             std::string("lanes of one warp meet in ") + operation->name + " and " +
                 lane->operation->name,
             lanes[0]->site, lane->site);
      abort_launch();
    }
  void* arguments[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) arguments[lane] = lanes[size_t(lane)]->argument;
  if (operation->run) operation->run(arguments);
  if (operation->orders_memory) meet(lanes);
  block.in_warp[size_t(warp)] = 0;
  for (Thread* lane : lanes) make_ready(lane);
}

void warp_together(const WarpOperation& operation, void* argument, const void* site) {
  moved();
  Thread* self = executor().current;
  Block& block = *self->home;
  const int warp = self->thread / kWarpSize;
  self->state = State::kInWarp;
  self->site = site;
  self->operation = &operation;
  self->argument = argument;
  if (++block.in_warp[size_t(warp)] == kWarpSize) finish_warp(block, warp);
  leave();
}

// --- Threads and blocks --------------------------------------------------------------------------

void thread_entry() {
  Executor& e = executor();
  Thread* self = e.current;
  entered(self->context);
  hooks.active = true;
  e.body(e.parameters);
  hooks.active = false;
  moved();
  self->state = State::kDone;
  ++self->home->done;
  check_barrier(*self->home);
  leave(true);
}

std::unique_ptr<Thread> new_thread() {
  Executor& e = executor();
  if (e.idle.empty()) {
    constexpr size_t kMany = 64;  // at once
    void* stacks = mmap(nullptr, kMany * (kGuard + kStack), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) std::abort();
    for (size_t i = 0; i < kMany; ++i) {
      auto thread = std::make_unique<Thread>();
      char* const guard = static_cast<char*>(stacks) + i * (kGuard + kStack);
      if (mprotect(guard, kGuard, PROT_NONE) != 0) std::abort();
      thread->stack = guard + kGuard;
      e.idle.push_back(std::move(thread));
    }
  }
  std::unique_ptr<Thread> thread = std::move(e.idle.back());
  e.idle.pop_back();
  return thread;
}

void admit(int index) {
  Executor& e = executor();
  auto block = std::make_unique<Block>();
  block->index = index;
  const int threads = int(e.config->threads);
  block->in_warp.resize(size_t(threads / kWarpSize));
  block->dynamic = e.memory.allocate(e.config->shared_bytes, 2, "memory", index);
  for (int t = 0; t < threads; ++t) {
    auto owned = new_thread();
    Thread* thread = owned.get();
    e.busy.push_back(std::move(owned));
    thread->clock = ThreadClock();
    thread->clock.self = uint32_t(index * threads + t);
    thread->block = index;
    thread->thread = t;
    thread->home = block.get();
    thread->polled = nullptr;
    thread->open.clear();
    thread->groups.clear();
    // Stacks begin at different offsets in a page, or all would share one set of the cache.
    const size_t offset = size_t(t % 56) * 64;
    prepare(thread->context, thread->stack, kStack - offset, thread_entry);
    block->threads.push_back(thread);
    make_ready(thread);
  }
  e.blocks.push_back(std::move(block));
}

void retire(Block& block) {
  Executor& e = executor();
  e.memory.release(block.dynamic->begin);
  for (const auto& [tag, allocation] : block.statics) e.memory.release(allocation->begin);
}

void report_deadlock() {
  Executor& e = executor();
  std::map<std::pair<State, const void*>, std::vector<Thread*>> groups;
  for (const auto& block : e.blocks)
    for (Thread* thread : block->threads)
      if (thread->state != State::kDone) groups[{thread->state, thread->site}].push_back(thread);
  std::string text = "nobody can go on";
  for (const auto& [key, threads] : groups) {
    const char* what = key.first == State::kAtBlockBarrier ? "in a barrier"
                       : key.first == State::kInWarp       ? threads[0]->operation->name
                                                           : "for a signal";
    text += "; " + std::to_string(threads.size()) + " threads, the first " +
            thread_name(threads[0]->block, threads[0]->thread) + ", wait " + what + " (" +
            line_of(key.second) + ")";
  }
  report(Fault::kDeadlock, text, nullptr);
}

Error run() {
  Executor& e = executor();
  const int total = int(e.config->blocks);
  const int room = e.config->cooperative ? total : std::max(1, e.schedule.resident_blocks);
  std::vector<int> order;
  const int sampled = e.schedule.sampled_blocks;
  const bool all = e.config->cooperative || sampled == 0;
  for (int i = 0; i < total; ++i)
    if (all || i < sampled || i >= total - sampled) order.push_back(i);
  if (e.schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (e.schedule.order == Order::kRandom && !e.config->cooperative)
    std::shuffle(order.begin(), order.end(), e.random);

  size_t admitted = 0;
  int stalled = 0;
  uint64_t progress_then = 0;
  while (!e.aborted) {
    std::erase_if(e.blocks, [&](const std::unique_ptr<Block>& block) {
      if (block->done < int(block->threads.size())) return false;
      retire(*block);
      return true;
    });
    while (admitted < order.size() && int(e.blocks.size()) < room) admit(order[admitted++]);
    if (e.blocks.empty()) break;
    Thread* next = next_ready();
    if (!next) {
      // Those that poll may be counting their attempts: let them look again, but not for ever.
      constexpr int kPatience = 100;
      stalled = e.progress == progress_then ? stalled + 1 : 0;
      progress_then = e.progress;
      if (e.spinning.empty() || stalled > kPatience) {
        report_deadlock();
        break;
      }
      wake_spinning();
      continue;
    }
    make_current(next);
    switch_context(e.main, next->context);
    hooks.active = false;
  }
  for (const auto& block : e.blocks) retire(*block);
  return found_anything() ? 1 : kSuccess;
}

}  // namespace

// --- For tests -----------------------------------------------------------------------------------

void set_schedule(const Schedule& schedule) { executor().schedule = schedule; }
void* allocate(size_t bytes, size_t granule, const char* name) {
  return executor().memory.allocate(bytes, granule, name, -1)->begin;
}
void release(void* memory) { executor().memory.release(memory); }
void* allocate_virtual(size_t bytes, const char* name) {
  return executor().memory.allocate_virtual(bytes, name);
}
void release_virtual(void* memory) { executor().memory.release_virtual(memory); }
void mark_written(const void* memory, size_t bytes) {
  executor().memory.mark_written(memory, bytes);
}

// --- For hooks.cpp -------------------------------------------------------------------------------

void checked_access(const void* p, size_t bytes, bool is_write, bool aligned, const void* site) {
  const Inside inside;
  Executor& e = executor();
  if (is_write) moved();
  const auto begin = static_cast<const char*>(e.parameters);
  if (!is_write && p >= begin && static_cast<const char*>(p) + bytes <= begin + e.parameter_bytes)
    return;
  if (aligned && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    report(Fault::kMisaligned,
           thread_name(e.current->block, e.current->thread) + " accesses " + std::to_string(bytes) +
               " bytes at " + e.memory.describe(p),
           site);
    abort_launch();
  }
  if (!e.memory.check(*e.current, p, bytes, is_write ? Kind::kWrite : Kind::kRead, site))
    abort_launch();
}

void preempt() {
  const Inside inside;
  yield();
}

// --- For portable_host.h -------------------------------------------------------------------------

#define RNN_EXT_SITE __builtin_return_address(0)

void* static_shared(const void* tag, size_t bytes, size_t) {
  const Inside inside;
  Executor& e = executor();
  Allocation*& a = e.current->home->statics[tag];
  if (!a) a = e.memory.allocate(bytes, 2, "variable", e.current->block);
  return a->begin;
}
void* dynamic_shared(size_t byte_offset) {
  const Inside inside;
  return executor().current->home->dynamic->begin + byte_offset;
}

void block_barrier() {
  const Inside inside;
  moved();
  Thread* self = executor().current;
  self->state = State::kAtBlockBarrier;
  self->site = RNN_EXT_SITE;
  ++self->home->at_barrier;
  check_barrier(*self->home);
  leave();
}

void warp_barrier() {
  const Inside inside;
  static const WarpOperation operation{"in a barrier of a warp", nullptr, true};
  warp_together(operation, nullptr, RNN_EXT_SITE);
}

uint64_t shuffle(Shuffle kind, uint64_t bits, int argument) {
  const Inside inside;
  struct Lane {
    Shuffle kind;
    uint64_t bits, result;
    int argument;
  };
  static const WarpOperation operation{
      "in a shuffle",
      [](void* const* arguments) {
        const auto lane_at = [&](int i) -> Lane& { return *static_cast<Lane*>(arguments[i]); };
        for (int i = 0; i < kWarpSize; ++i) {
          Lane& lane = lane_at(i);
          int from = lane.kind == Shuffle::kXor    ? i ^ lane.argument
                     : lane.kind == Shuffle::kDown ? i + lane.argument
                                                   : lane.argument % kWarpSize;
          if (from < 0 || from >= kWarpSize) from = i;
          lane.result = lane_at(from).bits;
        }
      },
      false};
  Lane lane{kind, bits, 0, argument};
  warp_together(operation, &lane, RNN_EXT_SITE);
  return lane.result;
}

uint32_t vote_ballot(bool p) {
  const Inside inside;
  struct Lane {
    bool p;
    uint32_t result;
  };
  static const WarpOperation operation{"in a vote",
                                       [](void* const* arguments) {
                                         uint32_t votes = 0;
                                         for (int i = 0; i < kWarpSize; ++i)
                                           votes |= uint32_t(static_cast<Lane*>(arguments[i])->p)
                                                    << i;
                                         for (int i = 0; i < kWarpSize; ++i)
                                           static_cast<Lane*>(arguments[i])->result = votes;
                                       },
                                       false};
  Lane lane{p, 0};
  warp_together(operation, &lane, RNN_EXT_SITE);
  return lane.result;
}

static void check_signal(const uint32_t* p, Kind kind, const void* site) {
  Executor& e = executor();
  if (e.schedule.order == Order::kRandom && e.random() % 2) yield();
  if (reinterpret_cast<uintptr_t>(p) % 4 != 0) {
    report(Fault::kMisaligned, "a signal at " + e.memory.describe(p), site);
    abort_launch();
  }
  if (!e.memory.check(*e.current, p, sizeof *p, kind, site)) abort_launch();
}

uint32_t atomic_load(const uint32_t* p, bool acquire) {
  const Inside inside;
  Executor& e = executor();
  Thread* self = e.current;
  if (self->polled == p && self->polled_value == *p) {
    self->state = State::kSpinning;
    self->site = RNN_EXT_SITE;
    e.spinning.push_back(self);
    leave();
  }
  check_signal(p, Kind::kAtomicRead, RNN_EXT_SITE);
  const Signal& signal = e.signals[p];
  if (acquire) {
    self->clock.acquire(signal.published);
  } else if (signal.published && signal.published != self->clock.loaded) {
    auto all = std::make_shared<Clock>(e.thread_count);
    join(*all, self->clock.loaded);
    join(*all, signal.published);
    self->clock.loaded = all;
  }
  self->polled = p;
  self->polled_value = *p;
  return *p;
}

// A store ends what earlier releases have published there; an addition continues it.
static void publish(const uint32_t* p, bool release, bool continues) {
  Executor& e = executor();
  ThreadClock& clock = e.current->clock;
  SharedClock all = release ? clock.snapshot(e.thread_count) : clock.fenced;
  Signal& signal = e.signals[p];
  if (continues && signal.published) {
    auto both = std::make_shared<Clock>(*signal.published);
    join(*both, all);
    all = both;
  }
  signal.published = all;
  moved();
  wake_spinning(p);
}

void atomic_store(uint32_t* p, uint32_t v, bool release) {
  const Inside inside;
  check_signal(p, Kind::kAtomicWrite, RNN_EXT_SITE);
  publish(p, release, false);
  *p = v;
}

uint32_t atomic_add(uint32_t* p, uint32_t v, bool release) {
  const Inside inside;
  check_signal(p, Kind::kAtomicRead, RNN_EXT_SITE);
  check_signal(p, Kind::kAtomicWrite, RNN_EXT_SITE);
  ThreadClock& clock = executor().current->clock;
  if (const SharedClock& published = executor().signals[p].published; published) {
    auto all = std::make_shared<Clock>(executor().thread_count);
    join(*all, clock.loaded);
    join(*all, published);
    clock.loaded = all;
  }
  publish(p, release, true);
  const uint32_t old = *p;
  *p = old + v;
  return old;
}

void device_fence() {
  const Inside inside;
  moved();
  ThreadClock& clock = executor().current->clock;
  clock.acquire(clock.loaded);
  clock.fenced = clock.snapshot(executor().thread_count);
}

void wide_access(const void* p, size_t bytes) {
  const Inside inside;
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  Executor& e = executor();
  report(Fault::kMisaligned,
         thread_name(e.current->block, e.current->thread) + " accesses " + std::to_string(bytes) +
             " bytes at " + e.memory.describe(p),
         RNN_EXT_SITE);
  abort_launch();
}

void streaming_access(const void* p, size_t bytes) {
  const Inside inside;
  if (!executor().memory.check(*executor().current, p, bytes, Kind::kStreaming, RNN_EXT_SITE))
    abort_launch();
}

// --- Asynchronous copies -------------------------------------------------------------------------

void copy_async(void* shared, const void* global, int size, int bytes) {
  const Inside inside;
  Executor& e = executor();
  moved();
  const void* site = RNN_EXT_SITE;
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % uintptr_t(size) != 0;
  };
  if (bytes < 0 || bytes > size || misaligned(shared) || misaligned(global)) {
    report(Fault::kMisaligned,
           "copy of " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes from " +
               e.memory.describe(global) + " to " + e.memory.describe(shared),
           site);
    abort_launch();
  }
  const Allocation* to = e.memory.find(shared);
  if (!to || to->block < 0) {
    report(Fault::kOutOfBounds, "copy_async to " + e.memory.describe(shared), site);
    abort_launch();
  }
  if ((bytes > 0 && !e.memory.check(*e.current, global, size_t(bytes), Kind::kRead, site)) ||
      !e.memory.check(*e.current, shared, size_t(size), Kind::kAsyncWrite, site))
    abort_launch();
  std::memset(shared, 0xff, size_t(size));
  e.current->open.push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), size, bytes, site});
}

void copy_async_commit() {
  const Inside inside;
  moved();
  Thread* self = executor().current;
  self->groups.push_back(std::move(self->open));
  self->open.clear();
}

void copy_async_wait(int newest) {
  const Inside inside;
  moved();
  Executor& e = executor();
  Thread* self = e.current;
  for (; int(self->groups.size()) > newest; self->groups.pop_front())
    for (const AsyncCopy& copy : self->groups.front()) {
      // The source may be read at any time until now.
      if (copy.bytes > 0 &&
          !e.memory.check(*self, copy.global, size_t(copy.bytes), Kind::kRead, copy.site))
        abort_launch();
      std::memcpy(copy.shared, copy.global, size_t(copy.bytes));
      std::memset(copy.shared + copy.bytes, 0, size_t(copy.size - copy.bytes));
      e.memory.arrived(*self, copy.shared, size_t(copy.size), copy.site);
    }
}

// --- Matrix fragments ----------------------------------------------------------------------------
// Layouts: portable_nvcc.h.

static float half_of(uint32_t two, int which, bool bfloat16) {
  const auto bits = uint16_t(two >> (16 * which));
  return bfloat16 ? float_of(BFloat16{bits}) : float_of(Float16{bits});
}

namespace {
struct MmaLane {
  float* acc;
  const uint32_t *a, *b;
};
}  // namespace

// acc (16, 8) += a (16, K) b (K, 8), sums in the order of K.
template <int K>
static void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      float& sum = static_cast<const MmaLane*>(lanes[lane])->acc[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
    }
}

template <bool kBFloat16>
static void run_mma16(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* m = static_cast<const MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = half_of(m->a[r], half, kBFloat16);
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half)
        b[2 * t + r * 8 + half][g] = half_of(m->b[r], half, kBFloat16);
  }
  multiply(lanes, a, b);
}

void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b, bool bfloat16) {
  const Inside inside;
  static const WarpOperation of_float16{"in a product", run_mma16<false>, false};
  static const WarpOperation of_bfloat16{"in a product", run_mma16<true>, false};
  MmaLane lane{acc, a, b};
  warp_together(bfloat16 ? of_bfloat16 : of_float16, &lane, RNN_EXT_SITE);
}

void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b) {
  const Inside inside;
  static const WarpOperation operation{
      "in a product",
      [](void* const* lanes) {
        const auto value = [](uint32_t bits) {  // the hardware ignores the lowest 13 bits
          return __builtin_bit_cast(float, bits & ~0x1fffu);
        };
        float a[16][8], b[8][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const auto* m = static_cast<const MmaLane*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = value(m->a[r]);
          for (int r = 0; r < 2; ++r) b[t + r * 4][g] = value(m->b[r]);
        }
        multiply(lanes, a, b);
      },
      false};
  MmaLane lane{acc, a, b};
  warp_together(operation, &lane, RNN_EXT_SITE);
}

void load_matrix(uint32_t* registers, const void* row, int count, bool transpose) {
  const Inside inside;
  Executor& e = executor();
  const void* site = RNN_EXT_SITE;
  struct Lane {
    uint32_t* registers;
    const void* row;
    int count;
    bool transpose;
  };
  static const WarpOperation operation{
      "in a load of matrices",
      [](void* const* lanes) {
        const auto* first = static_cast<const Lane*>(lanes[0]);
        for (int m = 0; m < first->count; ++m)
          for (int lane = 0; lane < kWarpSize; ++lane) {
            uint16_t two[2];
            for (int half = 0; half < 2; ++half) {
              int r = lane / 4, c = lane % 4 * 2 + half;
              if (first->transpose) std::swap(r, c);
              const auto* from = static_cast<const Lane*>(lanes[8 * m + r]);
              std::memcpy(&two[half], static_cast<const char*>(from->row) + 2 * c, 2);
            }
            static_cast<const Lane*>(lanes[lane])->registers[m] =
                uint32_t(two[0]) | uint32_t(two[1]) << 16;
          }
      },
      false};
  // Every address has to be one of a row, also those that are not used.
  const Allocation* from = e.memory.find(row);
  if (!from || from->block < 0 || reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    report(Fault::kMisaligned, "load_matrix from " + e.memory.describe(row), site);
    abort_launch();
  }
  if (place.thread % kWarpSize < 8 * count &&
      !e.memory.check(*e.current, row, 16, Kind::kRead, site))
    abort_launch();
  Lane lane{registers, row, count, transpose};
  warp_together(operation, &lane, site);
}

// --- Launch --------------------------------------------------------------------------------------

Error launch(const LaunchConfig& config, void (*body)(const void*), const void* parameters,
             size_t parameter_bytes) {
  Executor& e = executor();
  constexpr size_t kMostShared = 227 << 10;  // of any device
  if (config.threads == 0 || config.threads > 1024 || config.threads % kWarpSize != 0 ||
      config.blocks == 0 || config.shared_bytes > kMostShared || e.config) {
    report(Fault::kLaunch,
           std::to_string(config.blocks) + " blocks of " + std::to_string(config.threads) +
               " threads with " + std::to_string(config.shared_bytes) + " bytes of shared memory",
           nullptr);
    return 1;
  }
  e.config = &config;
  e.body = body;
  e.parameters = parameters;
  e.parameter_bytes = parameter_bytes;
  e.thread_count = size_t(config.blocks) * config.threads;
  e.random.seed(e.schedule.seed);
  e.memory.begin_launch(int(config.threads));
  e.progress = 0;
  e.aborted = false;

  const Error error = run();

  e.blocks.clear();
  e.ready.clear();
  e.spinning.clear();
  e.signals.clear();
  for (auto& thread : e.busy) {
    thread->clock = ThreadClock();
    e.idle.push_back(std::move(thread));
  }
  e.busy.clear();
  e.current = nullptr;
  e.config = nullptr;
  hooks.active = false;
  return error;
}

}  // namespace rnn_ext::cuda::host
