"""A generation request, checked at the door: prompts, sampling, stop rules, logits processors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StopStringCriteria

from ..sampling import SamplingParams
from .processors import refuse_unsupported
from .state import RowText, StopRules


@dataclass(frozen=True)
class Request:
    """What to generate: everything checked, nothing computed yet."""

    input_ids: Tensor  # int64 [B, P], as given
    attention_mask: Tensor  # int64 [B, P], 1 at real tokens
    prompt_lengths: tuple[int, ...]  # real tokens of each row
    sampling: SamplingParams
    rules: StopRules
    pad_token: int
    processors: LogitsProcessorList  # other than temperature, top-k, top-p and min-p: run in Python, per node
    return_log_probs: bool

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        eos_token_id: int | Collection[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        logits_processor: Any = None,
        return_log_probs: bool = False,
        criteria: Sequence[tuple[str, Any]] = (),
        pad_token_id: int | None = None,
    ) -> Request:
        """Check everything; EOS and padding default to the target's generation config (`eos_token_id=()`: none)."""
        mask = _check_prompts(input_ids, attention_mask, model.config.get_text_config().vocab_size)
        batch_size = len(input_ids)
        sampling = sampling or SamplingParams()
        sampling.rows(batch_size)
        eos = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        eos_tokens = _token_set(eos)
        if stop_strings:
            stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
            if tokenizer is None:
                raise ValueError("stop_strings need the tokenizer to find them in the text; pass tokenizer=...")
            criteria = [*criteria, ("stop_string", StopStringCriteria(tokenizer, stop_strings))]
        processors = LogitsProcessorList(logits_processor or ())
        refuse_unsupported(processors)
        pad = model.generation_config.pad_token_id if pad_token_id is None else pad_token_id
        pad_token = pad if isinstance(pad, int) else min(eos_tokens, default=0)
        rules = StopRules(_lengths(max_new_tokens, batch_size), eos_tokens, tuple(criteria))
        prompt_lengths = tuple(mask.sum(dim=1).tolist())
        return cls(input_ids, mask, prompt_lengths, sampling, rules, pad_token, processors, return_log_probs)

    def packed(self, device: torch.device) -> Tensor:
        """The prompts moved to column 0, int64 [B, longest] with token 0 behind them."""
        first_real = torch.argsort(self.attention_mask, dim=1, descending=True, stable=True)
        tokens = self.input_ids.gather(1, first_real)[:, : max(self.prompt_lengths)]
        is_real = self.attention_mask.gather(1, first_real)[:, : tokens.shape[1]]
        return (tokens * is_real).to(device)

    def sequences(self, rows: Sequence[RowText]) -> Tensor:
        """The prompts as given, each row's new tokens, padding: int64 [B, P + longest]."""
        longest = max(len(row.new_tokens) for row in rows)
        new = [row.new_tokens + [self.pad_token] * (longest - len(row.new_tokens)) for row in rows]
        tail = torch.tensor(new, dtype=torch.int64, device=self.input_ids.device).reshape(len(rows), longest)
        return torch.cat([self.input_ids, tail], dim=1)


def _check_prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """The attention mask as int64 [B, P]; raises for prompts that cannot be decoded."""
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
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device, torch.int64)
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {list(input_ids.shape)} like input_ids, got {list(mask.shape)}")
    if bool((mask * (1 - mask)).any()):
        raise ValueError("attention_mask must hold 0 and 1 only")
    lengths = mask.sum(dim=1)
    if bool((lengths == 0).any()):
        raise ValueError(f"prompt {int(lengths.argmin())} has no token; give every row at least one")
    if bool(((input_ids < 0) | (input_ids >= vocab_size))[mask.bool()].any()):
        raise ValueError(f"input_ids must lie in 0..{vocab_size - 1}, the target's vocabulary; check the tokenizer")
    return mask


def _lengths(max_new_tokens: int | Sequence[int], batch_size: int) -> tuple[int, ...]:
    given = max_new_tokens if isinstance(max_new_tokens, Sequence) else [max_new_tokens] * batch_size
    if not all(isinstance(length, Integral) for length in given):
        raise ValueError(f"max_new_tokens must be an integer, or one a row, got {max_new_tokens!r}")
    lengths = tuple(int(length) for length in given)
    if len(lengths) != batch_size:
        raise ValueError(
            f"max_new_tokens has {len(lengths)} values for a batch of {batch_size}; give one, or one a row"
        )
    if any(length < 1 for length in lengths):
        raise ValueError(f"max_new_tokens must be at least 1, got {min(lengths)}")
    return lengths


def _token_set(tokens: int | Collection[int] | Tensor | None) -> frozenset[int]:
    if tokens is None:
        return frozenset()
    flat = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    return frozenset([int(flat)] if isinstance(flat, Integral) else (int(token) for token in flat))  # type: ignore[union-attr]
