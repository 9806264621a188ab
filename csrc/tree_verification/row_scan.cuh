// The first reading of a row of logits: its maximum, and that of each chunk.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/tree_rules.h"
#include "tree_verification/logits_chunks.cuh"

namespace taps::cuda {

// A row's maximum: its standing above its lowest token, so that the smallest key of parts is that of the whole.
using RowKey = unsigned long long;

constexpr RowKey kNanKey = 0;
constexpr uint32_t kStandingOfInfinity = 0x7FFFFFFFu - 0x7F800000u;

__device__ inline uint32_t standing_of_key(RowKey key) {
  return static_cast<uint32_t>(key >> 32);
}

__device__ inline int token_of_key(RowKey key) {
  return static_cast<int>(key & 0xFFFFFFFFu);
}

// Whether the row holds no NaN and has a finite maximum.
__device__ inline bool is_valid(RowKey key) {
  return standing_of_key(key) > kStandingOfInfinity && standing_of_key(key) != kNeverKept;
}

// What a lane has seen: its maximum, and the logits of the chunk that had it first.
template <LogitsType kType>
struct LaneBest {
  float maximum = -kInfinity;
  int chunk = -1;
  bool is_nan = false;
  LaneLogits<kType> logits = {};

  __device__ __forceinline__ float take(int chunk_in, const LaneLogits<kType>& each) {
    float highest = -kInfinity;
#pragma unroll
    for (int j = 0; j < kLaneTokens; ++j) {
      const float logit = each[j];
      is_nan |= logit != logit;
      highest = fmaxf(highest, logit);
    }
    if (highest > maximum) {
      maximum = highest;
      chunk = chunk_in;
      logits = each;
    }
    return highest;
  }

  __device__ RowKey key(const ChunkedRow<kType>& row) const {
    int token = 0;
#pragma unroll
    for (int j = kLaneTokens - 1; j >= 0; --j) {
      token = logits[j] == maximum ? row.token(chunk, j) : token;
    }
    return is_nan ? kNanKey : static_cast<RowKey>(standing_of(maximum)) << 32 | static_cast<RowKey>(token);
  }
};

// Chunks first..end-1 of a row. A warp takes a chunk at a time, and has the loads of several under way.
template <int kThreads, bool kAsVectors, LogitsType kType>
__device__ __forceinline__ void scan_part(const ChunkedRow<kType>& row, int first, int end, uint32_t* chunk_best,
                                          LaneBest<kType>& best) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kAtOnce = kAsVectors ? 8 / LaneLogits<kType>::kVectors : 2;
  for (int chunk = first + warp_index(); chunk < end; chunk += kAtOnce * kWarps) {
    LaneLogits<kType> logits[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      logits[i] = row.template load<kAsVectors>(min(chunk + i * kWarps, end - 1));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (chunk + i * kWarps < end) {
        const float highest = best.take(chunk + i * kWarps, logits[i]);
        if (chunk_best != nullptr) {
          const uint32_t standing = __reduce_min_sync(kAllLanes, standing_of(highest));
          if (lane_index() == 0) {
            chunk_best[chunk + i * kWarps] = standing;
          }
        }
      }
    }
  }
}

// The key of chunks first..end-1. chunk_best[chunk] becomes the smallest standing in each, unless it is null.
template <int kThreads, LogitsType kType>
__device__ RowKey scan_row(const ChunkedRow<kType>& row, int first, int end, uint32_t* chunk_best) {
  LaneBest<kType> best;
  const int vectors_end = max(first, min(end, row.vector_end()));
  scan_part<kThreads, true>(row, first, vectors_end, chunk_best, best);
  scan_part<kThreads, false>(row, vectors_end, end, chunk_best, best);
  return block_reduce<kThreads>(best.key(row), [](RowKey a, RowKey b) { return min(a, b); });
}

}  // namespace taps::cuda
