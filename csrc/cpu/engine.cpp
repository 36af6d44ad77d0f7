// Running a call: the plan, the kernels that go with it, the team.
#include "engine.h"

#include <time.h>

#include <algorithm>

#include "governor.h"

namespace rnn_ext {
namespace {

int64_t clock_ns(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// body(member) for every member of a team, with a report to the governor, unless it is one thread
// that does not stand in for a team. `work`: the seconds that the cost model expects of one thread.
template <class Body>
void run_team(int members, bool stands_in, double work, Runner runner, const Body& body) {
  Team team(members);
  if (team.members() == 1) {
    Member alone(team, 0);
    const int64_t start = stands_in ? clock_ns(CLOCK_MONOTONIC) : 0;
    body(alone);
    const int64_t now = stands_in ? clock_ns(CLOCK_MONOTONIC) : 0;
    if (stands_in) governor().one_thread_ran(work, now - start, now);
    return;
  }
  struct Context {
    const Body& body;
    Team& team;
  } context{body, team};
  governor().team_starts();
  const int64_t start = clock_ns(CLOCK_MONOTONIC), running = clock_ns(CLOCK_THREAD_CPUTIME_ID);
  const int64_t first_tick = ticks();
  runner(
      team.members(),
      [](int member, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        Member self(c.team, member);
        c.body(self);
        c.team.close();
      },
      &context);
  const int64_t last_tick = ticks(), now = clock_ns(CLOCK_MONOTONIC), elapsed = now - start;
  // Lost: waits for stalled members, the wait for the others at the end, and all the time in which
  // this thread itself was not running. The first two may be among the last.
  const double waited =
      double(team.ticks_lost() + last_tick - team.closed_at()) / double(last_tick - first_tick);
  const int64_t off = elapsed - (clock_ns(CLOCK_THREAD_CPUTIME_ID) - running);
  governor().team_ran(work, elapsed, std::max(int64_t(waited * double(elapsed)), off), now);
}

template <class T>
PlanInput plan_input(const SequenceShape& shape, bool backward, int max_threads, bool bf16_products,
                     bool two_parts = false) {
  const Kernels& kernels = current_kernels();
  return {shape,
          int(sizeof(T)),
          kernels.vector_bytes,
          backward,
          sizeof(T) == sizeof(float) && bf16_products && kernels.bf16_products,
          max_threads,
          two_parts,
          kernels.streamed_reserve_bytes};
}

// A few rows are not worth packing, and without packing operands stay as they are.
template <class Call, class T>
const KernelsOf<T>& kernels_for(const Call& call, const Plan& plan, const KernelsOf<T>& full) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const KernelsOf<float>* narrow = current_kernels().bf16_products;
    if (call.bf16_products && narrow && plan.packed_weights && plan.packed_recurrent)
      return *narrow;
  }
  return full;
}
template <class T>
const KernelsOf<T>& kernels_for(const ForwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan, current_kernels().of<T>());
}
template <class T>
const KernelsOf<T>& kernels_for(const BackwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan, current_kernels().of<T>());
}

double work_of(const Plan& plan, int64_t steps) { return plan.step_seconds * double(steps); }

}  // namespace

template <class T>
Plan plan_call(const SequenceShape& shape, bool backward, int max_threads, bool bf16_products,
               bool two_parts) {
  return make_plan(plan_input<T>(shape, backward, max_threads, bf16_products, two_parts));
}

template <class T>
size_t workspace_bytes(const ForwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan).forward_workspace(call, plan);
}
template <class T>
size_t workspace_bytes(const BackwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan).backward_workspace(call, plan);
}

