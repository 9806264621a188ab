// A row of logits in chunks of 256 tokens, one to a warp at a time, eight tokens a lane.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/bounded_noise.cuh"
#include "common/logits_type.h"
#include "common/tree_rules.h"

namespace taps::cuda {

// The logit that has this standing (tree_rules.h; larger logits have smaller standings).
__device__ __forceinline__ float logit_of(uint32_t standing) {
  return float_from_bits((standing >> 31) != 0 ? standing : 0x7FFFFFFFu - standing);
}

TAPS_HD inline int64_t num_chunks(int64_t vocabulary) {
  return (vocabulary + kChunk - 1) / kChunk;
}

template <LogitsType kType>
struct LogitsFormat;

template <>
struct LogitsFormat<LogitsType::kFloat32> {
  using Bits = uint32_t;
  static constexpr Bits kMinusInfinity = 0xFF800000u;
  __device__ static float value(Bits bits) { return float_from_bits(bits); }
};

template <>
struct LogitsFormat<LogitsType::kBFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kMinusInfinity = 0xFF80u;
  __device__ static float value(Bits bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

template <>
struct LogitsFormat<LogitsType::kFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kMinusInfinity = 0xFC00u;
  __device__ static float value(Bits bits) { return float_from_half(bits); }
};

// The eight logits of a lane as they lie in memory, 16 bytes a vector.
template <LogitsType kType>
struct LaneLogits {
  using Format = LogitsFormat<kType>;
  using Bits = typename Format::Bits;
  static constexpr int kVectors = kLaneTokens * sizeof(Bits) / sizeof(uint4);
  static constexpr int kPerWord = 4 / sizeof(Bits);

  uint32_t words[4 * kVectors];

  __device__ float operator[](int j) const {
    return Format::value(static_cast<Bits>(words[j / kPerWord] >> (32 / kPerWord * (j % kPerWord))));
  }

  // The first one, and the others move up: a loop that is not unrolled cannot index registers.
  __device__ float pop() {
    const float first = (*this)[0];
#pragma unroll
    for (int w = 0; w + 1 < 4 * kVectors; ++w) {
      words[w] = kPerWord == 1 ? words[w + 1] : words[w] >> 16 | words[w + 1] << 16;
    }
    words[4 * kVectors - 1] >>= 16;
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
