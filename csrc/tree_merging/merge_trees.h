// The union of several trees by prefix.
#pragma once

#include <cstdint>

namespace taps {

struct MergeTreesParams {
  const int64_t* tokens;     // [B, D, N]
  const int64_t* parents;    // [B, D, N]
  const float* scores;       // [B, D, N]
  const int64_t* num_nodes;  // [B, D]
  int64_t* merged_tokens;    // [B, C]
  int64_t* merged_parents;   // [B, C]
  float* merged_scores;      // [B, C]
  int64_t* num_merged;       // [B]
  int64_t* proposers;        // [B, C]
  int64_t* node_map;         // [B, D, N]
  int64_t* workspace;        // [B, merge_workspace(D, N).length()]
  int64_t drafters;          // D
  int64_t nodes;             // N
  int64_t capacity;          // C
  bool has_budget;           // keep the best C nodes; without, C holds the whole union
};

// What a row of the CPU op needs: a hash table at most half full, and arrays as long as the largest union.
struct MergeWorkspace {
  static constexpr int64_t kArrays = 9;
  int64_t union_length;  // U = D (N - 1) + 1
  int64_t table_bits;

  int64_t table_length() const { return int64_t{1} << table_bits; }
  int64_t length() const { return table_length() + kArrays * union_length; }
};

inline MergeWorkspace merge_workspace(int64_t drafters, int64_t nodes) {
  MergeWorkspace layout{.union_length = drafters * (nodes - 1) + 1, .table_bits = 1};
  while (layout.table_length() < 2 * layout.union_length) {
    ++layout.table_bits;
  }
  return layout;
}

namespace cpu {
void merge_trees(const MergeTreesParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

}  // namespace taps
