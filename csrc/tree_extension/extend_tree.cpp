#include "tree_extension/extend_tree.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/run.h"
#include "common/text_match.h"
#include "common/tree_tensors.h"
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
    const Tensor& tokens, const Tensor& parents, const Tensor& scores, const Tensor& num_nodes, const Tensor& entropies,
    const std::optional<Tensor>& proposers, const Tensor& text_in, const Tensor& lengths_in,
    const std::vector<double>& log_probs, int64_t max_extension, int64_t window, int64_t proposer) {
  const TreeTensors tree = checked_trees(tokens, parents, scores, num_nodes, entropies, proposers);
  check_device({{"parents", parents}, {"text", text_in}, {"lengths", lengths_in}});
  const int64_t rows = tree.rows();
  const int64_t nodes = tree.nodes();
  TORCH_CHECK_VALUE(max_extension >= 1, "max_extension must be at least 1, got ", max_extension);
  TORCH_CHECK_VALUE(window >= 1, "window must be at least 1, got ", window);
  TORCH_CHECK_VALUE(proposer >= 0, "proposer must be a bit mask of at least 0, got ", proposer);
  const Tensor lengths = checked_column(lengths_in, "lengths", at::kLong, rows);
  const Tensor text = checked_text(text_in, lengths, tree.tokens, window);
  check_log_probs(log_probs);

  const int64_t capacity = nodes * (1 + max_extension);
  const TreeTensors extended = empty_trees(tree, capacity);
  Tensor workspace = empty({rows, 3, nodes}, tree.tokens);
  ExtendTreeParams params{
      .tree = tree.read(),
      .text = text.const_data_ptr<int64_t>(),
      .lengths = lengths.const_data_ptr<int64_t>(),
      .extended = extended.written(),
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
      tree.parents, [&](Stream stream) { cuda::extend_tree(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(std::min(window, text.size(1)) + 10 * capacity),
                         [&](int64_t begin, int64_t end) { cpu::extend_tree(params, begin, end); });
      });
  return extended.fields();
}

}  // namespace taps
