#include "tree_expansion/expand_frontier.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "common/allocate.h"
#include "common/check.h"
#include "common/device.h"
#include "common/logits.h"
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

// The five columns of a coupling, contiguous; undefined where none is given.
struct CouplingTensors {
  Tensor seeds, positions, temperature, alpha, beta;

  CouplingColumns columns() const {
    if (!seeds.defined()) {
      return {};
    }
    return {seeds.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>(), temperature.const_data_ptr<float>(),
            alpha.const_data_ptr<float>(), beta.const_data_ptr<float>()};
  }
};

using MaybeTensor = std::optional<Tensor>;

CouplingTensors checked_coupling(const Tensor& logits, const MaybeTensor& seeds, const MaybeTensor& positions,
                                 const MaybeTensor& temperature, const MaybeTensor& alpha, const MaybeTensor& beta) {
  const std::pair<const char*, const MaybeTensor&> columns[] = {
      {"seeds", seeds}, {"positions", positions}, {"temperature", temperature}, {"alpha", alpha}, {"beta", beta}};
  const bool is_any_given = seeds || positions || temperature || alpha || beta;
  for (const auto& [name, column] : columns) {
    TORCH_CHECK_VALUE(column.has_value() || !is_any_given, name,
                      " must be given with the seeds, positions, temperature, alpha and beta of a coupling, got none");
  }
  if (!is_any_given) {
    return {};
  }
  check_device({{"logits", logits},
                {"seeds", *seeds},
                {"positions", *positions},
                {"temperature", *temperature},
                {"alpha", *alpha},
                {"beta", *beta}});
  const int64_t rows = logits.size(0);
  const auto is_alpha = [](float value) { return std::isfinite(value) && value > 0; };
  const auto is_beta = [](float value) { return std::isfinite(value) && value >= 0; };
  return {checked_column(*seeds, "seeds", at::kLong, rows), checked_positions(*positions, rows),
          checked_temperature(*temperature, rows),
          checked_column<float>(*alpha, "alpha", rows, "finite and above 0", is_alpha),
          checked_column<float>(*beta, "beta", rows, "finite and at least 0", is_beta)};
}

// Ascending, so that ties go to the lowest token by going to the lowest index.
Tensor checked_token_ids(const MaybeTensor& token_ids, const Tensor& logits) {
  if (!token_ids) {
    return {};
  }
  check_device({{"logits", logits}, {"token_ids", *token_ids}});
  check_int64(*token_ids, "token_ids");
  check_sizes(*token_ids, "token_ids", {logits.size(2)}, "one a logit");
  Tensor ids = token_ids->contiguous();
  const int64_t* values = ids.const_data_ptr<int64_t>();
  int64_t previous = -1;
  for (int64_t i = 0; can_read(ids) && i < ids.numel(); previous = values[i++]) {
    TORCH_CHECK_VALUE(previous < values[i] && values[i] <= INT32_MAX, "token_ids must ascend within 0..", INT32_MAX,
                      ", entry ", i, " is ", values[i], i == 0 ? "" : " after ",
                      i == 0 ? "" : std::to_string(previous));
  }
  return ids;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_frontier(const Tensor& logits, const Tensor& scores,
                                                           int64_t branching, const MaybeTensor& seeds,
                                                           const MaybeTensor& positions, const MaybeTensor& temperature,
                                                           const MaybeTensor& alpha, const MaybeTensor& beta,
                                                           const MaybeTensor& token_ids) {
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
  const CouplingTensors coupling = checked_coupling(logits, seeds, positions, temperature, alpha, beta);
  const Tensor ids = checked_token_ids(token_ids, logits);

  const Tensor parent_scores = scores.contiguous();
  Tensor child_tokens = empty({batch, frontier_length, branching}, scores, at::kLong);
  Tensor child_scores = empty({batch, frontier_length, branching}, scores);
  Tensor frontier = empty({batch, branching}, child_tokens);
  Tensor entropies = empty({batch, frontier_length}, scores);
  const int64_t length = expansion_workspace_length(batch, frontier_length, logits.size(2), branching);
  Tensor workspace = empty({can_read(logits) ? 0 : length}, child_tokens);
  const int64_t noise_blocks = coupling.seeds.defined() && can_read(logits) ? batch * num_blocks(logits.size(2)) : 0;
  Tensor noise = empty({noise_blocks * kBlock}, scores);
  const ExpandFrontierParams params{
      .logits = logits.const_data_ptr(),
      .logits_type = logits_type_of(logits),
      .batch_stride = logits.stride(0),
      .frontier_stride = logits.stride(1),
      .frontier_length = frontier_length,
      .vocabulary = logits.size(2),
      .branching = branching,
      .parent_scores = parent_scores.const_data_ptr<float>(),
      .token_ids = ids.defined() ? ids.const_data_ptr<int64_t>() : nullptr,
      .coupling = coupling.columns(),
      .tokens = child_tokens.mutable_data_ptr<int64_t>(),
      .scores = child_scores.mutable_data_ptr<float>(),
      .frontier = frontier.mutable_data_ptr<int64_t>(),
      .entropies = entropies.mutable_data_ptr<float>(),
      .noise = noise.mutable_data_ptr<float>(),
      .workspace = workspace.mutable_data_ptr<int64_t>(),
      .nonce = launch_nonce(),
  };
  run(
      logits, [&](Stream stream) { cuda::expand_frontier(params, batch, stream); },
      [&] {
        at::parallel_for(0, noise_blocks, rows_per_task(3 * kBlock),
                         [&](int64_t begin, int64_t end) { cpu::write_noise(params, begin, end); });
        at::parallel_for(0, batch * frontier_length, rows_per_task(params.vocabulary),
                         [&](int64_t begin, int64_t end) { cpu::expand_nodes(params, begin, end); });
        at::parallel_for(0, batch, rows_per_task(10 * frontier_length * branching),
                         [&](int64_t begin, int64_t end) { cpu::choose_frontier(params, begin, end); });
      });
  return {child_tokens, child_scores, frontier, entropies};
}

}  // namespace taps
