// One pass over the inputs finds every node's union node (parents come first, so the parent's is known), numbered by
// first appearance; a stable counting sort by depth then gives the order of the output.
#include "tree_merging/merge_trees.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/tree_rules.h"

namespace taps::cpu {

namespace {

// The union of one row. Node 0 is the root; a node's place is its position by (depth, first appearance).
struct Union {
  int64_t* table;      // [2^table_bits], the node in each slot, 0: free (the root is never looked up)
  int64_t* tokens;     // [U]
  int64_t* parents;    // [U]
  int64_t* proposers;  // [U]
  int64_t* depths;     // [U]
  int64_t* order;      // [U], the node at each place
  int64_t* places;     // [U], the place of each node; in the end its number in the output, or -1
  int64_t* scratch;    // [U]
  uint64_t* keys;      // [U], the rank of the node at each place
  float* scores;       // [U]
  int64_t table_bits;
  int64_t size = 0;

  Union(int64_t* workspace, const MergeWorkspace& layout)
      : table(workspace),
        tokens(table + layout.table_length()),
        parents(tokens + layout.union_length),
        proposers(parents + layout.union_length),
        depths(proposers + layout.union_length),
        order(depths + layout.union_length),
        places(order + layout.union_length),
        scratch(places + layout.union_length),
        keys(reinterpret_cast<uint64_t*>(scratch + layout.union_length)),
        scores(reinterpret_cast<float*>(keys + layout.union_length)),
        table_bits(layout.table_bits) {
    std::fill_n(table, layout.table_length(), 0);
  }

  int64_t add(int64_t parent, int64_t token, float score) {
    tokens[size] = token;
    parents[size] = parent;
    proposers[size] = 0;
    depths[size] = depth_below(depths, parent);
    scores[size] = score;
    return size++;
  }

  // The node of (parent, token), added when it is new.
  int64_t find_or_add(int64_t parent, int64_t token, float score) {
    const uint64_t mixed = (static_cast<uint64_t>(parent) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(token)) ^
                           static_cast<uint64_t>(token) << 32;
    const uint64_t last_slot = (uint64_t{1} << table_bits) - 1;
    uint64_t slot = mixed * 0xD6E8FEB86659FD93u >> (64 - table_bits);
    for (; table[slot] != 0; slot = (slot + 1) & last_slot) {
      const int64_t node = table[slot];
      if (parents[node] == parent && tokens[node] == token) {
        scores[node] = merged_score(scores[node], score);
        return node;
      }
    }
    return table[slot] = add(parent, token, score);
  }
};

// Fills the union, and node_map with union nodes.
void unite(const MergeTreesParams& params, int64_t b, Union& all) {
  for (int64_t d = 0; d < params.drafters; ++d) {
    const int64_t tree = b * params.drafters + d;
    const int64_t* tokens = params.tokens + tree * params.nodes;
    const int64_t* parents = params.parents + tree * params.nodes;
    const float* scores = params.scores + tree * params.nodes;
    int64_t* node_map = params.node_map + tree * params.nodes;
    const int64_t count = params.num_nodes[tree];
    node_map[0] = d == 0 ? all.add(-1, tokens[0], scores[0]) : 0;
    all.scores[0] = merged_score(all.scores[0], scores[0]);
    all.proposers[0] |= int64_t{1} << d;
    for (int64_t node = 1; node < count; ++node) {
      node_map[node] = all.find_or_add(node_map[parents[node]], tokens[node], scores[node]);
      all.proposers[node_map[node]] |= int64_t{1} << d;
    }
    std::fill(node_map + count, node_map + params.nodes, -1);
  }
}

void order_by_depth(Union& all, int64_t num_depths) {
  int64_t* starts = all.scratch;  // the next free place of each depth
  std::fill_n(starts, num_depths, 0);
  for (int64_t node = 0; node < all.size; ++node) {
    ++starts[all.depths[node]];
  }
  int64_t start = 0;
  for (int64_t depth = 0; depth < num_depths; ++depth) {
    start += std::exchange(starts[depth], start);
  }
  for (int64_t node = 0; node < all.size; ++node) {
    all.places[node] = starts[all.depths[node]]++;
    all.order[all.places[node]] = node;
  }
}

// Ranks the nodes in their output order and returns the worst key within the budget.
uint64_t rank_union(Union& all, int64_t budget) {
  all.keys[0] = root_key(all.scores[0]);
  for (int64_t place = 1; place < all.size; ++place) {
    const int64_t node = all.order[place];
    all.keys[place] = rank_key(all.scores[node], place, all.keys[all.places[all.parents[node]]]);
  }
  return worst_kept_key(all.keys, all.size, budget, reinterpret_cast<uint64_t*>(all.scratch));
}

// Writes the kept nodes in order, then padding; places become numbers in the output.
void write_union(const MergeTreesParams& params, int64_t b, Union& all, uint64_t worst) {
  const int64_t to = b * params.capacity;
  int64_t kept = 0;
  for (int64_t place = 0; place < all.size; ++place) {
    const int64_t node = all.order[place];
    if (params.has_budget && place > 0 && !is_kept(all.keys[place], worst)) {
      all.places[node] = -1;
      continue;
    }
    params.merged_tokens[to + kept] = all.tokens[node];
    params.merged_parents[to + kept] = place == 0 ? -1 : all.places[all.parents[node]];
    params.merged_scores[to + kept] = all.scores[node];
    params.proposers[to + kept] = all.proposers[node];
    all.places[node] = kept++;
  }
  params.num_merged[b] = kept;

  const int64_t padding = params.capacity - kept;
  std::fill_n(params.merged_tokens + to + kept, padding, 0);
  std::fill_n(params.merged_parents + to + kept, padding, 0);
  std::fill_n(params.merged_scores + to + kept, padding, -std::numeric_limits<float>::infinity());
  std::fill_n(params.proposers + to + kept, padding, 0);
}

}  // namespace

void merge_trees(const MergeTreesParams& params, int64_t begin, int64_t end) {
  const MergeWorkspace layout = merge_workspace(params.drafters, params.nodes);
  for (int64_t b = begin; b < end; ++b) {
    Union all(params.workspace + b * layout.length(), layout);
    unite(params, b, all);
    order_by_depth(all, params.nodes);
    write_union(params, b, all, params.has_budget ? rank_union(all, params.capacity) : UINT64_MAX);

    int64_t* node_map = params.node_map + b * params.drafters * params.nodes;
    for (int64_t i = 0; i < params.drafters * params.nodes; ++i) {
      node_map[i] = node_map[i] < 0 ? -1 : all.places[node_map[i]];
    }
  }
}

}  // namespace taps::cpu
