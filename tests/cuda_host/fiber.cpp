#include "fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace rnn_ext::cuda::host {

#if defined(__x86_64__)

// Saves what the calling convention asks a function to keep. swapcontext() would also change the
// signal mask: a system call for every switch.
extern "C" void rnn_ext_switch_stack(void** save, void* load);
asm(R"(
.text
.globl rnn_ext_switch_stack
.hidden rnn_ext_switch_stack
.type rnn_ext_switch_stack, @function
rnn_ext_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rnn_ext_switch_stack, .-rnn_ext_switch_stack
)");

static void start(Context& context, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(context.bottom) + context.size;
  auto* stack = reinterpret_cast<void**>(top & ~uintptr_t(15));
  *--stack = nullptr;  // where entry() would return to
  *--stack = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  context.stack_pointer = stack;
}
static void jump(Context& from, Context& to) {
  rnn_ext_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

static ucontext_t* ucontext_of(Context& context) {
  if (!context.stack_pointer) context.stack_pointer = new ucontext_t;  // kept with its stack
  return static_cast<ucontext_t*>(context.stack_pointer);
}
static void start(Context& context, void (*entry)()) {
  ucontext_t* u = ucontext_of(context);
  getcontext(u);
  u->uc_stack.ss_sp = const_cast<void*>(context.bottom);
  u->uc_stack.ss_size = context.size;
  u->uc_link = nullptr;
  makecontext(u, entry, 0);
}
static void jump(Context& from, Context& to) { swapcontext(ucontext_of(from), ucontext_of(to)); }

#endif

void prepare(Context& context, void* bottom, size_t size, void (*entry)()) {
  context.bottom = bottom;
  context.size = size;
  context.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom, size);  // what an abandoned fiber has left
#endif
  start(context, entry);
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool dying) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.bottom, to.size);
  jump(from, to);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  jump(from, to);
#endif
}

void entered([[maybe_unused]] Context& self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace rnn_ext::cuda::host
