// The union, level by level. The input nodes that become one node share a slot of a hash table, and the lowest of them
// stands for all. Two nodes are one when their parents share a slot and
// their tokens are equal; nothing else needs to be known of a parent, so one barrier a level is enough. Which slot it
// is depends on the order of the threads; who shares it does not.
#include "tree_merging/merge_row.cuh"

namespace taps::cuda {

namespace {

constexpr int kFree = 0x7FFFFFFF;  // marks a free slot
constexpr int kIsPadding = -2;     // as parent, depth and first node
constexpr int kLevels = kMergeLevels;

// Reads all at once, so that it takes one trip to memory. `tokens` and `scores` are where a shared row keeps its own.
template <typename Row>
__device__ __forceinline__ void load_nodes(const MergeTreesParams& params, const Row& row, int64_t* tokens,
                                           float* scores) {
  const int num_slots = 1 << row.table_bits;
  for (int slot = 0; slot < num_slots; slot += Row::kThreads) {  // which divides num_slots
    row.table[slot + static_cast<int>(threadIdx.x)] = kFree;
  }
  if (threadIdx.x == 0) {
    row.table[num_slots] = 0;
  }
  const int64_t first_tree = blockIdx.x * params.drafters;
  const int64_t first_node = first_tree * params.nodes;
  for_each_node(row, [&](int i) {
    const int tree = row.tree_of(i);
    const int node = i - tree * row.tree_length;
    const int64_t entry = params.parents[first_node + i];
    const int64_t num_nodes = params.num_nodes[first_tree + tree];
    if constexpr (Row::kIsShared) {
      tokens[i] = params.tokens[first_node + i];
      scores[i] = params.scores[first_node + i];
    }
    const int64_t count = safe_count(num_nodes, params.nodes);
    const int parent = static_cast<int>(safe_parent_of(entry, count, node));
    const int at = parent > 0 ? tree * row.tree_length + parent : parent;
    row.parents[i] = static_cast<typename Row::Index>(node < count ? at : kIsPadding);
    row.best[i] = ~0ull;
    row.proposers[2 * i] = row.proposers[2 * i + 1] = 0;
  });
}

// Gives the roots their slot; returns the depth of this thread's deepest node.
template <typename Row>
__device__ __forceinline__ int measure_depths(const Row& row) {
  int deepest = 0;
  for_each_node(row, [&](int node) {
    int above = row.parents[node];
    int depth = above == kIsPadding ? kIsPadding : 0;
    for (; above >= 0; above = row.parents[above]) {
      ++depth;
    }
    row.depths[node] = static_cast<typename Row::Index>(depth);
    row.slots[node] = static_cast<typename Row::Index>(depth == 0 ? 1 << row.table_bits : kIsPadding);
    deepest = max(deepest, depth);
  });
  return deepest;
}

// Finds the slot of a node whose parent has one. At most half of the slots are ever taken, so the search ends.
template <typename Row>
__device__ __forceinline__ void find_or_add(const Row& row, int node) {
  const int64_t token = row.tokens[node];
  const int parent_slot = row.slots[row.parents[node]];
  uint32_t mixed = static_cast<uint32_t>(token) ^ static_cast<uint32_t>(token >> 32) * 0x85EBCA6Bu;
  mixed = (mixed + static_cast<uint32_t>(parent_slot) * 0xC2B2AE35u) * 0x9E3779B1u;
  mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6Du;
  int slot = static_cast<int>(mixed >> (32 - row.table_bits));
  for (;; slot = (slot + 1) & ((1 << row.table_bits) - 1)) {
    const int other = atomicCAS(&row.table[slot], kFree, node);
    if (other == kFree) {
      break;
    }
    if (row.tokens[other] == token && row.slots[row.parents[other]] == parent_slot) {
      if (node < other) {
        atomicMin(&row.table[slot], node);
      }
      break;
    }
  }
  row.slots[node] = static_cast<typename Row::Index>(slot);
}

// Turns slots into firsts, to which every node brings its score and its proposer.
template <typename Row>
__device__ __forceinline__ void gather_groups(const Row& row) {
  for_each_node(row, [&](int node) {
    if (row.depths[node] == kIsPadding) {
      return;
    }
    const int first = row.table[row.slots[node]];
    const int tree = row.tree_of(node);
    row.firsts()[node] = static_cast<typename Row::Index>(first);
    atomicMin(&row.best[first], fold_key(row.scores[node], node));
    atomicOr(&row.proposers[2 * first + tree / 32], 1u << tree % 32);
  });
}

// Gives the nodes of the union on kLevels levels the places from `next_place` on, by (depth, node); returns how many
// they are. A counting sort: every 32 nodes count theirs on each level, and a scan of the counts, level by level, says
// where they go.
template <typename Row>
__device__ __forceinline__ int place_levels(const Row& row, int top_level, int next_place) {
  const int num_words = (row.num_nodes + kWarp - 1) / kWarp;
  const auto level_of = [&](int node) {
    const bool is_first = node < row.num_nodes && row.firsts()[node] == node;
    return is_first ? row.depths[node] - top_level : kLevels;
  };
  for (int word = warp_index(); word < num_words; word += Row::kThreads / kWarp) {
    const int node = word * kWarp + lane_index();
    const int level = level_of(node);
    const bool is_placed = 0 <= level && level < kLevels;
    unsigned peers = __ballot_sync(kAllLanes, is_placed);  // that share this node's level
    unsigned counted = peers;                              // that are on this lane's level
    for (int bit = 1; bit < kLevels; bit *= 2) {
      const unsigned ones = __ballot_sync(kAllLanes, level & bit);
      peers &= (level & bit) != 0 ? ones : ~ones;
      counted &= (lane_index() & bit) != 0 ? ones : ~ones;
    }
    if (lane_index() < kLevels) {
      row.counts[lane_index() * num_words + word] = __popc(counted);
    }
    if (is_placed) {
      row.places[node] = static_cast<typename Row::Index>(__popc(peers & ((1u << lane_index()) - 1)));
    }
    if constexpr (Row::kIsShared) {
      break;
    }
  }
  __syncthreads();
  const int num_placed = scan<Row>(
      kLevels * num_words, [&](int i) { return row.counts[i]; },
      [&](int i, int, int before) { row.counts[i] = before; });
  __syncthreads();
  for_each_node(row, [&](int node) {
    const int level = level_of(node);
    if (0 <= level && level < kLevels) {
      const int before = next_place + row.counts[level * num_words + node / kWarp];
      row.places[node] = static_cast<typename Row::Index>(before + row.places[node]);
    }
  });
  __syncthreads();
  return num_placed;
}

// Numbers the best `budget` nodes of the union in the order of their places; returns how many they are.
template <typename Row>
__device__ __forceinline__ int choose_nodes(const Row& row, int size, int64_t budget) {
  for_each_node(row, [&](int node) {
    if (row.firsts()[node] != node) {
      return;
    }
    uint32_t worst = 0;  // standing on the path from the root
    for (int above = node; above >= 0; above = row.parents[above]) {
      worst = max(worst, static_cast<uint32_t>(row.best[row.firsts()[above]] >> 32));
    }
    row.numbers()[row.places[node]] = static_cast<int>(worst);
  });
  __syncthreads();
  const auto key = [&](int place) {
    return static_cast<uint64_t>(static_cast<uint32_t>(row.numbers()[place])) << 32 | static_cast<uint64_t>(place);
  };
  uint64_t worst_kept = budget < size ? 0 : UINT64_MAX;
  if (1 < budget && budget < size) {  // the root is kept in any case
    const int last = static_cast<int>(budget) - 2;
    worst_kept = kth_smallest<Row::kThreads>(size - 1, last, [&](int i) { return key(i + 1); });
  }
  const int num_kept = scan<Row>(
      size, [&](int place) { return place == 0 || is_kept(key(place), worst_kept) ? 1 : 0; },
      [&](int place, int is_in, int before) { row.numbers()[place] = is_in != 0 ? before : -1; });
  __syncthreads();
  return num_kept;
}

// Writes the kept nodes, padding behind them, and where every node went.
template <typename Row>
__device__ __forceinline__ void write_union(const MergeTreesParams& params, const Row& row, int num_kept) {
  const int64_t to = blockIdx.x * params.capacity;
  int64_t* node_map = params.node_map + static_cast<int64_t>(blockIdx.x) * row.num_nodes;
  const auto number_of = [&](int node) {
    const int place = row.places[row.firsts()[node]];
    return params.has_budget ? row.numbers()[place] : place;
  };
  for_each_node(row, [&](int node) {
    const int first = row.firsts()[node];
    const int number = first == kIsPadding ? -1 : number_of(node);
    node_map[node] = number;
    if (first == node && number >= 0) {
      const uint64_t high = row.proposers[2 * node + 1];
      params.merged_tokens[to + number] = row.tokens[node];
      params.merged_parents[to + number] = node == 0 ? -1 : number_of(row.parents[node]);
      params.merged_scores[to + number] = row.scores[node_of(row.best[node])];
      params.proposers[to + number] = static_cast<int64_t>(high << 32 | row.proposers[2 * node]);
    }
  });
  for (int64_t i = num_kept + static_cast<int64_t>(threadIdx.x); i < params.capacity; i += Row::kThreads) {
    params.merged_tokens[to + i] = 0;
    params.merged_parents[to + i] = 0;
    params.merged_scores[to + i] = -__builtin_inff();
    params.proposers[to + i] = 0;
  }
  if (threadIdx.x == 0) {
    params.num_merged[blockIdx.x] = num_kept;
  }
}

template <typename Row>
__device__ __forceinline__ void merge_row(const MergeTreesParams& params, const Row& row, int64_t* tokens,
                                          float* scores) {
  load_nodes(params, row, tokens, scores);
  __syncthreads();
  const int deepest = measure_depths(row);
  int depth = 1;
  for (; __syncthreads_or(deepest >= depth); ++depth) {
    for_each_node(row, [&](int node) {
      if (row.depths[node] == depth) {
        find_or_add(row, node);
      }
    });
  }
  gather_groups(row);
  int size = 0;
  for (int top_level = 0; top_level < depth; top_level += kLevels) {
    size += place_levels(row, top_level, size);
  }
  const int num_kept = params.has_budget ? choose_nodes(row, size, params.capacity) : size;
  write_union(params, row, num_kept);
}

// One block per request: its nodes are few, and each level needs the one above. A thread per node, so that all that is
// read is under way at once.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) merge_in_shared_memory(const MergeTreesParams params) {
  constexpr int kTableBits = merge_table_bits(kThreads);
  constexpr int kCounts = kLevels * kThreads / kWarp;
  TAPS_SHARED(int64_t, tokens, kThreads);
  TAPS_SHARED(float, scores, kThreads);
  TAPS_SHARED(int16_t, parents, kThreads);
  TAPS_SHARED(int16_t, depths, kThreads);
  TAPS_SHARED(int16_t, slots, kThreads);
  TAPS_SHARED(int16_t, places, kThreads);
  TAPS_SHARED(int, table, (1 << kTableBits) + 1);
  TAPS_SHARED(unsigned long long, best, kThreads);
  TAPS_SHARED(unsigned, proposers, 2 * kThreads);
  TAPS_SHARED(int, counts, kCounts);
  const MergeRow<kThreads, true> row{.tokens = tokens,
                                     .scores = scores,
                                     .parents = parents,
                                     .depths = depths,
                                     .slots = slots,
                                     .places = places,
                                     .table = table,
                                     .best = best,
                                     .proposers = proposers,
                                     .counts = counts,
                                     .table_bits = kTableBits,
                                     .num_nodes = static_cast<int>(params.drafters * params.nodes),
                                     .tree_length = static_cast<int>(params.nodes)};
  merge_row(params, row, tokens, scores);
}

// The same for a row that does not fit there: its arrays lie in the workspace, its tokens and scores where they were.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) merge_in_workspace(const MergeTreesParams params) {
  using Row = MergeRow<kThreads, false>;
  TAPS_SHARED(Row, row, 1);  // in registers the pointers would spill
  if (threadIdx.x == 0) {
    const int num_nodes = static_cast<int>(params.drafters * params.nodes);
    const int64_t first_node = static_cast<int64_t>(blockIdx.x) * num_nodes;
    int64_t* words = params.workspace + blockIdx.x * merge_spill_length(params.drafters, params.nodes);
    int* ints = reinterpret_cast<int*>(words + 2 * num_nodes);
    row[0] = {.tokens = params.tokens + first_node,
              .scores = params.scores + first_node,
              .parents = ints,
              .depths = ints + num_nodes,
              .slots = ints + 2 * num_nodes,
              .places = ints + 3 * num_nodes,
              .table = ints + 4 * num_nodes,
              .best = reinterpret_cast<unsigned long long*>(words),
              .proposers = reinterpret_cast<unsigned*>(words + num_nodes),
              .counts = ints + 4 * num_nodes + (1 << merge_table_bits(num_nodes)) + 1,
              .table_bits = merge_table_bits(num_nodes),
              .num_nodes = num_nodes,
              .tree_length = static_cast<int>(params.nodes)};
  }
  __syncthreads();
  merge_row(params, row[0], nullptr, nullptr);
}

template <int kThreads>
void launch(const MergeTreesParams& params, int64_t rows, Stream stream) {
  TAPS_LAUNCH(merge_in_shared_memory<kThreads>, static_cast<unsigned>(rows), kThreads, 0, stream, params);
}

}  // namespace

void merge_trees(const MergeTreesParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  const int64_t num_nodes = params.drafters * params.nodes;
  if (num_nodes <= 128) {
    return launch<128>(params, rows, stream);
  }
  if (num_nodes <= 256) {
    return launch<256>(params, rows, stream);
  }
  if (num_nodes <= 512) {
    return launch<512>(params, rows, stream);
  }
  if (num_nodes <= kMergeSharedNodes) {
    return launch<kMergeSharedNodes>(params, rows, stream);
  }
  TAPS_LAUNCH(merge_in_workspace<1024>, static_cast<unsigned>(rows), 1024, 0, stream, params);
}

}  // namespace taps::cuda
