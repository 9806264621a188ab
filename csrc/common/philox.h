// Philox4x32-7, the counter-based generator of Salmon et al. (SC 2011): four random words from a counter and a key,
// no state, so that any word of any position can be had at any time, by any thread. Seven rounds are the fewest that
// pass BigCrush there; against the customary ten they take a fifth off verify_tree on a CPU. Their number is part of
// the result: another one changes every sampled text.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct PhiloxWords {
  uint32_t word[4];
};

struct Product {
  uint32_t high, low;
};

TAPS_HD inline Product product_of(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return {__umulhi(a, b), a * b};  // one instruction; a 64-bit product, shifted, costs another one
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
#endif
}

constexpr int kPhiloxRounds = 7;

TAPS_HD inline PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Product product0 = product_of(c0, 0xD2511F53u);
    const Product product1 = product_of(c2, 0xCD9E8D57u);
    c0 = product1.high ^ c1 ^ k0;
    c1 = product1.low;
    c2 = product0.high ^ c3 ^ k1;
    c3 = product0.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The noise of tokens 4 * quad .. 4 * quad + 3 at an absolute position, under a seed.
TAPS_HD inline PhiloxWords noise_words(int64_t seed, int64_t position, uint32_t quad) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const uint64_t place = static_cast<uint64_t>(position);
  return philox4x32(quad, 0, static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32),
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

// The word of one token.
TAPS_HD inline uint32_t noise_word(int64_t seed, int64_t position, uint32_t token) {
  const PhiloxWords words = noise_words(seed, position, token / 4);
  const uint32_t j = token % 4;
  return j == 0 ? words.word[0] : j == 1 ? words.word[1] : j == 2 ? words.word[2] : words.word[3];
}

}  // namespace taps
