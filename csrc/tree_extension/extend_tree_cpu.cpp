// One pass over the window serves every leaf: a bit per hash of a leaf's token tells most places of the text apart.
#include "tree_extension/extend_tree.h"

#include <algorithm>
#include <limits>

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
  std::copy_n(params.tokens + from, count, params.extended_tokens + to);
  std::copy_n(params.parents + from, count, params.extended_parents + to);
  std::copy_n(params.scores + from, count, params.extended_scores + to);
  std::copy_n(params.entropies + from, count, params.extended_entropies + to);
  if (params.proposers != nullptr) {
    std::copy_n(params.proposers + from, count, params.extended_proposers + to);
  } else {
    std::fill_n(params.extended_proposers + to, count, 0);
  }
}

void pad_tree(const ExtendTreeParams& params, int64_t b, int64_t count) {
  const int64_t tail = b * params.capacity + count;
  const int64_t padding = params.capacity - count;
  std::fill_n(params.extended_tokens + tail, padding, 0);
  std::fill_n(params.extended_parents + tail, padding, 0);
  std::fill_n(params.extended_scores + tail, padding, -std::numeric_limits<float>::infinity());
  std::fill_n(params.extended_entropies + tail, padding, 0.0f);
  std::fill_n(params.extended_proposers + tail, padding, 0);
  params.num_extended[b] = count;
}

}  // namespace

void extend_tree(const ExtendTreeParams& params, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t length = params.lengths[b];
    const int64_t count = params.num_nodes[b];
    const TextOfTree row{
        .text = params.text + b * params.text_length,
        .begin = first_counted(length, params.window),
        .length = length,
        .tokens = params.tokens + b * params.nodes,
        .parents = params.parents + b * params.nodes,
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
      size += continue_match(row, leaves[i], keys[i], params.scores[b * params.nodes + leaves[i]], params.log_probs,
                             params.max_context, params.max_extension, [&](int64_t step, int64_t token, float score) {
                               params.extended_tokens[at + step] = token;
                               params.extended_parents[at + step] = step == 0 ? leaves[i] : first + step - 1;
                               params.extended_scores[at + step] = score;
                               params.extended_entropies[at + step] = 0.0f;
                               params.extended_proposers[at + step] = params.proposer;
                             });
    }
    pad_tree(params, b, size);
  }
}

}  // namespace taps::cpu
