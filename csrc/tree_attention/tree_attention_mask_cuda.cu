#include <algorithm>

#include "tree_attention/block_parents.cuh"
#include "tree_attention/tree_attention_mask.h"

namespace taps::cuda {

namespace {

// How the rows of a request are divided among blocks.
struct Tiling {
  int tiles;      // blocks of a request
  int tile_rows;  // rows of a block
  int lanes;      // threads that write one row together
};

// 32-bit words with a bit a node; one to spare, so that any 16 bits can be read from two words.
inline TAPS_HD int row_words(int64_t nodes) {
  return static_cast<int>((nodes + 31) / 32 + 1);
}

// Bit k: whether the row attends to column + k. Bits of columns past the row's end mean nothing.
__device__ __forceinline__ uint32_t attended(const uint32_t* seen, int64_t prefix_length, int64_t kv_length,
                                             int64_t column, int elements) {
  const int64_t in_prefix = prefix_length - column;
  uint32_t bits = in_prefix >= elements ? 0xFFFFFFFFu : in_prefix > 0 ? (1u << in_prefix) - 1 : 0;
  const int64_t node = column - kv_length;
  if (node >= 0) {
    const uint64_t pair = seen[node / 32] | static_cast<uint64_t>(seen[node / 32 + 1]) << 32;
    bits |= static_cast<uint32_t>(pair >> (node % 32));
  } else if (node > -elements) {
    bits |= seen[0] << -node;
  }
  return bits;
}

template <typename Element>
__device__ __forceinline__ Element element_of(const TreeAttentionMaskParams& params, uint32_t bits, int k) {
  return static_cast<Element>((bits >> k & 1) != 0 ? params.visible : params.masked);
}

// Four bytes of elements, from element k.
template <typename Element>
__device__ __forceinline__ uint32_t packed(const TreeAttentionMaskParams& params, uint32_t bits, int k) {
  uint32_t word = 0;
  for (int i = 0; i < static_cast<int>(4 / sizeof(Element)); ++i) {
    word |= static_cast<uint32_t>(element_of<Element>(params, bits, k + i)) << (8 * sizeof(Element) * i);
  }
  return word;
}

// Rows start at any element: the 16-byte words are those of memory, and the first and the last may be shared with the
// neighbouring rows.
template <typename Element>
__device__ __forceinline__ void write_row(const TreeAttentionMaskParams& params, const uint32_t* seen,
                                          int64_t prefix_length, int64_t row, int lane, int lanes) {
  constexpr int kElements = 16 / sizeof(Element);
  const int64_t length = params.kv_length + params.nodes;
  Element* mask = static_cast<Element*>(params.mask) + row * length;
  const auto neighbours = static_cast<int>(reinterpret_cast<uintptr_t>(mask) % 16 / sizeof(Element));
  auto* vectors = reinterpret_cast<uint4*>(mask - neighbours);
  for (int64_t vector = lane; vector * kElements < length + neighbours; vector += lanes) {
    const int64_t column = vector * kElements - neighbours;
    const uint32_t bits = attended(seen, prefix_length, params.kv_length, column, kElements);
    if (column >= 0 && column + kElements <= length) {
      vectors[vector] =
          make_uint4(packed<Element>(params, bits, 0), packed<Element>(params, bits, kElements / 4),
                     packed<Element>(params, bits, kElements / 2), packed<Element>(params, bits, kElements / 4 * 3));
    } else {
      for (int k = 0; k < kElements; ++k) {
        if (column + k >= 0 && column + k < length) {
          mask[column + k] = element_of<Element>(params, bits, k);
        }
      }
    }
  }
}

// A block per tile of a request's rows. One thread per row collects the row's ancestors as bits; then each group of
// `lanes` threads writes a row, 16 bytes a thread: the writing is the cost.
template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    tree_attention_mask_kernel(const TreeAttentionMaskParams params, Tiling tiling) {
  TAPS_DYNAMIC_SHARED(int32_t, shared);
  const int64_t b = blockIdx.x / tiling.tiles;
  const int first = static_cast<int>(blockIdx.x % tiling.tiles) * tiling.tile_rows;
  const int rows = min(tiling.tile_rows, static_cast<int>(params.nodes) - first);
  const int words = row_words(params.nodes);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t prefix_length = max(int64_t{0}, min(params.prefix_lengths[b], params.kv_length));
  auto* seen = reinterpret_cast<uint32_t*>(shared + staged_nodes(params.nodes));
  for (int i = thread; i < rows * words; i += kThreads) {
    seen[i] = 0;
  }
  const BlockParents parents =
      block_parents<kThreads>(params.parents, params.num_nodes, params.nodes, b, first + rows, shared);
  if (thread < rows) {
    for (int node = first + thread; node >= 0; node = parents.of(node)) {
      seen[thread * words + node / 32] |= 1u << (node % 32);
    }
  }
  __syncthreads();
  for (int row = thread / tiling.lanes; row < rows; row += kThreads / tiling.lanes) {
    write_row<Element>(params, seen + row * words, prefix_length, b * params.nodes + first + row, thread % tiling.lanes,
                       tiling.lanes);
  }
}

// Enough blocks for every multiprocessor; beyond that, more rows a block, which share the reading of the parents.
Tiling tiling_of(const TreeAttentionMaskParams& params, int64_t rows, int64_t row_vectors, int threads) {
  constexpr int64_t kSharedWords = 48 * 1024 / 4;
  Tiling tiling{1, 1, 4};
  while (tiling.lanes < row_vectors && tiling.lanes < threads) {
    tiling.lanes *= 2;
  }
  const int64_t groups = threads / tiling.lanes;
  const int64_t shared_rows = (kSharedWords - staged_nodes(params.nodes)) / row_words(params.nodes);
  const int64_t wanted = std::max(rows * params.nodes / 1024, params.nodes / 256);
  tiling.tile_rows = static_cast<int>(
      std::max<int64_t>(1, std::min({std::max(groups, std::min<int64_t>(wanted, 16)), params.nodes, shared_rows})));
  tiling.tiles = static_cast<int>((params.nodes + tiling.tile_rows - 1) / tiling.tile_rows);
  return tiling;
}

template <typename Element, int kThreads>
void launch(const TreeAttentionMaskParams& params, int64_t rows, int64_t row_vectors, Stream stream) {
  const Tiling tiling = tiling_of(params, rows, row_vectors, kThreads);
  const size_t shared_words = staged_nodes(params.nodes) + tiling.tile_rows * row_words(params.nodes);
  TAPS_LAUNCH((tree_attention_mask_kernel<Element, kThreads>), rows * tiling.tiles, kThreads,
              shared_words * sizeof(int32_t), stream, params, tiling);
}

template <typename Element>
void launch(const TreeAttentionMaskParams& params, int64_t rows, Stream stream) {
  const int64_t row_bytes = (params.kv_length + params.nodes) * static_cast<int64_t>(sizeof(Element));
  const int64_t row_vectors = row_bytes / 16 + 2;
  if (params.nodes * row_vectors <= 512) {
    return launch<Element, 64>(params, rows, row_vectors, stream);
  }
  launch<Element, 256>(params, rows, row_vectors, stream);
}

}  // namespace

void tree_attention_mask(const TreeAttentionMaskParams& params, int64_t rows, Stream stream) {
  if (rows == 0) {
    return;
  }
  switch (params.element_size) {
    case 1:
      return launch<uint8_t>(params, rows, stream);
    case 2:
      return launch<uint16_t>(params, rows, stream);
    default:
      return launch<uint32_t>(params, rows, stream);
  }
}

}  // namespace taps::cuda
