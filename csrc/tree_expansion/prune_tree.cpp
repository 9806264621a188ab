#include "tree_expansion/prune_tree.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "common/run.h"
#include "common/tree_tensors.h"
#include "ops.h"

namespace taps {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prune_tree(const Tensor& tokens, const Tensor& parents,
                                                                      const Tensor& scores, const Tensor& num_nodes,
                                                                      const Tensor& entropies,
                                                                      const std::optional<Tensor>& proposers,
                                                                      int64_t max_nodes) {
  const TreeTensors tree = checked_trees(tokens, parents, scores, num_nodes, entropies, proposers);
  TORCH_CHECK_VALUE(max_nodes >= 1, "max_nodes must be at least 1, got ", max_nodes);

  const int64_t rows = tree.rows();
  const int64_t nodes = tree.nodes();
  const int64_t capacity = std::min(max_nodes, nodes);
  const TreeTensors kept = empty_trees(tree, capacity);
  Tensor workspace = empty({rows, 2, nodes}, tree.tokens);
  const PruneTreeParams params{
      .tree = tree.read(),
      .kept = kept.written(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nodes = nodes,
      .capacity = capacity,
  };
  run(
      tree.parents, [&](Stream stream) { cuda::prune_tree(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(15 * nodes),
                         [&](int64_t begin, int64_t end) { cpu::prune_tree(params, begin, end); });
      });
  return kept.fields();
}

}  // namespace taps
