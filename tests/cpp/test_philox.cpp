// The known answers that the authors of Random123 publish (kat_vectors, philox4x32 10).
#include "check.h"
#include "philox.h"

namespace {

using rnn_ext::philox;
using rnn_ext::PhiloxBlock;

TEST(known_answers) {
  CHECK((philox(PhiloxBlock{0, 0, 0, 0}, {0, 0}) ==
         PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = 0xffffffff;
  CHECK((philox(PhiloxBlock{ones, ones, ones, ones}, {ones, ones}) ==
         PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  CHECK((philox(PhiloxBlock{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                {0xa4093822, 0x299f31d0}) ==
         PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(positions_and_keys_of_64_bits) {
  CHECK((philox(0x0000000500000007, 0x0000000b0000000d) ==
         philox(PhiloxBlock{7, 5, 0, 0}, {13, 11})));
}

}  // namespace
