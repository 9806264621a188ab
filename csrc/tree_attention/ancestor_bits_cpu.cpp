#include "tree_attention/ancestor_bits.h"

#include <algorithm>

#include "common/tree_rules.h"

namespace taps::cpu {

// A node sees what its parent sees, and itself.
void ancestor_bits(const AncestorBitsParams& params, int64_t begin, int64_t end) {
  const int64_t words = params.words;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* parents = params.parents + b * params.nodes;
    int64_t* bits = params.bits + b * params.nodes * words;
    for (int64_t node = 0; node < params.nodes; ++node) {
      const int64_t parent = parent_of(parents, params.num_nodes[b], node);
      int64_t* row = bits + node * words;
      if (parent < 0) {
        std::fill_n(row, words, 0);
      } else {
        std::copy_n(bits + parent * words, words, row);
      }
      row[node / 64] |= static_cast<int64_t>(uint64_t{1} << (node % 64));
    }
  }
}

}  // namespace taps::cpu
