// Where the tokens of a row, from the largest logit down, weigh a limit: a token weighs one for top-k, its share of the
// probability for top-p. No sorting of the vocabulary: a histogram of weights finds the bin where the limit is reached,
// the logits of that bin are collected, and both are repeated between the bin's largest and smallest logit until they
// fit a list. All weights are integers, so that sums do not depend on their order.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/sampling_rule.h"
#include "common/tree_rules.h"
#include "tree_verification/logits_chunks.cuh"
#include "tree_verification/token_weight.cuh"

namespace taps::cuda {

// A whole row after its first reading, valid: chunk_best holds the smallest standing of each chunk.
template <LogitsType kType>
struct ScannedRow {
  ChunkedRow<kType> row;
  const uint32_t* chunk_best;  // [num_chunks], shared by the block
  float maximum;
};

constexpr int kBins = 256;
constexpr int kBinCopies = 8;  // neighbouring lanes add to different copies: they often hit few bins
constexpr int kLimbBits = 15;  // of a weight; a 64-bit atomic on shared memory is a loop
constexpr int kLimbs = 3;
constexpr int kListLength = 512;
static_assert((kLargestVocabulary + 1) / kBinCopies * ((1 << kLimbBits) - 1) < int64_t{1} << 32);

// Monotone in the standing: equal steps of the logit where per_logit > 0, else equal steps of the standing, of which
// four histograms find any one.
struct Bins {
  float highest;
  float per_logit;
  uint32_t first;
  int shift;

  __device__ int operator()(uint32_t standing) const {
    if (per_logit > 0) {
      const float bin = (highest - score_of(standing)) * per_logit;
      return bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
    }
    return static_cast<int>((standing - first) >> shift);
  }
};

// Between half of the bins and all of them cover the span, which is above 0.
__device__ inline Bins even_bins(float highest, float span) {
  const uint32_t exponent = __float_as_uint(span) >> 23;
  static_assert(kBins == 1 << 8);
  return {highest, __uint_as_float((127 + 7 + 127 - max(exponent, 7u)) << 23), 0, 0};
}

__device__ inline Bins standing_bins(uint32_t first, uint32_t last) {
  const int bits = 32 - __clz(static_cast<int>(last - first));
  return {0, 0, first, bits > 8 ? bits - 8 : 0};
}

// The tokens from `first` to `last`, of the one bin unless it is negative.
struct TokenRange {
  uint32_t first, last;  // standings
  Bins bins;
  int bin;

  __device__ bool holds(uint32_t standing) const {
    return first <= standing && standing <= last && (bin < 0 || bins(standing) == bin);
  }
};

// The block's search, in shared memory: in registers it would leave no room for anything else.
struct CutSearch {
  TokenWeight weight;
  TokenRange range;
  double limit;    // what the tokens up to the cut have to weigh
  double share;    // which is, where positive, this share of all in the first range
  uint64_t above;  // what the tokens before the range weigh,
  uint64_t upto;   // and together with those of the range, once it is a bin
  int count;       // of listed tokens
  uint64_t bin_weights[kBins];
  union {  // a bin is chosen before its tokens are listed
    uint32_t limbs[kLimbs * kBins * kBinCopies];
    struct {
      uint64_t weights[kListLength];
      uint32_t standings[kListLength];
    } list;
  };
};

// Calls take(standing, logit) for the tokens of a range. Several vectors are under way before the first is looked at;
// the one body of the loops is large, so they are not unrolled.
template <int kThreads, LogitsType kType, typename Take>
__device__ __forceinline__ void visit_range(const ScannedRow<kType>& scanned, const CutSearch& search, Take take) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kVectors = 4;
  constexpr int kPerChunk = LaneLogits<kType>::kVectors;
  const int chunks = scanned.row.num_chunks();
  for (int chunk = warp_index(); chunk < chunks; chunk += kVectors / kPerChunk * kWarps) {
    uint32_t words[kVectors * 4] = {};
    unsigned wanted = 0;  // a bit a vector
#pragma unroll
    for (int v = 0; v < kVectors; v += kPerChunk) {
      const int each = chunk + v / kPerChunk * kWarps;
      if (each < chunks && scanned.chunk_best[each] <= search.range.last) {
        const LaneLogits<kType> logits = scanned.row.load(each);
#pragma unroll
        for (int w = 0; w < kPerChunk * 4; ++w) {
          words[v * 4 + w] = logits.words[w];
        }
        wanted |= ((1u << kPerChunk) - 1) << v;
      }
    }
#pragma unroll 1
    for (; wanted != 0; wanted >>= 1) {
      LogitsQueue<kType> queue{{words[0], words[1], words[2], words[3]}};
#pragma unroll
      for (int w = 0; w < (kVectors - 1) * 4; ++w) {
        words[w] = words[w + 4];
      }
#pragma unroll 1
      for (int j = 0; j < LogitsQueue<kType>::kLength && (wanted & 1) != 0; ++j) {
        const float logit = queue.pop();
        const uint32_t standing = standing_of(logit);
        if (search.range.holds(standing)) {
          take(standing, logit);
        }
      }
    }
  }
}

template <int kThreads, LogitsType kType>
__device__ void fill_bins(const ScannedRow<kType>& scanned, CutSearch& search) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kLimbs * kBins * kBinCopies; i += kThreads) {
    search.limbs[i] = 0;
  }
  __syncthreads();
  visit_range<kThreads>(scanned, search, [&](uint32_t standing, float logit) {
    uint32_t* limb = search.limbs + search.range.bins(standing) * kBinCopies + lane_index() % kBinCopies;
    for (uint64_t rest = search.weight(logit); rest != 0; rest >>= kLimbBits, limb += kBins * kBinCopies) {
      atomicAdd(limb, static_cast<uint32_t>(rest) & ((1u << kLimbBits) - 1));
    }
  });
  __syncthreads();
