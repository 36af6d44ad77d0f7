// The thread team of one call.
//
// Every member runs the same control code, a sequence of phases; a phase is a number of
// independent jobs, handed out by Member::for_each. Jobs are claimed, not assigned: a member takes
// the jobs of its own range first (so that the same core meets the same weights at every step) and
// then helps the others. for_each returns when all jobs of the phase are done, whoever did them.
//
// Nothing waits for a member, only for a claimed job: a team that turns out smaller than asked for,
// a member that starts late or a core that is taken away for a while cost time but never a hang,
// and a member that wakes up late walks through the finished phases without doing anything.
// Results do not depend on who does a job, so they are the same for any number of members.
//
// A core that is taken away with a claimed job holds up everybody. Whoever had to wait for that
// much longer than it worked itself goes on alone for a while: the others may not claim jobs and
// sleep. The longer this repeats itself, the longer it stays alone, so that a machine with one core
// left costs little more than one thread would.
#pragma once

#include <atomic>
#include <cstdint>

#include "../sequence.h"

namespace rnn_ext {

// Runs body(member, context) for members 0..members-1, concurrently if it can, and returns when
// every started one has returned. It may run fewer than asked for (at least one).
using Runner = void (*)(int members, void (*body)(int member, void* context), void* context);

inline constexpr int kMaxTeam = 64;

// A clock of unknown, constant rate that is cheap to read.
RNN_EXT_SHARED_INLINE int64_t ticks() {
#if defined(__x86_64__) || defined(__i386__)
  return int64_t(__builtin_ia32_rdtsc());
#elif defined(__aarch64__)
  int64_t now;
  asm volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
#else
#error "ticks() is not defined for this processor"
#endif
}

class Team {
 public:
  RNN_EXT_SHARED_INLINE explicit Team(int members)
      : members_(members < kMaxTeam ? members : kMaxTeam) {}
  RNN_EXT_SHARED_INLINE int members() const { return members_; }

  // May this member claim jobs now?
  RNN_EXT_SHARED_INLINE bool admits(int member) {
    const int sole = sole_.load(std::memory_order_relaxed);
    if (sole == kNobody) return true;
    admit_all_when_over();
    return sole == member;
  }
  // Index of a claimed job in the range of `owner` (which has `size` jobs in this phase), or -1.
  int64_t claim(int owner, uint32_t phase, int64_t size);
  void finish(uint64_t jobs);
  bool done_soon(uint64_t target);  // waits for a moment
  // Until `target` jobs are done. `worked`: the ticks this member has just worked; `admitted`:
  // whether it was allowed to.
  void wait(int member, uint64_t target, int64_t worked, bool admitted);
  // A member has left its last phase: nobody needs to sleep any longer. A team whose members leave
  // without it goes on, only later.
  void close();

  // When the first member left its last phase, and how long members waited for stalled ones.
  int64_t closed_at() const { return closed_at_.load(std::memory_order_relaxed); }
  int64_t ticks_lost() const { return lost_.load(std::memory_order_relaxed); }

 private:
  struct alignas(64) Line {
    std::atomic<uint64_t> value{0};
  };
  static constexpr int kNobody = -1;

  void go_alone(int member, int64_t waited);
  void admit_all_when_over();  // everybody again, when the time alone is over
  void sleep_until_admitted(int member);

  int members_;
  Line done_;               // jobs finished since the start
  Line tickets_[kMaxTeam];  // per owner: phase << 32 | jobs claimed in that phase
  // Read at every phase, seldom written: on a line of their own.
  alignas(64) std::atomic<int> sole_{kNobody};  // the member that goes on alone
  std::atomic<int> sleepers_{0};                // members that sleep until a job is finished
  std::atomic<int64_t> alone_since_{0}, alone_for_{0};
  std::atomic<int64_t> closed_at_{0}, lost_{0};
  // What is slept on: changes when a job is finished, when the time alone is over.
  std::atomic<uint32_t> finished_{0}, admission_{0};
};

class Member {
 public:
  RNN_EXT_SHARED_INLINE Member(Team& team, int id) : team_(team), id_(id) {}
  RNN_EXT_SHARED_INLINE int id() const { return id_; }
  RNN_EXT_SHARED_INLINE int members() const { return team_.members(); }
  // The job that this member is likely to come to after the i-th of the phase.
  RNN_EXT_SHARED_INLINE int64_t after(int64_t i) const { return phase_ & 1 ? i + 1 : i - 1; }

  // for_each with jobs that are handed a Member of their own, which works alone: what a job does
  // with it costs no waiting.
  template <class Job>
  void for_each_alone(int64_t jobs, Job&& job) {
    for_each(jobs, [&](int64_t i) {
      Team nobody_else(1);
      Member alone(nobody_else, 0);
      job(alone, i);
    });
  }

  template <class Job>
  void for_each(int64_t jobs, Job&& job) {
    const int members = team_.members();
    ++phase_;
    if (members == 1) {
      for (int64_t i = 0; i < jobs; ++i) job(in_turn(0, jobs, i));
      return;
    }
    target_ += uint64_t(jobs);
    const int64_t start = ticks();
    const bool admitted = team_.admits(id_);
    for (int k = 0; admitted && k < members; ++k) {
      const int owner = (id_ + k) % members;
      const int64_t begin = jobs * owner / members, end = jobs * (owner + 1) / members;
      uint64_t mine = 0;
      for (;;) {
        const int64_t i = team_.claim(owner, phase_, end - begin);
        if (i < 0) break;
        job(in_turn(begin, end, i));
        ++mine;
      }
      if (mine) team_.finish(mine);
      // Who is about to finish needs no help: looking at a ticket takes it from its owner's cache.
      if (k == 0 && mine && team_.done_soon(target_)) return;
    }
    team_.wait(id_, target_, ticks() - start, admitted);
  }

 private:
  // Every other phase runs backwards: it begins with what the last one has left in the cache.
  int64_t in_turn(int64_t begin, int64_t end, int64_t i) const {
    return phase_ & 1 ? begin + i : end - 1 - i;
  }

  Team& team_;
  int id_;
  uint32_t phase_ = 0;
  uint64_t target_ = 0;
};

}  // namespace rnn_ext
