// The union of several trees by prefix.
#pragma once

#include <cstdint>

#include "common/device.h"

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
  int64_t* workspace;        // [B, merge_workspace(D, N).length()], on a device [B, merge_spill_length(D, N)]
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

// On a device a row of up to kMergeSharedNodes input nodes (M = D N) lives in shared memory. A longer one lives in the
// workspace; far beyond, the one block that a row gets would take too long.
constexpr int64_t kMergeSharedNodes = 1024;
constexpr int64_t kMergeMostNodes = 65536;
constexpr int kMergeLevels = 16;  // that are put in order at a time

// A hash table of M nodes is at most half full.
TAPS_HD constexpr int merge_table_bits(int64_t num_nodes) {
  int bits = 1;
  while (int64_t{1} << bits < 2 * num_nodes) {
    ++bits;
  }
  return bits;
}

// What a row needs of the workspace: two arrays of M, and ints: four arrays of M, the table and a slot more, and a
// count a level for each 32 nodes.
TAPS_HD constexpr int64_t merge_spill_length(int64_t drafters, int64_t nodes) {
  const int64_t num_nodes = drafters * nodes;
  const int64_t table_length = (int64_t{1} << merge_table_bits(num_nodes)) + 1;
  const int64_t num_ints = 4 * num_nodes + table_length + kMergeLevels * ((num_nodes + 31) / 32);
  return num_nodes <= kMergeSharedNodes ? 0 : 2 * num_nodes + (num_ints + 1) / 2;
}

namespace cpu {
void merge_trees(const MergeTreesParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void merge_trees(const MergeTreesParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
