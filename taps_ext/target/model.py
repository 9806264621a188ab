"""The target: a stock Hugging Face causal LM that scores draft trees.

This directory is the only place that knows transformers' attention and cache conventions. The attention function
`taps_tree` is registered once and set once per model. Without a tree it is transformers' own SDPA attention, so that
nothing is toggled between steps and plain `model.generate` works as before, in other threads too. With a tree it is
the attention of `tree_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import ops
from ..tree import DraftTree, Lengths
from .kv_cache import KVSpec, TreeKVCache, cache_keyword
from .support import (
    UNSUPPORTED_ATTENTION,
    name_of,
    refuse_attention_arguments,
    refuse_changed_logits,
    refuse_long_text,
    refuse_unsupported_model,
)
from .tree_attention import TreeView

ATTENTION = "taps_tree"


@dataclass(frozen=True)
class ScoredTree:
    """Hold what the target computes for every node of a tree."""

    logits: Tensor  # [B, N, V]
    features: Tensor  # [B, N, H], the hidden states behind the final norm, which the drafters are fed with


class TargetModel:
    """Score draft trees with a causal LM from transformers, unchanged but for the name of its attention function.

    Refused, each with the reason: encoder-decoders, recurrent layers, models without SDPA support or whose weights are
    not in memory, models that post-process the LM head's output, and devices for which the ops were not built.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported_model(model)
        AttentionInterface.register(ATTENTION, tree_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"target {name_of(model)} does not use transformers' AttentionInterface; use one that does"
            )
        model.eval()
        self.model = model
        self.decoder_stack: Any = _decoder_stack(model)
        self._cache_keyword = cache_keyword(self.decoder_stack)
        self.embedding: Any = model.get_input_embeddings()
        self.lm_head: Any = model.get_output_embeddings()
        self.config: Any = model.config.get_text_config()
        self._kv_specs = self._probe()
        self._probe_tree()

    @property
    def device(self) -> torch.device:
        """Device where token ids go in and logits come out (with a device map: the embedding's)."""
        device: torch.device = self.embedding.weight.device
        return device

    @property
    def vocab_size(self) -> int:
        """Number of columns of the logits."""
        return int(self.config.vocab_size)

    def new_cache(self, batch_size: int) -> TreeKVCache:
        """Return an empty KV cache for one call."""
        return TreeKVCache(self._kv_specs, Lengths.of([0] * batch_size, self.device))

    def refuse_longer_than_exact(self, longest: int) -> None:
        """Raise ValueError if a text of `longest` tokens is too long for exact trees; see `refuse_long_text`."""
        refuse_long_text(self.model, longest)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Lengths, kv: TreeKVCache) -> ScoredTree:
        """Commit prompts int64 [B, P]: row b's tokens in columns 0..lengths[b]-1, then padding; P is the longest.

        Returns logits [B, 1, V] of each row's last token and features [B, P, H] of all.
        """
        kv.reserve(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        features = self._forward(tokens, positions, kv)
        kv.lengths = lengths
        rows = torch.arange(len(tokens), device=features.device)
        last = features[rows, lengths.tensor.to(features.device) - 1]
        return ScoredTree(self._logits(last[:, None]), features.to(self.device))

    @torch.inference_mode()
    def score(self, tree: DraftTree, kv: TreeKVCache, last_positions: Tensor | None = None) -> ScoredTree:
        """Run one forward over every node of the trees; each node sees its row's prefix and its own ancestors.

        `last_positions`, int64 [B]: nodes beyond keep this position. The text ends before they could be emitted, and
        the target may not have such a position.
        """
        positions = kv.lengths.tensor[:, None] + ops.tree_depths(tree.parents, tree.num_nodes)
        if last_positions is not None:
            positions = positions.minimum(last_positions[:, None])
        features = self._forward_tree(tree, positions, _view(tree, kv), kv)
        return ScoredTree(self._logits(features), features.to(self.device))

    def commit(self, path: Tensor, num_accepted: Tensor, lengths: Lengths, kv: TreeKVCache) -> None:
        """Keep the KV rows of the accepted paths and drop the other nodes' rows.

        Args:
            path: int64 [B, N], the accepted nodes, the root first.
            num_accepted: int64 [B], nodes behind the root; -1: not even the root, for a finished row.
            lengths: the rows' new lengths.
        """
        kv.compact(path, num_accepted)
        kv.lengths = lengths

    def _forward(self, tokens: Tensor, positions: Tensor, kv: TreeKVCache, **kwargs: Any) -> Tensor:
        if self.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"the target's attention was set to {self.config._attn_implementation!r} after it was taken for "
                "speculation; make a new TargetModel or SpeculativeDecoder"
            )
        kwargs[self._cache_keyword] = kv.cache
        output = self.decoder_stack(input_ids=tokens, position_ids=positions, use_cache=True, **kwargs)
        features: Tensor = output.last_hidden_state
        return features

    def _forward_tree(self, tree: DraftTree, positions: Tensor, view: TreeView, kv: TreeKVCache) -> Tensor:
        kv.reserve(tree.capacity)
        # transformers makes a mask of its own unless it is given one of four axes.
        return self._forward(tree.tokens, positions, kv, attention_mask=view.ancestors, taps_tree=view)

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(features)
        return logits.to(self.device)

    @torch.inference_mode()
    def _probe(self) -> list[tuple[KVSpec, KVSpec]]:
        """Run one token: return each layer's KV shape and place, and check that logits are lm_head(features)."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        cache = DynamicCache()
        output = self.decoder_stack(input_ids=token, use_cache=True, **{self._cache_keyword: cache})
        features = getattr(output, "last_hidden_state", None)
        if features is None:
            raise ValueError(f"target {name_of(self.model)} has no decoder stack that returns its last hidden state")
        refuse_changed_logits(self.model, self._logits(features), self.model(input_ids=token, use_cache=False).logits)
        layers: list[Any] = list(cache.layers)
        return [(KVSpec.of(layer.keys), KVSpec.of(layer.values)) for layer in layers]

    @torch.inference_mode()
    def _probe_tree(self) -> None:
        """Score one small tree, so that attention which a tree does not support is refused now and not in mid-text."""
        kv, tokens = self.new_cache(1), torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self.prefill(tokens[:, :1], Lengths.of([1], self.device), kv)
        parents = torch.tensor([[-1, 0]], device=self.device)
        num_nodes = torch.full_like(tokens[0, :1], 2)
        tree = DraftTree(tokens, parents, torch.zeros_like(tokens, dtype=torch.float32), num_nodes)
        view = _view(tree, kv)
        self._forward_tree(tree, parents + 2, view, kv)
        if view.num_layers < len(self._kv_specs):
            raise ValueError(
                f"target {name_of(self.model)} has {len(self._kv_specs)} layers with keys and values, but only "
                f"{view.num_layers} use transformers' AttentionInterface; use a model whose layers all do"
            )


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    taps_tree: TreeView | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over prefix and tree as `taps_tree` says; without a tree, run transformers' SDPA.

    Shapes: query [B, heads, N, head_dim], key and value [B, kv_heads, L + N, head_dim], mask bool [B, 1, N, N].
    """
    if taps_tree is None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return stock
    if attention_mask is not taps_tree.ancestors or not UNSUPPORTED_ATTENTION.keys().isdisjoint(kwargs):
        refuse_attention_arguments(module, attention_mask, taps_tree.ancestors, kwargs)
    return taps_tree.attend(query, key, value, scaling), None


def _view(tree: DraftTree, kv: TreeKVCache) -> TreeView:
    lengths = kv.lengths
    ancestors = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.zeros_like(lengths.tensor), 0)
    return TreeView(ancestors, lengths.longest, lengths.tensor if lengths.is_ragged else None)


def _decoder_stack(model: PreTrainedModel) -> Any:
    """Return the model without its LM head; some families' `get_decoder` returns the whole model."""
    stack: Any = model.get_decoder()
    return model.base_model if stack is model else stack
