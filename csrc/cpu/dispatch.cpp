#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

#include "engine.h"

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
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    static const Kernels avx512 = [] {
      Kernels copy = avx512::kKernels;
      // Where the last level of cache is slow; elsewhere not measured.
      if (__builtin_cpu_is("intel")) copy.streamed_reserve_bytes = 6 << 20;
      return copy;
    }();
    kernels.push_back(&avx512);
  }
#endif
#if defined(RNN_EXT_HAVE_AVX512_BF16)
  const Kernels& widest = *kernels.back();
  if (widest.vector_bytes == 64 && __builtin_cpu_supports("avx512bf16")) {
    static const Kernels with_bf16 = [&] {
      Kernels copy = widest;
      copy.name = "avx512_bf16";
      copy.bf16_products = &avx512_bf16::kBFloat16Products;
      // Intel's vdpbf16ps has half the multiply-adds of float32, which leaves the shorter reads.
      if (__builtin_cpu_is("intel")) copy.bf16_products_rows = 1;
      return copy;
    }();
    kernels.push_back(&with_bf16);
#if defined(RNN_EXT_HAVE_AMX)
    static const Kernels with_amx = [&] {
      Kernels copy = widest;
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

}  // namespace rnn_ext
