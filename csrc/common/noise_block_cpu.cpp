#include "common/noise_block.h"

#include "common/philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TAPS_HAS_AVX512
#endif

namespace taps::cpu {

namespace {

static_assert(kBlock == 64, "a block is sixteen counters of four words");

TAPS_EACH_CPU void portable_noise_block(int64_t seed, int64_t position, int64_t first, uint32_t* words) {
  for (int quad = 0; quad < kBlock / 4; ++quad) {
    const PhiloxWords four = noise_words(seed, position, static_cast<uint32_t>(first / 4) + quad);
    words[4 * quad] = four.word[0];
    words[4 * quad + 1] = four.word[1];
    words[4 * quad + 2] = four.word[2];
    words[4 * quad + 3] = four.word[3];
  }
}

#ifdef TAPS_HAS_AVX512

// Compilers turn the 32 x 32 -> 64 bit products of the loop above into 64-bit multiplications, three times as slow as
// the instruction for it; hence by hand. The sixteen counters lie in the lanes: even lanes are multiplied in place, odd
// ones shifted down.
struct Products {
  __m512i high, low;
};

__attribute__((target("avx512f"), always_inline)) inline Products multiply(__m512i a, __m512i b) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  constexpr __mmask16 kOdd = 0xAAAA;
  return {_mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even, 32), odd),
          _mm512_mask_blend_epi32(kOdd, even, _mm512_slli_epi64(odd, 32))};
}

__attribute__((target("avx512f"), always_inline)) inline __m512i all(uint32_t value) {
  return _mm512_set1_epi32(static_cast<int>(value));
}

__attribute__((target("avx512f"))) void avx512_noise_block(int64_t seed, int64_t position, int64_t first,
                                                           uint32_t* words) {
  constexpr int kXor3 = 0x96;
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const uint64_t place = static_cast<uint64_t>(position);
  const uint64_t key = static_cast<uint64_t>(seed);
  __m512i c0 = _mm512_add_epi32(all(static_cast<uint32_t>(first / 4)), lanes);
  __m512i c1 = _mm512_setzero_si512();
  __m512i c2 = all(static_cast<uint32_t>(place));
  __m512i c3 = all(static_cast<uint32_t>(place >> 32));
  uint32_t k0 = static_cast<uint32_t>(key);
  uint32_t k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Products first_product = multiply(c0, all(0xD2511F53u));
    const Products second_product = multiply(c2, all(0xCD9E8D57u));
    c0 = _mm512_ternarylogic_epi32(second_product.high, c1, all(k0), kXor3);
    c1 = second_product.low;
    c2 = _mm512_ternarylogic_epi32(first_product.high, c3, all(k1), kXor3);
    c3 = first_product.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  // From word by word to counter by counter: a transposition of 4 x 16.
  const __m512i low01 = _mm512_unpacklo_epi32(c0, c1), high01 = _mm512_unpackhi_epi32(c0, c1);
  const __m512i low23 = _mm512_unpacklo_epi32(c2, c3), high23 = _mm512_unpackhi_epi32(c2, c3);
  const __m512i q0 = _mm512_unpacklo_epi64(low01, low23), q1 = _mm512_unpackhi_epi64(low01, low23);
  const __m512i q2 = _mm512_unpacklo_epi64(high01, high23), q3 = _mm512_unpackhi_epi64(high01, high23);
  const __m512i t0 = _mm512_shuffle_i32x4(q0, q1, 0x44), t1 = _mm512_shuffle_i32x4(q2, q3, 0x44);
  const __m512i t2 = _mm512_shuffle_i32x4(q0, q1, 0xEE), t3 = _mm512_shuffle_i32x4(q2, q3, 0xEE);
  _mm512_store_si512(words, _mm512_shuffle_i32x4(t0, t1, 0x88));
  _mm512_store_si512(words + 16, _mm512_shuffle_i32x4(t0, t1, 0xDD));
  _mm512_store_si512(words + 32, _mm512_shuffle_i32x4(t2, t3, 0x88));
  _mm512_store_si512(words + 48, _mm512_shuffle_i32x4(t2, t3, 0xDD));
}

#endif

}  // namespace

NoiseBlock noise_block() {
#ifdef TAPS_HAS_AVX512
  if (__builtin_cpu_supports("avx512f")) {
    return avx512_noise_block;
  }
#endif
  return portable_noise_block;
}

}  // namespace taps::cpu
