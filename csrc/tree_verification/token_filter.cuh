// Top-k and top-p on the device: the last standing (tree_rules.h) that they keep, found without sorting the vocabulary.
//
// Both ask for the largest logit such that the tokens from it up weigh a limit; a token weighs one for top-k, its share
// of the probability for top-p. A histogram of weights finds the bin where that happens, the logits of that bin are
// collected, and the histogram is repeated between the bin's largest and smallest logit until they fit a list. All
// weights are integers, so that sums do not depend on their order.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/sampling_rule.h"
#include "common/tree_rules.h"
#include "tree_verification/logits_chunks.cuh"

namespace taps::cuda {

// scaled_logit for many logits x of one row, to the bit and without divisions: a quotient by the rounded reciprocal,
// then two corrections by its exact remainder. The first leaves one of the two doubles around the true quotient, from
// which the second finds the nearest (Markstein, 1990). Nothing over- or underflows: all come from finite floats.
struct LogitScale {
  double temperature;
  double per_temperature;  // 1 / temperature

  __device__ double operator()(float logit, float maximum) const {
    const double difference = static_cast<double>(logit) - static_cast<double>(maximum);
    double z = difference * per_temperature;
    z = fma(fma(-temperature, z, difference), per_temperature, z);
    return fma(fma(-temperature, z, difference), per_temperature, z);
  }
};

// A whole row after its first reading, valid: chunk_best holds the smallest standing of each chunk.
template <LogitsType kType>
struct ScannedRow {
  ChunkedRow<kType> row;
  const uint32_t* chunk_best;  // [num_chunks], shared by the block
  float maximum;
};

enum class Weighing {
  kCount,  // one
  kRough,  // nearly token_weight, in float32: float64 is slow, on most devices very slow
  kExact,  // token_weight
};

struct TokenWeight {
  Weighing weighing;
  float maximum;
  LogitScale scale;

  __device__ uint64_t operator()(float logit) const {
    if (weighing == Weighing::kCount) {
      return 1;
    }
    if (weighing == Weighing::kRough) {
      return static_cast<uint64_t>(expf((logit - maximum) * static_cast<float>(scale.per_temperature)) * 0x1p44f);
    }
    return token_weight(scale(logit, maximum));
  }

  // Whether what a comparison of a sum with the limit says is true of exact weights too. Where a token weighs anything,
  // z >= -32 is off by 32 * 3 * 2^-24 at most and expf by a few 2^-24, so that a sum is off by less than its 2^-16th.
  __device__ bool is_certain(uint64_t sum, double limit) const {
    const double weight = static_cast<double>(sum);
    return weighing != Weighing::kRough || sum == 0 || fabs(weight - limit) > 0x1p-15 * (weight + limit);
  }
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
      const float bin = (highest - logit_of(standing)) * per_logit;
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

// The block's search, in shared memory: in registers it would crowd out all else.
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

// Calls take(standing, logit) for the tokens of a range. Several chunks are under way before the first is looked at;
// the one body of the loops is large, so they are not unrolled.
template <int kThreads, LogitsType kType, typename Take>
__device__ __forceinline__ void visit_range(const ScannedRow<kType>& scanned, const CutSearch& search, Take take) {
  constexpr int kWarps = kThreads / kWarp;
  constexpr int kAtOnce = 4 / LaneLogits<kType>::kVectors;
  const int chunks = scanned.row.num_chunks();
  for (int chunk = warp_index(); chunk < chunks; chunk += kAtOnce * kWarps) {
    LaneLogits<kType> logits[kAtOnce] = {};
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int each = chunk + i * kWarps;
      if (each < chunks && scanned.chunk_best[each] <= search.range.last) {
        logits[i] = scanned.row.load(each);
        wanted |= 1u << i;
      }
    }
#pragma unroll 1
    for (; wanted != 0; wanted >>= 1) {
      LaneLogits<kType> current = logits[0];
#pragma unroll
      for (int i = 0; i + 1 < kAtOnce; ++i) {
        logits[i] = logits[i + 1];
      }
#pragma unroll 1
      for (int j = 0; j < kLaneTokens && (wanted & 1) != 0; ++j) {
        const float logit = current.pop();
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
    search.list.weights[i] = search.weight(logit_of(search.list.standings[i]));
  }
  __syncthreads();
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const uint32_t own = search.list.standings[i];
    uint64_t before = search.above;
    uint64_t upto = search.above;
    bool is_first = true;  // of its equals: one thread shall write
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
      const float highest = logit_of(found.first);
      const float span = highest - logit_of(found.last);
      const bool is_even = round == 0 || (round == 1 && search.share == 0);
      search.range = {found.first, found.last,
                      is_even ? even_bins(highest, span) : standing_bins(found.first, found.last), -1};
    }
    __syncthreads();
  }
}

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
