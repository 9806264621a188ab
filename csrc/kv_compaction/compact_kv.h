// Moves the accepted path in the KV cache behind the prefix, every layer in one call.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct CompactKvParams {
  char* kv;                       // [S, B, heads, capacity] rows of row_bytes
  const int64_t* path;            // [B, N]
  const int64_t* num_accepted;    // [B], -1: nothing moves
  const int64_t* prefix_lengths;  // [B]
  int64_t nodes;                  // N
  int64_t rows;                   // B
  int64_t heads;
  int64_t capacity;
  int64_t kv_length;
  int64_t row_bytes;
};

namespace cpu {
void compact_kv(const CompactKvParams& params, int64_t begin, int64_t end);  // slabs of S * B * heads
}  // namespace cpu

namespace cuda {
void compact_kv(const CompactKvParams& params, int64_t slabs, Stream stream);  // S * B * heads
}  // namespace cuda

}  // namespace taps
