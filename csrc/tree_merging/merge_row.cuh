// The row of a block of merge_trees_cuda.cu, and how its threads iterate over it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/block_primitives.cuh"
#include "common/tree_rules.h"
#include "tree_merging/merge_trees.h"

namespace taps::cuda {

// The M = D N input nodes of a row; d * N + n is node n of tree d. In shared memory there is a thread for each of them.
template <int kBlock, bool kInShared>
struct MergeRow {
  using Index = std::conditional_t<kInShared, int16_t, int>;
  static constexpr int kThreads = kBlock;
  static constexpr bool kIsShared = kInShared;

  const int64_t* tokens;     // [M]
  const float* scores;       // [M]
  Index* parents;            // [M], -1 for every root, 0 for its children
  Index* depths;             // [M]
  Index* slots;              // [M], then firsts
  Index* places;             // [M], by (depth, node) among the nodes of the union
  int* table;                // [2^table_bits + 1], the first node of each slot, the roots' in the last; then numbers
  unsigned long long* best;  // [M], the fold_key of all that a first node stands for
  unsigned* proposers;       // [2 M], low and high words
  int* counts;               // [kMergeLevels * ceil(M / 32)], how many nodes of the union on a level in 32 nodes
  int table_bits;
  int num_nodes;    // M
  int tree_length;  // N

  // When all have a slot: the first node with the same prefix.
  __device__ __forceinline__ Index* firsts() const { return slots; }

  // With a budget, by place: first the standing, then the number in the output or -1.
  __device__ __forceinline__ int* numbers() const { return table; }

  __device__ __forceinline__ int tree_of(int node) const {
    return static_cast<int>(static_cast<unsigned>(node) / static_cast<unsigned>(tree_length));
  }
};

// Calls visit(node) for every node, each in one thread, always the same.
template <typename Row, typename Visit>
__device__ __forceinline__ void for_each_node(const Row& row, Visit visit) {
  for (int node = static_cast<int>(threadIdx.x); node < row.num_nodes; node += Row::kThreads) {
    visit(node);
    if constexpr (Row::kIsShared) {
      break;
    }
  }
}

// Calls put(i, value(i), the sum of the values before i) for i in 0..length - 1; returns the sum of all. A thread takes
// neighbours and asks for a value twice.
template <typename Row, typename Value, typename Put>
__device__ __forceinline__ int scan(int length, Value value, Put put) {
  const int run = Row::kIsShared ? 1 : (length + Row::kThreads - 1) / Row::kThreads;
  const int begin = static_cast<int>(threadIdx.x) * run;
  int sum = 0;
  for (int i = begin; i < begin + run; ++i) {
    sum += i < length ? value(i) : 0;
  }
  const Scanned scanned = block_scan<Row::kThreads>(sum);
  int before = scanned.before;
  for (int i = begin; i < begin + run; ++i) {
    if (i < length) {
      const int own = value(i);
      put(i, own, before);
      before += own;
    }
  }
  return scanned.total;
}

// The smallest key belongs to the score that a fold of merged_score over the nodes ends with: the largest, the
// first among equals, -inf before NaN, and the last one if all are NaN.
__device__ __forceinline__ unsigned long long fold_key(float score, int node) {
  const unsigned rank = static_cast<unsigned>(score != score ? ~node : node);
  return static_cast<unsigned long long>(standing_of(score)) << 32 | rank;
}

__device__ __forceinline__ int node_of(unsigned long long fold_key) {
  const int rank = static_cast<int>(static_cast<unsigned>(fold_key));
  return rank < 0 ? ~rank : rank;
}

}  // namespace taps::cuda
