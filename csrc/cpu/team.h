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
#pragma once

#include <atomic>
#include <cstdint>

#include "../sequence.h"

namespace rnn_ext {

// Runs body(member, context) for members 0..members-1, concurrently if it can, and returns when
// every started one has returned. It may run fewer than asked for (at least one).
using Runner = void (*)(int members, void (*body)(int member, void* context), void* context);

inline constexpr int kMaxTeam = 64;

class Team {
 public:
  explicit Team(int members) : members_(members < kMaxTeam ? members : kMaxTeam) {}
  RNN_EXT_SHARED_INLINE int members() const { return members_; }

  // Index of a claimed job in the range of `owner` (which has `size` jobs in this phase), or -1.
  int64_t claim(int owner, uint32_t phase, int64_t size);
  RNN_EXT_SHARED_INLINE void finish(uint64_t jobs) {
    done_.value.fetch_add(jobs, std::memory_order_acq_rel);
  }
  void wait(uint64_t target) const;

 private:
  struct alignas(64) Line {
    std::atomic<uint64_t> value{0};
  };
  int members_;
  Line done_;               // jobs finished since the start
  Line tickets_[kMaxTeam];  // per owner: phase << 32 | jobs claimed in that phase
};

class Member {
 public:
  RNN_EXT_SHARED_INLINE Member(Team& team, int id) : team_(team), id_(id) {}
  RNN_EXT_SHARED_INLINE int id() const { return id_; }
  RNN_EXT_SHARED_INLINE int members() const { return team_.members(); }

  template <class Job>
  void for_each(int64_t jobs, Job&& job) {
    const int members = team_.members();
    if (members == 1) {
      for (int64_t i = 0; i < jobs; ++i) job(i);
      return;
    }
    ++phase_;
    target_ += uint64_t(jobs);
    uint64_t mine = 0;
    for (int k = 0; k < members; ++k) {
      const int owner = (id_ + k) % members;
      const int64_t begin = jobs * owner / members, end = jobs * (owner + 1) / members;
      for (;;) {
        const int64_t i = team_.claim(owner, phase_, end - begin);
        if (i < 0) break;
        job(begin + i);
        ++mine;
      }
    }
    if (mine) team_.finish(mine);
    team_.wait(target_);
  }

 private:
  Team& team_;
  int id_;
  uint32_t phase_ = 0;
  uint64_t target_ = 0;
};

}  // namespace rnn_ext
