#include <algorithm>
#include <cstdint>

#include "common/block_primitives.cuh"
#include "common/launch.cuh"
#include "common/tree_rules.h"
#include "tree_verification/row_parts.cuh"
#include "tree_verification/token_draw_cuda.cuh"
#include "tree_verification/verify_tree.h"

namespace taps::cuda {

namespace {

__device__ inline DrawSettings settings_of(const VerifyTreeParams& p, int64_t b) {
  return draw_settings(p.temperature[b], p.top_k[b], p.top_p[b], p.min_p[b], p.seeds[b], p.positions[b]);
}

// A part of the row of node `node`, at this depth.
template <LogitsType kType>
__device__ DrawTask<kType> task_of(const VerifyTreeParams& p, int64_t b, int64_t node, int64_t depth, int part,
                                   int parts) {
  using Bits = typename ChunkedRow<kType>::Bits;
  const Bits* logits = static_cast<const Bits*>(p.logits) + b * p.batch_stride + node * p.node_stride;
  const int chunks = static_cast<int>(num_chunks(p.vocabulary));
  return {{logits, static_cast<int>(p.vocabulary)}, chunks * part / parts, chunks * (part + 1) / parts, depth};
}

// The results of request b, whose path is written up to `depth`.
template <int kThreads>
__device__ void write_result(const VerifyTreeParams& p, int64_t b, int64_t depth, int token) {
#pragma unroll 1
  for (int64_t d = depth + 1 + threadIdx.x; d < p.nodes; d += kThreads) {
    p.path[b * p.nodes + d] = -1;
  }
  if (threadIdx.x == 0) {
    p.num_accepted[b] = depth;
    p.bonus_tokens[b] = token;
    p.status[b] = token < 0 ? kInvalidLogits : 0;
  }
}

// ---- Visited rows only ----

// The node's first child that carries the token, or -1.
template <int kThreads>
__device__ int child_with(const VerifyTreeParams& p, int64_t b, int count, int node, int token) {
  const int64_t* parents = p.parents + b * p.nodes;
  const int64_t* tokens = p.tokens + b * p.nodes;
  int first = INT32_MAX;
#pragma unroll 1
  for (int child = node + 1 + static_cast<int>(threadIdx.x); child < count && first == INT32_MAX; child += kThreads) {
    first = parents[child] == node && tokens[child] == token ? child : INT32_MAX;
  }
  first = block_reduce<kThreads>(first, [](int a, int c) { return min(a, c); });
  return first < INT32_MAX ? first : -1;
}

// One block per request: the walk is sequential in depth, parallel over the vocabulary. (Launch bounds of one block a
// multiprocessor: for two, nvcc spills registers.)
template <int kThreads, LogitsType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_visited_kernel(const VerifyTreeParams p) {
  TAPS_DYNAMIC_SHARED(uint32_t, chunk_best);
  TAPS_SHARED(DrawSettings, settings, 1);
  TAPS_SHARED(DrawTask<kType>, task, 1);
  const int64_t b = blockIdx.x;
  const int count = static_cast<int>(safe_count(p.num_nodes[b], p.nodes));
  int depth = -1;
  int token = -1;
  if (threadIdx.x == 0) {
    settings[0] = settings_of(p, b);
  }
  for (int node = 0; node >= 0; node = token < 0 ? -1 : child_with<kThreads>(p, b, count, node, token)) {
    ++depth;
    if (threadIdx.x == 0) {
      p.path[b * p.nodes + depth] = node;
      task[0] = task_of<kType>(p, b, node, depth, 0, 1);
    }
    __syncthreads();
    token = draw_token<kThreads>(task[0], settings[0], 0, chunk_best).token;
  }
  write_result<kThreads>(p, b, depth, token);
}

// ---- All rows ----

// The walk over drawn tokens: next[node] is the first child that carries the node's token, or past every node.
template <int kThreads>
__device__ void walk_drawn(const VerifyTreeParams& p, int64_t b, int count, const int32_t* drawn, int32_t* next) {
  TAPS_SHARED(int, end, 2);  // of the path: depth, node
  const int64_t* parents = p.parents + b * p.nodes;
  const int64_t* tokens = p.tokens + b * p.nodes;
#pragma unroll 1
  for (int node = static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    next[node] = INT32_MAX;
  }
  __syncthreads();
#pragma unroll 1
  for (int node = 1 + static_cast<int>(threadIdx.x); node < count; node += kThreads) {
    const int parent = static_cast<int>(safe_parent(parents, count, node));
    if (drawn[parent] >= 0 && drawn[parent] == tokens[node]) {
      atomicMin(&next[parent], node);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int depth = -1;
    for (int node = 0; node < count; node = next[node]) {
      p.path[b * p.nodes + ++depth] = node;
      end[1] = node;
    }
    end[0] = depth;
  }
  __syncthreads();
  write_result<kThreads>(p, b, end[0], drawn[end[1]]);
}

__device__ inline int depth_of(const int32_t* parents, int node) {
  int depth = 0;
  for (; node > 0; node = parents[node]) {
    ++depth;
  }
  return depth;
}

// `parts` blocks per row (b, node) draw its token, whether or not the walk visits it; the last block of a request
// walks.
template <int kThreads, LogitsType kType>
__global__ void __launch_bounds__(kThreads, 1) verify_all_rows_kernel(const VerifyTreeParams p, int parts) {
  TAPS_DYNAMIC_SHARED(uint32_t, chunk_best);
  TAPS_SHARED(DrawSettings, settings, 1);
  TAPS_SHARED(DrawTask<kType>, task, 1);
  int32_t* drawn = reinterpret_cast<int32_t*>(chunk_best + num_chunks(p.vocabulary));  // [N]
  int32_t* links = drawn + p.nodes;                                                    // [N], parents or next
  const int nodes = static_cast<int>(p.nodes);
  const int own_part = static_cast<int>(blockIdx.x) % parts;
  const int own_node = static_cast<int>(blockIdx.x) / parts % nodes;
  const int64_t b = static_cast<int>(blockIdx.x) / parts / nodes;
  const int count = static_cast<int>(safe_count(p.num_nodes[b], nodes));
  const int64_t rows = gridDim.x / (nodes * parts);
  RowPart* request_parts = reinterpret_cast<RowPart*>(p.workspace + rows) + b * nodes * parts;
  unsigned long long* ticket = reinterpret_cast<unsigned long long*>(p.workspace) + b;
  if (threadIdx.x == 0) {
    settings[0] = settings_of(p, b);
  } else if (threadIdx.x == kThreads - 1) {  // in another warp, so that neither waits for the other's loads
    ready_ticket(ticket, p.nonce);
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    links[i] = static_cast<int32_t>(safe_parent(p.parents + b * nodes, count, i));
  }
  __syncthreads();
  const bool is_filtered = settings[0].has_filter(p.vocabulary);
  // First the block's own part, then, in the last block, the rows whose parts are too close to each other.
  bool is_last = false;
  for (int node = own_node; node < count || !is_last;) {
    const bool is_whole = is_last || is_filtered;
    Drawn found{~RowKey{0}, 0, threadIdx.x == 0, 0, false};
    if (node < count && (own_part == 0 || is_last || !is_filtered)) {
      if (threadIdx.x == 0) {
        task[0] = task_of<kType>(p, b, node, depth_of(links, node), is_whole ? 0 : own_part, is_whole ? 1 : parts);
      }
      __syncthreads();
      found = draw_token<kThreads>(task[0], settings[0], kPartSlack, chunk_best);
    }
    if (!is_last) {
      if (found.is_winner && node < count) {
        request_parts[node * parts + own_part] = part_of(found, task[0].row, is_filtered && own_part == 0);
      }
      if (!arrives_last(ticket, p.nonce, nodes * parts, true)) {
        return;
      }
      join_parts<kThreads>(request_parts, count, parts, settings[0], is_filtered || settings[0].is_greedy, drawn);
      is_last = true;
      node = -1;
    } else if (threadIdx.x == 0) {
      drawn[node] = found.token;
    }
    do {
      ++node;
    } while (node < count && drawn[node] != kUndecided);
  }
  __syncthreads();
  walk_drawn<kThreads>(p, b, count, drawn, links);
}

// ---- Launches ----

// Blocks per row when all rows are drawn, a power of two, so that each multiprocessor has one; 0 where rows are so many
// that visiting some, one after the other, is faster.
int parts_per_row(const VerifyTreeParams& params, int64_t rows) {
  const int64_t all_rows = rows * params.nodes;
  const int64_t blocks = std::min<int64_t>(num_multiprocessors(), kMostRowParts);
  if (all_rows > std::min(2 * blocks, kMostRowParts)) {
    return 0;
  }
  int parts = 1;
  while (parts < kWarp && 2 * parts * all_rows <= blocks && 2 * parts <= num_chunks(params.vocabulary)) {
    parts *= 2;
  }
  return parts;
}

template <int kThreads, LogitsType kType>
void launch(const VerifyTreeParams& params, int64_t rows, Stream stream) {
  const int parts = parts_per_row(params, rows);
  const int64_t chunk_bytes = num_chunks(params.vocabulary) * sizeof(uint32_t);
  if (parts == 0) {
    TAPS_LAUNCH((verify_visited_kernel<kThreads, kType>), rows, kThreads, chunk_bytes, stream, params);
  } else {
    const int64_t node_bytes = 2 * params.nodes * sizeof(int32_t);
    TAPS_LAUNCH((verify_all_rows_kernel<kThreads, kType>), rows * params.nodes * parts, kThreads,
                chunk_bytes + node_bytes, stream, params, parts);
  }
}

template <LogitsType kType>
void launch(const VerifyTreeParams& params, int64_t rows, Stream stream) {
  if (params.vocabulary <= 8192) {
    return launch<128, kType>(params, rows, stream);
  }
  launch<512, kType>(params, rows, stream);
}

}  // namespace

void verify_tree(const VerifyTreeParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  switch (params.logits_type) {
    case LogitsType::kFloat32:
      return launch<LogitsType::kFloat32>(params, rows, stream);
    case LogitsType::kBFloat16:
      return launch<LogitsType::kBFloat16>(params, rows, stream);
    case LogitsType::kFloat16:
      return launch<LogitsType::kFloat16>(params, rows, stream);
  }
}

}  // namespace taps::cuda
