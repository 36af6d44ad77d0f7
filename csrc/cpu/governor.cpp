#include "governor.h"

#include <algorithm>

namespace rnn_ext {
namespace {

// A team that loses less than this part of its time is not questioned.
constexpr int kTolerated = 4;
constexpr int64_t kPause = 4;
constexpr int kMaxLosses = 3;
constexpr int64_t kLongest = 1'000'000'000;
// One thread's pause counts the time it works; a caller that seldom calls is not held up for longer
// than this many times as much.
constexpr int64_t kIdle = 4;
// Calls are judged together until they have taken this long, several time slices of a scheduler: a
// single stall says nothing.
constexpr int64_t kWindow = 32'000'000;
// Or until the caller does something else for this long: what follows may be a slow start again.
constexpr int64_t kGap = 10'000'000;

}  // namespace

void Governor::Record::add(double more, int64_t time) {
  elapsed += time;
  work = work + more;
}

double Governor::Record::rate() const { return work / double(std::max<int64_t>(elapsed, 1)); }

void Governor::Record::clear() {
  elapsed = 0;
  work = 0;
}

int Governor::grant(int most) const {
  if (on_trial()) return 1;
  return std::max(1, most / (1 + teams_.load(std::memory_order_relaxed)));
}

void Governor::one_thread_ran(double work, int64_t elapsed, int64_t now) {
  alone_.add(work, elapsed);
  if ((alone_left_ -= elapsed) > 0 && now < alone_until_) return;
  alone_left_ = 0;
  if (alone_.rate() > team_.rate()) {
    losses_ = std::min(losses_ + 1, kMaxLosses);
    team_left_ = team_for_ = 0;
  } else {
    losses_ = 0;
    team_for_ = std::clamp(kPause * team_for_, kPause * alone_for_, kLongest);
    team_left_ = team_for_.load();
    team_rate_ = team_.rate();
  }
  alone_.clear();
  team_.clear();
}

void Governor::team_ran(double work, int64_t elapsed, int64_t lost, int64_t now) {
  --teams_;
  if (now - elapsed - last_team_ > kGap) judge_team(now);
  last_team_ = now;
  team_.add(work, elapsed);
  team_lost_ += lost;
  if (team_.elapsed >= kWindow) judge_team(now);
}

void Governor::judge_team(int64_t now) {
  if (team_.elapsed == 0) return;
  const bool wasteful = team_lost_ > team_.elapsed / kTolerated;
  // Trust ends early when the team does much worse than when it earned it.
  const bool trusted = (team_left_ -= std::min<int64_t>(team_.elapsed, team_left_)) > 0 &&
                       team_.rate() > team_rate_ / 2;
  team_lost_ = 0;
  if (!wasteful) losses_ = 0;
  // Once is not enough: a thread that wakes up may have to wait for some slices until the scheduler
  // sees that another core is free. A team that has been found wanting gets no second chance.
  const bool again = losses_ > 0 || suspected_;
  suspected_ = wasteful;
  if (!wasteful || trusted || !again) {
    team_.clear();
    return;
  }
  int64_t pause = kWindow;
  for (int i = 0; i < losses_; ++i) pause *= kPause;
  alone_for_ = std::min(pause, kLongest);
  alone_until_ = now + kIdle * alone_for_;
  alone_left_ = alone_for_.load();
}

Governor& governor() {
  static Governor instance;
  return instance;
}

}  // namespace rnn_ext
