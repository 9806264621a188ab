// The best K of many keys, without sorting the others. Keys are unique, 64 bits wide, smaller is better.
//
// The candidates are dealt into 32 groups. The K-th best of the groups' best keys is a bound: K keys are not worse, so
// no other than these can be among the best K. What is not worse is collected, in any order: little more than K keys of
// a usual row, ranked by counting. Where the bound lets too many through (K above 32, or keys that lie in few groups on
// purpose) the K-th best key is found exactly, and K keys are collected.
#pragma once

#include "common/block_primitives.cuh"

namespace taps::cuda {

constexpr int kGroups = 32;
constexpr int kMostTopKeys = 256;        // K at most
constexpr uint64_t kNoKey = UINT64_MAX;  // worse than every key, and never among the best

struct TopKeys {  // in shared memory
  uint64_t groups[kGroups];
  uint64_t list[kMostTopKeys];
  uint64_t bound;
  int count;
};

// The threads of a group are lanes of one warp.
template <int kThreads>
constexpr int kGroupsPerWarp = kGroups / (kThreads / kWarp);

template <int kThreads>
__device__ __forceinline__ int group_index() {
  return warp_index() * kGroupsPerWarp<kThreads> + lane_index() % kGroupsPerWarp<kThreads>;
}

// `best` is the best of the thread's own candidates, or kNoKey. A barrier, then find_bound.
template <int kThreads>
__device__ __forceinline__ void offer_best(TopKeys& top, uint64_t best) {
  static_assert(kThreads % kWarp == 0 && kGroups % (kThreads / kWarp) == 0);
  for (int offset = kGroupsPerWarp<kThreads>; offset < kWarp; offset *= 2) {
    best = min(best, __shfl_xor_sync(kAllLanes, best, offset));
  }
  if (lane_index() < kGroupsPerWarp<kThreads>) {
    top.groups[group_index<kThreads>()] = best;
  }
  if (threadIdx.x == 0) {
    top.bound = kNoKey;
    top.count = 0;
  }
}

// The rank of each group's best key, by as many threads as there are to a group. A barrier, then collect.
template <int kThreads>
__device__ __forceinline__ void find_bound(TopKeys& top, int k) {
  constexpr int kParts = kThreads / kGroups;
  constexpr int kKeys = kGroups / kParts;
  const int part = static_cast<int>(threadIdx.x) % kParts;
  const uint64_t own = top.groups[threadIdx.x / kParts];
  int rank = 0;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    rank += top.groups[part * kKeys + i] < own ? 1 : 0;
  }
  for (int offset = 1; offset < kParts; offset *= 2) {
    rank += __shfl_xor_sync(kAllLanes, rank, offset);
  }
  if (part == 0 && rank == k - 1 && own != kNoKey) {
    top.bound = own;
  }
}

__device__ __forceinline__ void put(TopKeys& top, int slot, uint64_t key) {
  if (slot < kMostTopKeys) {
    top.list[slot] = key;
  }
}

// For each candidate that is not worse than the bound. A barrier, then visit_collected.
__device__ __forceinline__ void collect(TopKeys& top, uint64_t key) {
  put(top, atomicAdd(&top.count, 1), key);
}

// Collects the best k of key(0), ..., key(count - 1) exactly.
template <int kThreads, typename Key>
__device__ void collect_exactly(TopKeys& top, int count, int k, Key key) {
  const uint64_t worst = kth_smallest<kThreads>(count, k - 1, key);
  if (threadIdx.x == 0) {
    top.count = 0;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const uint64_t own = key(i);
    if (own <= worst) {
      collect(top, own);
    }
  }
  __syncthreads();
}

// Calls visit(rank, key) for the best k of what was collected; key(i) gives all candidates once more.
template <int kThreads, typename Key, typename Visit>
__device__ __forceinline__ void visit_collected(TopKeys& top, int count, int k, Key key, Visit visit) {
  if (top.count > kMostTopKeys) {
    collect_exactly<kThreads>(top, count, k, key);
  }
  const int collected = top.count;
  for (int i = static_cast<int>(threadIdx.x); i < collected; i += kThreads) {
    const uint64_t own = top.list[i];
    int rank = 0;
    for (int j = 0; j < collected; ++j) {
      rank += top.list[j] < own ? 1 : 0;
    }
    if (rank < k) {
      visit(rank, own);
    }
  }
}

// Calls visit(rank, key) for the best k of key(0), ..., key(count - 1), some of which may be kNoKey. Every thread calls
// meanwhile() before, between barriers.
template <int kThreads, typename Key, typename Meanwhile, typename Visit>
__device__ void visit_top_keys(TopKeys& top, int count, int k, Key key, Meanwhile meanwhile, Visit visit) {
  uint64_t best = kNoKey;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    best = min(best, key(i));
  }
  __syncthreads();  // the last use of `top`
  offer_best<kThreads>(top, best);
  __syncthreads();
  find_bound<kThreads>(top, k);
  meanwhile();
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const uint64_t own = key(i);
    if (own <= top.bound && own != kNoKey) {
      collect(top, own);
    }
  }
  __syncthreads();
  visit_collected<kThreads>(top, count, k, key, visit);
}

}  // namespace taps::cuda
