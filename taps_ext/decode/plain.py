"""Plain decoding, one token per forward, with the decoder's own noise: the text that speculation must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from ..sampling import SamplingRows
from ..target.model import TargetModel
from ..target.support import refuse_training_mode, transformers_model
from ..tree import DraftTree
from .request import NOT_SAMPLED, GenerateOptions, Request
from .state import RowText
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
    """Generate the target's own text: transformers' own decoding loop, tokens drawn as `ops.verify_tree` draws.

    Takes prompts int64 [B, P] and the options of `SpeculativeDecoder.generate` (see `GenerateOptions`),
    except `return_log_probs`, and returns the same text. Since the loop is that of `model.generate`, it also decodes
    models that `TargetModel` refuses, such as those with recurrent layers or learned prompts.
    """
    if options.get("return_log_probs"):
        raise ValueError("plain_generate returns no log-probabilities; leave return_log_probs out")
    model: Any = target.model if isinstance(target, TargetModel) else target
    refuse_training_mode(transformers_model(model))
    request = Request.build(model, input_ids, attention_mask, options)
    device = model.get_input_embeddings().weight.device
    text, mask = request.moved_left.to(device), request.attention_mask.sort(dim=1).values.to(device)
    run = _PlainRun(request, request.rows(), request.sampling.rows(len(text), device), mask.sum(dim=1))
    with torch.inference_mode():  # cheaper than the loop's own no_grad
        model.generate(
            text,
            attention_mask=mask,
            custom_generate=run.decode,
            max_new_tokens=max(request.rules.max_new_tokens),
            eos_token_id=list(request.rules.eos_tokens),  # the call's: processors of the generation config need it
            pad_token_id=request.pad_token,
            num_return_sequences=1,  # the request's rows are all there
            stop_strings=None,
            **NOT_SAMPLED,
        )
    rows = run.rows
    reasons = [row.finish_reason or "" for row in rows]
    return PlainResult(request.sequences(rows), [row.new_tokens for row in rows], reasons, run.num_forwards)


@dataclass
class _PlainRun:
    """Draw the tokens of transformers' own greedy loop: it takes the largest score, and only the drawn token has one.

    The loop knows under which name each model takes its cache or state, and which positions it gives it.
    """

    request: Request
    rows: Sequence[RowText]
    sampling: SamplingRows
    positions: Tensor  # int64 [B], of the tokens to draw next
    num_forwards: int = 0

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Serve `model.generate(custom_generate=...)`; processors and stop rules are those of the request."""
        generation_config.return_dict_in_generate = False
        tokens: Tensor = model._sample(
            input_ids,
            logits_processor=self.draw,
            stopping_criteria=StoppingCriteriaList([cast(Any, self.are_finished)]),
            generation_config=generation_config,
            **model_kwargs,
        )
        return tokens

    def draw(self, text: Tensor, logits: Tensor) -> Tensor:
        """Return scores [B, V]: 0 at the drawn tokens (padding for rows that had ended), else -inf; extend the rows."""
        if self.request.processors:
            logits = self.request.processors(cast(Any, text), cast(Any, logits))
        tokens = _draw(logits[:, None], self.sampling, self.positions)
        self.positions, self.num_forwards = self.positions + 1, self.num_forwards + 1
        drawn = tokens.tolist()
        for b, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
            if row.finish_reason is not None:
                drawn[b] = self.request.pad_token  # as stock generation does; rows may share a layer's capacity
            elif token < 0:
                row.finish_reason, drawn[b] = "invalid_logits", 0
            row.extend([token], b, self.request.rules)
        scores = torch.full_like(logits, -torch.inf)
        return scores.scatter(1, torch.tensor(drawn, device=logits.device)[:, None], 0.0)

    def are_finished(self, text: Tensor, scores: Any, **more: Any) -> Tensor:
        """Return bool [B], whether each row has ended."""
        return torch.tensor([row.finish_reason is not None for row in self.rows], device=text.device)


def _draw(logits: Tensor, sampling: SamplingRows, positions: Tensor) -> Tensor:
    roots = DraftTree.of_roots(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return verify(logits, roots, sampling, positions).bonus_tokens
