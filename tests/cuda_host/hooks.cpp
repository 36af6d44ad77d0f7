// The functions that -fsanitize=thread makes the compiler call before every access to memory. The
// sanitizer's own library is not linked: these stand in for it, and this file and the executor are
// compiled without that flag.
#include "hooks.h"

#include <link.h>

#include <utility>

#include "executor.h"

namespace rnn_ext::cuda::host {

Hooks hooks;

// The program or library that holds the kernels: its constants may be read.
static bool in_image(const void* p) {
  static const auto extent = [] {
    struct Found {
      uintptr_t begin = 0, end = 0;
    } found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          uintptr_t begin = UINTPTR_MAX, end = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const uintptr_t at = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            begin = at < begin ? at : begin;
            end = at + info->dlpi_phdr[i].p_memsz > end ? at + info->dlpi_phdr[i].p_memsz : end;
          }
          const auto self = reinterpret_cast<uintptr_t>(&hooks);
          if (self < begin || self >= end) return 0;
          *static_cast<Found*>(out) = {begin, end};
          return 1;
        },
        &found);
    return found;
  }();
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at >= extent.begin && at < extent.end;
}

static inline void access(const void* p, size_t bytes, bool is_write, bool aligned,
                          const void* site) {
  if (!hooks.active) return;
  if (size_t(static_cast<const char*>(p) - hooks.stack_begin) < hooks.stack_size) return;
  if (!is_write && in_image(p)) return;
  if (--hooks.until_preemption <= 0) preempt();
  checked_access(p, bytes, is_write, aligned, site);
}

}  // namespace rnn_ext::cuda::host

using rnn_ext::cuda::host::access;

#define RNN_EXT_HOOK __attribute__((visibility("default"))) void
#define RNN_EXT_HOOKS(bytes)                                     \
  RNN_EXT_HOOK __tsan_read##bytes(void* p) {                     \
    access(p, bytes, false, true, __builtin_return_address(0));  \
  }                                                              \
  RNN_EXT_HOOK __tsan_write##bytes(void* p) {                    \
    access(p, bytes, true, true, __builtin_return_address(0));   \
  }                                                              \
  RNN_EXT_HOOK __tsan_unaligned_read##bytes(void* p) {           \
    access(p, bytes, false, false, __builtin_return_address(0)); \
  }                                                              \
  RNN_EXT_HOOK __tsan_unaligned_write##bytes(void* p) {          \
    access(p, bytes, true, false, __builtin_return_address(0));  \
  }

extern "C" {
RNN_EXT_HOOKS(1)
RNN_EXT_HOOKS(2)
RNN_EXT_HOOKS(4)
RNN_EXT_HOOKS(8)
RNN_EXT_HOOKS(16)
RNN_EXT_HOOK __tsan_read_range(void* p, size_t bytes) {
  if (bytes > 0) access(p, bytes, false, false, __builtin_return_address(0));
}
RNN_EXT_HOOK __tsan_write_range(void* p, size_t bytes) {
  if (bytes > 0) access(p, bytes, true, false, __builtin_return_address(0));
}
RNN_EXT_HOOK __tsan_init() {}
RNN_EXT_HOOK __tsan_func_entry(void*) {}
RNN_EXT_HOOK __tsan_func_exit() {}
RNN_EXT_HOOK __tsan_vptr_update(void**, void*) {}
RNN_EXT_HOOK __tsan_vptr_read(void**) {}
}
