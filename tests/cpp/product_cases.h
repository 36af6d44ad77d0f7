// The products are templates of one instruction set, out of reach through the engine's table. So
// product_cases.cpp is compiled once per instruction set, like kernels.cpp and under the same rule:
// nothing in it that the linker could share. It reports here instead of including check.h.
#pragma once

#include <cstdint>

namespace rnn_ext {

// A case that came out wrong, by the line that checks it and up to four of its sizes.
void product_failed(int line, int64_t a, int64_t b = -1, int64_t c = -1, int64_t d = -1);

// Each runs all cases of its types and returns how many there were.
namespace unit_scalar {
int64_t check_products();
}
namespace unit_avx2 {
int64_t check_products();
}
namespace unit_avx512 {
int64_t check_products();
}
namespace unit_avx512_bf16 {
int64_t check_products();  // of bfloat16 operands
}
namespace unit_amx {
int64_t check_products();  // the same on emulated tiles
}

}  // namespace rnn_ext
