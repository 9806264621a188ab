// Which nodes each node may attend to, as 64-bit words.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace taps {

struct AncestorBitsParams {
  const int64_t* parents;    // [B, N]
  const int64_t* num_nodes;  // [B]
  int64_t* bits;             // [B, N, W]
  int64_t nodes;             // N
  int64_t words;             // W = ceil(N / 64)
};

namespace cpu {
void ancestor_bits(const AncestorBitsParams& params, int64_t begin, int64_t end);  // rows of B
}  // namespace cpu

namespace cuda {
void ancestor_bits(const AncestorBitsParams& params, int64_t rows, Stream stream);
}  // namespace cuda

}  // namespace taps
