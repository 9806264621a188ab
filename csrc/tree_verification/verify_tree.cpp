#include "tree_verification/verify_tree.h"

#include <ATen/Parallel.h>

#include "common/allocate.h"
#include "common/check.h"
#include "common/device.h"
#include "common/logits_tensor.h"
#include "common/run.h"
#include "common/sampling_rule.h"
#include "common/ticket.h"
#include "ops.h"

namespace taps {

namespace {

bool is_count(int64_t value) {
  return value >= 0;
}

bool is_probability(float value) {
  return value >= 0 && value <= 1;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> verify_tree(const Tensor& logits, const Tensor& tokens_in,
                                                       const Tensor& parents_in, const Tensor& num_nodes_in,
                                                       const Tensor& temperature_in, const Tensor& top_k_in,
                                                       const Tensor& top_p_in, const Tensor& min_p_in,
                                                       const Tensor& seeds_in, const Tensor& positions_in) {
  check_device({{"logits", logits},
                {"tokens", tokens_in},
                {"parents", parents_in},
                {"num_nodes", num_nodes_in},
                {"temperature", temperature_in},
                {"top_k", top_k_in},
                {"top_p", top_p_in},
                {"min_p", min_p_in},
                {"seeds", seeds_in},
                {"positions", positions_in}});
  check_logits(logits, "[B, N, V]");
  TORCH_CHECK_VALUE(logits.size(2) <= kLargestVocabulary, "logits must be over at most ", kLargestVocabulary,
                    " tokens, got ", text_of(logits.sizes()));
  const auto [parents, num_nodes] = checked_tree(parents_in, num_nodes_in);
  check_sizes(parents, "parents", logits.sizes().slice(0, 2), "like logits");
  const Tensor tokens = checked_like(tokens_in, "tokens", at::kLong, parents);
  check_tokens(tokens, num_nodes, logits.size(2));
  const int64_t rows = parents.size(0);
  const int64_t nodes = parents.size(1);
  const Tensor temperature = checked_temperature(temperature_in, rows);
  const Tensor top_k = checked_column(top_k_in, "top_k", rows, "at least 0", is_count);
  const Tensor top_p = checked_column(top_p_in, "top_p", rows, "between 0 and 1", is_probability);
  const Tensor min_p = checked_column(min_p_in, "min_p", rows, "between 0 and 1", is_probability);
  const Tensor seeds = checked_column(seeds_in, "seeds", at::kLong, rows);
  const Tensor positions = checked_positions(positions_in, rows);

  Tensor path = empty({rows, nodes}, parents);
  Tensor num_accepted = empty({rows}, parents);
  Tensor bonus_tokens = empty({rows}, parents);
  Tensor status = empty({rows}, parents);
  Tensor workspace = empty({can_read(logits) ? 0 : verify_tree_workspace(rows, nodes)}, parents);
  const VerifyTreeParams params{
      .logits = logits.const_data_ptr(),
      .logits_type = logits_type_of(logits),
      .batch_stride = logits.stride(0),
      .node_stride = logits.stride(1),
      .nodes = nodes,
      .vocabulary = logits.size(2),
      .tokens = tokens.const_data_ptr<int64_t>(),
      .parents = parents.const_data_ptr<int64_t>(),
      .num_nodes = num_nodes.const_data_ptr<int64_t>(),
      .temperature = temperature.const_data_ptr<float>(),
      .top_k = top_k.const_data_ptr<int64_t>(),
      .top_p = top_p.const_data_ptr<float>(),
      .min_p = min_p.const_data_ptr<float>(),
      .seeds = seeds.const_data_ptr<int64_t>(),
      .positions = positions.const_data_ptr<int64_t>(),
      .path = path.mutable_data_ptr<int64_t>(),
      .num_accepted = num_accepted.mutable_data_ptr<int64_t>(),
      .bonus_tokens = bonus_tokens.mutable_data_ptr<int64_t>(),
      .status = status.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nonce = launch_nonce(),
  };
  run(
      logits, [&](Stream stream) { cuda::verify_tree(params, rows, stream); },
      [&] {
        at::parallel_for(0, rows, rows_per_task(params.vocabulary),
                         [&](int64_t begin, int64_t end) { cpu::verify_tree(params, begin, end); });
      });
  return {path, num_accepted, bonus_tokens, status};
}

}  // namespace taps
