"""Texts that the target writes itself, greedily and at temperature 1: what a drafter will have to foresee."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from ..training import Example
from .corpus import Conversation

BATCH_SIZE = 128


@torch.inference_mode()
def regenerate(
    target: Any,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[Conversation],
    max_new_tokens: int,
    seed: int,
    report: Callable[[int, float], None],
) -> list[Example]:
    """An example for each conversation start, in order of length: the start, then the target's answer.

    Every second answer of a batch is greedy, the others are drawn at temperature 1. `report(done, mean length)`.
    """
    prompts = [_prompt(tokenizer, start) for start in starts]
    prompts.sort(key=lambda prompt: len(prompt.tokens))
    generator = torch.Generator().manual_seed(seed)
    examples: list[Example] = []
    for begin in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[begin : begin + BATCH_SIZE]
        answers = _answers(target, tokenizer, batch, max_new_tokens, generator)
        for prompt, answer in zip(batch, answers, strict=True):
            examples.append(Example(prompt.tokens + answer, prompt.loss_mask + (True,) * len(answer)))
        report(len(examples), sum(map(len, answers)) / len(answers))
    return examples


def _prompt(tokenizer: PreTrainedTokenizerBase, start: Conversation) -> Example:
    """The start with the header of the answer to come; earlier answers are not the target's and are not learned."""
    encoded: Any = tokenizer.apply_chat_template(start, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = tuple(encoded["input_ids"])
    return Example(tokens, (False,) * len(tokens))


def _answers(
    target: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Example],
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    """The target's answers, end token included, to prompts padded on the left."""
    longest = max(len(prompt.tokens) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, longest - len(prompt.tokens) :] = 1
    cache, drawn, step = DynamicCache(), [], tokens
    is_greedy = torch.arange(len(prompts)) % 2 == 0
    open_rows = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        logits = target(
            step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        step = _draw(logits, is_greedy, generator)[:, None]
        drawn.append(step)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        open_rows &= step[:, 0] != tokenizer.eos_token_id
        if not bool(open_rows.any()):
            break
    return [_until_end(row, tokenizer.eos_token_id) for row in torch.cat(drawn, dim=1).tolist()]


def _draw(logits: Tensor, is_greedy: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens [B]: the likeliest where `is_greedy`, else drawn at temperature 1."""
    sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return torch.where(is_greedy, logits.argmax(-1), sampled)


def _until_end(tokens: list[int], end: int) -> tuple[int, ...]:
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
