#include "tree_attention/tree_depths.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

Tensor tree_depths(const Tensor& parents_in, const Tensor& num_nodes_in) {
  check_device({{"parents", parents_in}, {"num_nodes", num_nodes_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);

  Tensor depths = empty(parents.sizes(), parents);
  const TreeDepthsParams params{
      .parents = parents.const_data_ptr<int64_t>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .depths = depths.mutable_data_ptr<int64_t>(),
      .nodes = parents.size(1),
  };
  run(
      parents, [&](Stream stream) { cuda::tree_depths(params, parents.size(0), stream); },
      [&] {
        at::parallel_for(0, parents.size(0), rows_per_task(2 * params.nodes),
                         [&](int64_t begin, int64_t end) { cpu::tree_depths(params, begin, end); });
      });
  return depths;
}

}  // namespace taps
