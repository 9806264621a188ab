#include <algorithm>

#include "tree_attention/ancestor_bits.h"
#include "tree_attention/block_parents.cuh"

namespace taps::cuda {

namespace {

constexpr int64_t kWordsPerBlock = 512;

// A block per tile of a request's nodes, a thread per word of a node: walks are short, and the lanes of a node read the
// same parents and write neighbouring words.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    ancestor_bits_kernel(const AncestorBitsParams params, int tiles, int tile_nodes) {
  TAPS_DYNAMIC_SHARED(int32_t, shared);
  const int64_t b = blockIdx.x / tiles;
  const int first = static_cast<int>(blockIdx.x % tiles) * tile_nodes;
  const int end = min(first + tile_nodes, static_cast<int>(params.nodes));
  const int words = static_cast<int>(params.words);
  const BlockParents parents = block_parents<kThreads>(params.parents, params.num_nodes, params.nodes, b, end, shared);
  int64_t* bits = params.bits + (b * params.nodes + first) * words;
  for (int i = static_cast<int>(threadIdx.x); i < (end - first) * words; i += kThreads) {
    const int lowest = i % words * 64;
    uint64_t seen = 0;
    for (int node = first + i / words; node >= lowest; node = parents.of(node)) {
      seen |= node < lowest + 64 ? uint64_t{1} << (node % 64) : 0;
    }
    bits[i] = static_cast<int64_t>(seen);
  }
}

template <int kThreads>
void launch(const AncestorBitsParams& params, int64_t rows, Stream stream) {
  const int64_t tile_nodes = std::max<int64_t>(1, kWordsPerBlock / params.words);
  const int64_t tiles = (params.nodes + tile_nodes - 1) / tile_nodes;
  TAPS_LAUNCH(ancestor_bits_kernel<kThreads>, rows * tiles, kThreads, staged_nodes(params.nodes) * sizeof(int32_t),
              stream, params, static_cast<int>(tiles), static_cast<int>(tile_nodes));
}

}  // namespace

void ancestor_bits(const AncestorBitsParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  if (params.nodes <= 64) {
    return launch<64>(params, rows, stream);
  }
  launch<256>(params, rows, stream);
}

}  // namespace taps::cuda
