#include "tree_attention/tree_paths.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

namespace {

// int64 [B, M], contiguous, each -1 or a node of its row.
Tensor checked_nodes(const Tensor& nodes_in, const Tensor& num_nodes) {
  check_int64(nodes_in, "nodes");
  check_dim(nodes_in, "nodes", 2, "[B, M]");
  check_sizes(nodes_in, "nodes", {num_nodes.size(0), nodes_in.size(1)}, "rows like parents");
  const Tensor nodes = nodes_in.contiguous();
  const int64_t* counts = num_nodes.const_data_ptr<int64_t>();
  const int64_t* node = nodes.const_data_ptr<int64_t>();
  for (int64_t b = 0; can_read(nodes) && b < nodes.size(0); ++b) {
    for (int64_t m = 0; m < nodes.size(1); ++m, ++node) {
      TORCH_CHECK_VALUE(-1 <= *node && *node < counts[b], "nodes must lie in -1..", counts[b] - 1, ", row ", b, " has ",
                        *node);
    }
  }
  return nodes;
}

Tensor leaves_of(const Tensor& parents, const Tensor& num_nodes) {
  Tensor leaves = empty(parents.sizes(), parents);
  const TreeLeavesParams params{
      .parents = parents.const_data_ptr<int64_t>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .leaves = leaves.mutable_data_ptr<int64_t>(),
      .nodes = parents.size(1),
  };
  run(
      parents, [&](Stream stream) { cuda::tree_leaves(params, parents.size(0), stream); },
      [&] {
        at::parallel_for(0, parents.size(0), rows_per_task(4 * params.nodes),
                         [&](int64_t begin, int64_t end) { cpu::tree_leaves(params, begin, end); });
      });
  return leaves;
}

void check_max_depth(const Tensor& ends, const Tensor& depths, int64_t max_depth) {
  const int64_t* end = ends.const_data_ptr<int64_t>();
  const int64_t* depth = depths.const_data_ptr<int64_t>();
  for (int64_t b = 0; can_read(ends) && b < ends.size(0); ++b, depth += depths.size(1)) {
    for (int64_t m = 0; m < ends.size(1); ++m, ++end) {
      TORCH_CHECK_VALUE(*end < 0 || depth[*end] <= max_depth, "max_depth must reach every path, got ", max_depth,
                        ": row ", b, ", node ", *end, " has depth ", depth[*end]);
    }
  }
}

}  // namespace

Tensor tree_paths(const Tensor& parents_in, const Tensor& num_nodes_in, const std::optional<Tensor>& nodes,
                  int64_t max_depth) {
  check_device({{"parents", parents_in}, {"num_nodes", num_nodes_in}, {"nodes", nodes.value_or(parents_in)}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  TORCH_CHECK_VALUE(max_depth >= 0, "max_depth must be at least 0, got ", max_depth);
  const Tensor ends = nodes.has_value() ? checked_nodes(*nodes, num_nodes) : leaves_of(parents, num_nodes);
  const Tensor depths = tree_depths(parents, num_nodes);
  check_max_depth(ends, depths, max_depth);

  Tensor paths = empty({ends.size(0), ends.size(1), max_depth + 1}, parents);
  const TreePathsParams params{
      .parents = parents.const_data_ptr<int64_t>(),
      .depths = depths.const_data_ptr<int64_t>(),
      .ends = ends.const_data_ptr<int64_t>(),
      .paths = paths.mutable_data_ptr<int64_t>(),
      .nodes = parents.size(1),
      .num_paths = ends.size(1),
      .path_length = max_depth + 1,
  };
  run(
      parents, [&](Stream stream) { cuda::tree_paths(params, ends.size(0), stream); },
      [&] {
        at::parallel_for(0, ends.size(0), rows_per_task(params.num_paths * params.path_length),
                         [&](int64_t begin, int64_t end) { cpu::tree_paths(params, begin, end); });
      });
  return paths;
}

}  // namespace taps
