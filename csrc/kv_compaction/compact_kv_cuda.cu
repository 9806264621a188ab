#include "common/launch.cuh"
#include "kv_compaction/compact_kv.h"

namespace taps::cuda {

namespace {

constexpr int kRowsAtOnce = 8;  // that a thread has in flight: most accepted paths whole

// A thread owns a column of one slab, as wide as a Unit, and moves it row by row; `lanes` threads share a slab. Rows in
// flight are all loaded before the first is stored: a row's source is never below the destinations before it.
template <typename Unit, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    compact_kv_kernel(const CompactKvParams params, int64_t slabs, int lanes) {
  const int slabs_per_block = kThreads / lanes;
  const int slab_of_block = static_cast<int>(threadIdx.x) / lanes;
  const int64_t slab = static_cast<int64_t>(blockIdx.x) * slabs_per_block + slab_of_block;
  if (slab_of_block >= slabs_per_block || slab >= slabs) {
    return;
  }
  const int64_t b = slab / params.heads % params.rows;
  const int64_t* path = params.path + b * params.nodes;
  const int64_t kv_length = min(params.kv_length, params.capacity);
  const int64_t prefix_length = max(int64_t{0}, min(params.prefix_lengths[b], kv_length));
  const int64_t num_sources = min(params.nodes, params.capacity - kv_length);
  const int nodes = static_cast<int>(params.nodes);
  const int64_t last = min(params.num_accepted[b], min(params.nodes, params.capacity - prefix_length) - 1);
  const int count = last < 0 ? 0 : static_cast<int>(last + 1);
  const int columns = static_cast<int>(params.row_bytes / static_cast<int64_t>(sizeof(Unit)));
  Unit* slab_rows = reinterpret_cast<Unit*>(params.kv) + slab * params.capacity * columns;
  for (int column = static_cast<int>(threadIdx.x) % lanes; column < columns; column += lanes) {
    const Unit* from = slab_rows + kv_length * columns + column;
    Unit* to = slab_rows + prefix_length * columns + column;
    int first = 0;
    do {  // the first path nodes are read while num_accepted is still on its way
      int64_t entries[kRowsAtOnce];
      int node[kRowsAtOnce];  // -1: nothing to move
      Unit units[kRowsAtOnce];
      for (int i = 0; i < kRowsAtOnce; ++i) {
        entries[i] = first + i < nodes ? path[first + i] : -1;
      }
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const bool is_sound = static_cast<uint64_t>(entries[i]) < static_cast<uint64_t>(num_sources);
        node[i] = is_sound && first + i < count ? static_cast<int>(entries[i]) : -1;
        if (prefix_length == kv_length && node[i] == first + i) {
          node[i] = -1;
        }
        if (node[i] >= 0) {
          units[i] = from[static_cast<int64_t>(node[i]) * columns];
        }
      }
      for (int i = 0; i < kRowsAtOnce; ++i) {
        if (node[i] >= 0) {
          to[static_cast<int64_t>(first + i) * columns] = units[i];
        }
      }
      first += kRowsAtOnce;
    } while (first < count);
  }
}

template <typename Unit, int kThreads>
void launch(const CompactKvParams& params, int64_t slabs, int64_t columns, Stream stream) {
  const int lanes = static_cast<int>(columns < kThreads ? columns : kThreads);
  const int64_t slabs_per_block = kThreads / lanes;
  const int64_t blocks = (slabs + slabs_per_block - 1) / slabs_per_block;
  TAPS_LAUNCH((compact_kv_kernel<Unit, kThreads>), blocks, kThreads, 0, stream, params, slabs, lanes);
}

template <typename Unit>
bool is_aligned(const CompactKvParams& params) {
  return (reinterpret_cast<uintptr_t>(params.kv) | static_cast<uintptr_t>(params.row_bytes)) % sizeof(Unit) == 0;
}

// Small blocks while they are few, to reach more of the device's memory at once.
template <typename Unit>
void launch(const CompactKvParams& params, int64_t slabs, Stream stream) {
  const int64_t columns = params.row_bytes / static_cast<int64_t>(sizeof(Unit));
  if (slabs * columns <= 16384) {
    return launch<Unit, 64>(params, slabs, columns, stream);
  }
  launch<Unit, 256>(params, slabs, columns, stream);
}

}  // namespace

void compact_kv(const CompactKvParams& params, int64_t slabs, Stream stream) {
  if (slabs == 0 || params.row_bytes == 0) {
    return;
  }
  if (is_aligned<uint4>(params)) {
    return launch<uint4>(params, slabs, stream);
  }
  if (is_aligned<uint32_t>(params)) {
    return launch<uint32_t>(params, slabs, stream);
  }
  launch<uint8_t>(params, slabs, stream);
}

}  // namespace taps::cuda
