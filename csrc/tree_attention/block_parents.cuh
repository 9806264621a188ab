// The parents of one request, for the threads of a block that walk from many nodes towards the root.
#pragma once

#include "common/block_primitives.cuh"
#include "common/tree_rules.h"

namespace taps::cuda {

constexpr int kMostStagedNodes = 8192;  // 32 KiB of shared memory; larger trees are walked where they are

// Shared memory that a tree's parents take, in nodes.
inline TAPS_HD int staged_nodes(int64_t nodes) {
  return nodes <= kMostStagedNodes ? static_cast<int>(nodes) : 0;
}

struct BlockParents {
  const int64_t* entries;  // [N]
  int64_t count;
  const int32_t* staged;  // [staged_nodes(N)], or null

  // -1 at the root; always before the node, so every walk ends.
  __device__ int of(int node) const {
    return staged != nullptr ? staged[node] : static_cast<int>(safe_parent(entries, count, node));
  }
};

// The parents of request b below node `end`. Every thread calls it, and it ends with a barrier.
template <int kThreads>
__device__ BlockParents block_parents(const int64_t* parents, const int64_t* num_nodes, int64_t nodes, int64_t b,
                                      int end, int32_t* shared) {
  const int64_t* entries = parents + b * nodes;
  const int64_t count = safe_count(num_nodes[b], nodes);
  const bool is_staged = staged_nodes(nodes) > 0;
  if (is_staged) {
    for (int node = static_cast<int>(threadIdx.x); node < end; node += kThreads) {
      shared[node] = static_cast<int32_t>(safe_parent_of(entries[node], count, node));
    }
  }
  __syncthreads();
  return {entries, count, is_staged ? shared : nullptr};
}

}  // namespace taps::cuda
