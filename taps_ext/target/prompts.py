"""Prompts: ids and mask checked, and inputs beside the tokens as transformers' `generate` prepares them.

Pictures and other inputs beside the tokens change a text through the prefill only: the steps behind it are those of a
text without pictures, but for their positions. So the prefill is the model's own forward of whatever
`prepare_inputs_for_generation` makes of a call, and an argument that would take part in later steps, or that nobody
would use, is refused by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
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


def check_ids(input_ids: Tensor) -> Tensor:
    """Return `input_ids`; raise ValueError unless they are int64 [B, P]."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids must be a tensor, got {type(input_ids).__name__}; tokenize with return_tensors='pt' and give "
            "generate(**inputs)"
        )
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be int64 [B, P] with at least one row and token, got {input_ids.dtype} "
            f"{list(input_ids.shape)}"
        )
    return input_ids


def inferred_mask(input_ids: Tensor, pads: Sequence[int], ends: Sequence[int]) -> Tensor:
    """Return the mask of prompts without one, as transformers infers it: pad tokens are padding unless they are EOS."""
    if not pads or pads[0] in ends:
        return torch.ones_like(input_ids)
    return check_mask(
        input_ids, input_ids != pads[0], f"; without an attention_mask, pad_token_id {pads[0]} is padding"
    )


def check_mask(input_ids: Tensor, attention_mask: Any, reason: str = "") -> Tensor:
    """Return the attention mask as int64 [B, P]; raise ValueError for one that is none of these prompts."""
    try:
        mask = torch.as_tensor(attention_mask, device=input_ids.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"attention_mask must be a tensor or lists of 0 and 1, got {attention_mask!r}") from error
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)} like input_ids, got {list(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold 0 and 1 only")
    lengths = mask.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(f"prompt {int(lengths.argmin())} has no token; give every row at least one{reason}")
    return mask.to(torch.int64)


def moved_left(input_ids: Tensor, mask: Tensor, vocab_size: int, pads: Sequence[int]) -> Tensor:
    """Return prompts with the padding on the left, the order of the real tokens kept, and all ids in the vocabulary.

    What stands in padded places means nothing to a model, but processors look it up in the vocabulary.
    """
    is_known = (input_ids >= 0) & (input_ids < vocab_size)
    if not bool(is_known[mask.bool()].all()):
        raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}, the target's vocabulary; check the tokenizer")
    readable = torch.where(is_known, input_ids, next((token for token in pads if 0 <= token < vocab_size), 0))
    return readable.gather(1, torch.argsort(mask, dim=1, stable=True))


def inputs_beside_text(model: PreTrainedModel, model_kwargs: dict[str, Any]) -> set[str]:
    """Return the names of a call's inputs beside its text, such as pixel_values; empty for text alone.

    Raises ValueError for an argument of `generate` that would not be used as transformers would use it.
    """
    given = {name for name, value in model_kwargs.items() if value is not None and not _is_empty(value)}
    for name in given.intersection(CACHES):
        if _holds_tokens(model_kwargs[name]):
            raise ValueError(
                "speculative decoding keeps its own cache, but cache (past_key_values) holds tokens; leave it out"
            )
    more = given.difference(USED_ARGUMENTS, CACHES)
    by_steps = inspect.signature(decoder_stack(model).forward).parameters
    by_prefill = inspect.signature(model.forward).parameters.keys() - by_steps.keys()
    for name in sorted(more - by_prefill):
        _refuse_unused(name)
    return more


def prepare_prompts(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, model_kwargs: dict[str, Any], more: set[str]
) -> PreparedPrompts | None:
    """Return the prefill of prompts int64 [B, P] (mask [B, P]) with what `inputs_beside_text` named; None for no more.

    Raises ValueError where the prefill would be of other prompts, and where positions behind them are not known before.
    """
    _refuse_other_positions(model_kwargs.get("position_ids"), mask, has_pictures=bool(more))
    prepared = _first_call(model, input_ids, model_kwargs)
    _refuse_other_prompts(input_ids, prepared)
    if not more:
        return None
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


def _first_call(model: PreTrainedModel, input_ids: Tensor, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the first forward, as `prepare_inputs_for_generation` makes them."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    first_call = {"is_first_iteration": True, "cache_position": columns}
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    prepare: Any = model.prepare_inputs_for_generation
    prepared: dict[str, Any] = prepare(
        input_ids, **model_kwargs, **{name: value for name, value in first_call.items() if name in known}
    )
    return prepared


def _refuse_other_positions(positions: Tensor | None, mask: Tensor, has_pictures: bool) -> None:
    """Raise ValueError unless positions count the real tokens, along all axes; with pictures, axes may differ."""
    if positions is None or (has_pictures and positions.ndim == 3):
        return
    counted = (mask.cumsum(dim=-1) - 1).clamp_min(0)
    fits = positions.shape[-2:] in (mask.shape, mask[:1].shape, mask[0].shape)
    if not (fits and bool(((positions == counted) | (mask == 0)).all())):
        raise ValueError(
            f"position_ids must count the real tokens of each prompt from 0, int64 {list(mask.shape)}, got "
            f"{list(positions.shape)}; leave them out"
        )


def _refuse_other_prompts(input_ids: Tensor, prepared: dict[str, Any]) -> None:
    """Raise ValueError where the first forward would see more, or other, than the tokens of the prompts.

    PEFT puts learnt tokens in front of them there, as inputs_embeds or in the cache.
    """
    names = [name for name in CACHES if prepared.get(name) is not None and _holds_tokens(prepared[name])]
    if prepared.get("inputs_embeds") is not None:
        names.append("inputs_embeds")
    seen = prepared.get("input_ids")
    if not names and (seen is None or not torch.equal(seen, input_ids)):
        names.append("other input_ids")
    if names:
        raise ValueError(
            f"speculative decoding reads the tokens of a prompt, but this call's first forward has {names[0]} in their "
            "place (as with prompt or prefix tuning); decode without taps_ext"
        )


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


def _holds_tokens(cache: Any) -> bool:
    return not hasattr(cache, "get_seq_length") or cache.get_seq_length() > 0


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and not value  # transformers 5 makes an empty dict for a call without pictures
