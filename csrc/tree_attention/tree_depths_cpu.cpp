#include "common/tree_rules.h"
#include "tree_attention/tree_depths.h"

namespace taps::cpu {

void tree_depths(const TreeDepthsParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* parents = params.parents + b * params.nodes;
    int64_t* depths = params.depths + b * params.nodes;
    for (int64_t node = 0; node < params.nodes; ++node) {
      depths[node] = depth_below(depths, parent_of(parents, params.num_nodes[b], node));
    }
  }
}

}  // namespace taps::cpu
