#include "tree_merging/merge_trees.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "ops.h"

namespace taps {

namespace {

// Checks that the D trees of a row continue the same token.
void check_roots(const Tensor& tokens) {
  if (!can_read(tokens)) {
    return;
  }
  const int64_t drafters = tokens.size(1);
  const int64_t nodes = tokens.size(2);
  const int64_t* root = tokens.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < tokens.size(0); ++b, root += drafters * nodes) {
    for (int64_t d = 1; d < drafters; ++d) {
      TORCH_CHECK_VALUE(root[d * nodes] == root[0], "tokens must hold the same root in every tree of a row, row ", b,
                        " has ", root[0], " in tree 0 and ", root[d * nodes], " in tree ", d);
    }
  }
}

// The workspace of a row, in int64.
int64_t workspace_length(const Tensor& parents) {
  const int64_t drafters = parents.size(1);
  const int64_t nodes = parents.size(2);
  if (can_read(parents)) {
    return merge_workspace(drafters, nodes).length();
  }
  TORCH_CHECK_VALUE(drafters * nodes <= kMergeMostNodes, "parents must hold at most ", kMergeMostNodes,
                    " nodes a row on a device, got ", drafters, " trees of ", nodes);
  return merge_spill_length(drafters, nodes);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_trees(const Tensor& tokens_in,
                                                                       const Tensor& parents_in,
                                                                       const Tensor& scores_in,
                                                                       const Tensor& num_nodes_in,
                                                                       std::optional<int64_t> max_nodes) {
  check_device({{"parents", parents_in}, {"num_nodes", num_nodes_in}, {"tokens", tokens_in}, {"scores", scores_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in, 3, "[B, D, N]");
  const Tensor tokens = checked_like(tokens_in, "tokens", at::kLong, parents);
  const Tensor scores = checked_like(scores_in, "scores", at::kFloat, parents);
  const int64_t rows = parents.size(0);
  const int64_t drafters = parents.size(1);
  const int64_t nodes = parents.size(2);
  TORCH_CHECK_VALUE(1 <= drafters && drafters <= 63, "parents must hold 1..63 trees a row, got ", drafters);
  check_tokens(tokens, num_nodes);
  check_roots(tokens);
  TORCH_CHECK_VALUE(max_nodes.value_or(1) >= 1, "max_nodes must be at least 1, got ", *max_nodes);

  const int64_t union_length = drafters * (nodes - 1) + 1;
  const int64_t capacity = std::min(max_nodes.value_or(union_length), union_length);
  Tensor merged_tokens = empty({rows, capacity}, tokens);
  Tensor merged_parents = empty({rows, capacity}, tokens);
  Tensor merged_scores = empty({rows, capacity}, scores);
  Tensor num_merged = empty({rows}, tokens);
  Tensor proposers = empty({rows, capacity}, tokens);
  Tensor node_map = empty({rows, drafters, nodes}, tokens);
  Tensor workspace = empty({rows, workspace_length(parents)}, tokens);
  const MergeTreesParams params{
      .tokens = tokens.const_data_ptr<int64_t>(),
      .parents = parents.const_data_ptr<int64_t>(),
      .scores = scores.const_data_ptr<float>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .merged_tokens = merged_tokens.mutable_data_ptr<int64_t>(),
      .merged_parents = merged_parents.mutable_data_ptr<int64_t>(),
      .merged_scores = merged_scores.mutable_data_ptr<float>(),
      .num_merged = num_merged.mutable_data_ptr<int64_t>(),
      .proposers = proposers.mutable_data_ptr<int64_t>(),
      .node_map = node_map.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .drafters = drafters,
      .nodes = nodes,
      .capacity = capacity,
      .has_budget = max_nodes.has_value(),
  };
  run(
      tokens, [&](Stream stream) { cuda::merge_trees(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(30 * union_length),
                         [&](int64_t begin, int64_t end) { cpu::merge_trees(params, begin, end); });
      });
  return {merged_tokens, merged_parents, merged_scores, num_merged, proposers, node_map};
}

}  // namespace taps
