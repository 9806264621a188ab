#include "tree_expansion/expand_frontier.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/device.h"
#include "common/logits_tensor.h"
#include "common/run.h"
#include "common/ticket.h"
#include "ops.h"

namespace taps {

namespace {

// What the kernel is made for; the loop on the CPU takes anything.
void check_limits(const Tensor& logits, int64_t branching) {
  if (can_read(logits)) {
    return;
  }
  TORCH_CHECK_VALUE(branching <= kMostBranching, "branching must be at most ", kMostBranching, " on a device, got ",
                    branching, ": ask for fewer children, or move the logits to the CPU");
  TORCH_CHECK_VALUE(logits.size(1) <= kMostFrontierNodes && logits.size(2) <= kMostVocabulary,
                    "logits must hold at most ", kMostFrontierNodes, " frontier nodes and ", kMostVocabulary,
                    " tokens on a device, got ", text_of(logits.sizes()));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_frontier(const Tensor& logits, const Tensor& scores,
                                                           int64_t branching) {
  check_device({{"logits", logits}, {"scores", scores}});
  check_logits(logits, "[B, F, V]");
  const int64_t batch = logits.size(0);
  const int64_t frontier_length = logits.size(1);
  TORCH_CHECK_VALUE(frontier_length >= 1, "logits must hold at least one frontier node, got ", text_of(logits.sizes()));
  check_float32(scores, "scores");
  check_sizes(scores, "scores", {batch, frontier_length}, "like logits");
  TORCH_CHECK_VALUE(1 <= branching && branching <= logits.size(2), "branching must lie in 1..", logits.size(2),
                    ", the vocabulary, got ", branching);

  check_limits(logits, branching);

  const Tensor parent_scores = scores.contiguous();
  Tensor child_tokens = empty({batch, frontier_length, branching}, scores, at::kLong);
  Tensor child_scores = empty({batch, frontier_length, branching}, scores);
  Tensor frontier = empty({batch, branching}, child_tokens);
  Tensor entropies = empty({batch, frontier_length}, scores);
  const int64_t length = expansion_workspace_length(batch, frontier_length, logits.size(2), branching);
  Tensor workspace = empty({can_read(logits) ? 0 : length}, child_tokens);
  const ExpandFrontierParams params{
      .logits = logits.const_data_ptr(),
      .logits_type = logits_type_of(logits),
      .batch_stride = logits.stride(0),
      .frontier_stride = logits.stride(1),
      .frontier_length = frontier_length,
      .vocabulary = logits.size(2),
      .branching = branching,
      .parent_scores = parent_scores.const_data_ptr<float>(),
      .tokens = child_tokens.mutable_data_ptr<int64_t>(),
      .scores = child_scores.mutable_data_ptr<float>(),
      .frontier = frontier.mutable_data_ptr<int64_t>(),
      .entropies = entropies.mutable_data_ptr<float>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nonce = launch_nonce(),
  };
  run(
      logits, [&](Stream stream) { cuda::expand_frontier(params, batch, stream); },
      [&] {
        at::parallel_for(0, batch * frontier_length, rows_per_task(params.vocabulary),
                         [&](int64_t begin, int64_t end) { cpu::expand_nodes(params, begin, end); });
        at::parallel_for(0, batch, rows_per_task(10 * frontier_length * branching),
                         [&](int64_t begin, int64_t end) { cpu::choose_frontier(params, begin, end); });
      });
  return {child_tokens, child_scores, frontier, entropies};
}

}  // namespace taps
