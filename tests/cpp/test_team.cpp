// The thread team: every job of every phase once, whoever turns up; and a whole call gives the same
// bits for any team.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/engine.h"
#include "layers.h"

using namespace rnn_ext;
using namespace rnn_ext::testing;

namespace {

// --- Runners ------------------------------------------------------------------------------------

using Body = void (*)(int member, void* context);

void run_threads(int first, int last, Body body, void* context, std::chrono::microseconds delay) {
  std::vector<std::thread> threads;
  for (int member = first; member < last; ++member)
    threads.emplace_back([=] {
      std::this_thread::sleep_for(delay * (member - first));
      body(member, context);
    });
  for (std::thread& thread : threads) thread.join();
}

void all_at_once(int members, Body body, void* context) {
  run_threads(0, members, body, context, {});
}
void late(int members, Body body, void* context) {
  run_threads(0, members, body, context, std::chrono::microseconds(300));
}
void one_after_another(int members, Body body, void* context) {
  for (int member = 0; member < members; ++member) body(member, context);
}
void last_one_first(int members, Body body, void* context) {
  for (int member = members - 1; member >= 0; --member) body(member, context);
}
void only_the_first(int, Body body, void* context) { body(0, context); }
void only_the_last(int members, Body body, void* context) { body(members - 1, context); }
void only_half(int members, Body body, void* context) {
  run_threads(0, (members + 1) / 2, body, context, {});
}

struct NamedRunner {
  const char* name;
  Runner run;
};
constexpr NamedRunner kRunners[] = {{"all at once", all_at_once},
                                    {"late", late},
                                    {"one after another", one_after_another},
                                    {"last one first", last_one_first},
                                    {"only the first", only_the_first},
                                    {"only the last", only_the_last},
                                    {"only half", only_half}};

// Calls f(members, runner) for teams of 1 to 8 and every runner.
template <class F>
void for_each_team(F&& f) {
  for (const NamedRunner& runner : kRunners) {
    for (int members = 1; members <= 8; ++members) {
      check::Scope scope(runner.name, ", members ", members);
      f(members, runner.run);
    }
  }
}

// --- Phases of plain counters -------------------------------------------------------------------

struct Phases {
  std::vector<int64_t> jobs;
  // Written by one job each and read by the jobs of the next phase: plain ints, so that
  // ThreadSanitizer sees a phase that starts before the last one is over.
  std::vector<std::vector<int>> runs;
  std::atomic<int> unfinished_before{0};  // jobs of an earlier phase missing when one started

  explicit Phases(std::vector<int64_t> counts) : jobs(std::move(counts)) {
    for (int64_t n : jobs) runs.emplace_back(size_t(n), 0);
  }

  void walk(Member& member) {
    for (size_t phase = 0; phase < jobs.size(); ++phase)
      member.for_each(jobs[phase], [&](int64_t job) {
        ++runs[phase][size_t(job)];
        if (phase == 0) return;
        for (int count : runs[phase - 1])
          if (count != 1) unfinished_before.fetch_add(1);
      });
  }

  void check() const {
    for (size_t phase = 0; phase < jobs.size(); ++phase)
      for (size_t job = 0; job < runs[phase].size(); ++job) {
        check::Scope scope("phase ", phase, ", job ", job);
        CHECK_EQ(runs[phase][job], 1);
      }
    CHECK_EQ(unfinished_before.load(), 0);
  }
};

struct TeamOfPhases {
  Team team;
  Phases phases;

  void run(Runner runner) {
    runner(
        team.members(),
        [](int member, void* context) {
          auto& self = *static_cast<TeamOfPhases*>(context);
          Member walker(self.team, member);
          self.phases.walk(walker);
        },
        this);
    phases.check();
  }
};

}  // namespace

TEST(every_job_once) {
  for_each_team([](int members, Runner runner) {
    TeamOfPhases test{Team(members), Phases({0, 1, 2, 3, 7, 64, 5, 0, 0, 300, 1, 8, 0})};
    test.run(runner);
  });
}

TEST(many_short_phases) {
  for (int members : {2, 3, 8}) {
    check::Scope scope("members ", members);
    TeamOfPhases test{Team(members), Phases(std::vector<int64_t>(300, 4))};
    test.run(all_at_once);
  }
}

TEST(no_phases) {
  for_each_team([](int members, Runner runner) {
    TeamOfPhases test{Team(members), Phases({})};
    test.run(runner);
  });
}

TEST(team_is_capped) {
  CHECK_EQ(Team(kMaxTeam + 1).members(), kMaxTeam);
  TeamOfPhases test{Team(1000), Phases({0, 1, 100, 7})};
  CHECK_EQ(test.team.members(), kMaxTeam);
  test.run(one_after_another);
}

// A member that wakes up when everything is over does nothing and does not wait.
TEST(latecomer) {
  Team team(2);
  Phases phases({3, 5, 2});
  Member early(team, 0), tardy(team, 1);
  phases.walk(early);
  phases.walk(tardy);
  phases.check();
}

