// Appends to each leaf what followed its path at an earlier place of the row's own text.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/tree_fields.h"

namespace taps {

constexpr int64_t kMostContext = 32;  // match lengths that the parameters of a launch have room for

struct ExtendTreeParams {
  TreesRead tree;          // [B, N]
  const int64_t* text;     // [B, L]
  const int64_t* lengths;  // [B], 0: the row stays as it is
  TreesWritten extended;   // [B, C]
  int64_t* workspace;      // [B, 3, N]
  int64_t nodes;           // N
  int64_t capacity;        // C = N (1 + max_extension)
  int64_t text_length;     // L
  int64_t max_context;     // of log_probs
  int64_t max_extension;
  int64_t window;
  int64_t proposer;  // of every node that is added, a bit mask
  float log_probs[kMostContext];
};

namespace cpu {
void extend_tree(const ExtendTreeParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void extend_tree(const ExtendTreeParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
