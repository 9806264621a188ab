// How a path of a draft tree continues its row's own text, once, for the CPU loop and the CUDA kernel. The context of a
// node is the text, whose last token is the root's, and behind it the tokens of the path below the root.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/tree_rules.h"

namespace taps {

// A row's text, of which tokens [begin, length) count, and its tree. Kernels take parents through safe_parent.
struct TextOfTree {
  const int64_t* text;
  int64_t begin;
  int64_t length;
  const int64_t* tokens;
  const int64_t* parents;
  int64_t count;  // nodes

  TAPS_HD int64_t above(int64_t node) const { return safe_parent(parents, count, node); }
};

// Only the last `window` tokens of a text count.
TAPS_HD inline int64_t first_counted(int64_t length, int64_t window) {
  return length > window ? length - window : 0;
}

// How many tokens before `end`, a place behind a token of the text and before its last one, are the last ones of the
// node's context: at most `longest`.
TAPS_HD inline int64_t match_length(const TextOfTree& row, int64_t node, int64_t end, int64_t longest) {
  int64_t own = row.length - 1;  // where the context stands once it has reached the root
  int64_t matched = 0;
  while (matched < longest && end - 1 - matched >= row.begin) {
    const int64_t token = node > 0 ? row.tokens[node] : row.text[own];
    if (token != row.text[end - 1 - matched]) {
      break;
    }
    ++matched;
    if (node > 0) {
      node = row.above(node);
    } else {
      --own;
    }
  }
  return matched;
}

// Matches as numbers: the longer is larger, then the later. No match is 0.
constexpr int kPlaceBits = 40;

TAPS_HD inline uint64_t match_key(int64_t matched, int64_t end) {
  return matched == 0 ? 0 : static_cast<uint64_t>(matched) << kPlaceBits | static_cast<uint64_t>(end);
}

TAPS_HD inline int64_t matched_of(uint64_t key) {
  return static_cast<int64_t>(key >> kPlaceBits);
}

TAPS_HD inline int64_t end_of(uint64_t key) {
  return static_cast<int64_t>(key & ((uint64_t{1} << kPlaceBits) - 1));
}

// The token at a place of the context of a node at `depth`.
TAPS_HD inline int64_t context_token(const TextOfTree& row, int64_t node, int64_t depth, int64_t place) {
  if (place < row.length) {
    return row.text[place];
  }
  for (int64_t up = row.length + depth - 1 - place; up > 0; --up) {
    node = row.above(node);
  }
  return row.tokens[node];
}

// Calls visit(step, token, score) for each token that followed a match, `limit` at most, and returns how many. Behind
// the text the copy goes on in the path and then in itself, so that a text that repeats itself is continued.
// log_probs[m - 1] is the log-probability of a token behind a match of m tokens, or of all that are longer; the match
// grows with each token. A score of -inf ends the chain.
template <typename Visit>
TAPS_HD inline int64_t continue_match(const TextOfTree& row, int64_t leaf, uint64_t key, float score,
                                      const float* log_probs, int64_t longest, int64_t limit, Visit visit) {
  int64_t depth = 0;
  for (int64_t node = leaf; node > 0; node = row.above(node)) {
    ++depth;
  }
  const int64_t period = row.length + depth - end_of(key);  // from a token back to the one that it repeats
  const int64_t matched = matched_of(key);
  int64_t step = 0;
  for (; matched > 0 && step < limit; ++step) {
    score += log_probs[(matched + step < longest ? matched + step : longest) - 1];
    if (!(score > -__builtin_inff())) {
      break;
    }
    visit(step, context_token(row, leaf, depth, end_of(key) + step % period), score);
  }
  return step;
}

}  // namespace taps
