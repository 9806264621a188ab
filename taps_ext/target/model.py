"""The target: a stock Hugging Face causal LM that scores draft trees.

This file and `kv_cache.py` are the only ones that know transformers' attention and cache conventions. The attention
function `taps_tree` is registered once and set once per model; without a tree it is transformers' own SDPA attention,
so that nothing is toggled between steps and plain `model.generate` stays what it was, in other threads too. With one
it is `tree_attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .. import ops
from ..native import refuse_without_ops
from ..tree import DraftTree
from .kv_cache import KVSpec, TreeKVCache, cache_keyword
from .tree_attention import TreeView

ATTENTION = "taps_tree"
ATTENDING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# What some models ask of their attention function beside query, key and value, and tree attention does not do.
UNSUPPORTED_ATTENTION = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
}


@dataclass(frozen=True)
class ScoredTree:
    """What the target says of every node of a tree."""

    logits: Tensor  # [B, N, V]
    features: Tensor  # [B, N, H], the hidden states behind the final norm: what the drafters are fed with


class TargetModel:
    """A causal LM with full attention, from transformers, unchanged but for its attention function's name.

    Refused, each with the reason: encoder-decoders, recurrent layers, models without SDPA support or whose weights are
    not in memory, models that post-process the LM head's output, and devices that the ops are not built for.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _refuse_unsupported(model)
        _register_attention()
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise ValueError(f"target {_name(model)} does not use transformers' AttentionInterface; use one that does")
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
        """Where token ids go in and logits come out (with a device map: the embedding's device)."""
        device: torch.device = self.embedding.weight.device
        return device

    @property
    def vocab_size(self) -> int:
        """The columns of the logits."""
        return int(self.config.vocab_size)

    def new_cache(self, batch_size: int) -> TreeKVCache:
        return TreeKVCache(self._kv_specs, batch_size)

    def refuse_longer_than_exact(self, longest: int) -> None:
        """Raise when a text of `longest` tokens (prompt and new tokens) leaves the range in which a tree is exact.

        A tree attends to everything, so a window must hold the text; and rotary frequencies that change with the
        length (`dynamic`, `longrope`) would change a tree too early.
        """
        window, rope_length = _attention_window(self.config), _changing_rope_length(self.config)
        if window is not None and longest > window:
            raise ValueError(
                f"target {_name(self.model)} has layers that see {window} tokens only, but prompt and new tokens can "
                f"reach {longest}; shorten the prompt or max_new_tokens"
            )
        if rope_length is not None and longest > rope_length:
            raise ValueError(
                f"target {_name(self.model)} changes its rotary frequencies beyond {rope_length} tokens, but prompt "
                f"and new tokens can reach {longest}; shorten the prompt or max_new_tokens"
            )

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Sequence[int], kv: TreeKVCache) -> ScoredTree:
        """Commit prompts [B, P], row b's tokens in columns 0..lengths[b]-1, the rest padding; P is the longest.

        Returns logits [B, 1, V] of each row's last token and features [B, P, H] of all.
        """
        kv.reserve(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        features = self._forward(tokens, positions, kv)
        kv.hold(lengths)
        rows = torch.arange(len(tokens), device=features.device)
        last = features[rows, torch.tensor(lengths, device=features.device) - 1]
        return ScoredTree(self._logits(last[:, None]), features.to(self.device))

    @torch.inference_mode()
    def score(
        self, tree: DraftTree, prefix_lengths: Tensor, kv: TreeKVCache, last_positions: Tensor | None = None
    ) -> ScoredTree:
        """One forward over every node of the trees, each seeing its row's prefix and its own ancestors.

        `prefix_lengths` int64 [B]: the lengths that `kv` holds, on the device. `last_positions` int64 [B]: nodes beyond
        stay there. The text ends before they could be emitted, and the target may have no such position.
        """
        positions = prefix_lengths[:, None] + ops.tree_depths(tree.parents, tree.num_nodes)
        if last_positions is not None:
            positions = positions.minimum(last_positions[:, None])
        features = self._forward_tree(tree, positions, _view(tree, prefix_lengths, kv), kv)
        return ScoredTree(self._logits(features), features.to(self.device))

    def commit(
        self, path: Tensor, num_accepted: Tensor, prefix_lengths: Tensor, kv: TreeKVCache, lengths: Sequence[int]
    ) -> None:
        """Keep the KV rows of the accepted paths (num_accepted -1: of none), drop the rest.

        `lengths` are the rows' new lengths: the caller has them on the host.
        """
        kv.compact(path, num_accepted, prefix_lengths)
        kv.hold(lengths)

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
        # A mask of four axes is what keeps transformers from making one of its own.
        return self._forward(tree.tokens, positions, kv, attention_mask=view.ancestors, taps_tree=view)

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(features)
        return logits.to(self.device)

    @torch.inference_mode()
    def _probe(self) -> list[tuple[KVSpec, KVSpec]]:
        """Run one token: each layer's KV shape and place, and the proof that logits are lm_head(features)."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        cache = DynamicCache()
        output = self.decoder_stack(input_ids=token, use_cache=True, **{self._cache_keyword: cache})
        features = getattr(output, "last_hidden_state", None)
        if features is None:
            raise ValueError(f"target {_name(self.model)} has no decoder stack that returns its last hidden state")
        stock = self.model(input_ids=token, use_cache=False).logits
        if stock.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"target logits must be float32, bfloat16 or float16, got {stock.dtype}; convert the model"
            )
        if not torch.allclose(self._logits(features).float(), stock.to(self.device).float(), rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"target {_name(self.model)} changes the LM head's output (scaling, soft-capping), which tree scoring "
                "does not repeat; use a model whose logits are lm_head(hidden states)"
            )
        layers: list[Any] = list(cache.layers)
        return [(_kv_spec(layer.keys), _kv_spec(layer.values)) for layer in layers]

    @torch.inference_mode()
    def _probe_tree(self) -> None:
        """Score one small tree: what an attention asks for and a tree cannot give is refused now, not in mid-text."""
        kv, tokens = self.new_cache(1), torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        self.prefill(tokens[:, :1], [1], kv)
        parents, one = torch.tensor([[-1, 0]], device=self.device), torch.ones_like(tokens[0, :1])
        tree = DraftTree(tokens, parents, torch.zeros_like(tokens, dtype=torch.float32), num_nodes=one + 1)
        view = _view(tree, prefix_lengths=one, kv=kv)
        self._forward_tree(tree, parents + 2, view, kv)
        if view.num_layers < len(self._kv_specs):
            raise ValueError(
                f"target {_name(self.model)} has {len(self._kv_specs)} layers with keys and values, but only "
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
    """Attention over prefix and tree, as `taps_tree` says; transformers' SDPA when no tree is given.

    Shapes: query [B, heads, N, head_dim], key and value [B, kv_heads, L + N, head_dim], mask bool [B, 1, N, N].
    """
    if taps_tree is None:
        stock: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return stock
    _refuse_more_than_attention(module, attention_mask, taps_tree, kwargs)
    return taps_tree.attend(query, key, value, scaling), None


def _refuse_more_than_attention(
    module: torch.nn.Module, mask: Tensor | None, view: TreeView, kwargs: dict[str, Any]
) -> None:
    asked = {what for name, what in UNSUPPORTED_ATTENTION.items() if kwargs.get(name) is not None}
    if mask is None or mask.dtype != torch.bool or mask.shape != view.ancestors.shape:
        asked.add("an attention mask of its own")
    if asked:
        raise ValueError(
            f"the target's {type(module).__name__} asks for {', '.join(sorted(asked))}, which tree attention does not "
            "have; decode it plainly"
        )


def _view(tree: DraftTree, prefix_lengths: Tensor, kv: TreeKVCache) -> TreeView:
    ancestors = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.zeros_like(prefix_lengths), 0)
    return TreeView(ancestors, kv.kv_length, prefix_lengths if kv.is_ragged else None)


def _register_attention() -> None:
    AttentionInterface.register(ATTENTION, tree_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _decoder_stack(model: PreTrainedModel) -> Any:
    """The model without its LM head; some families' `get_decoder` returns the whole model."""
    stack: Any = model.get_decoder()
    return model.base_model if stack is model else stack


def _kv_spec(states: Tensor) -> KVSpec:
    return KVSpec(states.device, states.dtype, states.shape[1], states.shape[3])


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _refuse_unsupported(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(f"target {_name(model)} is an encoder-decoder; tree verification needs a decoder-only model")
    other = sorted(set(_layer_types(config)) - set(ATTENDING_LAYERS))
    if other or getattr(model, "_is_stateful", False):
        kinds = ", ".join(other) or "a recurrent state"
        raise ValueError(
            f"target {_name(model)} has {kinds}: a recurrent state cannot go back to an accepted branch of a tree; "
            "use a model with attention layers only"
        )
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        raise ValueError(
            f"target {_name(model)} has weights that are not in memory (offloaded or not loaded); load all"
        )
    if devices - {"cpu", "cuda"} or len(devices) > 1:
        raise ValueError(
            f"target {_name(model)} is on {', '.join(sorted(devices))}; put all of it on the CPU, or on CUDA devices"
        )
    if devices == {"cuda"}:
        refuse_without_ops(f"target {_name(model)} on {next(model.parameters()).device}")
    if not getattr(model, "_supports_sdpa", False):
        raise ValueError(f"target {_name(model)} does not support SDPA attention, which tree scoring stands on")
    if model.get_output_embeddings() is None:
        raise ValueError(f"target {_name(model)} has no LM head; load it as AutoModelForCausalLM")


def _layer_types(config: Any) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _attention_window(config: Any) -> int | None:
    """The smallest window that any layer attends within, or None when all see everything."""
    kinds = _layer_types(config)
    windows = []
    if not kinds or "sliding_attention" in kinds:
        windows.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((int(window) for window in windows if window), default=None)


def _changing_rope_length(config: Any) -> int | None:
    """The length up to which the rotary frequencies stay the same; None when they never change."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)
