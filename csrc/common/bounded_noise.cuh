// Gumbel noise for many tokens of which only the largest sums of logit and noise matter: what the noise of a token may
// be at most decides from its random word alone, as an integer, whether the token can matter at all.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/philox.h"
#include "common/sampling_rule.h"

namespace taps::cuda {

constexpr int kLaneTokens = 16;              // of a chunk
constexpr int kChunk = kWarp * kLaneTokens;  // tokens that a warp takes at a time
constexpr float kLeastNoise = -3.14f;        // below the noise of every word
constexpr float kNoiseSlack = kBoundSlack;   // far more than float32 loses below

// The words of a lane's tokens in a chunk, a counter for every four.
struct LaneWords {
  static constexpr int kQuads = kLaneTokens / 4;
  PhiloxWords quads[kQuads];

  __device__ static int token(int chunk, int j) {
    return chunk * kChunk + j / 4 * (kWarp * 4) + lane_index() * 4 + j % 4;
  }

  __device__ uint32_t operator[](int j) const { return quads[j / 4].word[j % 4]; }

  __device__ uint32_t least() const {
    uint32_t least = quads[0].word[0];
#pragma unroll
    for (int j = 1; j < kLaneTokens; ++j) {
      least = min(least, (*this)[j]);
    }
    return least;
  }
};

__device__ __forceinline__ LaneWords lane_words(int64_t seed, int64_t position, int chunk) {
  LaneWords words;
#pragma unroll
  for (int quad = 0; quad < LaneWords::kQuads; ++quad) {
    words.quads[quad] = noise_words(seed, position, static_cast<uint32_t>(LaneWords::token(chunk, 4 * quad)) / 4);
  }
  return words;
}

// The largest word whose noise may reach the value: small words are large noise, gumbel <= -log(uniform).
__device__ __forceinline__ uint32_t largest_word_reaching(float value) {
  const float words = expf(kNoiseSlack - value) * 0x1p32f;
  return words < 0x1p32f ? static_cast<uint32_t>(words) : UINT32_MAX;
}

// At most gumbel(word), and close below it for all but the largest words.
__device__ inline float gumbel_floor(uint32_t word) {
  const float uniform = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return uniform < 0.99f ? -logf(-log1pf(-uniform)) - kNoiseSlack : kLeastNoise;
}

}  // namespace taps::cuda
