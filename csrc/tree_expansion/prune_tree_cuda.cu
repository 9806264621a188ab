#include "common/block_primitives.cuh"
#include "common/launch.cuh"
#include "common/tree_rules.h"
#include "tree_expansion/prune_tree.h"

namespace taps::cuda {

namespace {

constexpr int64_t kMostSharedNodes = 2048;  // 32 KB; larger trees work in the workspace

// One word per node: the worst standing among it and the ancestors seen so far, and the next one to see.
__device__ __forceinline__ uint64_t word_of(uint32_t standing, int above) {
  return static_cast<uint64_t>(standing) << 32 | static_cast<uint32_t>(above);
}

// A node's word takes in the ancestors that the word at its far end has seen: log2(depth) rounds, each reading one
// half of `words` and writing the other. Returns the half with the result.
template <int kThreads>
__device__ uint64_t* limit_to_ancestors(uint64_t* words, int nodes, int count) {
  uint64_t* from = words;
  uint64_t* to = words + nodes;
  for (bool is_done = false; !is_done;) {
    bool has_more = false;
    for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
      const uint64_t own = from[node];
      const uint64_t far = from[static_cast<uint32_t>(own)];
      to[node] = word_of(max(static_cast<uint32_t>(own >> 32), static_cast<uint32_t>(far >> 32)),
                         static_cast<int>(static_cast<uint32_t>(far)));
      has_more |= static_cast<uint32_t>(far) != 0;
    }
    is_done = __syncthreads_or(has_more) == 0;
    uint64_t* const result = to;
    to = from;
    from = result;
  }
  return from;
}

// Writes each node's new number, twice over, plus 1 where it is kept. Returns how many are.
template <int kThreads, typename IsKept>
__device__ int number_nodes(int count, IsKept is_kept, uint64_t* numbers) {
  int kept = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int node = first + static_cast<int>(threadIdx.x);
    const int own = node < count && is_kept(node) ? 1 : 0;
    const Scanned scanned = block_scan<kThreads>(own);
    if (node < count) {
      numbers[node] = static_cast<uint64_t>(kept + scanned.before) * 2 + own;
    }
    kept += scanned.total;
  }
  return kept;
}

template <int kThreads>
__device__ void write_nodes(const PruneTreeParams& params, int64_t b, int count, int kept, const uint64_t* numbers) {
  const int64_t from = b * params.nodes;
  const int64_t to = b * params.capacity;
  for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    if (numbers[node] % 2 == 0) {
      continue;
    }
    const int64_t at = to + static_cast<int64_t>(numbers[node] / 2);
    const int64_t parent = safe_parent(params.tree.parents + from, count, node);
    params.kept.copy(at, params.tree, from + node, parent < 0 ? -1 : static_cast<int64_t>(numbers[parent] / 2));
  }
  for (int64_t place = kept + static_cast<int64_t>(threadIdx.x); place < params.capacity; place += kThreads) {
    params.kept.pad(to + place);
  }
  if (threadIdx.x == 0) {
    params.kept.num_nodes[b] = kept;
  }
}

// One block per request: ranks by pointer doubling, the worst kept key by selection, the new numbers by a scan. (Launch
// bounds of one block a multiprocessor: without them nvcc spills registers to raise occupancy.)
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) prune_tree_kernel(const PruneTreeParams params, bool is_shared) {
  TAPS_DYNAMIC_SHARED(uint64_t, shared_words);
  const int64_t b = blockIdx.x;
  const int nodes = static_cast<int>(params.nodes);
  const int capacity = static_cast<int>(params.capacity);
  const int count = static_cast<int>(safe_count(params.tree.num_nodes[b], nodes));
  const int64_t* parents = params.tree.parents + b * nodes;
  const float* scores = params.tree.scores + b * nodes;
  uint64_t* words = is_shared ? shared_words : reinterpret_cast<uint64_t*>(params.workspace) + b * 2 * nodes;

  const uint32_t root = standing_of(scores[0]);  // in every word: to reach the root is to be done
  for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    const int64_t parent = safe_parent(parents, count, node);
    words[node] = word_of(max(standing_of(scores[node]), root), parent < 0 ? 0 : static_cast<int>(parent));
  }
  __syncthreads();
  const uint64_t* limited = limit_to_ancestors<kThreads>(words, nodes, count);
  uint64_t* numbers = limited == words ? words + nodes : words;

  const auto key = [&](int node) { return (limited[node] >> 32) << 32 | static_cast<uint32_t>(node); };
  uint64_t worst = UINT64_MAX;
  if (capacity < count) {  // the root is kept without a rank
    worst = capacity < 2 ? 0 : kth_smallest<kThreads>(count - 1, capacity - 2, [&](int i) { return key(i + 1); });
  }
  const int kept =
      number_nodes<kThreads>(count, [&](int node) { return node == 0 || is_kept(key(node), worst); }, numbers);
  __syncthreads();
  write_nodes<kThreads>(params, b, count, kept, numbers);
}

template <int kThreads>
void launch(const PruneTreeParams& params, int64_t rows, Stream stream) {
  const bool is_shared = params.nodes <= kMostSharedNodes;
  const int64_t bytes = is_shared ? 2 * params.nodes * static_cast<int64_t>(sizeof(uint64_t)) : 0;
  TAPS_LAUNCH(prune_tree_kernel<kThreads>, rows, kThreads, bytes, stream, params, is_shared);
}

}  // namespace

void prune_tree(const PruneTreeParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  if (params.nodes <= 64) {
    return launch<64>(params, rows, stream);
  }
  if (params.nodes <= 1024) {
    return launch<256>(params, rows, stream);
  }
  launch<1024>(params, rows, stream);
}

}  // namespace taps::cuda
