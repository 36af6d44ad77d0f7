// Stackful coroutines: a context is where a stack was left.
#pragma once

#include <cstddef>

namespace rnn_ext::cuda::host {

struct Context {
  void* stack_pointer = nullptr;  // x86-64; elsewhere a ucontext_t of its own
  void* fake_stack = nullptr;     // AddressSanitizer's
  const void* bottom = nullptr;
  size_t size = 0;
};

// Makes `context` call entry() on that stack when first switched to. entry() never returns.
void prepare(Context& context, void* bottom, size_t size, void (*entry)());

// Leaves the running context in `from` and continues `to`. `dying`: `from` is never continued.
void switch_context(Context& from, Context& to, bool dying = false);

// To be called first in entry().
void entered(Context& self);

}  // namespace rnn_ext::cuda::host
