#include "tree_expansion/prune_tree.h"

#include "common/tree_rules.h"

namespace taps::cpu {

namespace {

// Copies the kept nodes in order and returns how many. `numbers` receives the new number of each kept node.
int64_t copy_kept(const PruneTreeParams& params, int64_t b, const uint64_t* keys, uint64_t worst, int64_t* numbers) {
  const int64_t from = b * params.nodes;
  const int64_t to = b * params.capacity;
  int64_t kept = 0;
  for (int64_t node = 0; node < params.tree.num_nodes[b]; ++node) {
    if (node > 0 && !is_kept(keys[node], worst)) {
      continue;
    }
    numbers[node] = kept;
    const int64_t parent = node == 0 ? -1 : numbers[params.tree.parents[from + node]];
    params.kept.copy(to + kept, params.tree, from + node, parent);
    ++kept;
  }
  return kept;
}

}  // namespace

void prune_tree(const PruneTreeParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    int64_t* numbers = params.workspace + b * 2 * params.nodes;
    auto* scratch = reinterpret_cast<uint64_t*>(numbers);  // the numbers come after the selection
    uint64_t* keys = scratch + params.nodes;
    const int64_t count = params.tree.num_nodes[b];
    rank_nodes(params.tree.scores + b * params.nodes, params.tree.parents + b * params.nodes, count, keys);
    const uint64_t worst = worst_kept_key(keys, count, params.capacity, scratch);
    const int64_t kept = copy_kept(params, b, keys, worst, numbers);

    for (int64_t place = kept; place < params.capacity; ++place) {
      params.kept.pad(b * params.capacity + place);
    }
    params.kept.num_nodes[b] = kept;
  }
}

}  // namespace taps::cpu
