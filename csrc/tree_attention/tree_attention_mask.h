// The attention mask of a tree behind its prefix.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct TreeAttentionMaskParams {
  const int64_t* parents;         // [B, N]
  const int64_t* num_nodes;       // [B]
  const int64_t* prefix_lengths;  // [B]
  void* mask;                     // [B, N, kv_length + N], elements of element_size bytes
  int64_t nodes;                  // N
  int64_t kv_length;
  int64_t element_size;  // 1, 2 or 4
  uint32_t visible;      // the bits of an element that attends
  uint32_t masked;       // and of one that does not
};

namespace cpu {
void tree_attention_mask(const TreeAttentionMaskParams& params, int64_t begin, int64_t end);  // rows of B * N
}  // namespace cpu

namespace cuda {
void tree_attention_mask(const TreeAttentionMaskParams& params, int64_t rows, Stream stream);  // B
}  // namespace cuda

}  // namespace taps