template <class T>
void run(const ForwardCall<T>& call, const Plan& plan, void* workspace, Runner runner) {
  const auto kernel = kernels_for(call, plan).forward;
  const int64_t steps = call.features.end(call.shape) - call.features.first_position;
  run_team(plan.threads, plan.stands_in, work_of(plan, steps), runner,
           [&](Member& member) { kernel(call, plan, workspace, member); });
}
template <class T>
void run(const BackwardCall<T>& call, const Plan& plan, void* workspace, Runner runner,
         int64_t from, int64_t to) {
  const auto kernel = kernels_for(call, plan).backward;
  to = std::min(to, call.shape.steps);
  run_team(plan.threads, plan.stands_in, work_of(plan, to - from), runner,
           [&](Member& member) { kernel(call, plan, workspace, member, from, to); });
}

template <class T>
Wavefront plan_stack(const SequenceShape* shapes, int count, int max_threads, bool bf16_products) {
  std::vector<PlanInput> layers;
  for (int i = 0; i < count; ++i)
    layers.push_back(plan_input<T>(shapes[i], false, max_threads, bf16_products));
  return plan_wavefront(layers.data(), count);
}

template <class T>
void run_stack(const ForwardCall<T>* calls, const Plan* plans, void* const* workspaces, int count,
               const Wavefront& wave, Runner runner) {
  double work = 0;
  for (int layer = 0; layer < count; ++layer)
    work += work_of(plans[layer], calls[layer].shape.steps);
  const int64_t chunks = (calls[0].shape.steps + wave.chunk_steps - 1) / wave.chunk_steps;
  run_team(wave.threads, false, work, runner, [&](Member& member) {
    for (int64_t i = 0; i < chunks + count - 1; ++i)
      member.for_each_alone(count, [&](Member& alone, int64_t layer) {
        const int64_t chunk = i - layer;
        if (chunk < 0 || chunk >= chunks) return;
        kernels_for(calls[layer], plans[layer])
            .forward_chunk(calls[layer], plans[layer], workspaces[layer], alone,
                           chunk * wave.chunk_steps);
      });
  });
}

void run_jobs(int64_t jobs, int threads, double work, Runner runner,
              const std::function<void(int64_t)>& job) {
  run_team(threads, /*stands_in=*/false, work, runner,
           [&](Member& member) { member.for_each(jobs, job); });
}

template <class T>
WindowPlan plan_window(const WindowCall<T>& call, int max_threads) {
  return make_window_plan({call.shape, int(sizeof(T)), current_kernels().vector_bytes, call.window,
                           call.num_layers, max_threads});
}
template <class T>
size_t workspace_bytes(const WindowCall<T>& call, const WindowPlan& plan) {
  return current_kernels().of<T>().window_workspace(call, plan);
}
template <class T>
void run(const WindowCall<T>& call, const WindowPlan& plan, void* workspace, Runner runner) {
  const auto kernel = current_kernels().of<T>().window;
  run_team(plan.threads, plan.stands_in, plan.seconds, runner,
           [&](Member& member) { kernel(call, plan, workspace, member); });
}

#define RNN_EXT_INSTANTIATE(T)                                                                \
  template Plan plan_call<T>(const SequenceShape&, bool, int, bool, bool);                    \
  template size_t workspace_bytes<T>(const ForwardCall<T>&, const Plan&);                     \
  template size_t workspace_bytes<T>(const BackwardCall<T>&, const Plan&);                    \
  template void run<T>(const ForwardCall<T>&, const Plan&, void*, Runner);                    \
  template void run<T>(const BackwardCall<T>&, const Plan&, void*, Runner, int64_t, int64_t); \
  template WindowPlan plan_window<T>(const WindowCall<T>&, int);                              \
  template size_t workspace_bytes<T>(const WindowCall<T>&, const WindowPlan&);                \
  template void run<T>(const WindowCall<T>&, const WindowPlan&, void*, Runner);               \
  template Wavefront plan_stack<T>(const SequenceShape*, int, int, bool);                     \
  template void run_stack<T>(const ForwardCall<T>*, const Plan*, void* const*, int,           \
                             const Wavefront&, Runner);
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)

}  // namespace rnn_ext
