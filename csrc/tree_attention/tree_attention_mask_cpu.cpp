#include "tree_attention/tree_attention_mask.h"

#include <algorithm>

#include "common/tree_rules.h"

namespace taps::cpu {

namespace {

// Writing the row is the cost; the ancestors are few, so each row walks its own and rows stay independent.
template <typename Element>
void mask_rows(const TreeAttentionMaskParams& params, int64_t begin, int64_t end) {
  const auto visible = static_cast<Element>(params.visible);
  const auto masked = static_cast<Element>(params.masked);
  const int64_t length = params.kv_length + params.nodes;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / params.nodes;
    Element* mask = static_cast<Element*>(params.mask) + row * length;
    std::fill_n(mask, params.prefix_lengths[b], visible);
    std::fill(mask + params.prefix_lengths[b], mask + length, masked);
    for_each_ancestor(params.parents + b * params.nodes, params.num_nodes[b], row % params.nodes,
                      [&](int64_t node) { mask[params.kv_length + node] = visible; });
  }
}

}  // namespace

void tree_attention_mask(const TreeAttentionMaskParams& params, int64_t begin, int64_t end) {
  switch (params.element_size) {
    case 1:
      return mask_rows<uint8_t>(params, begin, end);
    case 2:
      return mask_rows<uint16_t>(params, begin, end);
    default:
      return mask_rows<uint32_t>(params, begin, end);
  }
}

}  // namespace taps::cpu
