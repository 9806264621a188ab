#include "common/block_primitives.cuh"
#include "common/launch.cuh"
#include "common/text_match.h"
#include "tree_extension/extend_tree.h"

namespace taps::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostSharedNodes = 1024;  // 24 KB; larger trees work in the workspace

// The leaves of a block's row, N slots each, in order of their nodes.
struct Leaves {
  int64_t* nodes;
  int64_t* tokens;
  unsigned long long* keys;  // the best match so far
};

// Lists the nodes without a child. `keys` first holds which nodes have one.
__device__ int list_leaves(const TextOfTree& row, int count, const Leaves& leaves) {
  for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    leaves.keys[node] = 0;
  }
  __syncthreads();
  for (int node = static_cast<int>(threadIdx.x) + 1; node < count; node += kThreads) {
    leaves.keys[row.above(node)] = 1;
  }
  __syncthreads();
  int num_leaves = 0;
  for (int first = 0; first < count; first += kThreads) {
    const int node = first + static_cast<int>(threadIdx.x);
    const bool is_leaf = node < count && leaves.keys[node] == 0;
    const Scanned scanned = block_scan<kThreads>(is_leaf ? 1 : 0);
    if (is_leaf) {
      leaves.nodes[num_leaves + scanned.before] = node;
      leaves.tokens[num_leaves + scanned.before] = row.tokens[node];
    }
    num_leaves += scanned.total;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < num_leaves; i += kThreads) {
    leaves.keys[i] = 0;
  }
  __syncthreads();
  return num_leaves;
}

// A thread per place of the window compares its token with every leaf's: the text is read once, in order, and the
// leaves from shared memory, all threads the same one. The largest key is the same in any order.
__device__ void find_matches(const TextOfTree& row, const Leaves& leaves, int num_leaves, int64_t longest) {
  for (int64_t end = row.begin + 1 + static_cast<int64_t>(threadIdx.x); end < row.length; end += kThreads) {
    const int64_t token = row.text[end - 1];
    for (int i = 0; i < num_leaves; ++i) {
      if (leaves.tokens[i] == token) {
        const int64_t matched = match_length(row, leaves.nodes[i], end, longest);
        atomicMax(&leaves.keys[i], static_cast<unsigned long long>(match_key(matched, end)));
      }
    }
  }
  __syncthreads();
}

__device__ void copy_tree(const ExtendTreeParams& params, int64_t b, int count) {
  const int64_t from = b * params.nodes;
  const int64_t to = b * params.capacity;
  for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    params.extended.copy(to + node, params.tree, from + node, safe_parent(params.tree.parents + from, count, node));
  }
}

// A thread per leaf, twice over: a chain's place is known once the lengths of those before it are. Returns the number
// of nodes.
__device__ int append_chains(const ExtendTreeParams& params, int64_t b, const TextOfTree& row, const Leaves& leaves,
                             int num_leaves) {
  int size = static_cast<int>(row.count);
  for (int begin = 0; begin < num_leaves; begin += kThreads) {
    const int i = begin + static_cast<int>(threadIdx.x);
    const auto for_each_token = [&](auto visit) {
      if (i >= num_leaves) {
        return 0;
      }
      const int64_t leaf = leaves.nodes[i];
      const float score = params.tree.scores[b * params.nodes + leaf];
      return static_cast<int>(continue_match(row, leaf, leaves.keys[i], score, params.log_probs, params.max_context,
                                             params.max_extension, visit));
    };
    const Scanned scanned = block_scan<kThreads>(for_each_token([](int64_t, int64_t, float) {}));
    const int64_t first = size + scanned.before;
    const int64_t at = b * params.capacity + first;
    for_each_token([&](int64_t step, int64_t token, float score) {
      const int64_t parent = step == 0 ? leaves.nodes[i] : first + step - 1;
      params.extended.put(at + step, token, parent, score, 0, params.proposer);
    });
    size += scanned.total;
  }
  return size;
}

__device__ void pad_tree(const ExtendTreeParams& params, int64_t b, int size) {
  const int64_t to = b * params.capacity;
  for (int64_t place = size + static_cast<int64_t>(threadIdx.x); place < params.capacity; place += kThreads) {
    params.extended.pad(to + place);
  }
  if (threadIdx.x == 0) {
    params.extended.num_nodes[b] = size;
  }
}

// One block per row: its chains stand one behind another, and all leaves share the one pass over the window.
__global__ void __launch_bounds__(kThreads, 1) extend_tree_kernel(const ExtendTreeParams params, bool is_shared) {
  TAPS_DYNAMIC_SHARED(int64_t, shared_words);
  const int64_t b = blockIdx.x;
  const int64_t nodes = params.nodes;
  const int64_t count = safe_count(params.tree.num_nodes[b], nodes);
  const int64_t given = params.lengths[b];
  const int64_t length = given < 0 ? 0 : given < params.text_length ? given : params.text_length;
  const TextOfTree row{params.text + b * params.text_length, first_counted(length, params.window), length,
                       params.tree.tokens + b * nodes,       params.tree.parents + b * nodes,      count};
  int64_t* words = is_shared ? shared_words : params.workspace + b * 3 * nodes;
  const Leaves leaves{words, words + nodes, reinterpret_cast<unsigned long long*>(words + 2 * nodes)};

  copy_tree(params, b, static_cast<int>(count));
  const int num_leaves = list_leaves(row, static_cast<int>(count), leaves);
  find_matches(row, leaves, num_leaves, params.max_context);
  pad_tree(params, b, append_chains(params, b, row, leaves, num_leaves));
}

}  // namespace

void extend_tree(const ExtendTreeParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  const bool is_shared = params.nodes <= kMostSharedNodes;
  const int64_t bytes = is_shared ? 3 * params.nodes * static_cast<int64_t>(sizeof(int64_t)) : 0;
  TAPS_LAUNCH(extend_tree_kernel, rows, kThreads, bytes, stream, params, is_shared);
}

}  // namespace taps::cuda
