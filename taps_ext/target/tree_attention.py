"""Tree attention: over the prefix, which all nodes of a row see; over the tree, by ancestry; and both merged.

The attention output over prefix and tree together is the mean of the two outputs, weighted by their sums of
exponentials. So the prefix needs no mask per node, and fused kernels that return the log of that sum (log-sum-exp) do
the work. Query heads that share a key-value head become rows of one matrix: keys and values are never repeated.

Source: the merge of partial softmaxes is that of split-KV attention (FlashAttention, arXiv 2205.14135).
Dims: B rows, L prefix columns, N nodes, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BIAS_ALIGNMENT = 8  # columns: the fused kernels of CUDA want bias rows of a multiple of 16 bytes

aten = torch.ops.aten
_Partial = tuple[Tensor, Tensor]  # attention output [B, H, M, D] and its log-sum-exp, float32 [B, H, M]


@dataclass
class TreeView:
    """Hold what the nodes of one scoring call may see. Every layer attends through it and shares its masks."""

    ancestors: Tensor  # bool [B, 1, N, N], True: node j is node i or its ancestor
    kv_length: int  # L, the committed columns of the longest row
    prefix_lengths: Tensor | None  # int64 [B], the columns that each row sees, at least 1; None: all of them
    num_layers: int = 0  # layers that have attended so far
    _biases: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return the attention output of each node, [B, N, heads, D], contiguous.

        `query` is [B, heads, N, D]; `key` and `value` are [B, kv_heads, L + N, D], the tree's own behind the prefix.
        """
        self.num_layers += 1
        batch_size, num_heads, num_nodes, _ = query.shape
        groups = num_heads // key.shape[1]
        prefix_bias, tree_bias = self._bias_of(query, groups)
        rows, length = _fold(query, key.shape[1]), self.kv_length
        tree = partial_attention(rows, key[:, :, length:], value[:, :, length:], tree_bias, scale)
        if length > 0:
            prefix = partial_attention(rows, key[:, :, :length], value[:, :, :length], prefix_bias, scale)
            out = merge_partial(prefix, tree)
        else:
            out = tree[0]
        unfolded = out.view(batch_size, -1, num_nodes, groups, out.shape[-1]).transpose(1, 2)
        return query.new_empty(unfolded.shape).copy_(unfolded).view(batch_size, num_nodes, num_heads, -1)

    def _bias_of(self, query: Tensor, groups: int) -> tuple[Tensor | None, Tensor]:
        """Return the additive masks of prefix and tree; the first layer of a device, dtype and grouping makes them."""
        kind = (query.device, query.dtype, groups)
        if kind not in self._biases:
            self._biases[kind] = self._prefix_bias(query), self._tree_bias(query, groups)
        return self._biases[kind]

    def _prefix_bias(self, query: Tensor) -> Tensor | None:
        if self.prefix_lengths is None or self.kv_length == 0:
            return None
        columns = torch.arange(_aligned(self.kv_length), device=query.device)
        beyond = columns >= self.prefix_lengths.to(query.device)[:, None]
        return _additive(beyond[:, None, None], query.dtype)[..., : self.kv_length]

    def _tree_bias(self, query: Tensor, groups: int) -> Tensor:
        num_nodes = self.ancestors.shape[-1]
        hidden = ~self.ancestors.to(query.device).repeat_interleave(groups, dim=2)
        hidden = torch.nn.functional.pad(hidden, (0, _aligned(num_nodes) - num_nodes), value=True)
        return _additive(hidden, query.dtype)[..., :num_nodes]


def partial_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> _Partial:
    """Return attention output and log-sum-exp, by the fused kernel that takes these tensors, or by matrix products.

    Args:
        query: [B, H, M, D]. key: [B, H, S, D]. value: [B, H, S, D'].
        bias: in the query's dtype, expandable to [B, H, M, S], each row of it at a multiple of `BIAS_ALIGNMENT`.
        scale: of the products; None: 1 / sqrt(D).
    """
    if query.is_cpu and key.shape[-1] == value.shape[-1]:
        on_cpu: _Partial = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
        return on_cpu
    if query.is_cuda:
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        kernel = torch.backends.cuda.SDPAParams(query, key, value, bias, 0.0, False, False)
        if bias is None and query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(kernel):
            out, log_sum, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
            return out, log_sum
        if torch.backends.cuda.can_use_efficient_attention(kernel):
            out, log_sum, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, scale=scale)
            return out, log_sum[:, :, : query.shape[2]]  # padded to a multiple of 32
    return _plain_attention(query, key, value, bias, scale)


def merge_partial(first: _Partial, second: _Partial) -> Tensor:
    """Return the attention output over the columns of both, float32."""
    share = torch.sigmoid(first[1] - second[1])[..., None]  # of the first in the sum of exponentials
    return torch.lerp(second[0].float(), first[0].float(), share)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> _Partial:
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    log_sum = scores.logsumexp(dim=-1)
    return (scores - log_sum[..., None]).exp() @ value.float(), log_sum


def _fold(query: Tensor, num_kv_heads: int) -> Tensor:
    """Return [B, heads, N, D] as [B, kv_heads, N * groups, D]: per node the query heads of each key-value head."""
    batch_size, num_heads, num_nodes, head_dim = query.shape
    grouped = query.view(batch_size, num_kv_heads, num_heads // num_kv_heads, num_nodes, head_dim)
    return grouped.transpose(2, 3).reshape(batch_size, num_kv_heads, -1, head_dim)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a column is visible, -inf where it is hidden."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _aligned(num_columns: int) -> int:
    return -(-num_columns // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
