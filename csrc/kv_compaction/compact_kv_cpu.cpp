#include "kv_compaction/compact_kv.h"

#include <cstring>

namespace taps::cpu {

void compact_kv(const CompactKvParams& params, int64_t begin, int64_t end) {
  for (int64_t slab = begin; slab < end; ++slab) {
    const int64_t b = slab / params.heads % params.rows;
    const int64_t* path = params.path + b * params.nodes;
    char* kv = params.kv + slab * params.capacity * params.row_bytes;
    // Ascending, in place: a row moves down or stays, and never onto one that has yet to move.
    for (int64_t i = 0; i <= params.num_accepted[b]; ++i) {
      const int64_t to = params.prefix_lengths[b] + i;
      const int64_t from = params.kv_length + path[i];
      if (to != from) {
        std::memcpy(kv + to * params.row_bytes, kv + from * params.row_bytes, params.row_bytes);
      }
    }
  }
}

}  // namespace taps::cpu
