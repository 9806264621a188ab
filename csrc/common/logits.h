// Rows of logits on the CPU, in blocks of 64 tokens: the exact upcast to float32, the maximum of each block, and the
// k-th largest logit, which the maxima of the blocks bound. Plain loops of fixed length, for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

// One body, compiled for each of these instruction sets and chosen when the library loads: a wheel for any x86-64 runs
// at the machine's width. Without contraction (-ffp-contract=off) all give the same bits. Sanitizers dislike ifuncs.
#if !defined(TAPS_EACH_CPU) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TAPS_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif defined(__GNUC__) && !defined(__clang__)
#define TAPS_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef TAPS_EACH_CPU
#define TAPS_EACH_CPU
#endif

// Called from such a body, a function must be inlined to be compiled for its instruction set.
#if defined(__GNUC__)
#define TAPS_INLINE inline __attribute__((always_inline))
#else
#define TAPS_INLINE inline
#endif

namespace taps {

enum class LogitsType { kFloat32, kBFloat16, kFloat16 };

constexpr int kBlock = 64;  // tokens
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t num_blocks(int64_t vocabulary) {
  return (vocabulary + kBlock - 1) / kBlock;
}

TAPS_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Without a branch, for the vectoriser, and without a subnormal float32, which could be flushed to 0: a subnormal half
// is read as 2^-14 plus its value, and 2^-14 is taken off.
TAPS_INLINE float float_from_half(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t is_full = 0u - (magnitude >= 0x7C00u);  // all ones for infinity and NaN, which keep a full exponent
  const uint32_t is_subnormal = 0u - (magnitude < 0x0400u);
  const uint32_t bits = (magnitude << 13) + 0x38000000u + (is_full & 0x38000000u) + (is_subnormal & 0x00800000u);
  const float value = float_from_bits(bits) - float_from_bits(is_subnormal & 0x38800000u);
  uint32_t signless;
  std::memcpy(&signless, &value, sizeof(signless));
  return float_from_bits(signless | static_cast<uint32_t>(half & 0x8000u) << 16);
}

// One row of logits. The vocabulary is contiguous.
struct LogitsRow {
  const void* data;  // [V]
  LogitsType type;
  int64_t vocabulary;

  TAPS_INLINE float at(int64_t token) const {
    if (type == LogitsType::kFloat32) {
      return static_cast<const float*>(data)[token];
    }
    const uint16_t bits = static_cast<const uint16_t*>(data)[token];
    return type == LogitsType::kBFloat16 ? float_from_bits(static_cast<uint32_t>(bits) << 16) : float_from_half(bits);
  }

  // The 64 logits of a block, in place where possible, else in `buffer`; past the vocabulary: -inf.
  TAPS_INLINE const float* block(int64_t index, float* buffer) const {
    const int64_t first = index * kBlock;
    if (first + kBlock > vocabulary) {
      for (int j = 0; j < kBlock; ++j) {
        buffer[j] = first + j < vocabulary ? at(first + j) : -kInfinity;
      }
      return buffer;
    }
    if (type == LogitsType::kFloat32) {
      return static_cast<const float*>(data) + first;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(data) + first;
    if (type == LogitsType::kBFloat16) {
      for (int j = 0; j < kBlock; ++j) {
        buffer[j] = float_from_bits(static_cast<uint32_t>(halves[j]) << 16);
      }
    } else {
      for (int j = 0; j < kBlock; ++j) {
        buffer[j] = float_from_half(halves[j]);
      }
    }
    return buffer;
  }
};

// The row that starts `offset` elements behind `data`.
inline LogitsRow logits_row(const void* data, LogitsType type, int64_t offset, int64_t vocabulary) {
  const int64_t bytes = type == LogitsType::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(data) + offset * bytes, type, vocabulary};
}

TAPS_INLINE float larger_of(float value, float number) {
  return value > number ? value : number;  // `number` where `value` is NaN
}

// The largest of a block's logits, NaN left out: -inf where all are NaN.
TAPS_INLINE float maximum_of(const float* block) {
  alignas(64) float lanes[32];
  for (int j = 0; j < 16; ++j) {
    const float first = larger_of(block[j + 16], larger_of(block[j], -kInfinity));
    lanes[j] = larger_of(block[j + 48], larger_of(block[j + 32], first));
  }
  for (int j = 0; j < 8; ++j) {
    lanes[16 + j] = larger_of(lanes[j + 8], lanes[j]);
  }
  for (int j = 0; j < 4; ++j) {
    lanes[j] = larger_of(lanes[20 + j], lanes[16 + j]);
  }
  return larger_of(larger_of(lanes[3], lanes[2]), larger_of(lanes[1], lanes[0]));
}

// At most the k-th largest logit of the row (1 <= k <= V): each of the k best blocks holds a logit of at least this.
// `scratch` is overwritten.
inline float bound_of_k_best(const std::vector<float>& block_maxima, int64_t k, std::vector<float>& scratch) {
  if (k > static_cast<int64_t>(block_maxima.size())) {
    return -kInfinity;
  }
  scratch = block_maxima;
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<float>());
  return scratch[k - 1];
}

// Calls visit(token, logit) for the tokens of at least `bound`, in order, NaN left out.
template <typename Visit>
void for_each_token_from(const LogitsRow& row, const std::vector<float>& block_maxima, float bound, Visit visit) {
  alignas(64) float buffer[kBlock];
  for (int64_t index = 0; index < static_cast<int64_t>(block_maxima.size()); ++index) {
    if (block_maxima[index] < bound) {
      continue;
    }
    const float* block = row.block(index, buffer);
    const int64_t first = index * kBlock;
    const int count = static_cast<int>(std::min<int64_t>(kBlock, row.vocabulary - first));
    for (int j = 0; j < count; ++j) {
      if (block[j] >= bound) {
        visit(first + j, block[j]);
      }
    }
  }
}

}  // namespace taps
