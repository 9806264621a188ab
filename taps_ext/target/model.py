"""The target: a stock Hugging Face causal LM that scores draft trees.

This directory is the only place that knows transformers' attention and cache conventions. The attention function
`taps_tree` is registered once and set once per model. Without a tree it is transformers' own SDPA attention, so that
nothing is toggled between steps and plain `model.generate` works as before, in other threads too. With a tree it is
the attention of `tree_attention.py`.

Logits come from the model's own `forward`, so that whatever it does behind its LM head (scaling, soft-capping, biases,
further layers) is part of them. A hook on its decoder stack keeps the features. Hook and attention read what they
need from a context variable, which each thread has for itself: the hook stays on the model and does nothing unless a
forward of this file is running.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import ops
from ..products import pack_products
from ..tree import DraftTree, Lengths
from .kv_cache import KVSpec, TreeKVCache, cache_keyword
from .probe import Probe, refuse_other_logits
from .prompts import PreparedPrompts
from .support import (
    UNSUPPORTED_ATTENTION,
    attention_settings,
    decoder_stack,
    name_of,
    refuse_attention_arguments,
    refuse_logits_dtype,
    refuse_long_text,
    refuse_other_head,
    refuse_other_length,
    refuse_training_mode,
    refuse_unsupported_model,
    refusing_failures,
    unwrapped,
)
from .tree_attention import TreeView

ATTENTION = "taps_tree"


@dataclass(frozen=True)
class ScoredTree:
    """Hold what the target computes for every node of a tree."""

    logits: Tensor  # [B, N, V]
    features: Tensor  # [B, N, H], the hidden states behind the final norm, which the drafters are fed with


@dataclass
class _Forward:
    """Hold what the decoder stack's hook and the attention layers need in one forward, and what the hook keeps."""

    stack: Any
    view: TreeView | None = None  # what the nodes see; None: plain causal attention
    columns: Tensor | None = None  # int64 [B], the one column of each row whose logits are wanted; None: all columns
    features: Tensor | None = None  # [B, T, H], kept by the hook


_FORWARD: ContextVar[_Forward | None] = ContextVar("taps_ext_forward", default=None)