namespace {

// The owner of a job that stalls.
std::thread finish_late(Team& team) {
  return std::thread([&team] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    team.finish(1);
  });
}

}  // namespace

// Who waited long for a job of another member goes on alone, and the other one is admitted again
// after some time. A machine that pauses this test in the wrong moment hides that: it may take a
// few attempts to see it.
TEST(stalled_member_is_left_alone) {
  const auto stall = [] {
    Team team(2);
    std::thread owner = finish_late(team);
    team.wait(0, 1, 0, true);
    const bool alone = !team.admits(1) && team.admits(0);
    owner.join();
    while (!team.admits(1)) CHECK(team.admits(0));
    CHECK(team.admits(0));
    return alone && team.ticks_lost() > 0;
  };
  bool seen = false;
  for (int attempt = 0; attempt < 20 && !seen; ++attempt) seen = stall();
  CHECK(seen);
}

// A member that sleeps because another one goes on alone wakes up when that one has finished.
TEST(closing_wakes_everybody) {
  Team team(2);
  std::thread owner = finish_late(team);
  team.wait(0, 1, 0, true);
  std::thread other([&] { team.wait(1, 1, 0, team.admits(1)); });
  team.close();
  other.join();
  owner.join();
  CHECK(team.admits(0) && team.admits(1));
}

// Nor does it sleep forever when that one leaves without closing the team.
TEST(nobody_waits_for_a_member_that_left) {
  Team team(2);
  std::thread owner = finish_late(team);
  team.wait(0, 1, 0, true);
  team.wait(1, 1, 0, team.admits(1));
  owner.join();
  while (!team.admits(1)) std::this_thread::yield();
}

// Phases go on, once each, while members stall in turn.
TEST(stalls_lose_no_job) {
  struct Stalling {
    Team team{3};
    std::atomic<int> runs[60] = {};
  } test;
  all_at_once(
      3,
      [](int member, void* context) {
        auto& self = *static_cast<Stalling*>(context);
        Member walker(self.team, member);
        for (int phase = 0; phase < 60; ++phase)
          walker.for_each(3, [&](int64_t job) {
            if (phase % 10 == member && job == member)
              std::this_thread::sleep_for(std::chrono::milliseconds(5));
            self.runs[phase].fetch_add(1);
          });
        self.team.close();
      },
      &test);
  for (const std::atomic<int>& runs : test.runs) CHECK_EQ(runs.load(), 3);
}

namespace {

// Forward (with its reserve) and backward are bitwise what one thread makes of them.
void check_same_bits(CellKind cell, const Sizes& sizes, Setting setting) {
  const RandomLayer layer(cell, sizes);
  const Forward<float> forward = run_forward<float>(layer, setting);
  const Gradients gradients = run_backward(layer, forward, setting);
  const auto check_run = [&] {
    const Forward<float> again = run_forward<float>(layer, setting);
    check_same(again.outputs, forward.outputs);
    for (int d = 0; d < sizes.D; ++d) CHECK(same_bits(again.reserve[d], forward.reserve[d]));
    check_same(run_backward(layer, forward, setting), gradients);
  };
  check_run();  // a second time with one thread
  for (const NamedRunner& runner : kRunners) {
    for (int threads : {2, 3, 8}) {
      for (int64_t shares : {0, 1, 2, 3}) {
        check::Scope scope(runner.name, ", shares ", shares, ", threads ", threads);
        setting.threads = threads;
        setting.runner = runner.run;
        setting.shares = shares;
        setting.directions_in_turn = shares == 0 && threads == 3;
        check_run();
      }
    }
  }
}

void check_cell(CellKind cell) {
  for_each_isa([&] {
    const int64_t P = cell == CellKind::kLstm ? 11 : 0;
    check_same_bits(cell, {.T = 7, .B = 3, .I = 9, .H = 35, .D = 2}, {.chunk_steps = 3});
    check_same_bits(cell, {.T = 4, .B = 50, .I = 5, .H = 6}, {.row_block = 12});
    check_same_bits(cell, {.T = 5, .B = 17, .I = 9, .H = 35},
                    {.chunk_steps = 2, .row_block = 4, .groups = 4});
    check_same_bits(cell, {.T = 6, .B = 9, .I = 7, .H = 35, .D = 2},
                    {.chunk_steps = 4, .row_block = 4, .packed_weights = 1, .project_in_step = 1});
    check_same_bits(cell, {.T = 3, .B = 1, .I = 5, .H = 40}, {.packed_weights = 0});
    check_same_bits(cell, {.I = 5, .H = 20, .P = P, .D = 2, .batch_sizes = {5, 3, 3, 1}},
                    {.chunk_steps = 2});
  });
}

}  // namespace

TEST(rnn_tanh) { check_cell(CellKind::kRnnTanh); }
TEST(rnn_relu) { check_cell(CellKind::kRnnRelu); }
TEST(lstm) { check_cell(CellKind::kLstm); }
TEST(gru) { check_cell(CellKind::kGru); }
