// The choice of instruction set.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/engine.h"

using namespace rnn_ext;

// First in this file: nothing has been selected yet.
TEST(fastest_by_default) {
  std::vector<std::string> isas = available_isas();
  if (isas.back() == "amx") isas.pop_back();  // only when asked for
  CHECK_EQ(current_kernels().name, isas.back());
}

TEST(available) {
  const std::vector<std::string> isas = available_isas();
  CHECK(!isas.empty());
  CHECK_EQ(isas.front(), "scalar");
  const bool amx = isas.back() == "amx";
  std::vector<std::string> expected = {"scalar"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) expected.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    expected.push_back("avx512");
  if (__builtin_cpu_supports("avx512bf16")) expected.push_back("avx512_bf16");
#endif
  if (amx) expected.push_back("amx");
  CHECK(isas == expected);
}

TEST(select) {
  int narrower = 0;
  for (const std::string& isa : available_isas()) {
    check::Scope scope(isa);
    CHECK(select_isa(isa));
    CHECK_EQ(current_kernels().name, isa);
    CHECK(current_kernels().vector_bytes > narrower || current_kernels().bf16_products);
    narrower = current_kernels().vector_bytes;
    CHECK_EQ(select_isa(isa), true);  // again
  }
}

TEST(refuse) {
  const std::string selected = current_kernels().name;
  for (const char* name : {"", "sse", "AVX2", "avx", "avx51", "avx5122", "scalar ", "auto"}) {
    check::Scope scope(name);
    CHECK(!select_isa(name));
    CHECK_EQ(current_kernels().name, selected);
  }
  const std::vector<std::string> isas = available_isas();
  for (const char* name : {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"}) {
    check::Scope scope(name);
    CHECK_EQ(select_isa(name), std::count(isas.begin(), isas.end(), name) == 1);
  }
  CHECK(select_isa(selected));
}
