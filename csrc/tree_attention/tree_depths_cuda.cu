#include "common/launch.cuh"
#include "common/tree_rules.h"
#include "tree_attention/tree_depths.h"

namespace taps::cuda {

namespace {

// A node's link to one of its ancestors, which takes `edges` steps; above < 0 when there is no way further up.
struct alignas(8) Link {
  int above;
  int edges;
};

// One block per request, a thread per node, so that log2(depth) rounds of pointer doubling find every depth. Trees
// larger than the block come in tiles: parents precede their children, so what lies before a tile is known already.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) tree_depths_kernel(const TreeDepthsParams params) {
  TAPS_SHARED(Link, links, 2 * kThreads);  // one half is read while the other is written: a barrier a round is enough
  const int64_t* parents = params.parents + blockIdx.x * params.nodes;
  int64_t* depths = params.depths + blockIdx.x * params.nodes;
  const int64_t count = safe_count(params.num_nodes[blockIdx.x], params.nodes);
  const int thread = static_cast<int>(threadIdx.x);
  int half = 0;
  for (int64_t first = 0; first < params.nodes; first += kThreads) {
    const int64_t node = first + thread;
    const int64_t parent = node < params.nodes ? safe_parent_of(parents[node], count, node) : -1;
    Link link{-1, 0};
    if (parent >= first) {
      link = {static_cast<int>(parent - first), 1};
    } else if (parent >= 0) {
      link.edges = static_cast<int>(depth_below(depths, parent));
    }
    for (;;) {
      links[half * kThreads + thread] = link;
      if (!__syncthreads_or(link.above >= 0)) {
        break;
      }
      if (link.above >= 0) {
        const Link next = links[half * kThreads + link.above];
        link = {next.above, link.edges + next.edges};
      }
      half ^= 1;
    }
    if (node < params.nodes) {
      depths[node] = link.edges;
    }
    __syncthreads();  // the next tile reads these depths
  }
}

template <int kThreads>
void launch(const TreeDepthsParams& params, int64_t rows, Stream stream) {
  TAPS_LAUNCH(tree_depths_kernel<kThreads>, rows, kThreads, 0, stream, params);
}

}  // namespace

void tree_depths(const TreeDepthsParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  if (params.nodes <= 64) {
    return launch<64>(params, rows, stream);
  }
  if (params.nodes <= 256) {
    return launch<256>(params, rows, stream);
  }
  launch<1024>(params, rows, stream);
}

}  // namespace taps::cuda
