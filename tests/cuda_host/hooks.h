// What the compiler's instrumentation calls, and what it shares with the executor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rnn_ext::cuda::host {

struct Hooks {
  bool active = false;  // kernel code is running
  const char* stack_begin = nullptr;
  size_t stack_size = 0;
  int64_t until_preemption = INT64_MAX;
};
extern Hooks hooks;

void checked_access(const void* p, size_t bytes, bool is_write, bool aligned, const void* site);
void preempt();

}  // namespace rnn_ext::cuda::host
