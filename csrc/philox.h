// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11):
// random numbers as a function of a counter and a key. A number depends on nothing but its own
// position, so any number of threads may compute them in any order.
#pragma once

#include <array>
#include <cstdint>

namespace rnn_ext {

using PhiloxBlock = std::array<uint32_t, 4>;

// The four words that belong to a counter, a word each least significant first.
inline PhiloxBlock philox(PhiloxBlock counter, std::array<uint32_t, 2> key) {
  constexpr int kRounds = 10;
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;  // golden ratio, sqrt(3) - 1
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = kMultiplier0 * counter[0];
    const uint64_t product1 = kMultiplier1 * counter[2];
    counter = {uint32_t(product1 >> 32) ^ counter[1] ^ key[0], uint32_t(product1),
               uint32_t(product0 >> 32) ^ counter[3] ^ key[1], uint32_t(product0)};
    key[0] += kWeyl0;
    key[1] += kWeyl1;
  }
  return counter;
}

// The same for 64-bit positions and keys.
inline PhiloxBlock philox(uint64_t counter, uint64_t key) {
  return philox(PhiloxBlock{uint32_t(counter), uint32_t(counter >> 32), 0, 0},
                {uint32_t(key), uint32_t(key >> 32)});
}

}  // namespace rnn_ext
