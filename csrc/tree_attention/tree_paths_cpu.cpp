#include "tree_attention/tree_paths.h"

#include <algorithm>

#include "common/tree_rules.h"

namespace taps::cpu {

void tree_leaves(const TreeLeavesParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* parents = params.parents + b * params.nodes;
    const int64_t count = params.num_nodes[b];
    int64_t* leaves = params.leaves + b * params.nodes;
    std::fill_n(leaves, count, 1);  // first a flag a node, then the list, in place: it never overtakes the flags
    for (int64_t node = 1; node < count; ++node) {
      leaves[parents[node]] = 0;
    }
    int64_t num_leaves = 0;
    for (int64_t node = 0; node < count; ++node) {
      if (leaves[node] != 0) {
        leaves[num_leaves++] = node;
      }
    }
    std::fill(leaves + num_leaves, leaves + params.nodes, -1);
  }
}

void tree_paths(const TreePathsParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* parents = params.parents + b * params.nodes;
    const int64_t* depths = params.depths + b * params.nodes;
    for (int64_t row = b * params.num_paths; row < (b + 1) * params.num_paths; ++row) {
      const int64_t node = params.ends[row];
      write_path(parents, node, node < 0 ? -1 : depths[node], params.path_length,
                 params.paths + row * params.path_length);
    }
  }
}

}  // namespace taps::cpu