#pragma unroll 1
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) {
    uint64_t sum = 0;
    for (int limb = kLimbs - 1; limb >= 0; --limb) {
      sum <<= kLimbBits;
      for (int copy = 0; copy < kBinCopies; ++copy) {
        sum += search.limbs[(limb * kBins + bin) * kBinCopies + copy];
      }
    }
    search.bin_weights[bin] = sum;
  }
  __syncthreads();
}

// Narrows the range to the bin where the limit is reached, or to bin -1 if none is; one warp, eight bins a lane.
__device__ inline void choose_bin(CutSearch& search, bool has_limit) {
  constexpr int kPerLane = kBins / kWarp;
  const uint64_t* weights = search.bin_weights;
  unsigned long long inclusive = 0;
  for (int i = 0; i < kPerLane; ++i) {
    inclusive += weights[lane_index() * kPerLane + i];
  }
  const unsigned long long in_lane = inclusive;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const unsigned long long below = __shfl_up_sync(kAllLanes, inclusive, offset);
    inclusive += lane_index() >= offset ? below : 0;
  }
  const double all = static_cast<double>(__shfl_sync(kAllLanes, inclusive, kWarp - 1));
  const double limit = has_limit ? search.limit : search.share * all;
  const unsigned reached = __ballot_sync(kAllLanes, reaches(search.above + inclusive, limit));
  const int lane = __ffs(static_cast<int>(reached)) - 1;
  __syncwarp();  // all have read what one now writes
  if (lane_index() == max(lane, 0)) {
    uint64_t above = search.above + inclusive - in_lane;
    int bin = lane * kPerLane;
    while (lane >= 0 && !reaches(above + weights[bin], limit)) {
      above += weights[bin++];
    }
    search.limit = limit;
    search.range.bin = lane >= 0 ? bin : -1;
    search.above = above;
    search.upto = above + weights[max(bin, 0)];
  }
}

struct Collected {
  int count;             // beyond kListLength: at least so many
  uint32_t first, last;  // standings
};

template <int kThreads, LogitsType kType>
__device__ Collected collect(const ScannedRow<kType>& scanned, CutSearch& search) {
  if (threadIdx.x == 0) {
    search.count = 0;
  }
  __syncthreads();
  uint32_t first = kNeverKept;
  uint32_t last = 0;
  bool has_room = true;
  visit_range<kThreads>(scanned, search, [&](uint32_t standing, float) {
    first = min(first, standing);
    last = max(last, standing);
    if (has_room) {  // or thousands would queue for the counter
      const int slot = atomicAdd(&search.count, 1);
      has_room = slot < kListLength;
      if (has_room) {
        search.list.standings[slot] = standing;
      }
    }
  });
  first = block_reduce<kThreads>(first, [](uint32_t a, uint32_t b) { return min(a, b); });
  last = block_reduce<kThreads>(last, [](uint32_t a, uint32_t b) { return max(a, b); });
  return {search.count, first, last};
}

struct Cut {
  uint32_t last;    // the last standing that is kept
  bool is_certain;  // else exact weights are needed
};

// The listed token with which the limit is reached, by comparing all with all; `otherwise` if there is none.
template <int kThreads>
__device__ Cut choose_listed(CutSearch& search, int count, uint32_t otherwise) {
  TAPS_SHARED(Cut, chosen, 1);
  if (threadIdx.x == 0) {
    chosen[0] = {otherwise, true};
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    search.list.weights[i] = search.weight(score_of(search.list.standings[i]));
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const uint32_t own = search.list.standings[i];
    uint64_t before = search.above;
    uint64_t upto = search.above;
    bool is_first = true;  // among equal tokens: only one thread writes
#pragma unroll 1
    for (int j = 0; j < count; ++j) {
      const uint32_t other = search.list.standings[j];
      before += other < own ? search.list.weights[j] : 0;
      upto += other <= own ? search.list.weights[j] : 0;
      is_first = is_first && (other != own || j >= i);
    }
    if (is_first && !reaches(before, search.limit) && reaches(upto, search.limit)) {
      chosen[0] = {own, search.weight.is_certain(before, search.limit) && search.weight.is_certain(upto, search.limit)};
    }
  }
  __syncthreads();
  return chosen[0];
}

// Where the tokens of the range, from its first on, reach the limit; its last if they never do.
template <int kThreads, LogitsType kType>
__device__ Cut find_cut(const ScannedRow<kType>& scanned, CutSearch& search) {
  const uint32_t otherwise = search.range.last;
#pragma unroll 1
  for (int round = 0;; ++round) {
    if (search.share > 0 || round > 0) {
      fill_bins<kThreads>(scanned, search);
      if (warp_index() == 0) {
        choose_bin(search, search.share == 0 || round > 0);
      }
      __syncthreads();
      if (search.range.bin < 0) {
        return {otherwise, true};
      }
    }
    const Collected found = collect<kThreads>(scanned, search);
    if (found.count <= kListLength) {
      return choose_listed<kThreads>(search, found.count, otherwise);
    }
    if (found.first == found.last) {
      return {found.first, search.weight.is_certain(search.above, search.limit) &&
                               search.weight.is_certain(search.upto, search.limit)};
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const float highest = score_of(found.first);
      const float span = highest - score_of(found.last);
      const bool is_even = round == 0 || (round == 1 && search.share == 0);
      search.range = {found.first, found.last,
                      is_even ? even_bins(highest, span) : standing_bins(found.first, found.last), -1};
    }
    __syncthreads();
  }
}

}  // namespace taps::cuda
