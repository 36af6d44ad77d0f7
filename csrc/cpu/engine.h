// The CPU engine as the outside sees it: free of torch, for the torch layer and for the C++ tests.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels.h"
#include "plan.h"
#include "team.h"

namespace rnn_ext {

// --- Instruction sets ---------------------------------------------------------------------------

// Names this machine can run, slowest first. "scalar" is the baseline of the target (SSE2 on
// x86-64, NEON on aarch64); "avx512_bf16" is avx512 with products of bfloat16.
std::vector<std::string> available_isas();
const Kernels& current_kernels();
// False if the name is unknown or this machine cannot run it; nothing changes then. Not to be
// called while a call is running in another thread.
bool select_isa(const std::string& name);

// --- Calls --------------------------------------------------------------------------------------

// T is float or double. A shape needs steps >= 1 and batch >= 1. `workspace` has at least the bytes
// asked for, 64-byte aligned, uninitialized. With plan.threads == 1 the runner is not used.
// two_parts: those of the call's features.
template <class T>
Plan plan_call(const SequenceShape& shape, bool backward, int max_threads,
               bool bf16_products = false, bool two_parts = false);

template <class T>
size_t workspace_bytes(const ForwardCall<T>& call, const Plan& plan);
template <class T>
void run(const ForwardCall<T>& call, const Plan& plan, void* workspace, Runner runner);

// A stack of layers, forward: each call's x is the y of the one before. `wave` from plan_stack has
// chunks, and each plan and workspace is for one thread with that many chunk_steps.
template <class T>
Wavefront plan_stack(const SequenceShape* shapes, int count, int max_threads, bool bf16_products);
template <class T>
void run_stack(const ForwardCall<T>* calls, const Plan* plans, void* const* workspaces, int count,
               const Wavefront& wave, Runner runner);

template <class T>
size_t workspace_bytes(const BackwardCall<T>& call, const Plan& plan);
// Positions [from, to) only: the runs of one call follow each other in order, with one workspace.
template <class T>
void run(const BackwardCall<T>& call, const Plan& plan, void* workspace, Runner runner,
         int64_t from = 0, int64_t to = INT64_MAX);

// job(i) for 0 <= i < jobs, shared out over a team that is watched as that of a call is. `work`:
// the seconds that the cost model expects of one thread for all of them. A job must not throw.
void run_jobs(int64_t jobs, int threads, double work, Runner runner,
              const std::function<void(int64_t)>& job);

template <class T>
WindowPlan plan_window(const WindowCall<T>& call, int max_threads);
template <class T>
size_t workspace_bytes(const WindowCall<T>& call, const WindowPlan& plan);
template <class T>
void run(const WindowCall<T>& call, const WindowPlan& plan, void* workspace, Runner runner);

}  // namespace rnn_ext
