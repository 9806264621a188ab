// The best children of the frontier nodes, and the best of those: what is read and what is written.
#pragma once

#include <cstdint>

#include "common/logits.h"

namespace taps {

struct ExpandFrontierParams {
  const void* logits;  // [B, F, V]
  LogitsType logits_type;
  int64_t batch_stride;  // in elements
  int64_t frontier_stride;
  int64_t frontier_length;     // F
  int64_t vocabulary;          // V
  int64_t branching;           // K
  const float* parent_scores;  // [B, F]
  int64_t* tokens;             // [B, F, K]
  float* scores;               // [B, F, K]
  int64_t* frontier;           // [B, K]
  float* entropies;            // [B, F]
};

namespace cpu {

// The children and the entropies of frontier nodes begin..end of B * F.
void expand_nodes(const ExpandFrontierParams& params, int64_t begin, int64_t end);

// The next frontier of batch rows begin..end, once their nodes are expanded.
void choose_frontier(const ExpandFrontierParams& params, int64_t begin, int64_t end);

}  // namespace cpu

}  // namespace taps
