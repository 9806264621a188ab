// The best nodes of a tree under a budget, renumbered.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct PruneTreeParams {
  const int64_t* tokens;     // [B, N]
  const int64_t* parents;    // [B, N]
  const float* scores;       // [B, N]
  const int64_t* num_nodes;  // [B]
  const float* entropies;    // [B, N]
  const int64_t* proposers;  // [B, N], or null: zeros
  int64_t* kept_tokens;      // [B, C]
  int64_t* kept_parents;     // [B, C]
  float* kept_scores;        // [B, C]
  int64_t* num_kept;         // [B]
  float* kept_entropies;     // [B, C]
  int64_t* kept_proposers;   // [B, C]
  int64_t* workspace;        // [B, 2, N]
  int64_t nodes;             // N
  int64_t capacity;          // C, the budget too
};

namespace cpu {
void prune_tree(const PruneTreeParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void prune_tree(const PruneTreeParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
