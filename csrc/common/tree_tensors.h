// The tensors of a batch of trees with all fields: checked where they come in, allocated where they go out.
#pragma once

#include <optional>
#include <tuple>

#include "common/allocate.h"
#include "common/check.h"
#include "common/tree_fields.h"

namespace taps {

struct TreeTensors {
  at::Tensor tokens, parents, scores, num_nodes, entropies, proposers;  // proposers: undefined if there are none

  int64_t rows() const { return parents.size(0); }
  int64_t nodes() const { return parents.size(1); }

  TreesRead read() const {
    return {
        .tokens = tokens.const_data_ptr<int64_t>(),
        .parents = parents.const_data_ptr<int64_t>(),
        .scores = scores.const_data_ptr<float>(),
        .num_nodes = num_nodes.const_data_ptr<int64_t>(),
        .entropies = entropies.const_data_ptr<float>(),
        .proposers = proposers.defined() ? proposers.const_data_ptr<int64_t>() : nullptr,
    };
  }

  TreesWritten written() const {
    return {
        .tokens = tokens.mutable_data_ptr<int64_t>(),
        .parents = parents.mutable_data_ptr<int64_t>(),
        .scores = scores.mutable_data_ptr<float>(),
        .num_nodes = num_nodes.mutable_data_ptr<int64_t>(),
        .entropies = entropies.mutable_data_ptr<float>(),
        .proposers = proposers.mutable_data_ptr<int64_t>(),
    };
  }

  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> fields() const {
    return {tokens, parents, scores, num_nodes, entropies, proposers};
  }
};

// The trees of a call, contiguous.
inline TreeTensors checked_trees(const at::Tensor& tokens, const at::Tensor& parents_in, const at::Tensor& scores,
                                 const at::Tensor& num_nodes_in, const at::Tensor& entropies,
                                 const std::optional<at::Tensor>& proposers) {
  check_device({{"parents", parents_in},
                {"num_nodes", num_nodes_in},
                {"tokens", tokens},
                {"scores", scores},
                {"entropies", entropies}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  TreeTensors trees{
      .tokens = checked_like(tokens, "tokens", at::kLong, parents),
      .parents = parents,
      .scores = checked_like(scores, "scores", at::kFloat, parents),
      .num_nodes = num_nodes,
      .entropies = checked_like(entropies, "entropies", at::kFloat, parents),
      .proposers = {},
  };
  if (proposers) {
    check_device({{"parents", parents}, {"proposers", *proposers}});
    trees.proposers = checked_like(*proposers, "proposers", at::kLong, parents);
  }
  check_tokens(trees.tokens, trees.num_nodes);
  return trees;
}

// Trees of as many rows, in `capacity` slots.
inline TreeTensors empty_trees(const TreeTensors& like, int64_t capacity) {
  const int64_t rows = like.rows();
  return {
      .tokens = empty({rows, capacity}, like.tokens),
      .parents = empty({rows, capacity}, like.tokens),
      .scores = empty({rows, capacity}, like.scores),
      .num_nodes = empty({rows}, like.tokens),
      .entropies = empty({rows, capacity}, like.scores),
      .proposers = empty({rows, capacity}, like.tokens),
  };
}

}  // namespace taps
