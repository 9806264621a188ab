#include "tree_expansion/prune_tree.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prune_tree(
    const Tensor& tokens_in, const Tensor& parents_in, const Tensor& scores_in, const Tensor& num_nodes_in,
    const Tensor& entropies_in, const std::optional<Tensor>& proposers_in, int64_t max_nodes) {
  check_device({{"parents", parents_in},
                {"num_nodes", num_nodes_in},
                {"tokens", tokens_in},
                {"scores", scores_in},
                {"entropies", entropies_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  const Tensor tokens = checked_like(tokens_in, "tokens", at::kLong, parents);
  const Tensor scores = checked_like(scores_in, "scores", at::kFloat, parents);
  const Tensor entropies = checked_like(entropies_in, "entropies", at::kFloat, parents);
  Tensor proposers;
  if (proposers_in) {
    check_device({{"parents", parents}, {"proposers", *proposers_in}});
    proposers = checked_like(*proposers_in, "proposers", at::kLong, parents);
  }
  check_tokens(tokens, num_nodes);
  TORCH_CHECK_VALUE(max_nodes >= 1, "max_nodes must be at least 1, got ", max_nodes);

  const int64_t rows = parents.size(0);
  const int64_t nodes = parents.size(1);
  const int64_t capacity = std::min(max_nodes, nodes);
  Tensor kept_tokens = empty({rows, capacity}, tokens);
  Tensor kept_parents = empty({rows, capacity}, tokens);
  Tensor kept_scores = empty({rows, capacity}, scores);
  Tensor num_kept = empty({rows}, tokens);
  Tensor kept_entropies = empty({rows, capacity}, scores);
  Tensor kept_proposers = empty({rows, capacity}, tokens);
  Tensor workspace = empty({rows, 2, nodes}, tokens);
  const PruneTreeParams params{
      .tokens = tokens.const_data_ptr<int64_t>(),
      .parents = parents.const_data_ptr<int64_t>(),
      .scores = scores.const_data_ptr<float>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .entropies = entropies.const_data_ptr<float>(),
      .proposers = proposers.defined() ? proposers.const_data_ptr<int64_t>() : nullptr,
      .kept_tokens = kept_tokens.mutable_data_ptr<int64_t>(),
      .kept_parents = kept_parents.mutable_data_ptr<int64_t>(),
      .kept_scores = kept_scores.mutable_data_ptr<float>(),
      .num_kept = num_kept.mutable_data_ptr<int64_t>(),
      .kept_entropies = kept_entropies.mutable_data_ptr<float>(),
      .kept_proposers = kept_proposers.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nodes = nodes,
      .capacity = capacity,
  };
  run(
      parents, [&](Stream stream) { cuda::prune_tree(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(15 * nodes),
                         [&](int64_t begin, int64_t end) { cpu::prune_tree(params, begin, end); });
      });
  return {kept_tokens, kept_parents, kept_scores, num_kept, kept_entropies, kept_proposers};
}

}  // namespace taps
