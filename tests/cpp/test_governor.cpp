// The governor, against made-up machines: calls of 2 ms of work, reported as such a machine would
// have run them.
#include <cstdint>

#include "check.h"
#include "cpu/governor.h"

using namespace rnn_ext;

namespace {

constexpr int64_t kMs = 1'000'000;
constexpr double kWork = 2e-3;

struct Call {
  int64_t elapsed, lost = 0;
};

struct Tally {
  int64_t elapsed = 0;
  int calls = 0, teams = 0;

  double mean_ms() const { return double(elapsed) / double(calls) / double(kMs); }
};

// Runs calls for `duration` of made-up time: team(i) and alone(i) say what call i takes each way.
template <class Team, class Alone>
Tally run(Governor& governor, int64_t duration, Team&& team, Alone&& alone) {
  Tally tally;
  while (tally.elapsed < duration) {
    if (governor.grant(2) == 2) {
      const Call call = team(tally.calls);
      governor.team_starts();
      tally.elapsed += call.elapsed;
      governor.team_ran(kWork, call.elapsed, call.lost, tally.elapsed);
      ++tally.teams;
    } else {
      const Call call = alone(tally.calls);
      tally.elapsed += call.elapsed;
      governor.one_thread_ran(kWork, call.elapsed, tally.elapsed);
    }
    ++tally.calls;
  }
  return tally;
}

Call healthy(int) { return {kMs}; }
Call one_thread(int) { return {2 * kMs}; }
// A core is gone: a time slice is lost in every call.
Call stolen(int) { return {8 * kMs, 6 * kMs}; }
// A neighbor on each core: every third call of a team loses a slice, one thread half of its time.
Call team_of_halves(int i) { return i % 3 == 0 ? Call{5 * kMs, 4 * kMs} : Call{kMs}; }
Call half_a_core(int) { return {4 * kMs}; }

}  // namespace

TEST(healthy_machine_always_has_its_team) {
  Governor governor;
  const Tally tally = run(governor, 1000 * kMs, healthy, one_thread);
  CHECK_EQ(tally.teams, tally.calls);
}

TEST(stolen_core_costs_little_more_than_one_thread) {
  Governor governor;
  run(governor, 1000 * kMs, healthy, one_thread);
  CHECK(run(governor, 20000 * kMs, stolen, one_thread).mean_ms() < 1.15 * 2);
}

TEST(team_comes_back_with_the_core) {
  Governor governor;
  run(governor, 5000 * kMs, stolen, one_thread);
  const Tally tally = run(governor, 5000 * kMs, healthy, one_thread);
  CHECK(tally.mean_ms() < 1.3);
  CHECK_EQ(governor.grant(2), 2);
}

TEST(one_stall_is_soon_forgotten) {
  Governor governor;
  run(governor, 1000 * kMs, healthy, one_thread);
  const auto once = [](int i) { return i == 0 ? Call{9 * kMs, 8 * kMs} : Call{kMs}; };
  CHECK(run(governor, 1000 * kMs, once, one_thread).mean_ms() < 1.1);
}

// After each pause of the caller the team's first call is a slow one: two threads on one core.
TEST(slow_starts_do_not_add_up) {
  Governor governor;
  const auto start = [](int i) { return i == 0 ? Call{20 * kMs, 18 * kMs} : Call{kMs}; };
  for (int i = 0; i < 10; ++i) {
    const Tally tally = run(governor, 200 * kMs, start, one_thread);
    CHECK_EQ(tally.teams, tally.calls);
  }
}

// Nor do bursts that are over before a slow start is made up for.
TEST(bursts_keep_their_team) {
  Governor governor;
  int64_t now = 0;
  for (int burst = 0; burst < 20; ++burst) {
    now += 100 * kMs;
    for (int i = 0; i < 24; ++i) {
      const Call call = i == 0 ? Call{20 * kMs, 18 * kMs} : Call{kMs};
      CHECK_EQ(governor.grant(2), 2);
      governor.team_starts();
      governor.team_ran(kWork, call.elapsed, call.lost, now += call.elapsed);
    }
  }
}

// A core that is gone shows in bursts of one call, too.
TEST(rare_calls_without_a_core_go_alone) {
  Governor governor;
  int64_t now = 0;
  int teams = 0;
  for (int i = 0; i < 1000; ++i) {
    now += 100 * kMs;
    if (governor.grant(2) == 2) {
      ++teams;
      governor.team_starts();
      governor.team_ran(kWork, 8 * kMs, 6 * kMs, now += 8 * kMs);
    } else {
      governor.one_thread_ran(kWork, 2 * kMs, now += 2 * kMs);
    }
  }
  CHECK(teams < 1000 / 4);
}

TEST(shared_cores_keep_the_team) {
  Governor governor;
  const Tally tally = run(governor, 10000 * kMs, team_of_halves, half_a_core);
  CHECK(tally.teams > tally.calls * 9 / 10);
}

// Trust earned beside a neighbor does not last when the core is taken altogether.
TEST(trust_ends_when_things_get_worse) {
  Governor governor;
  run(governor, 10000 * kMs, team_of_halves, half_a_core);
  CHECK(run(governor, 1000 * kMs, stolen, one_thread).mean_ms() < 1.5 * 2);
}

TEST(short_waits_are_tolerated) {
  Governor governor;
  const auto uneven = [](int) { return Call{kMs, kMs / 5}; };
  const Tally tally = run(governor, 1000 * kMs, uneven, one_thread);
  CHECK_EQ(tally.teams, tally.calls);
}

// A caller that works a tenth of the time gets its team back in time, not in ten times that.
TEST(rare_calls_are_not_held_up) {
  Governor governor;
  int64_t now = 0;
  while (governor.grant(2) == 2) {
    now += 8 * kMs;
    governor.team_starts();
    governor.team_ran(kWork, 8 * kMs, 6 * kMs, now);
  }
  const int64_t start = now;
  while (governor.grant(2) == 1) {
    now += 20 * kMs;
    governor.one_thread_ran(kWork, 2 * kMs, now);
  }
  CHECK(now - start <= 4 * 32 * kMs + 20 * kMs);
}

TEST(teams_share_the_threads) {
  Governor governor;
  CHECK_EQ(governor.grant(8), 8);
  governor.team_starts();
  CHECK_EQ(governor.grant(8), 4);
  governor.team_starts();
  governor.team_starts();
  CHECK_EQ(governor.grant(8), 2);
  CHECK_EQ(governor.grant(2), 1);
  for (int i = 0; i < 3; ++i) governor.team_ran(kWork, kMs, 0, 0);
  CHECK_EQ(governor.grant(8), 8);
  CHECK_EQ(governor.grant(1), 1);
}
