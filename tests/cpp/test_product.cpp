// The products and the packing under every instruction set: see product_cases.h.
#include <cstdio>
#include <string>

#include "check.h"
#include "cpu/engine.h"
#include "product_cases.h"

void rnn_ext::product_failed(int line, int64_t a, int64_t b, int64_t c, int64_t d) {
  check::fail("product_cases.cpp", line)
      << "sizes " << a << ' ' << b << ' ' << c << ' ' << d << '\n';
}

namespace {

void run(const std::string& isa, int64_t (*check_products)()) {
  for (const std::string& name : rnn_ext::available_isas()) {
    if (name != isa) continue;
    check::Scope scope(isa);
    std::printf("  %lld cases\n", static_cast<long long>(check_products()));
    return;
  }
  std::printf("  not run: this machine has no %s\n", isa.c_str());
}

}  // namespace

TEST(scalar) { run("scalar", rnn_ext::unit_scalar::check_products); }
#if defined(RNN_EXT_HAVE_AVX2)
TEST(avx2) { run("avx2", rnn_ext::unit_avx2::check_products); }
#endif
#if defined(RNN_EXT_HAVE_AVX512)
TEST(avx512) { run("avx512", rnn_ext::unit_avx512::check_products); }
#endif
#if defined(RNN_EXT_HAVE_AVX512_BF16)
TEST(avx512_bf16) { run("avx512_bf16", rnn_ext::unit_avx512_bf16::check_products); }
#endif
#if defined(RNN_EXT_HAVE_AMX)
TEST(amx_emulated) { run("avx512_bf16", rnn_ext::unit_amx::check_products); }
#endif
