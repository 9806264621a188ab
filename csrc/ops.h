// The ops of taps_ext, tensors in, tensors out, in decode-step order: the table of contents of csrc/.
// What each one means stands in taps_ext/ops.py; each lives in the folder of its family as <op>.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace taps {

using at::Tensor;

// tree_expansion/
// -> tokens [B, F, K], scores [B, F, K], frontier [B, K], entropies [B, F]
std::tuple<Tensor, Tensor, Tensor, Tensor> expand_frontier(
    const Tensor& logits, const Tensor& scores, int64_t branching, const std::optional<Tensor>& seeds,
    const std::optional<Tensor>& positions, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& alpha, const std::optional<Tensor>& beta, const std::optional<Tensor>& token_ids);
// -> tokens, parents, scores [B, C], num_nodes [B], entropies, proposers [B, C], C = min(max_nodes, N)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prune_tree(const Tensor& tokens, const Tensor& parents,
                                                                      const Tensor& scores, const Tensor& num_nodes,
                                                                      const Tensor& entropies,
                                                                      const std::optional<Tensor>& proposers,
                                                                      int64_t max_nodes);

// tree_merging/
// -> tokens, parents, scores [B, C], num_nodes [B], proposers [B, C], node_map [B, D, N], C = D (N - 1) + 1 or less
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> merge_trees(const Tensor& tokens, const Tensor& parents,
                                                                       const Tensor& scores, const Tensor& num_nodes,
                                                                       std::optional<int64_t> max_nodes);

// tree_extension/
// -> tokens, parents, scores [B, C], num_nodes [B], entropies, proposers [B, C], C = N (1 + max_extension)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> extend_tree(
    const Tensor& tokens, const Tensor& parents, const Tensor& scores, const Tensor& num_nodes, const Tensor& entropies,
    const std::optional<Tensor>& proposers, const Tensor& text, const Tensor& lengths,
    const std::vector<double>& log_probs, int64_t max_extension, int64_t window, int64_t proposer);

// tree_attention/
Tensor tree_depths(const Tensor& parents, const Tensor& num_nodes);    // -> [B, N]
Tensor ancestor_bits(const Tensor& parents, const Tensor& num_nodes);  // -> [B, N, ceil(N / 64)]
Tensor tree_attention_mask(const Tensor& parents, const Tensor& num_nodes, const Tensor& prefix_lengths,
                           int64_t kv_length, at::ScalarType dtype);  // -> [B, 1, N, kv_length + N]

// tree_verification/
// -> path [B, N], num_accepted [B], bonus_tokens [B], status [B]
std::tuple<Tensor, Tensor, Tensor, Tensor> verify_tree(const Tensor& logits, const Tensor& tokens,
                                                       const Tensor& parents, const Tensor& num_nodes,
                                                       const Tensor& temperature, const Tensor& top_k,
                                                       const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                                                       const Tensor& positions);

// kv_compaction/
void compact_kv(const Tensor& kv, const Tensor& path, const Tensor& num_accepted, const Tensor& prefix_lengths,
                int64_t kv_length);

}  // namespace taps
