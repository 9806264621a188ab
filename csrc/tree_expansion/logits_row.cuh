// Rows of logits on the device, loaded in chunks of 16 bytes that become float32 in registers.
#pragma once

#include "common/launch.cuh"
#include "common/logits_type.h"
#include "tree_expansion/expand_frontier.h"  // kTokensPerThread

namespace taps::cuda {

// The vocabulary is contiguous.
template <LogitsType kType>
struct Row {
  using Format = LogitsFormat<kType>;
  using Element = typename Format::Bits;
  static constexpr int kPerChunk = 16 / sizeof(Element);  // tokens in a load of 16 bytes
  const Element* data;                                    // [V]
  int vocabulary;

  static __device__ __forceinline__ void unpack(const uint4& chunk, float* logits) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kPerChunk == 4) {
        logits[i] = Format::value(words[i]);
      } else {
        logits[2 * i] = Format::value(static_cast<Element>(words[i] & 0xFFFFu));
        logits[2 * i + 1] = Format::value(static_cast<Element>(words[i] >> 16));
      }
    }
  }

  __device__ __forceinline__ float at(int token) const { return Format::value(__ldg(data + token)); }
};

// 32 bits of -inf, which stand for tokens past the vocabulary: they change no sum and are never the best.
template <LogitsType kType>
constexpr uint32_t kAbsent =
    LogitsFormat<kType>::kMinusInfinity * (sizeof(typename LogitsFormat<kType>::Bits) == 2 ? 0x10001u : 1u);

// Loads the chunks of 16 bytes that begin at first_of(0), first_of(1), ...
template <LogitsType kType, int kChunks, typename First>
__device__ __forceinline__ void load_chunks(const Row<kType>& row, First first_of, uint4* chunks) {
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    constexpr uint32_t kNone = kAbsent<kType>;
    chunks[c] = first_of(c) < row.vocabulary ? __ldg(reinterpret_cast<const uint4*>(row.data + first_of(c)))
                                             : make_uint4(kNone, kNone, kNone, kNone);
  }
}

// The same for rows that are not aligned to chunks: by single tokens, through shared memory.
template <int kThreads, LogitsType kType, int kChunks, typename First>
__device__ __forceinline__ void load_unaligned(const Row<kType>& row, int begin, First first_of, uint4* chunks) {
  using Element = typename Row<kType>::Element;
  TAPS_DYNAMIC_SHARED(Element, staged);
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < kThreads * kTokensPerThread; i += kThreads) {
    staged[i] = begin + i < row.vocabulary ? __ldg(row.data + begin + i) : static_cast<Element>(kAbsent<kType>);
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    chunks[c] = *reinterpret_cast<const uint4*>(staged + first_of(c) - begin);
  }
}

}  // namespace taps::cuda
