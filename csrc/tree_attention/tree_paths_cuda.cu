#include "common/block_primitives.cuh"
#include "common/tree_rules.h"
#include "tree_attention/tree_paths.h"

namespace taps::cuda {

namespace {

// One block per request. As on the CPU, the output first holds a flag a node, then the list, which never overtakes the
// flags.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) tree_leaves_kernel(const TreeLeavesParams params) {
  static_assert(kThreads > kWarp);  // then block_scan is a barrier too
  const int64_t* parents = params.parents + blockIdx.x * params.nodes;
  int64_t* leaves = params.leaves + blockIdx.x * params.nodes;
  const int64_t count = safe_count(params.num_nodes[blockIdx.x], params.nodes);
  for (int64_t node = threadIdx.x; node < count; node += kThreads) {
    leaves[node] = 1;
  }
  __syncthreads();
  for (int64_t node = threadIdx.x; node < count; node += kThreads) {
    const int64_t parent = safe_parent(parents, count, node);
    if (parent >= 0) {
      leaves[parent] = 0;
    }
  }
  __syncthreads();
  int64_t num_leaves = 0;
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t node = first + threadIdx.x;
    const bool is_leaf = node < count && leaves[node] != 0;
    const Scanned scanned = block_scan<kThreads>(is_leaf ? 1 : 0);  // every thread has read its flag before any writes
    if (is_leaf) {
      leaves[num_leaves + scanned.before] = node;
    }
    num_leaves += scanned.total;
  }
  for (int64_t node = num_leaves + threadIdx.x; node < params.nodes; node += kThreads) {
    leaves[node] = -1;
  }
}

// A thread per step of a path, up from the path's end: paths are short, and neighbours write neighbouring elements.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) tree_paths_kernel(const TreePathsParams params, int64_t elements) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= elements) {
    return;
  }
  const int64_t path = element / params.path_length;
  const int64_t first_node = path / params.num_paths * params.nodes;
  const int64_t end = params.ends[path];
  int64_t node = -1;
  if (end >= 0 && end < params.nodes) {
    int64_t above = params.depths[first_node + end] - element % params.path_length;  // how far up the step is
    node = above >= 0 ? end : -1;
    for (; above > 0 && node >= 0; --above) {
      node = safe_parent(params.parents + first_node, params.nodes, node);
    }
  }
  params.paths[element] = node;
}

template <int kThreads>
void launch_leaves(const TreeLeavesParams& params, int64_t rows, Stream stream) {
  TAPS_LAUNCH(tree_leaves_kernel<kThreads>, rows, kThreads, 0, stream, params);
}

template <int kThreads>
void launch_paths(const TreePathsParams& params, int64_t elements, Stream stream) {
  TAPS_LAUNCH(tree_paths_kernel<kThreads>, (elements + kThreads - 1) / kThreads, kThreads, 0, stream, params, elements);
}

}  // namespace

void tree_leaves(const TreeLeavesParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  if (params.nodes <= 64) {
    return launch_leaves<64>(params, rows, stream);
  }
  launch_leaves<512>(params, rows, stream);
}

void tree_paths(const TreePathsParams& params, int64_t rows, Stream stream) {
  const int64_t elements = rows * params.num_paths * params.path_length;
  if (elements == 0) {
    return;
  }
  if (elements <= 64) {
    return launch_paths<64>(params, elements, stream);
  }
  launch_paths<256>(params, elements, stream);
}

}  // namespace taps::cuda