class TargetModel:
    """Score draft trees with a causal LM from transformers, unchanged but for the name of its attention function.

    Of a PeftModel, the target is the model inside, whose layers carry the adapters; of a model behind `torch.compile`
    it is the model itself, without compilation. Refused, each with the reason: encoder-decoders, layers with a running
    state, decoders that take no position ids, models in training mode, in float64, without SDPA support or whose
    weights are not in memory, models that score a small branched tree otherwise than the same texts one by one, and
    devices for which the ops were not built. A refused model keeps its own attention.

    A model that is moved or converted (`model.to(...)`, `model.half()`) needs a new TargetModel.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = unwrapped(model)
        refuse_unsupported_model(self.model)
        self.decoder_stack: Any = decoder_stack(self.model)
        self.embedding: Any = self.model.get_input_embeddings()
        self.lm_head: Any = self.model.get_output_embeddings()
        self.config: Any = self.model.config.get_text_config()
        self._cache_keyword = cache_keyword(self.model)
        settings = attention_settings(self.model)
        try:
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                self._probe()
        except BaseException:
            for config, attention in settings:
                config._attn_implementation = attention
            raise
        pack_products(self.model)

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
        """Return an empty KV cache for one call.

        Under autocast its dtype is float32, which holds exactly what layers write in either half precision.
        """
        refuse_training_mode(self.model)
        specs, place = self._kv_specs, self.device.type
        if torch.is_autocast_enabled(place):
            dtype = torch.get_autocast_dtype(place)
            specs = [(_widened(keys, dtype), _widened(values, dtype)) for keys, values in specs]
        return TreeKVCache(specs, Lengths.of([0] * batch_size, self.device))

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
        scored = self._forward({"input_ids": tokens, "position_ids": positions}, kv, columns=lengths.tensor - 1)
        kv.lengths = lengths
        return scored

    @torch.inference_mode()
    def prefill_prepared(
        self, prompts: PreparedPrompts, columns: Tensor, lengths: Lengths, kv: TreeKVCache
    ) -> ScoredTree:
        """Commit prompts with all that transformers prepared for the model's own forward, pictures included.

        `columns`, int64 [B, longest], say where each row's tokens stand in the prepared prompts. Returns logits
        [B, 1, V] of each row's last token and features [B, longest, H].
        """
        num_tokens = prompts.arguments["input_ids"].shape[1]
        kv.reserve(num_tokens)
        last = columns.gather(1, lengths.tensor[:, None] - 1)[:, 0]
        scored = self._forward(prompts.arguments, kv, columns=last)
        refuse_other_length(self.model, num_tokens, scored.features.shape[1])
        kv.pack(columns)
        kv.lengths = lengths
        if prompts.position_offsets is not None:
            kv.position_offsets = prompts.position_offsets.to(self.device)
        features = scored.features.gather(1, columns[:, :, None].expand(-1, -1, self.hidden_size))
        return replace(scored, features=features)

    @torch.inference_mode()
    def score(self, tree: DraftTree, kv: TreeKVCache, last_positions: Tensor | None = None) -> ScoredTree:
        """Run one forward over every node of the trees; each node sees its row's prefix and its own ancestors.

        `last_positions`, int64 [B]: nodes beyond keep this position. The text ends before they could be emitted, and
        the target may not have such a position.
        """
        positions = kv.lengths.tensor[:, None]
        if tree.capacity > 1:
            positions = positions + ops.tree_depths(tree.parents, tree.num_nodes)
        if last_positions is not None:
            positions = positions.minimum(last_positions[:, None])
        if kv.position_offsets is not None:
            positions = positions + kv.position_offsets[:, None]
        kv.reserve(tree.capacity)
        # A root alone is the next token of its row: the model's own causal attention, one call a layer.
        is_plain = tree.capacity == 1 and not kv.lengths.is_ragged
        view = None if is_plain else _view(tree, kv)
        with kv.products.running():
            return self._forward({"input_ids": tree.tokens, "position_ids": positions}, kv, view)

    def commit(self, path: Tensor, lengths: Lengths, kv: TreeKVCache) -> None:
        """Keep the KV rows of the accepted paths and drop the other nodes' rows.

        Args:
            path: int64 [B, N], the accepted nodes, the root first.
            lengths: the rows' new lengths, the root included; a row that has ended keeps its length.
        """
        kv.compact(path, lengths)
        kv.lengths = lengths

    def _forward(
        self,
        inputs: dict[str, Any],
        kv: TreeKVCache,
        view: TreeView | None = None,
        columns: Tensor | None = None,
    ) -> ScoredTree:
        if self.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"the target's attention was set to {self.config._attn_implementation!r} after it was taken for "
                "speculation; make a new TargetModel or SpeculativeDecoder"
            )
        arguments = {
            # transformers makes a mask of its own unless it is given one of four axes.
            "attention_mask": None if view is None else view.ancestors,
            **inputs,
            self._cache_keyword: kv.cache,
        }
        features, logits = _run(self.model, _Forward(self.decoder_stack, view, columns), arguments)
        return ScoredTree(logits.to(self.device), features.to(self.device))

    def _probe(self) -> None:
        """Compare a small branched tree with the model's own logits of its paths, and take down the cache's layout.

        The model's own logits are those of its own attention; from then on it has this file's.
        """
        probe = Probe.of(self.model, self.device)
        refuse_long_text(self.model, probe.longest)
        cache = DynamicCache()
        _listen_to(self.decoder_stack)
        with refusing_failures(self.model, "a forward over token ids with a KV cache"):
            arguments = {"input_ids": probe.texts, self._cache_keyword: cache}
            features, stock = _run(self.model, _Forward(self.decoder_stack), arguments)
            alone: dict[str, Any] = {"input_ids": probe.texts[:1], "use_cache": False}
            _, stock_alone = _run(self.model, _Forward(self.decoder_stack), alone)
            layers: list[Any] = list(cache.layers)
            self._kv_specs = [(KVSpec.of(layer.keys), KVSpec.of(layer.values)) for layer in layers]
        self.hidden_size = features.shape[-1]
        refuse_logits_dtype(stock.dtype)
        self._use_tree_attention()
        with refusing_failures(self.model, "a forward over the nodes of a tree"):
            kv = self.new_cache(len(probe.prefixes))
            kv.reserve(probe.longest + probe.tree.capacity)
            prefill = self.prefill(probe.prefixes, Lengths.of(probe.lengths, self.device), kv)
            view = _view(probe.tree, kv)
            positions = kv.lengths.tensor[:, None] + ops.tree_depths(probe.tree.parents, probe.tree.num_nodes)
            scored = self._forward({"input_ids": probe.tree.tokens, "position_ids": positions}, kv, view)
        if view.num_layers < len(self._kv_specs):
            raise ValueError(
                f"target {name_of(self.model)} has {len(self._kv_specs)} layers with keys and values, but only "
                f"{view.num_layers} use transformers' AttentionInterface; use a model whose layers all do"
            )
        given = prefill.logits, scored.logits

        def numbered() -> Tensor:
            positions = torch.arange(probe.longest, device=self.device)[None]
            return _run(self.model, _Forward(self.decoder_stack), {**alone, "position_ids": positions})[1].to(
                self.device
            )

        refuse_other_logits(self.model, probe, given, stock.to(self.device), stock_alone.to(self.device), numbered)

    def _use_tree_attention(self) -> None:
        AttentionInterface.register(ATTENTION, tree_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.model.set_attn_implementation(ATTENTION)
        if self.model.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"target {name_of(self.model)} does not use transformers' AttentionInterface; use one that does"
            )


@torch.inference_mode()
def refuse_unlike_head(model: PreTrainedModel, head: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError unless `head` turns the model's features [..., H] into its own logits [..., V].

    A drafter whose head is not the target's would draft, or be trained on, other distributions than the target's.
    """
    inner: Any = unwrapped(model)
    stack = decoder_stack(inner)
    _listen_to(stack)
    tokens = Probe.tokens(inner, 32).view(4, 8).to(inner.get_input_embeddings().weight.device)
    features, logits = _run(inner, _Forward(stack), {"input_ids": tokens, "use_cache": False})
    refuse_other_head(inner, head(features), logits)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over prefix and tree as the running forward says; without a tree, run transformers' SDPA.

    Shapes: query [B, heads, N, head_dim], key and value [B, kv_heads, L + N, head_dim], mask bool [B, 1, N, N].
    """
    forward = _FORWARD.get()
    view = None if forward is None else forward.view
    if view is None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return stock
    if attention_mask is not view.ancestors or not UNSUPPORTED_ATTENTION.keys().isdisjoint(kwargs):
        refuse_attention_arguments(module, attention_mask, view.ancestors, kwargs)
    place = query.device.type
    if torch.is_autocast_enabled(place):  # as autocast does around transformers' SDPA
        dtype = torch.get_autocast_dtype(place)
        with torch.autocast(place, enabled=False):
            return view.attend(query.to(dtype), key.to(dtype), value.to(dtype), scaling), None
    return view.attend(query, key, value, scaling), None


def _run(model: Any, forward: _Forward, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return features [B, T, H] and logits [B, T, V] of the model's own forward; [B, 1, V] with `forward.columns`."""
    token = _FORWARD.set(forward)
    try:
        output = model(**{"use_cache": True, **arguments})
    finally:
        _FORWARD.reset(token)
    if forward.features is None:
        raise ValueError(f"target {name_of(model)} has no decoder stack that returns its last hidden state")
    logits: Tensor = output.logits
    return forward.features, logits


def _listen_to(stack: Any) -> None:
    """Put the hook on a decoder stack, once."""
    if _keep_features not in stack._forward_hooks.values():
        stack.register_forward_hook(_keep_features)


def _keep_features(stack: Any, arguments: Any, output: Any) -> Any:
    """Keep the features of this thread's running forward, and hand on only the wanted columns to the LM head."""
    forward = _FORWARD.get()
    if forward is None or forward.stack is not stack or forward.features is not None:
        return output
    features = forward.features = getattr(output, "last_hidden_state", None)
    if features is not None and forward.columns is not None:
        rows = torch.arange(len(features), device=features.device)
        output.last_hidden_state = features[rows, forward.columns.to(features.device)][:, None]
    return output


def _widened(spec: KVSpec, dtype: torch.dtype) -> KVSpec:
    return spec if spec.dtype == dtype else replace(spec, dtype=torch.float32)


def _view(tree: DraftTree, kv: TreeKVCache) -> TreeView:
    lengths = kv.lengths
    ancestors = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.zeros_like(lengths.tensor), 0)
    return TreeView(ancestors, lengths.longest, lengths.tensor if lengths.is_ragged else None)
