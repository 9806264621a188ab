// All fields of a batch of trees, [B, N] each, as an op reads them and as it writes them.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct TreesRead {
  const int64_t* tokens;
  const int64_t* parents;
  const float* scores;
  const int64_t* num_nodes;  // [B]
  const float* entropies;
  const int64_t* proposers;  // or null: zeros
};

struct TreesWritten {
  int64_t* tokens;
  int64_t* parents;
  float* scores;
  int64_t* num_nodes;  // [B]
  float* entropies;
  int64_t* proposers;

  TAPS_HD void put(int64_t at, int64_t token, int64_t parent, float score, float entropy, int64_t proposer) const {
    tokens[at] = token;
    parents[at] = parent;
    scores[at] = score;
    entropies[at] = entropy;
    proposers[at] = proposer;
  }

  // A node as it is, below its new parent: field by field, which holds fewer registers than `put`.
  TAPS_HD void copy(int64_t at, const TreesRead& from, int64_t node, int64_t parent) const {
    tokens[at] = from.tokens[node];
    parents[at] = parent;
    scores[at] = from.scores[node];
    entropies[at] = from.entropies[node];
    proposers[at] = from.proposers != nullptr ? from.proposers[node] : 0;
  }

  TAPS_HD void pad(int64_t at) const { put(at, 0, 0, -__builtin_inff(), 0, 0); }
};

}  // namespace taps
