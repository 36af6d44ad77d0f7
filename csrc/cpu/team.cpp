#include "team.h"

#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace rnn_ext {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int64_t Team::claim(int owner, uint32_t phase, int64_t size) {
  std::atomic<uint64_t>& ticket = tickets_[owner].value;
  uint64_t seen = ticket.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t seen_phase = uint32_t(seen >> 32);
    const int64_t taken = seen_phase == phase ? int64_t(uint32_t(seen)) : 0;
    // A ticket of a later phase means that this phase is over.
    if (seen_phase > phase || taken >= size) return -1;
    const uint64_t next = (uint64_t(phase) << 32) | uint64_t(taken + 1);
    if (ticket.compare_exchange_weak(seen, next, std::memory_order_acq_rel)) return taken;
  }
}

void Team::wait(uint64_t target) const {
  // The other member is normally a few hundred nanoseconds away: spin first. If it is not, its
  // core is probably taken: give this one away, at last by sleeping, so that the scheduler can move
  // the owner of the unfinished job here.
  constexpr int kSpins = 4000, kYields = 200;
  for (int i = 0;; ++i) {
    if (done_.value.load(std::memory_order_acquire) >= target) return;
    if (i < kSpins) {
      relax();
    } else if (i < kSpins + kYields) {
      sched_yield();
    } else {
      const timespec pause = {0, 50'000};
      nanosleep(&pause, nullptr);
    }
  }
}

}  // namespace rnn_ext
