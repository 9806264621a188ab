#include "tree_attention/tree_attention_mask.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

namespace {

struct MaskBits {
  uint32_t visible;
  uint32_t masked;
};

// true and false, or 0 and -inf.
MaskBits mask_bits(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
      return {1, 0};
    case at::kFloat:
      return {0, 0xFF800000u};
    case at::kBFloat16:
      return {0, 0xFF80u};
    case at::kHalf:
      return {0, 0xFC00u};
    default:
      TORCH_CHECK_VALUE(false, "dtype must be bool, float32, bfloat16 or float16, got ", text_of(dtype));
  }
}

}  // namespace

Tensor tree_attention_mask(const Tensor& parents_in, const Tensor& num_nodes_in, const Tensor& prefix_lengths_in,
                           int64_t kv_length, at::ScalarType dtype) {
  check_device({{"parents", parents_in}, {"num_nodes", num_nodes_in}, {"prefix_lengths", prefix_lengths_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  const int64_t rows = parents.size(0);
  const int64_t nodes = parents.size(1);
  const Tensor prefix_lengths = checked_prefix_lengths(prefix_lengths_in, rows, kv_length);
  const MaskBits bits = mask_bits(dtype);

  Tensor mask = empty({rows, 1, nodes, kv_length + nodes}, parents, dtype);
  const TreeAttentionMaskParams params{
      .parents = parents.const_data_ptr<int64_t>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .prefix_lengths = prefix_lengths.const_data_ptr<int64_t>(),
      .mask = mask.mutable_data_ptr(),
      .nodes = nodes,
      .kv_length = kv_length,
      .element_size = static_cast<int64_t>(mask.element_size()),
      .visible = bits.visible,
      .masked = bits.masked,
  };
  const int64_t row_bytes = (kv_length + nodes) * params.element_size;
  run(
      parents, [&](Stream stream) { cuda::tree_attention_mask(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows * nodes, rows_per_task(20 + row_bytes / 16),
                         [&](int64_t begin, int64_t end) { cpu::tree_attention_mask(params, begin, end); });
      });
  return mask;
}

}  // namespace taps
