#include "tree_extension/extend_tree.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/allocate.h"
#include "common/check.h"
#include "common/run.h"
#include "common/text_match.h"
#include "ops.h"

namespace taps {

namespace {

// int64 [B, L], contiguous. A row's text ends with its root, and what may be copied holds tokens.
Tensor checked_text(const Tensor& text_in, const Tensor& lengths, const Tensor& tokens, int64_t window) {
  check_int64(text_in, "text");
  check_dim(text_in, "text", 2, "[B, L]");
  check_sizes(text_in, "text", {tokens.size(0), text_in.size(1)}, "one a row of tokens");
  check_values(lengths, "lengths", 0, text_in.size(1));
  Tensor text = text_in.contiguous();
  for (int64_t b = 0; can_read(text) && b < text.size(0); ++b) {
    const int64_t* row = text.const_data_ptr<int64_t>() + b * text.size(1);
    const int64_t length = lengths.const_data_ptr<int64_t>()[b];
    const int64_t root = tokens.const_data_ptr<int64_t>()[b * tokens.size(1)];
    TORCH_CHECK_VALUE(length == 0 || row[length - 1] == root, "text must end with the root of its tree, row ", b,
                      " ends with ", row[length - 1], ", and its root is ", root);
    const int64_t first = first_counted(length, window);
    const int64_t bad = first_bad_token(row + first, length - first, INT64_MAX);
    TORCH_CHECK_VALUE(bad < 0, "text must not hold negative tokens, row ", b, " has ", row[first + bad], " at ",
                      first + bad);
  }
  return text;
}

void check_log_probs(const std::vector<double>& log_probs) {
  const auto length = static_cast<int64_t>(log_probs.size());
  TORCH_CHECK_VALUE(1 <= length && length <= kMostContext, "log_probs must hold 1..", kMostContext,
                    " match lengths, got ", length);
  for (const double value : log_probs) {
    TORCH_CHECK_VALUE(value <= 0, "log_probs must be at most 0, got ", value);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extend_tree(
    const Tensor& tokens_in, const Tensor& parents_in, const Tensor& scores_in, const Tensor& num_nodes_in,
    const Tensor& entropies_in, const std::optional<Tensor>& proposers_in, const Tensor& text_in,
    const Tensor& lengths_in, const std::vector<double>& log_probs, int64_t max_extension, int64_t window,
    int64_t proposer) {
  check_device({{"parents", parents_in},
                {"num_nodes", num_nodes_in},
                {"tokens", tokens_in},
                {"scores", scores_in},
                {"entropies", entropies_in},
                {"text", text_in},
                {"lengths", lengths_in}});
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  const Tensor tokens = checked_like(tokens_in, "tokens", at::kLong, parents);
  const Tensor scores = checked_like(scores_in, "scores", at::kFloat, parents);
  const Tensor entropies = checked_like(entropies_in, "entropies", at::kFloat, parents);
  Tensor proposers;
  if (proposers_in) {
    check_device({{"parents", parents}, {"proposers", *proposers_in}});
    proposers = checked_like(*proposers_in, "proposers", at::kLong, parents);
  }
  const int64_t rows = parents.size(0);
  const int64_t nodes = parents.size(1);
  check_tokens(tokens, num_nodes);
  TORCH_CHECK_VALUE(max_extension >= 1, "max_extension must be at least 1, got ", max_extension);
  TORCH_CHECK_VALUE(window >= 1, "window must be at least 1, got ", window);
  TORCH_CHECK_VALUE(proposer >= 0, "proposer must be a bit mask of at least 0, got ", proposer);
  const Tensor lengths = checked_column(lengths_in, "lengths", at::kLong, rows);
  const Tensor text = checked_text(text_in, lengths, tokens, window);
  check_log_probs(log_probs);

  const int64_t capacity = nodes * (1 + max_extension);
  Tensor extended_tokens = empty({rows, capacity}, tokens);
  Tensor extended_parents = empty({rows, capacity}, tokens);
  Tensor extended_scores = empty({rows, capacity}, scores);
  Tensor num_extended = empty({rows}, tokens);
  Tensor extended_entropies = empty({rows, capacity}, scores);
  Tensor extended_proposers = empty({rows, capacity}, tokens);
  Tensor workspace = empty({rows, 3, nodes}, tokens);
  ExtendTreeParams params{
      .tokens = tokens.const_data_ptr<int64_t>(),
      .parents = parents.const_data_ptr<int64_t>(),
      .scores = scores.const_data_ptr<float>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .entropies = entropies.const_data_ptr<float>(),
      .proposers = proposers.defined() ? proposers.const_data_ptr<int64_t>() : nullptr,
      .text = text.const_data_ptr<int64_t>(),
      .lengths = lengths.const_data_ptr<int64_t>(),
      .extended_tokens = extended_tokens.mutable_data_ptr<int64_t>(),
      .extended_parents = extended_parents.mutable_data_ptr<int64_t>(),
      .extended_scores = extended_scores.mutable_data_ptr<float>(),
      .num_extended = num_extended.mutable_data_ptr<int64_t>(),
      .extended_entropies = extended_entropies.mutable_data_ptr<float>(),
      .extended_proposers = extended_proposers.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nodes = nodes,
      .capacity = capacity,
      .text_length = text.size(1),
      .max_context = static_cast<int64_t>(log_probs.size()),
      .max_extension = max_extension,
      .window = window,
      .proposer = proposer,
      .log_probs = {},
  };
  std::copy(log_probs.begin(), log_probs.end(), params.log_probs);
  run(
      parents, [&](Stream stream) { cuda::extend_tree(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(std::min(window, text.size(1)) + 10 * capacity),
                         [&](int64_t begin, int64_t end) { cpu::extend_tree(params, begin, end); });
      });
  return {extended_tokens, extended_parents, extended_scores, num_extended, extended_entropies, extended_proposers};
}

}  // namespace taps
