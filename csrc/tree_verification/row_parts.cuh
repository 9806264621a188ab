// Combines the draws of a row's parts, which measure z from different maxima, into the row's draw.
#pragma once

#include <cstdint>

#include "common/block_primitives.cuh"
#include "tree_verification/token_draw_cuda.cuh"
#include "tree_verification/verify_tree.h"

namespace taps::cuda {

constexpr int kUndecided = -2;  // beside -1, an invalid row

// What a part of a row found: enough to draw the row's token once the maximum of all parts is known. For greedy and for
// filtered rows the key is all, in the latter holding the token that the row's first part drew from the whole row.
struct RowPart {
  RowKey key;
  double noise;       // of the token that is drawn if it lies in this part
  int32_t token;      // this token, or kUndecided
  uint32_t standing;  // of its logit
};
static_assert(sizeof(RowPart) == kRowPartWords * sizeof(int64_t));

template <LogitsType kType>
__device__ RowPart part_of(const Drawn& found, const ChunkedRow<kType>& row, bool is_in_key) {
  if (!is_valid(found.key)) {
    return {found.key, 0, INT32_MAX, kNeverKept};
  }
  if (is_in_key) {
    return {found.key & ~RowKey{0xFFFFFFFF} | static_cast<RowKey>(found.token), 0, INT32_MAX, kNeverKept};
  }
  return {found.key, found.noise, found.is_close ? kUndecided : found.token, standing_of(row.at(found.token))};
}

// Values that are measured from different maxima agree to 1e-13 where z is above -60, as that of a winner and of any
// rival in its part is: no winner is below the maximum's -3.14, and noise spans 26.02.
constexpr double kPartSlack = 1e-9;

__device__ inline RowPart load_part(const RowPart* part) {  // from where other blocks' writes arrive
  const auto* words = reinterpret_cast<const unsigned long long*>(part);
  const unsigned long long last = __ldcg(words + 2);
  return {__ldcg(words), __longlong_as_double(static_cast<long long>(__ldcg(words + 1))),
          static_cast<int32_t>(last & 0xFFFFFFFFu), static_cast<uint32_t>(last >> 32)};
}

// drawn[node] of each node's parts, a lane per part. `parts` is a power of two up to a warp.
template <int kThreads>
__device__ void join_parts(const RowPart* all_parts, int count, int parts, const DrawSettings& settings, bool is_in_key,
                           int32_t* drawn) {
  for (int first = 0; first < count * parts; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    const RowPart part = i < count * parts ? load_part(all_parts + i) : RowPart{~RowKey{0}, 0, INT32_MAX, kNeverKept};
    RowKey key = part.key;
    for (int offset = 1; offset < parts; offset *= 2) {
      key = min(key, __shfl_xor_sync(kAllLanes, key, offset));
    }
    const double z = settings.scale(score_of(part.standing), score_of(standing_of_key(key)));
    double value = part.standing == kNeverKept ? -static_cast<double>(kInfinity) : z + part.noise;
    int token = part.token;
    int undecided = part.token == kUndecided;
    for (int offset = 1; offset < parts; offset *= 2) {
      const double other = __shfl_xor_sync(kAllLanes, value, offset);
      const int other_token = __shfl_xor_sync(kAllLanes, token, offset);
      undecided |= __shfl_xor_sync(kAllLanes, undecided, offset);
      const bool loses = beats(other, other_token, value, token);
      value = loses ? other : value;
      token = loses ? other_token : token;
    }
    token = !is_valid(key) ? -1 : is_in_key ? token_of_key(key) : undecided != 0 ? kUndecided : token;
    if (i < count * parts && i % parts == 0) {
      drawn[i / parts] = token;
    }
  }
  __syncthreads();
}

}  // namespace taps::cuda
