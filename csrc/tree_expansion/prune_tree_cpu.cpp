#include "tree_expansion/prune_tree.h"

#include <algorithm>
#include <limits>

#include "common/tree_rules.h"

namespace taps::cpu {

namespace {

// Copies the kept nodes in order and returns how many. `numbers` receives the new number of each kept node.
int64_t copy_kept(const PruneTreeParams& params, int64_t b, const uint64_t* keys, uint64_t worst, int64_t* numbers) {
  const int64_t from = b * params.nodes;
  const int64_t to = b * params.capacity;
  int64_t kept = 0;
  for (int64_t node = 0; node < params.num_nodes[b]; ++node) {
    if (node > 0 && !is_kept(keys[node], worst)) {
      continue;
    }
    numbers[node] = kept;
    params.kept_tokens[to + kept] = params.tokens[from + node];
    params.kept_parents[to + kept] = node == 0 ? -1 : numbers[params.parents[from + node]];
    params.kept_scores[to + kept] = params.scores[from + node];
    params.kept_entropies[to + kept] = params.entropies[from + node];
    params.kept_proposers[to + kept] = params.proposers != nullptr ? params.proposers[from + node] : 0;
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
    const int64_t count = params.num_nodes[b];
    rank_nodes(params.scores + b * params.nodes, params.parents + b * params.nodes, count, keys);
    const uint64_t worst = worst_kept_key(keys, count, params.capacity, scratch);
    const int64_t kept = copy_kept(params, b, keys, worst, numbers);

    const int64_t padding = params.capacity - kept;
    const int64_t tail = b * params.capacity + kept;
    std::fill_n(params.kept_tokens + tail, padding, 0);
    std::fill_n(params.kept_parents + tail, padding, 0);
    std::fill_n(params.kept_scores + tail, padding, -std::numeric_limits<float>::infinity());
    std::fill_n(params.kept_entropies + tail, padding, 0.0f);
    std::fill_n(params.kept_proposers + tail, padding, 0);
    params.num_kept[b] = kept;
  }
}

}  // namespace taps::cpu
