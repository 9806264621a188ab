"""Token sequences with loss masks, and the seeded batches that a trainer reads from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL_BATCHES = 16  # batches that are sorted by length together: little padding, and still a fresh mixture each time


@dataclass(frozen=True)
class Example:
    """One training text: its tokens, and which of them the loss is about."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask):
            raise ValueError(f"loss_mask must have {len(self.tokens)} entries like tokens, got {len(self.loss_mask)}")


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right. Under a causal mask the padding is never seen by a real token.

    Shapes: B rows, L the longest row.
    """

    tokens: Tensor  # int64 [B, L], padding 0
    loss_mask: Tensor  # bool [B, L], padding False
    lengths: Tensor  # int64 [B]


class TokenDataset:
    """Sequences held in memory; `batches` visits them in a seeded order, without end."""

    def __init__(self, sequences: Sequence[Example], max_length: int = 2048) -> None:
        """Sequences longer than `max_length` tokens are cut there; those without a token to learn are refused."""
        self.sequences = [Example(s.tokens[:max_length], s.loss_mask[:max_length]) for s in sequences]
        if not self.sequences:
            raise ValueError("a dataset needs at least one sequence, got none")
        for index, sequence in enumerate(self.sequences):
            if not any(sequence.loss_mask):
                raise ValueError(f"sequence {index} has no token to learn in its first {max_length} tokens")

    def __len__(self) -> int:
        return len(self.sequences)

    def batches(self, batch_size: int, seed: int) -> Iterator[TokenBatch]:
        """Batches of `batch_size` rows of similar length; every sequence once an epoch, but for the last few."""
        rng = Random(seed)
        size = min(batch_size, len(self.sequences))
        while True:
            order = rng.sample(range(len(self.sequences)), len(self.sequences))
            pool_size = size * POOL_BATCHES
            for start in range(0, len(order), pool_size):
                pool = sorted(order[start : start + pool_size], key=lambda i: len(self.sequences[i].tokens))
                groups = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
                rng.shuffle(groups)
                for group in groups:
                    yield collate([self.sequences[i] for i in group])


def collate(sequences: Sequence[Example]) -> TokenBatch:
    """The sequences as one batch, padded on the right with token 0."""
    lengths = [len(sequence.tokens) for sequence in sequences]
    tokens = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        tokens[row, :length] = torch.tensor(sequence.tokens)
        loss_mask[row, :length] = torch.tensor(sequence.loss_mask)
    return TokenBatch(tokens, loss_mask, torch.tensor(lengths))


def chat_sequence(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> Example:
    """A conversation in the tokenizer's chat format; the loss is about the assistant's tokens.

    The chat template must mark them with `{% generation %}` (ValueError otherwise).
    """
    encoded: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = tuple(bool(flag) for flag in encoded["assistant_masks"])
    if not any(mask):
        raise ValueError("no token is marked as the assistant's: the chat template needs {% generation %} blocks")
    return Example(tuple(encoded["input_ids"]), mask)
