// A row of logits in chunks of 512 tokens, one to a warp at a time, 16 tokens a lane.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/bounded_noise.cuh"
#include "common/logits_type.h"
#include "common/tree_rules.h"

namespace taps::cuda {

TAPS_HD inline int64_t num_chunks(int64_t vocabulary) {
  return (vocabulary + kChunk - 1) / kChunk;
}

// A lane's logits of a chunk as they lie in memory, 16 bytes a vector.
template <LogitsType kType>
struct LaneLogits {
  using Format = LogitsFormat<kType>;
  using Bits = typename Format::Bits;
  static constexpr int kPerWord = 4 / sizeof(Bits);
  static constexpr int kVectors = kLaneTokens / (4 * kPerWord);

  uint32_t words[4 * kVectors];

  __device__ float operator[](int j) const {
    return Format::value(static_cast<Bits>(words[j / kPerWord] >> (32 / kPerWord * (j % kPerWord))));
  }
};

// One vector of them, to be taken one by one: a loop that is not unrolled cannot index registers.
template <LogitsType kType>
struct LogitsQueue {
  static constexpr int kPerWord = LaneLogits<kType>::kPerWord;
  static constexpr int kLength = 4 * kPerWord;

  uint32_t words[4];

  __device__ float pop() {
    const float first = LogitsFormat<kType>::value(static_cast<typename LogitsFormat<kType>::Bits>(words[0]));
#pragma unroll
    for (int w = 0; w < 3; ++w) {
      words[w] = kPerWord == 1 ? words[w + 1] : words[w] >> 16 | words[w + 1] << 16;
    }
    words[3] >>= 16;
    return first;
  }
};

template <LogitsType kType>
struct ChunkedRow {
  using Logits = LaneLogits<kType>;
  using Format = typename Logits::Format;
  using Bits = typename Logits::Bits;
  static constexpr int kPerVector = sizeof(uint4) / sizeof(Bits);

  const Bits* data;  // [V]
  int vocabulary;

  __device__ int num_chunks() const { return static_cast<int>(cuda::num_chunks(vocabulary)); }
  __device__ float at(int token) const { return Format::value(data[token]); }

  // Chunks before this one are read as vectors, the others one logit at a time.
  __device__ int vector_end() const {
    return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0 ? vocabulary / kChunk : 0;
  }

  // Past the vocabulary: -inf.
  template <bool kAsVectors>
  __device__ __forceinline__ Logits load(int chunk) const {
    Logits logits;
    if constexpr (kAsVectors) {
#pragma unroll
      for (int v = 0; v < Logits::kVectors; ++v) {
        const uint4 vector = __ldg(reinterpret_cast<const uint4*>(data + token<true>(chunk, v * kPerVector)));
        logits.words[4 * v] = vector.x;
        logits.words[4 * v + 1] = vector.y;
        logits.words[4 * v + 2] = vector.z;
        logits.words[4 * v + 3] = vector.w;
      }
    } else {
      Bits bits[kLaneTokens];
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        const int at = token<false>(chunk, j);
        bits[j] = at < vocabulary ? __ldg(data + at) : Format::kMinusInfinity;
      }
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        constexpr int kPerWord = Logits::kPerWord;
        const uint32_t shifted = static_cast<uint32_t>(bits[j]) << (32 / kPerWord * (j % kPerWord));
        logits.words[j / kPerWord] = j % kPerWord == 0 ? shifted : logits.words[j / kPerWord] | shifted;
      }
    }
    return logits;
  }

  __device__ Logits load(int chunk) const { return chunk < vector_end() ? load<true>(chunk) : load<false>(chunk); }

  // The token of a lane's j-th logit; it grows with j.
  template <bool kAsVectors>
  __device__ static int token(int chunk, int j) {
    return chunk * kChunk + (kAsVectors
                                 ? j / kPerVector * kWarp * kPerVector + lane_index() * kPerVector + j % kPerVector
                                 : j * kWarp + lane_index());
  }

  __device__ int token(int chunk, int j) const {
    return chunk < vector_end() ? token<true>(chunk, j) : token<false>(chunk, j);
  }
};

}  // namespace taps::cuda
