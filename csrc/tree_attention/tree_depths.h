// The depth of every node.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct TreeDepthsParams {
  const int64_t* parents;    // [B, N]
  const int64_t* num_nodes;  // [B]
  int64_t* depths;           // [B, N]
  int64_t nodes;             // N
};

namespace cpu {
void tree_depths(const TreeDepthsParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void tree_depths(const TreeDepthsParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
