#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <time.h>

#include <algorithm>
#include <atomic>

#include "engine.h"
#include "governor.h"

namespace rnn_ext {
namespace {

#if defined(RNN_EXT_HAVE_AMX)
bool amx_is_usable() {
#if defined(__linux__)
  // A process has to ask for the tile registers: they enlarge what the system saves of a thread.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> kernels = {&scalar::kKernels};
#if defined(RNN_EXT_HAVE_AVX2)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    kernels.push_back(&avx2::kKernels);
#endif
#if defined(RNN_EXT_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&avx512::kKernels);
#endif
#if defined(RNN_EXT_HAVE_AVX512_BF16)
  if (kernels.back() == &avx512::kKernels && __builtin_cpu_supports("avx512bf16")) {
    static const Kernels with_bf16 = [] {
      Kernels copy = avx512::kKernels;
      copy.name = "avx512_bf16";
      copy.bf16_products = &avx512_bf16::kBFloat16Products;
      return copy;
    }();
    kernels.push_back(&with_bf16);
#if defined(RNN_EXT_HAVE_AMX)
    static const Kernels with_amx = [] {
      Kernels copy = avx512::kKernels;
      copy.name = "amx";
      copy.bf16_products = &amx::kBFloat16Products;
      return copy;
    }();
    if (amx_is_usable()) kernels.push_back(&with_amx);
#endif
  }
#endif
  return kernels;
}

std::atomic<const Kernels*>& selected() {
  // The fastest, but for amx: that has to be asked for until it has been measured.
  static std::atomic<const Kernels*> kernels{[] {
    std::vector<const Kernels*> all = runnable_kernels();
    if (std::string(all.back()->name) == "amx") all.pop_back();
    return all.back();
  }()};
  return kernels;
}

int64_t clock_ns(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

// Start `plan.threads` members on the same call.
template <class Call>
void run_team(void (*kernel)(const Call&, const Plan&, void*, Member&), const Call& call,
              const Plan& plan, void* workspace, Runner runner) {
  Team team(plan.threads);
  const double work = plan.step_seconds * double(call.shape.steps);
  if (team.members() == 1) {
    Member alone(team, 0);
    const bool report = governor().on_trial();
    const int64_t start = report ? clock_ns(CLOCK_MONOTONIC) : 0;
    kernel(call, plan, workspace, alone);
    if (report) governor().one_thread_ran(work, clock_ns(CLOCK_MONOTONIC) - start);
    return;
  }
  struct Context {
    void (*kernel)(const Call&, const Plan&, void*, Member&);
    const Call& call;
    const Plan& plan;
    void* workspace;
    Team& team;
  } context{kernel, call, plan, workspace, team};
  governor().team_starts();
  const int64_t start = clock_ns(CLOCK_MONOTONIC), running = clock_ns(CLOCK_THREAD_CPUTIME_ID);
  const int64_t first_tick = ticks();
  runner(
      team.members(),
      [](int member, void* opaque) {
        const Context& c = *static_cast<Context*>(opaque);
        Member self(c.team, member);
        c.kernel(c.call, c.plan, c.workspace, self);
        c.team.close();
      },
      &context);
  const int64_t last_tick = ticks(), elapsed = clock_ns(CLOCK_MONOTONIC) - start;
  // Lost: waits for stalled members, the wait for the others at the end, and all the time in which
  // this thread itself was not running. The first two may be among the last.
  const double waited =
      double(team.ticks_lost() + last_tick - team.closed_at()) / double(last_tick - first_tick);
  const int64_t off = elapsed - (clock_ns(CLOCK_THREAD_CPUTIME_ID) - running);
  governor().team_ran(work, elapsed, std::max(int64_t(waited * double(elapsed)), off));
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& current_kernels() { return *selected().load(std::memory_order_relaxed); }

bool select_isa(const std::string& name) {
  for (const Kernels* kernels : runnable_kernels()) {
    if (name != kernels->name) continue;
    selected().store(kernels, std::memory_order_relaxed);
    return true;
  }
  return false;
}

template <class T>
Plan plan_call(const SequenceShape& shape, bool backward, int max_threads, bool bf16_products) {
  const Kernels& kernels = current_kernels();
  return make_plan({shape, int(sizeof(T)), kernels.vector_bytes, backward,
                    sizeof(T) == sizeof(float) && bf16_products && kernels.bf16_products,
                    max_threads});
}

namespace {

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

}  // namespace

template <class T>
size_t workspace_bytes(const ForwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan, current_kernels().of<T>()).forward_workspace(call, plan);
}
template <class T>
size_t workspace_bytes(const BackwardCall<T>& call, const Plan& plan) {
  return kernels_for(call, plan, current_kernels().of<T>()).backward_workspace(call, plan);
}
template <class T>
void run(const ForwardCall<T>& call, const Plan& plan, void* workspace, Runner runner) {
  run_team<ForwardCall<T>>(kernels_for(call, plan, current_kernels().of<T>()).forward, call, plan,
                           workspace, runner);
}
template <class T>
void run(const BackwardCall<T>& call, const Plan& plan, void* workspace, Runner runner) {
  run_team<BackwardCall<T>>(kernels_for(call, plan, current_kernels().of<T>()).backward, call, plan,
                            workspace, runner);
}

#define RNN_EXT_INSTANTIATE(T)                                             \
  template Plan plan_call<T>(const SequenceShape&, bool, int, bool);       \
  template size_t workspace_bytes<T>(const ForwardCall<T>&, const Plan&);  \
  template size_t workspace_bytes<T>(const BackwardCall<T>&, const Plan&); \
  template void run<T>(const ForwardCall<T>&, const Plan&, void*, Runner); \
  template void run<T>(const BackwardCall<T>&, const Plan&, void*, Runner);
RNN_EXT_INSTANTIATE(float)
RNN_EXT_INSTANTIATE(double)

}  // namespace rnn_ext
