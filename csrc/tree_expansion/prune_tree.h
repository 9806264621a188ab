// The best nodes of a tree under a budget, renumbered.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/tree_fields.h"

namespace taps {

struct PruneTreeParams {
  TreesRead tree;      // [B, N]
  TreesWritten kept;   // [B, C]
  int64_t* workspace;  // [B, 2, N]
  int64_t nodes;       // N
  int64_t capacity;    // C, the budget too
};

namespace cpu {
void prune_tree(const PruneTreeParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void prune_tree(const PruneTreeParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
