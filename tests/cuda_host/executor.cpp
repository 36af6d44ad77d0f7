#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "executor_state.h"

namespace rnn_ext::cuda::host {

ThreadPlace place;

Executor& executor() {
  static Executor e;
  return e;
}

namespace {

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

}  // namespace

void leave(bool dying) {
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

[[noreturn]] void abort_launch() {
  executor().aborted = true;
  leave(true);
  std::abort();
}

void moved() {
  Thread* self = executor().current;
  self->polled = nullptr;
  ++executor().progress;
}

namespace {

void wake_spinning() {
  Executor& e = executor();
  std::vector<Thread*> woken;
  woken.swap(e.spinning);
  for (Thread* thread : woken) make_ready(thread);
}
}  // namespace

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

namespace {

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

// A phase of a cluster's barrier ends when all its threads have arrived.
void check_cluster_barrier(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived + cluster.done < int(cluster.threads.size())) return;
  std::vector<Thread*> arrived;
  for (Thread* thread : cluster.threads)
    if (thread->in_cluster_barrier && thread->cluster_phase == cluster.phase)
      arrived.push_back(thread);
  if (cluster.done > 0)
    report(Fault::kDivergentBarrier,
           std::to_string(cluster.arrived) +
               " threads of a cluster wait in its barrier, the other " +
               std::to_string(cluster.done) + " have returned",
           arrived[0]->cluster_site);
  if (kInstrumented) {
    auto all = std::make_shared<Clock>(executor().thread_count);
    SharedClock last;
    for (const Thread* thread : arrived) {
      if (thread->cluster_time == 0) continue;
      if (thread->cluster_known != last) join(*all, thread->cluster_known);
      last = thread->cluster_known;
    }
    for (const Thread* thread : arrived)
      if (thread->cluster_time)
        (*all)[thread->clock.self] = std::max((*all)[thread->clock.self], thread->cluster_time);
    cluster.released = all;
  }
  cluster.arrived = 0;
  ++cluster.phase;
  for (Thread* thread : arrived)
    if (thread->state == State::kAtClusterBarrier) make_ready(thread);
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

}  // namespace

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

namespace {

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
  if (Cluster* cluster = self->home->cluster) {
    ++cluster->done;
    check_cluster_barrier(*cluster);
  }
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
    block->owned.push_back(std::move(owned));
    thread->clock = ThreadClock();
    thread->clock.self = uint32_t(index * threads + t);
    thread->block = thread->first_block = thread->last_block = index;
    thread->in_cluster_barrier = false;
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

// Blocks [index * count, ...): a cluster if the launch has them.
void admit(int index, int count) {
  Executor& e = executor();
  for (int i = 0; i < count; ++i) admit(index * count + i);
  if (e.config->cluster == 0) return;
  auto cluster = std::make_unique<Cluster>();
  for (int i = 0; i < count; ++i) {
    Block* const block = e.blocks[e.blocks.size() - size_t(count - i)].get();
    block->cluster = cluster.get();
    cluster->blocks.push_back(block);
    for (Thread* thread : block->threads) {
      thread->first_block = index * count;
      thread->last_block = index * count + count - 1;
      cluster->threads.push_back(thread);
    }
  }
  e.clusters.push_back(std::move(cluster));
}

void move_all(Threads& from, Threads& to) {
  std::move(from.begin(), from.end(), std::back_inserter(to));
  from.clear();
}

void retire(Block& block) {
  Executor& e = executor();
  Cluster* const cluster = block.cluster;
  if (cluster) {
    cluster->blocks[size_t(block.index) % e.config->cluster] = nullptr;
    if (kInstrumented && !e.aborted && block.done == int(block.threads.size())) {
      auto known = std::make_shared<Clock>(e.thread_count);
      for (const Thread* thread : block.threads) join(*known, thread->clock.others);
      e.memory.check_return(*block.dynamic, known);
    }
  }
  e.memory.release(block.dynamic->begin);
  for (const auto& [tag, allocation] : block.statics) e.memory.release(allocation->begin);
  // The rest of a cluster looks at all its threads.
  move_all(block.owned, cluster ? cluster->owned : e.idle);
  if (!cluster || std::any_of(cluster->blocks.begin(), cluster->blocks.end(),
                              [](const Block* other) { return other != nullptr; }))
    return;
  move_all(cluster->owned, e.idle);
  std::erase_if(e.clusters, [&](const auto& other) { return other.get() == cluster; });
}

void report_deadlock() {
  Executor& e = executor();
  std::map<std::pair<State, const void*>, std::vector<Thread*>> groups;
  for (const auto& block : e.blocks)
    for (Thread* thread : block->threads)
      if (thread->state != State::kDone) groups[{thread->state, thread->site}].push_back(thread);
  std::string text = "nobody can go on";
  for (const auto& [key, threads] : groups) {
    const char* what = key.first == State::kAtBlockBarrier     ? "in a barrier"
                       : key.first == State::kAtClusterBarrier ? "in the barrier of a cluster"
                       : key.first == State::kInWarp           ? threads[0]->operation->name
                                                               : "for a signal";
    text += "; " + std::to_string(threads.size()) + " threads, the first " +
            thread_name(threads[0]->block, threads[0]->thread) + ", wait " + what + " (" +
            line_of(key.second) + ")";
  }
  report(Fault::kDeadlock, text, nullptr);
}

Error run() {
  Executor& e = executor();
  // Blocks come one by one, those of a cluster together.
  const int together = std::max(1, int(e.config->cluster));
  const int total = int(e.config->blocks) / together;
  const int resident = e.config->cooperative ? int(e.config->blocks) : e.schedule.resident_blocks;
  const int room = std::max(resident, together);
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
    while (admitted < order.size() && int(e.blocks.size()) + together <= room)
      admit(order[admitted++], together);
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

void report_misaligned(const void* p, size_t bytes, const void* site) {
  const Executor& e = executor();
  report(Fault::kMisaligned,
         thread_name(e.current->block, e.current->thread) + " accesses " + std::to_string(bytes) +
             " bytes at " + e.memory.describe(p),
         site);
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
    report_misaligned(p, bytes, site);
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

static Cluster& own_cluster(const char* what, const void* site) {
  Cluster* const cluster = executor().current->home->cluster;
  if (cluster) return *cluster;
  report(Fault::kLaunch, std::string(what) + " in a launch without clusters", site);
  abort_launch();
}

void cluster_arrive(bool release) {
  const Inside inside;
  moved();
  Thread* self = executor().current;
  Cluster& cluster = own_cluster("cluster_arrive", RNN_EXT_SITE);
  if (self->in_cluster_barrier) {
    report(Fault::kDivergentBarrier,
           thread_name(self->block, self->thread) + " arrives again without having waited",
           RNN_EXT_SITE);
    abort_launch();
  }
  self->cluster_site = RNN_EXT_SITE;
  self->in_cluster_barrier = true;
  self->cluster_phase = cluster.phase;
  self->cluster_time = release ? self->clock.time++ : 0;
  self->cluster_known = self->clock.others;
  ++cluster.arrived;
  check_cluster_barrier(cluster);
}

void cluster_wait() {
  const Inside inside;
  moved();
  Thread* self = executor().current;
  Cluster& cluster = own_cluster("cluster_wait", RNN_EXT_SITE);
  if (!self->in_cluster_barrier) {
    report(Fault::kDivergentBarrier,
           thread_name(self->block, self->thread) + " waits without having arrived", RNN_EXT_SITE);
    abort_launch();
  }
  self->site = RNN_EXT_SITE;
  if (cluster.phase == self->cluster_phase) {
    self->state = State::kAtClusterBarrier;
    leave();
  }
  self->in_cluster_barrier = false;
  self->clock.acquire(cluster.released);
}

void* in_block(void* p, int rank) {
  const Inside inside;
  moved();
  const Thread* self = executor().current;
  const Cluster& cluster = own_cluster("access to another block", RNN_EXT_SITE);
  const Allocation& own = *self->home->dynamic;
  const ptrdiff_t offset = static_cast<char*>(p) - own.begin;
  if (rank < 0 || rank >= int(cluster.blocks.size()) || offset < 0 || size_t(offset) >= own.size) {
    report(Fault::kOutOfBounds,
           thread_name(self->block, self->thread) + " reaches for byte " + std::to_string(offset) +
               " of block " + std::to_string(rank) + " of its cluster",
           RNN_EXT_SITE);
    abort_launch();
  }
  if (const Block* const block = cluster.blocks[size_t(rank)]; block) {
    // Its threads may all be done, and the block not retired yet.
    if (block->done < int(block->threads.size())) return block->dynamic->begin + offset;
  }
  report(Fault::kReturned,
         thread_name(self->block, self->thread) + " uses the shared memory of block " +
             std::to_string(rank) + " of its cluster",
         RNN_EXT_SITE);
  abort_launch();
}

void warp_barrier() {
  const Inside inside;
  static const WarpOperation operation{"in a barrier of a warp", nullptr, true};
  warp_together(operation, nullptr, RNN_EXT_SITE);
}

// --- Launch --------------------------------------------------------------------------------------

Error launch(const LaunchConfig& config, void (*body)(const void*), const void* parameters,
             size_t parameter_bytes) {
  Executor& e = executor();
  constexpr size_t kMostShared = 227 << 10;  // of any device
  constexpr unsigned kMostCluster = 8;       // that every device allows which has clusters
  if (config.threads == 0 || config.threads > 1024 || config.threads % kWarpSize != 0 ||
      config.blocks == 0 || config.shared_bytes > kMostShared || e.config ||
      config.cluster > kMostCluster || (config.cluster && config.blocks % config.cluster != 0)) {
    report(Fault::kLaunch,
           std::to_string(config.blocks) + " blocks of " + std::to_string(config.threads) +
               " threads with " + std::to_string(config.shared_bytes) + " bytes of shared memory" +
               (config.cluster ? " in clusters of " + std::to_string(config.cluster) : ""),
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
  e.clusters.clear();
  e.ready.clear();
  e.spinning.clear();
  e.signals.clear();
  for (auto& thread : e.idle) thread->clock = ThreadClock();
  e.current = nullptr;
  e.config = nullptr;
  hooks.active = false;
  return error;
}

}  // namespace rnn_ext::cuda::host
