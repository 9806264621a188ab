"""Texts that the target writes itself, greedily and at temperature 1: what a drafter will have to foresee."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..plain_generation import plain_generate
from ..sampling import SamplingParams
from ..training import Example
from .corpus import Conversation

BATCH_SIZE = 128


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
    examples: list[Example] = []
    for begin in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[begin : begin + BATCH_SIZE]
        answers = _answers(target, tokenizer, batch, max_new_tokens, seed + begin)
        for prompt, answer in zip(batch, answers, strict=True):
            examples.append(Example(prompt.tokens + tuple(answer), prompt.loss_mask + (True,) * len(answer)))
        report(len(examples), sum(map(len, answers)) / len(answers))
    return examples


def _prompt(tokenizer: PreTrainedTokenizerBase, start: Conversation) -> Example:
    """The start with the header of the answer to come; earlier answers are not the target's and are not learned."""
    encoded: Any = tokenizer.apply_chat_template(start, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokens = tuple(encoded["input_ids"])
    return Example(tokens, (False,) * len(tokens))


def _answers(
    target: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Example], max_new_tokens: int, seed: int
) -> list[list[int]]:
    """The target's answers, end token included: every second one greedy, the others at temperature 1."""
    ids = {"input_ids": [list(prompt.tokens) for prompt in prompts]}
    padded = tokenizer.pad(ids, padding_side="left", return_tensors="pt")
    temperatures = [float(row % 2) for row in range(len(prompts))]
    return plain_generate(
        target,
        padded["input_ids"],
        padded["attention_mask"],
        sampling=SamplingParams(temperatures, seed=seed),
        max_new_tokens=max_new_tokens,
    ).new_tokens
