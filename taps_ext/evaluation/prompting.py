"""Questions as tokens: through the tokenizer's chat template, left-padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.files import first_line

if TYPE_CHECKING:
    from ..target.model import TargetModel
    from .tasks import Question


class Prompter:
    """Conversations as tokens, through the tokenizer's chat template."""

    def __init__(self, tokenizer: Any, system_prompt: str = "") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; give the target's instruction-tuned version")
        self.tokenizer, self._system_prompt = tokenizer, system_prompt

    def encode(self, question: Question, answers: Sequence[str]) -> list[int]:
        """The prompt of the turn behind these answers."""
        messages = [dict(message) for message in question.history]
        if self._system_prompt and not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": self._system_prompt})
        for turn, answer in zip(question.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": question.turns[len(answers)]})
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and raises anything
            raise ValueError(
                f"the tokenizer's chat template refuses question {question.id}: {first_line(error)}; leave out what "
                "it does not take, as a system prompt"
            ) from error
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """The text of an answer."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.strip()


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Left-padded prompts and their mask, int64 [B, P]."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def refuse_long(question: Question, length: int, target: TargetModel) -> None:
    """ValueError if a text of that length, the question's with its answers, may not fit into the target's context."""
    longest = getattr(target.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"question {question.id} may come to {length} tokens with its answers, and the target's context is "
            f"{longest}; leave it out, or lower max_new_tokens"
        )
    target.refuse_longer_than_exact(length)
