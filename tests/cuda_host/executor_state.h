// What the parts of the executor share: the state of a launch, and how a thread stops and goes on.
// executor.cpp schedules, warp_operations.cpp does what lanes do together, memory_operations.cpp
// signals and copies.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <unordered_map>
#include <vector>

#include "../../csrc/cuda/portable.h"
#include "executor.h"
#include "fiber.h"
#include "hooks.h"
#include "memory.h"

// Of the kernel's line that called the function it stands in.
#define RNN_EXT_SITE __builtin_return_address(0)

namespace rnn_ext::cuda::host {

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

struct Cluster;

enum class State { kReady, kAtBlockBarrier, kAtClusterBarrier, kInWarp, kSpinning, kDone };

struct Thread : Accessor {
  Context context;
  Block* home = nullptr;
  // Between its arrival at the cluster's barrier and its wait: the phase it arrived in, and what it
  // releases there (0: nothing).
  bool in_cluster_barrier = false;
  uint64_t cluster_phase = 0;
  uint32_t cluster_time = 0;
  SharedClock cluster_known;
  const void* cluster_site = nullptr;
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

using Threads = std::vector<std::unique_ptr<Thread>>;

struct Block {
  int index = 0;
  Threads owned;
  Cluster* cluster = nullptr;  // null: none
  std::vector<Thread*> threads;
  std::vector<int> in_warp;  // lanes waiting, by warp
  int at_barrier = 0, done = 0;
  Allocation* dynamic = nullptr;
  std::map<const void*, Allocation*> statics;
};

struct Cluster {
  std::vector<Block*> blocks;  // by rank; null: has returned
  Threads owned;               // of blocks that have returned
  std::vector<Thread*> threads;
  int arrived = 0, done = 0;  // threads
  uint64_t phase = 0;         // that they arrive in
  SharedClock released;       // by the phase before
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
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::deque<Thread*> ready;
  std::vector<Thread*> spinning;
  std::unordered_map<const uint32_t*, Signal> signals;
  uint64_t progress = 0;
  bool aborted = false;

  Context main;
  Thread* current = nullptr;
  Threads idle;  // with stacks to use again
};

Executor& executor();

// The running thread has done something that others may see: who polls is not spinning.
void moved();
// Leaves the running thread, which is in some list or waits for something.
void leave(bool dying = false);
void yield();
// The launch cannot go on: every thread is abandoned where it is.
[[noreturn]] void abort_launch();
void wake_spinning(const uint32_t* signal);
// Waits for the other lanes; returns when the operation is done.
void warp_together(const WarpOperation& operation, void* argument, const void* site);
void report_misaligned(const void* p, size_t bytes, const void* site);

// Executor code runs with the hooks off.
struct Inside {
  Inside() { hooks.active = false; }
  ~Inside() { hooks.active = true; }
};

}  // namespace rnn_ext::cuda::host
