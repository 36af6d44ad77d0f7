// What the lanes of a warp do together.
#include <cstring>
#include <utility>

#include "beyond_kernels.h"
#include "executor_state.h"

namespace rnn_ext::cuda::host {

uint64_t shuffle(Shuffle kind, uint64_t bits, int argument) {
  const Inside inside;
  struct Lane {
    Shuffle kind;
    uint64_t bits, result;
    int argument;
  };
  static const WarpOperation operation{
      "in a shuffle",
      [](void* const* arguments) {
        const auto lane_at = [&](int i) -> Lane& { return *static_cast<Lane*>(arguments[i]); };
        for (int i = 0; i < kWarpSize; ++i) {
          Lane& lane = lane_at(i);
          int from = lane.kind == Shuffle::kXor    ? i ^ lane.argument
                     : lane.kind == Shuffle::kDown ? i + lane.argument
                                                   : lane.argument % kWarpSize;
          if (from < 0 || from >= kWarpSize) from = i;
          lane.result = lane_at(from).bits;
        }
      },
      false};
  Lane lane{kind, bits, 0, argument};
  warp_together(operation, &lane, RNN_EXT_SITE);
  return lane.result;
}

uint32_t vote_ballot(bool p) {
  const Inside inside;
  struct Lane {
    bool p;
    uint32_t result;
  };
  static const WarpOperation operation{"in a vote",
                                       [](void* const* arguments) {
                                         uint32_t votes = 0;
                                         for (int i = 0; i < kWarpSize; ++i)
                                           votes |= uint32_t(static_cast<Lane*>(arguments[i])->p)
                                                    << i;
                                         for (int i = 0; i < kWarpSize; ++i)
                                           static_cast<Lane*>(arguments[i])->result = votes;
                                       },
                                       false};
  Lane lane{p, 0};
  warp_together(operation, &lane, RNN_EXT_SITE);
  return lane.result;
}

// --- Matrix fragments ----------------------------------------------------------------------------
// Layouts: portable_nvcc.h.

static float half_of(uint32_t two, int which, bool bfloat16) {
  const auto bits = uint16_t(two >> (16 * which));
  return bfloat16 ? float_of(BFloat16{bits}) : float_of(Float16{bits});
}

namespace {
struct MmaLane {
  float* acc;
  const uint32_t *a, *b;
};
}  // namespace

// acc (16, 8) += a (16, K) b (K, 8), sums in the order of K.
template <int K>
static void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      float& sum = static_cast<const MmaLane*>(lanes[lane])->acc[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
    }
}

template <bool kBFloat16>
static void run_mma16(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto* m = static_cast<const MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int half = 0; half < 2; ++half)
        a[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = half_of(m->a[r], half, kBFloat16);
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half)
        b[2 * t + r * 8 + half][g] = half_of(m->b[r], half, kBFloat16);
  }
  multiply(lanes, a, b);
}

void mma_m16n8k16(float* acc, const uint32_t* a, const uint32_t* b, bool bfloat16) {
  const Inside inside;
  static const WarpOperation of_float16{"in a product", run_mma16<false>, false};
  static const WarpOperation of_bfloat16{"in a product", run_mma16<true>, false};
  MmaLane lane{acc, a, b};
  warp_together(bfloat16 ? of_bfloat16 : of_float16, &lane, RNN_EXT_SITE);
}

void mma_m16n8k8_tf32(float* acc, const uint32_t* a, const uint32_t* b) {
  const Inside inside;
  static const WarpOperation operation{
      "in a product",
      [](void* const* lanes) {
        const auto value = [](uint32_t bits) {  // the hardware ignores the lowest 13 bits
          return __builtin_bit_cast(float, bits & ~0x1fffu);
        };
        float a[16][8], b[8][8];
        for (int lane = 0; lane < kWarpSize; ++lane) {
          const auto* m = static_cast<const MmaLane*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = value(m->a[r]);
          for (int r = 0; r < 2; ++r) b[t + r * 4][g] = value(m->b[r]);
        }
        multiply(lanes, a, b);
      },
      false};
  MmaLane lane{acc, a, b};
  warp_together(operation, &lane, RNN_EXT_SITE);
}

void load_matrix(uint32_t* registers, const void* row, int count, bool transpose) {
  const Inside inside;
  Executor& e = executor();
  const void* site = RNN_EXT_SITE;
  struct Lane {
    uint32_t* registers;
    const void* row;
    int count;
    bool transpose;
  };
  static const WarpOperation operation{
      "in a load of matrices",
      [](void* const* lanes) {
        const auto* first = static_cast<const Lane*>(lanes[0]);
        for (int m = 0; m < first->count; ++m)
          for (int lane = 0; lane < kWarpSize; ++lane) {
            uint16_t two[2];
            for (int half = 0; half < 2; ++half) {
              int r = lane / 4, c = lane % 4 * 2 + half;
              if (first->transpose) std::swap(r, c);
              const auto* from = static_cast<const Lane*>(lanes[8 * m + r]);
              std::memcpy(&two[half], static_cast<const char*>(from->row) + 2 * c, 2);
            }
            static_cast<const Lane*>(lanes[lane])->registers[m] =
                uint32_t(two[0]) | uint32_t(two[1]) << 16;
          }
      },
      false};
  // Every address has to be one of a row, also those that are not used.
  const Allocation* from = e.memory.find(row);
  if (!from || from->block < 0 || reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    report(Fault::kMisaligned, "load_matrix from " + e.memory.describe(row), site);
    abort_launch();
  }
  if (place.thread % kWarpSize < 8 * count &&
      !e.memory.check(*e.current, row, 16, Kind::kRead, site))
    abort_launch();
  Lane lane{registers, row, count, transpose};
  warp_together(operation, &lane, site);
}

}  // namespace rnn_ext::cuda::host
