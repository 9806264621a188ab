"""Prompts with pictures, or with other inputs beside their tokens, as transformers' `generate` prepares them.

Such inputs change a text through the prefill only: the steps behind it are those of a text without pictures, but for
their positions. So the prefill is the model's own forward of whatever `prepare_inputs_for_generation` makes of a call,
and an argument that would take part in later steps, or that nobody would use, is refused by its name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from .support import decoder_stack, name_of

# Arguments that `generate` itself makes or that the decoder uses, beside the cache.
USED_ARGUMENTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position")
CACHES = ("cache", "past_key_values")  # the second before transformers 5.24
ROPE_AXES = 3  # of positions with one number for time, height and width; a fourth before them counts the text


@dataclass(frozen=True)
class PreparedPrompts:
    """Hold the arguments of the prefill, and how positions go on behind it."""

    arguments: dict[str, Any]  # of the model's own forward, without a cache; input_ids as given, int64 [B, P]
    position_offsets: Tensor | None  # int64 [B], what to add to a count of tokens for its position; None: nothing


def inputs_beside_text(model: PreTrainedModel, model_kwargs: dict[str, Any], mask: Tensor) -> set[str]:
    """Return the names of a call's inputs beside its text, such as pixel_values; empty for text alone.

    Raises ValueError for an argument of `generate` that would not be used as transformers would use it. `mask` is
    [B, P], 0 at padding.
    """
    given = {name for name, value in model_kwargs.items() if value is not None and not _is_empty(value)}
    for name in given.intersection(CACHES):
        if model_kwargs[name].get_seq_length() > 0:
            raise ValueError(
                "speculative decoding keeps its own cache, but cache (past_key_values) holds tokens; leave it out"
            )
    more = given.difference(USED_ARGUMENTS, CACHES)
    by_steps = inspect.signature(decoder_stack(model).forward).parameters
    by_prefill = inspect.signature(model.forward).parameters.keys() - by_steps.keys()
    for name in sorted(more - by_prefill):
        _refuse_unused(name)
    positions = model_kwargs.get("position_ids")
    if positions is not None and not (more and positions.ndim == 3):
        counted = (mask.ne(0).cumsum(dim=-1) - 1).clamp_min(0).expand_as(mask)
        if not bool(((positions == counted) | (mask == 0)).all()):
            raise ValueError("position_ids must count the real tokens of each prompt from 0; leave them out")
    return more


def prepare_prompts(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any], more: set[str]
) -> PreparedPrompts:
    """Return the prefill of prompts int64 [B, P] (mask [B, P]) with the inputs that `inputs_beside_text` named.

    Raises ValueError where positions behind the prompts are not known before the prefill.
    """
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    first_call = {"is_first_iteration": True, "cache_position": columns}
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    first_call = {name: value for name, value in first_call.items() if name in known}
    prepare: Any = model.prepare_inputs_for_generation
    prepared = prepare(input_ids, **{**model_kwargs, **first_call})
    for name in sorted(more):
        if prepared.get(name) is None:
            _refuse_unused(name)
    taken = inspect.signature(model.forward).parameters.keys() - {*CACHES, "use_cache", "logits_to_keep"}
    arguments = {name: value for name, value in prepared.items() if name in taken and value is not None}
    if "position_ids" not in arguments:
        raise ValueError(
            f"target {name_of(model)} makes the positions behind {', '.join(sorted(more))} inside its own forward, "
            "where a tree cannot follow; if this is transformers 4, upgrade it, or decode without taps_ext"
        )
    return PreparedPrompts(arguments, _position_offsets(arguments["position_ids"], mask))


def _position_offsets(positions: Tensor, mask: Tensor) -> Tensor | None:
    """Return what each row's positions are ahead of its tokens behind the prompt; None if they count tokens.

    `positions` is [B, P] or [1, P], or has axes in front.
    """
    mask = mask.to(positions.device)
    columns = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    last = positions.expand(*positions.shape[:-2], *mask.shape)[..., torch.arange(len(mask)), columns]
    axes = last.view(-1, len(mask))[-ROPE_AXES:]
    if bool((axes != axes[0]).any()):
        raise ValueError("a prompt ends with a picture or video; put text behind it, where one position is one token")
    offsets = axes[0] + 1 - mask.sum(dim=1)
    return offsets if bool(offsets.any()) else None


def _refuse_unused(name: str) -> None:
    if name == "mm_encoder_outputs":
        name = "the pictures (mm_encoder_outputs, as transformers encoded them)"
    raise ValueError(f"speculative decoding does not use {name}; leave it out, or decode without taps_ext")


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value  # transformers 5 makes an empty dict for a call without pictures
