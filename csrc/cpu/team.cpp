#include "team.h"

#include <algorithm>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <time.h>

namespace rnn_ext {
namespace {

// Spins before a member sleeps: tens of microseconds. A healthy member is at most one job away.
constexpr int kSpins = 4000;
// Before a member looks for somebody to help: below a microsecond.
constexpr int kGraceSpins = 16;
// A wait is a stall if it is this many times as long as the spins and the member's own work in the
// phase: jobs of a phase are alike.
constexpr int kStallFactor = 2;
// Time alone after a stall, as a multiple of the time it cost: 1, 2, 4 while stalls follow each
// other closely. Longer is the governor's business.
constexpr int kMaxDoublings = 2;

// Until `word` is no longer `seen`; may return early.
void sleep(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
  const timespec limit = {0, 10'000'000};
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, seen, &limit, nullptr, 0);
#else
  const timespec nap = {0, 50'000};
  if (word.load() == seen) nanosleep(&nap, nullptr);
#endif
}

void wake(std::atomic<uint32_t>& word, int most) {
  word.fetch_add(1);
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
#else
  (void)most;
#endif
}

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

void Team::finish(uint64_t jobs) {
  // Sequentially consistent, as in wait(): either the sleeper sees these jobs or we see it.
  done_.value.fetch_add(jobs);
  if (sleepers_.load() > 0) wake(finished_, members_);
}

bool Team::done_soon(uint64_t target) {
  for (int i = 0; i < kGraceSpins; ++i) {
    if (done_.value.load(std::memory_order_acquire) >= target) return true;
    relax();
  }
  return false;
}

void Team::close() {
  int64_t open = 0;
  closed_at_.compare_exchange_strong(open, ticks());
  if (sole_.exchange(kNobody) != kNobody) wake(admission_, members_);
}

void Team::wait(int member, uint64_t target, int64_t worked, bool admitted) {
  const auto over = [&] { return done_.value.load(std::memory_order_acquire) >= target; };
  if (!admitted) sleep_until_admitted(member);
  if (over()) return;
  const int64_t start = ticks();
  for (int i = 0; i < kSpins; ++i) {
    relax();
    if (over()) return;
  }
  const int64_t patience = kStallFactor * (ticks() - start + worked);
  // Give this core away: perhaps the owner of the unfinished job needs it.
  sleepers_.fetch_add(1);
  for (;;) {
    const uint32_t seen = finished_.load();
    if (over()) break;
    sleep(finished_, seen);
  }
  sleepers_.fetch_sub(1);
  const int64_t waited = ticks() - start;
  if (admitted && waited > patience) go_alone(member, waited);
}

void Team::go_alone(int member, int64_t waited) {
  lost_.fetch_add(waited);
  const int64_t now = ticks(), before = alone_for_.load();
  const int64_t calm = now - waited - (alone_since_.load() + before);
  const int64_t duration =
      before > 0 && calm < before ? std::min(2 * before, waited << kMaxDoublings) : waited;
  alone_for_.store(duration);
  alone_since_.store(now);
  int nobody = kNobody;
  sole_.compare_exchange_strong(nobody, member);
}

// Called by the sleepers too: the one that goes on alone may have left without a word.
void Team::admit_all_when_over() {
  const int64_t passed = ticks() - alone_since_.load(std::memory_order_relaxed);
  // A clock that runs backwards (another core's, on a poor host) must not keep anybody out.
  if (passed >= 0 && passed <= alone_for_.load(std::memory_order_relaxed)) return;
  if (sole_.exchange(kNobody) != kNobody) wake(admission_, members_);
}

// The one that works is not to be disturbed: no spinning, and no waking up at every phase.
void Team::sleep_until_admitted(int member) {
  for (;;) {
    const uint32_t seen = admission_.load();
    if (admits(member)) return;
    sleep(admission_, seen);
  }
}

}  // namespace rnn_ext
