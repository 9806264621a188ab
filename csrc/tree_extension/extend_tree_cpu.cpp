// One pass over the window serves every leaf: a bit per hash of a leaf's token tells most places of the text apart.
#include "tree_extension/extend_tree.h"

#include <algorithm>

#include "common/text_match.h"

namespace taps::cpu {

namespace {

constexpr uint64_t kHashes = 4096;

// Finds each leaf's longest match, the latest one of that length. Only a leaf's key is ever written.
void find_matches(const TextOfTree& row, const int64_t* leaves, int64_t num_leaves, int64_t longest, uint64_t* keys) {
  uint64_t is_last[kHashes / 64] = {};
  for (int64_t i = 0; i < num_leaves; ++i) {
    const uint64_t hash = static_cast<uint64_t>(row.tokens[leaves[i]]) % kHashes;
    is_last[hash / 64] |= uint64_t{1} << hash % 64;
  }
  std::fill_n(keys, num_leaves, 0);
  for (int64_t end = row.begin + 1; end < row.length; ++end) {
    const int64_t token = row.text[end - 1];
    const uint64_t hash = static_cast<uint64_t>(token) % kHashes;
    if ((is_last[hash / 64] >> hash % 64 & 1) == 0) {
      continue;
    }
    for (int64_t i = 0; i < num_leaves; ++i) {
      if (row.tokens[leaves[i]] == token) {
        keys[i] = std::max(keys[i], match_key(match_length(row, leaves[i], end, longest), end));
      }
    }
  }
}

// Lists the nodes without a child.
int64_t list_leaves(const int64_t* parents, int64_t count, int64_t* has_child, int64_t* leaves) {
  std::fill_n(has_child, count, 0);
  for (int64_t node = 1; node < count; ++node) {
    has_child[parents[node]] = 1;
  }
  int64_t num_leaves = 0;
  for (int64_t node = 0; node < count; ++node) {
    leaves[num_leaves] = node;
    num_leaves += 1 - has_child[node];
  }
  return num_leaves;
}

void copy_tree(const ExtendTreeParams& params, int64_t b, int64_t count) {
  const int64_t from = b * params.nodes;
  const int64_t to = b * params.capacity;
  for (int64_t node = 0; node < count; ++node) {
    params.extended.copy(to + node, params.tree, from + node, params.tree.parents[from + node]);
  }
}

void pad_tree(const ExtendTreeParams& params, int64_t b, int64_t count) {
  for (int64_t place = count; place < params.capacity; ++place) {
    params.extended.pad(b * params.capacity + place);
  }
  params.extended.num_nodes[b] = count;
}

}  // namespace

void extend_tree(const ExtendTreeParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = params.lengths[b];
    const int64_t count = params.tree.num_nodes[b];
    const TextOfTree row{
        .text = params.text + b * params.text_length,
        .begin = first_counted(length, params.window),
        .length = length,
        .tokens = params.tree.tokens + b * params.nodes,
        .parents = params.tree.parents + b * params.nodes,
        .count = count,
    };
    int64_t* leaves = params.workspace + b * 3 * params.nodes;
    auto* keys = reinterpret_cast<uint64_t*>(leaves + params.nodes);
    const int64_t num_leaves = list_leaves(row.parents, count, leaves + 2 * params.nodes, leaves);
    find_matches(row, leaves, num_leaves, params.max_context, keys);
    copy_tree(params, b, count);
    int64_t size = count;
    for (int64_t i = 0; i < num_leaves; ++i) {
      const int64_t first = size;
      const int64_t at = b * params.capacity + first;
      size +=
          continue_match(row, leaves[i], keys[i], params.tree.scores[b * params.nodes + leaves[i]], params.log_probs,
                         params.max_context, params.max_extension, [&](int64_t step, int64_t token, float score) {
                           const int64_t parent = step == 0 ? leaves[i] : first + step - 1;
                           params.extended.put(at + step, token, parent, score, 0, params.proposer);
                         });
    }
    pad_tree(params, b, size);
  }
}

}  // namespace taps::cpu
