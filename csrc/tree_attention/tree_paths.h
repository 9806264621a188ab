// Root-to-node paths: of every leaf, or of given nodes.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct TreePathsParams {
  const int64_t* parents;  // [B, N]
  const int64_t* depths;   // [B, N]
  const int64_t* ends;     // [B, M], the node where each path ends, -1 for none
  int64_t* paths;          // [B, M, P]
  int64_t nodes;           // N
  int64_t num_paths;       // M
  int64_t path_length;     // P = max_depth + 1
};

struct TreeLeavesParams {
  const int64_t* parents;    // [B, N]
  const int64_t* num_nodes;  // [B]
  int64_t* leaves;           // [B, N], ascending, then -1
  int64_t nodes;             // N
};

namespace cpu {
void tree_leaves(const TreeLeavesParams& params, int64_t begin, int64_t end);  // rows of B
void tree_paths(const TreePathsParams& params, int64_t begin, int64_t end);    // rows of B
}  // namespace cpu

namespace cuda {
void tree_leaves(const TreeLeavesParams& params, int64_t rows, Stream stream);
void tree_paths(const TreePathsParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
