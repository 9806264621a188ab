"""Plain decoding, one token per forward, with the decoder's own noise: the text that speculation must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..sampling import SamplingRows
from ..target.kv_cache import cache_keyword
from ..target.model import TargetModel
from ..target.support import unwrapped
from ..tree import DraftTree
from .request import GenerateOptions, Request
from .step import verify


@dataclass(frozen=True)
class PlainResult:
    """Hold the texts of a plain run."""

    sequences: Tensor  # int64 [B, P + longest], the prompts as given, the new tokens, padding
    new_tokens: list[list[int]]
    finish_reasons: list[str]
    num_target_forwards: int


def plain_generate(
    target: PreTrainedModel | TargetModel,
    input_ids: Tensor,
    attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
    **options: Unpack[GenerateOptions],
) -> PlainResult:
    """Generate the target's own text: stock forwards with transformers' cache, tokens drawn as `ops.verify_tree` draws.

    Takes prompts int64 [B, P] and the options of `SpeculativeDecoder.generate` (see `GenerateOptions`), except
    `return_log_probs`, and returns the same text.
    """
    if options.get("return_log_probs"):
        raise ValueError("plain_generate returns no log-probabilities; leave return_log_probs out")
    model: Any = target.model if isinstance(target, TargetModel) else target
    unwrapped(model)  # refuses learnt prompts
    request = Request.build(model, input_ids, attention_mask, options)
    rows = request.rows()
    draws, num_forwards = _draws(model, request), 0
    while any(row.finish_reason is None for row in rows):
        num_forwards += 1
        for b, (row, token) in enumerate(zip(rows, next(draws).tolist(), strict=True)):
            if token < 0 and row.finish_reason is None:
                row.finish_reason = "invalid_logits"
            row.extend([token], b, request.rules)
    reasons = [row.finish_reason or "" for row in rows]
    return PlainResult(request.sequences(rows), [row.new_tokens for row in rows], reasons, num_forwards)


@torch.inference_mode()
def _draws(model: Any, request: Request) -> Iterator[Tensor]:
    """Yield the tokens [B] that each forward draws, without end; -1 where the logits were invalid."""
    device = model.get_input_embeddings().weight.device
    text, mask = request.moved_left.to(device), request.attention_mask.sort(dim=1).values.to(device)
    tokens, cache = text, DynamicCache(config=model.config)
    sampling = request.sampling.rows(len(text), device)
    arguments: dict[str, Any] = {cache_keyword(model): cache}
    if model._supports_logits_to_keep():
        arguments["logits_to_keep"] = 1
    while True:
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)[:, -tokens.shape[1] :],
            use_cache=True,
            **arguments,
        ).logits[:, -1:]
        if request.processors:
            logits = request.processors(cast(Any, text), logits[:, 0].float())[:, None]
        drawn = _draw(logits, sampling, positions=mask.sum(dim=1))
        yield drawn
        tokens = drawn.clamp_min(0)[:, None]
        text = torch.cat([text, tokens], dim=1)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)


def _draw(logits: Tensor, sampling: SamplingRows, positions: Tensor) -> Tensor:
    roots = DraftTree.of_roots(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return verify(logits, roots, sampling, positions).bonus_tokens
