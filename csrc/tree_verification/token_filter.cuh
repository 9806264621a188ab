// Top-k and top-p on the device: the last standing (tree_rules.h) that they keep.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/sampling_rule.h"
#include "common/tree_rules.h"
#include "tree_verification/cut_search.cuh"

namespace taps::cuda {

// Tokens further down weigh nothing.
__device__ inline uint32_t last_with_weight(float maximum, double temperature) {
  const uint32_t last = standing_of(static_cast<float>(static_cast<double>(maximum) + kWeightless * temperature));
  return min(last, kNeverKept - 1);
}

// At least the k-th standing of the row: each of the k best chunks holds a token of at most this.
template <int kThreads, LogitsType kType>
__device__ uint32_t bound_of_top_k(const ScannedRow<kType>& scanned, int64_t k) {
  const int chunks = scanned.row.num_chunks();
  if (k > chunks) {
    return kNeverKept - 1;
  }
  const uint64_t kth = kth_smallest<kThreads>(chunks, static_cast<int>(k) - 1, [&](int chunk) {
    return static_cast<uint64_t>(scanned.chunk_best[chunk]) << 32 | static_cast<uint64_t>(chunk);
  });
  return min(static_cast<uint32_t>(kth >> 32), kNeverKept - 1);
}

// The last standing that passes top-k (off unless 0 < k < V), then top-p (off unless < 1), at T > 0.
template <int kThreads, LogitsType kType>
__device__ uint32_t last_kept_standing(const ScannedRow<kType>& scanned, const LogitScale& scale, int64_t top_k,
                                       double top_p) {
  TAPS_SHARED(CutSearch, search, 1);
  const uint32_t first = standing_of(scanned.maximum);
  if (top_p <= 0) {
    return first;
  }
  const bool has_top_k = 0 < top_k && top_k < scanned.row.vocabulary;
  const bool is_ordinary = scale.temperature > 1e-30 && scale.temperature < 1e30;  // in float32 too
  uint32_t last = kNeverKept - 1;
  bool is_certain = false;
#pragma unroll 1
  for (int i = has_top_k ? 0 : 1; i < (top_p < 1 ? 3 : 1); ++i) {  // top-k; top-p with rough weights; and with exact
    const Weighing weighing = static_cast<Weighing>(i);
    const bool is_top_k = weighing == Weighing::kCount;
    if ((weighing == Weighing::kRough && !is_ordinary) || (weighing == Weighing::kExact && is_certain)) {
      continue;
    }
    const uint32_t end = is_top_k ? bound_of_top_k<kThreads>(scanned, top_k)
                                  : min(last, last_with_weight(scanned.maximum, scale.temperature));
    __syncthreads();
    if (threadIdx.x == 0) {
      search[0].weight = {weighing, scanned.maximum, scale};
      search[0].range = {first, end, even_bins(scanned.maximum, static_cast<float>(-kWeightless * scale.temperature)),
                         -1};
      search[0].limit = is_top_k ? static_cast<double>(top_k) : 0;
      search[0].share = is_top_k ? 0 : top_p;
      search[0].above = 0;
    }
    __syncthreads();
    const Cut cut = find_cut<kThreads>(scanned, search[0]);
    is_certain = cut.is_certain && !is_top_k;
    last = cut.is_certain ? cut.last : last;
  }
  return last;
}

}  // namespace taps::cuda
