// How many threads the next call may use, from what the last ones have met.
//
// A team of threads is as fast as its slowest core. When calls have lost much of their time because
// threads did not get a core (a busy neighbor, a container's quota, threads that had to be woken
// up), and not just once, the next ones run on one thread for a while. Then the work done per
// second is compared, and whichever way was slower is tried again only after a pause that grows
// fourfold each time, to a second: with a core gone for good the attempts cost a few per cent, a
// single disturbance costs little, and where every core is shared a team may still be the better
// way.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnn_ext {

class Governor {
 public:
  // Threads a call may use if `most` are on offer. Teams of other Python threads share them.
  int grant(int most) const;

  // One thread takes turns with the team: its calls are to be reported.
  bool on_trial() const { return alone_left_.load(std::memory_order_relaxed) > 0; }
  // `work`: the seconds that the cost model expects of one thread. Times are nanoseconds.
  void one_thread_ran(double work, int64_t elapsed, int64_t now);

  void team_starts() { teams_.fetch_add(1, std::memory_order_relaxed); }
  // `lost`: the part of `elapsed` in which threads waited for a core or for each other.
  void team_ran(double work, int64_t elapsed, int64_t lost, int64_t now);

 private:
  // Never a lock: updates may get lost, and a process may fork at any time.
  using Nanoseconds = std::atomic<int64_t>;
  struct Record {
    std::atomic<double> work{0};
    Nanoseconds elapsed{0};

    void add(double more, int64_t time);
    double rate() const;
    void clear();
  };

  void judge_team(int64_t now);

  std::atomic<int> teams_{0};                 // running now
  Nanoseconds last_team_{0};                  // when the last one was done
  Nanoseconds alone_left_{0}, alone_for_{0};  // what one thread is still to do, and was given
  Nanoseconds alone_until_{0};                // at the latest
  Nanoseconds team_left_{0}, team_for_{0};    // how long the team is not questioned
  std::atomic<double> team_rate_{0};          // what it was trusted for
  Record alone_, team_;                       // of the trial, of the team's last calls
  Nanoseconds team_lost_{0};
  std::atomic<int> losses_{0};          // times in a row that the team was the slower way
  std::atomic<bool> suspected_{false};  // has it lost much of its time lately?
};

// The one of this process.
Governor& governor();

}  // namespace rnn_ext
