// The walk of each tree with the target's draws: what it reads and what it writes.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/logits_type.h"

namespace taps {

struct VerifyTreeParams {
  const void* logits;  // [B, N, V]
  LogitsType logits_type;
  int64_t batch_stride;  // in elements
  int64_t node_stride;
  int64_t nodes;             // N
  int64_t vocabulary;        // V
  const int64_t* tokens;     // [B, N]
  const int64_t* parents;    // [B, N]
  const int64_t* num_nodes;  // [B]
  const float* temperature;  // [B]
  const int64_t* top_k;      // [B]
  const float* top_p;        // [B]
  const float* min_p;        // [B]
  const int64_t* seeds;      // [B]
  const int64_t* positions;  // [B], of the token drawn at the root
  int64_t* path;             // [B, N]
  int64_t* num_accepted;     // [B]
  int64_t* bonus_tokens;     // [B]
  int64_t* status;           // [B]
  int64_t* workspace;        // [verify_tree_workspace(B, N)], of the kernels
  uint64_t nonce;            // of the launch (common/ticket.h)
};

// Where rows are few, the kernels draw all of them at once, each in parts: a ticket a request and a record a part.
constexpr int64_t kMostRowParts = 512;
constexpr int64_t kRowPartWords = 3;

inline int64_t verify_tree_workspace(int64_t rows, int64_t nodes) {
  return rows * nodes <= kMostRowParts ? rows + kMostRowParts * kRowPartWords : 0;
}

namespace cpu {

// Rows begin..end of the batch.
void verify_tree(const VerifyTreeParams& params, int64_t begin, int64_t end);

}  // namespace cpu

namespace cuda {

void verify_tree(const VerifyTreeParams& params, int64_t rows, Stream stream);

}  // namespace cuda

}  // namespace taps
