// Signals, fences and copies of a thread.
#include <cstring>
#include <utility>

#include "beyond_kernels.h"
#include "executor_state.h"

namespace rnn_ext::cuda::host {

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
  report_misaligned(p, bytes, RNN_EXT_SITE);
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
  if (!to || to->block != e.current->block) {
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

}  // namespace rnn_ext::cuda::host
