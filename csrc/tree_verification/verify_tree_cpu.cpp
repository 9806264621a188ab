#include "tree_verification/verify_tree.h"

#include <algorithm>

#include "common/sampling_rule.h"
#include "tree_verification/token_draw.h"

namespace taps::cpu {

namespace {

struct Tree {
  const int64_t* tokens;
  const int64_t* parents;
  int64_t count;

  // The node's first child that carries the token, or -1.
  int64_t child_with(int64_t node, int64_t token) const {
    for (int64_t child = node + 1; child < count; ++child) {
      if (parents[child] == node && tokens[child] == token) {
        return child;
      }
    }
    return -1;
  }
};

void verify_row(const VerifyTreeParams& p, int64_t b, TokenDraw& draw) {
  const Tree tree{p.tokens + b * p.nodes, p.parents + b * p.nodes, p.num_nodes[b]};
  const DrawSettings settings{p.temperature[b], p.top_k[b], p.top_p[b], p.min_p[b], p.seeds[b]};
  int64_t* path = p.path + b * p.nodes;
  std::fill(path, path + p.nodes, -1);
  int64_t depth = -1;
  int64_t token = -1;
  for (int64_t node = 0; node >= 0; node = token < 0 ? -1 : tree.child_with(node, token)) {
    path[++depth] = node;
    const LogitsRow row = logits_row(p.logits, p.logits_type, b * p.batch_stride + node * p.node_stride, p.vocabulary);
    token = draw(row, settings, p.positions[b] + depth);
  }
  p.num_accepted[b] = depth;
  p.bonus_tokens[b] = token;
  p.status[b] = token < 0 ? kInvalidLogits : 0;
}

}  // namespace

void verify_tree(const VerifyTreeParams& params, int64_t begin, int64_t end) {
  TokenDraw draw;
  for (int64_t b = begin; b < end; ++b) {
    verify_row(params, b, draw);
  }
}

}  // namespace taps::cpu
