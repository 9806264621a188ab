"""Unsupported targets: every refusal says what was given, why it is not supported, and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..native import refuse_without_ops

ATTENDING_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
# Arguments that some models give their attention function and that tree attention does not support.
UNSUPPORTED_ATTENTION = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a position bias",
}


def name_of(model: PreTrainedModel) -> str:
    """Return the name of the model's class, for messages."""
    return type(model).__name__


def refuse_unsupported_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that cannot score trees, as far as its config, weights and devices tell."""
    config, name = model.config.get_text_config(), name_of(model)
    if model.config.is_encoder_decoder:
        raise ValueError(f"target {name} is an encoder-decoder; tree verification needs a decoder-only model")
    other = sorted(set(_layer_types(config)) - set(ATTENDING_LAYERS))
    if other or getattr(model, "_is_stateful", False):
        kinds = ", ".join(other) or "a recurrent state"
        raise ValueError(
            f"target {name} has {kinds}: a recurrent state cannot go back to an accepted branch of a tree; "
            "use a model with attention layers only"
        )
    _refuse_devices(model)
    if not getattr(model, "_supports_sdpa", False):
        raise ValueError(f"target {name} does not support SDPA attention, which tree scoring needs")
    if model.get_output_embeddings() is None:
        raise ValueError(f"target {name} has no LM head; load it as AutoModelForCausalLM")


def _refuse_devices(model: PreTrainedModel) -> None:
    name, devices = name_of(model), {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices:
        raise ValueError(f"target {name} has weights that are not in memory (offloaded or not loaded); load all")
    if devices - {"cpu", "cuda"} or len(devices) > 1:
        raise ValueError(
            f"target {name} is on {', '.join(sorted(devices))}; put all of it on the CPU, or on CUDA devices"
        )
    if devices == {"cuda"}:
        refuse_without_ops(f"target {name} on {next(model.parameters()).device}")


def refuse_changed_logits(model: PreTrainedModel, from_features: Tensor, stock: Tensor) -> None:
    """Raise ValueError unless the model's own logits are lm_head(features), in a dtype that verification takes."""
    if stock.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"target logits must be float32, bfloat16 or float16, got {stock.dtype}; convert the model")
    if not torch.allclose(from_features.float(), stock.to(from_features.device).float(), rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"target {name_of(model)} changes the LM head's output (scaling, soft-capping), which tree scoring "
            "does not repeat; use a model whose logits are lm_head(hidden states)"
        )


def refuse_long_text(model: PreTrainedModel, longest: int) -> None:
    """Raise ValueError if a text of `longest` tokens (prompt and new tokens) leaves the range where a tree is exact.

    A tree attends to everything, so a window must hold the whole text; and rotary frequencies that change with the
    length (`dynamic`, `longrope`) would change too early for a tree.
    """
    config, name = model.config.get_text_config(), name_of(model)
    window, rope_length = _attention_window(config), _changing_rope_length(config)
    if window is not None and longest > window:
        raise ValueError(
            f"target {name} has layers that see {window} tokens only, but prompt and new tokens can "
            f"reach {longest}; shorten the prompt or max_new_tokens"
        )
    if rope_length is not None and longest > rope_length:
        raise ValueError(
            f"target {name} changes its rotary frequencies beyond {rope_length} tokens, but prompt "
            f"and new tokens can reach {longest}; shorten the prompt or max_new_tokens"
        )


def refuse_attention_arguments(
    module: torch.nn.Module, mask: Tensor | None, expected: Tensor, kwargs: dict[str, Any]
) -> None:
    """Raise ValueError if an attention layer asks for more than tree attention does; `expected` is the tree's mask."""
    asked = {what for name, what in UNSUPPORTED_ATTENTION.items() if kwargs.get(name) is not None}
    if mask is None or mask.dtype != torch.bool or mask.shape != expected.shape:
        asked.add("an attention mask of its own")
    if asked:
        raise ValueError(
            f"the target's {type(module).__name__} asks for {', '.join(sorted(asked))}, which tree attention does not "
            "support; decode it plainly"
        )


def _layer_types(config: Any) -> Sequence[str]:
    return getattr(config, "layer_types", None) or ()


def _attention_window(config: Any) -> int | None:
    """Return the smallest window within which any layer attends, or None if all layers see everything."""
    kinds = _layer_types(config)
    windows = []
    if not kinds or "sliding_attention" in kinds:
        windows.append(getattr(config, "sliding_window", None))
    if "chunked_attention" in kinds:
        windows.append(getattr(config, "attention_chunk_size", None))
    return min((int(window) for window in windows if window), default=None)


def _changing_rope_length(config: Any) -> int | None:
    """Return the length up to which the rotary frequencies stay the same; None if they never change."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("dynamic", "longrope"):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)
