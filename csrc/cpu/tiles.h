// AMX tiles: eight registers of 16 rows of 64 bytes, and their product of bfloat16 pairs. With
// RNN_EXT_EMULATE_TILES the same functions in plain code, for tests on machines without AMX.
//
// Nothing here has run on a processor with AMX yet.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rnn_ext::RNN_EXT_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileElements = 16;  // 32-bit elements of a row

#if defined(RNN_EXT_EMULATE_TILES)

struct Tiles {
  int32_t values[8][kTileRows][kTileElements];

  template <int kTile>
  void zero() {
    std::memset(values[kTile], 0, sizeof values[kTile]);
  }
  template <int kTile>
  void load(const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r)
      std::memcpy(values[kTile][r], static_cast<const char*>(from) + r * stride, 64);
  }
  template <int kTile>
  void store(void* to, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r)
      std::memcpy(static_cast<char*>(to) + r * stride, values[kTile][r], 64);
  }
  template <int kSum, int kLeft, int kRight>
  void multiply_add() {
    for (int m = 0; m < kTileRows; ++m)
      for (int k = 0; k < kTileElements; ++k)
        for (int n = 0; n < kTileElements; ++n) {
          float sum = as_float(values[kSum][m][n]);
          sum += as_float(values[kLeft][m][k] << 16) * as_float(values[kRight][k][n] << 16);
          sum += as_float(values[kLeft][m][k] & kUpper) * as_float(values[kRight][k][n] & kUpper);
          std::memcpy(&values[kSum][m][n], &sum, sizeof sum);
        }
  }

 private:
  static constexpr int32_t kUpper = int32_t(0xffff0000u);
  static float as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

#elif defined(__AMX_BF16__)

// While one exists, this thread's tile registers are in use.
class Tiles {
 public:
  RNN_EXT_INLINE Tiles() {
    Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = kTileRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  RNN_EXT_INLINE ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  RNN_EXT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  // Rows `stride` bytes apart.
  template <int kTile>
  RNN_EXT_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  RNN_EXT_INLINE void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kSum, int kLeft, int kRight>
  RNN_EXT_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

#endif

}  // namespace rnn_ext::RNN_EXT_ISA
