#include "tree_attention/ancestor_bits.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

Tensor ancestor_bits(const Tensor& parents_in, const Tensor& num_nodes_in) {
  check_device({{"parents", parents_in}, {"num_nodes", num_nodes_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  const int64_t rows = parents.size(0);
  const int64_t nodes = parents.size(1);
  const int64_t words = (nodes + 63) / 64;

  Tensor bits = empty({rows, nodes, words}, parents);
  const AncestorBitsParams params{
      .parents = parents.const_data_ptr<int64_t>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .bits = bits.mutable_data_ptr<int64_t>(),
      .nodes = nodes,
      .words = words,
  };
  run(
      parents, [&](Stream stream) { cuda::ancestor_bits(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(nodes * (4 + words)),
                         [&](int64_t begin, int64_t end) { cpu::ancestor_bits(params, begin, end); });
      });
  return bits;
}

}  // namespace taps
