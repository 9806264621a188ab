"""Plain decoding, one token a forward, with the decoder's own noise: the oracle that speculation must equal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .requests import Request
from .sampling import SamplingParams, SamplingRows
from .state import RowText
from .target import TargetModel
from .tree import DraftTree
from .verification import verify


@dataclass(frozen=True)
class PlainResult:
    """The texts of a plain run."""

    sequences: Tensor  # int64 [B, P + longest], the prompts as given, the new tokens, padding
    new_tokens: list[list[int]]
    finish_reasons: list[str]
    num_target_forwards: int


@torch.inference_mode()
def plain_generate(
    target: PreTrainedModel | TargetModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sampling: SamplingParams | None = None,
    max_new_tokens: int | Sequence[int] = 128,
    eos_token_id: int | Collection[int] | None = None,
    stop_strings: Sequence[str] | None = None,
    tokenizer: Any = None,
) -> PlainResult:
    """The target's own text: stock forwards with transformers' cache, each token drawn as `ops.verify_tree` draws.

    Takes left-padded prompts [B, P] and the arguments of `SpeculativeDecoder.generate`, and returns the same text.
    """
    model = target.model if isinstance(target, TargetModel) else target
    request = Request.build(
        model, input_ids, attention_mask, sampling, max_new_tokens, eos_token_id, stop_strings, tokenizer
    )
    if bool((request.attention_mask.diff(dim=1) < 0).any()):
        raise ValueError("plain_generate takes left-padded prompts, got padding behind a prompt; pad on the left")
    sampling_rows = request.sampling.rows(len(input_ids), input_ids.device)
    rows = [RowText(prompt) for prompt in input_ids.tolist()]
    mask, tokens, cache = request.attention_mask, input_ids, DynamicCache()
    num_forwards = 0
    while any(row.finish_reason is None for row in rows):
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -tokens.shape[1] :]
        logits = model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, -1:]
        num_forwards += 1
        drawn = _draw(logits, sampling_rows, mask.sum(dim=1))
        for row, (text, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
            if token < 0 and text.finish_reason is None:
                text.finish_reason = "invalid_logits"
            text.extend([token], row, request.rules)
        tokens = drawn.clamp_min(0)[:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    reasons = [row.finish_reason or "" for row in rows]
    return PlainResult(request.sequences(rows), [row.new_tokens for row in rows], reasons, num_forwards)


def _draw(logits: Tensor, sampling: SamplingRows, positions: Tensor) -> Tensor:
    root_only = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
    tree = DraftTree(root_only, root_only - 1, torch.zeros_like(root_only, dtype=torch.float32), root_only[:, 0] + 1)
    return verify(logits, tree, sampling, positions).bonus_tokens
