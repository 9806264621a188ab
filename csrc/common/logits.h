// Rows of logits on the CPU, in blocks of 64 tokens: the exact upcast to float32, the maximum of each block, and the
// k-th largest logit, which the maxima of the blocks bound. Plain loops of fixed length, for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "common/logits_type.h"

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

namespace taps {

constexpr int kBlock = 64;  // tokens

inline int64_t num_blocks(int64_t vocabulary) {
  return (vocabulary + kBlock - 1) / kBlock;
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

// Calls visit(token, logit) for the tokens of at least `bound`, in order, NaN left out. A row has a vocabulary and
// blocks.
template <typename Row, typename Visit>
void for_each_token_from(const Row& row, const std::vector<float>& block_maxima, float bound, Visit visit) {
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
