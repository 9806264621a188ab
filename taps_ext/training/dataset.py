"""Token sequences with loss masks, packed in memory, and the seeded batches that a trainer reads from them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import torch
from torch import Tensor

POOL_BATCHES = 16  # batches that are sorted by length together: little padding, and still a fresh mixture each time
NUM_UNDRAFTED = 2  # tokens 0 and 1 are never guessed: the first slot of a drafter guesses token 2


@dataclass(frozen=True)
class Example:
    """One training text: its tokens, and which of them the loss is about."""

    tokens: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask):
            raise ValueError(f"loss_mask must have {len(self.tokens)} entries like tokens, got {len(self.loss_mask)}")

    @property
    def num_learned(self) -> int:
        """Tokens that a drafter learns from this text."""
        return sum(self.loss_mask[NUM_UNDRAFTED:])

    def cut(self, max_length: int) -> Example:
        """The first `max_length` tokens."""
        return Example(self.tokens[:max_length], self.loss_mask[:max_length])


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right. Under a causal mask the padding is never seen by a real token.

    Shapes: B rows, L the longest row.
    """

    tokens: Tensor  # int64 [B, L], padding 0
    loss_mask: Tensor  # bool [B, L], padding False
    lengths: Tensor  # int64 [B]
    ids: tuple[int, ...]  # B, of the sequences: a hash of their content

    def to(self, device: torch.device) -> TokenBatch:
        """The same on a device."""
        return TokenBatch(self.tokens.to(device), self.loss_mask.to(device), self.lengths.to(device), self.ids)


class TokenDataset:
    """Sequences in three flat arrays, five bytes a token: a million conversations fit, a million objects do not."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Refuses (ValueError) an example without a token to learn, and an empty dataset."""
        tokens, loss_mask, ends = array("i"), array("b"), array("q", [0])
        num_learned, ids = array("i"), array("Q")
        for index, example in enumerate(examples):
            if not example.num_learned:
                raise ValueError(f"sequence {index} has no token to learn among its {len(example.tokens)} tokens")
            tokens.extend(example.tokens)
            loss_mask.extend(example.loss_mask)
            ends.append(len(tokens))
            num_learned.append(example.num_learned)
            ids.append(content_id(example))
        if not num_learned:
            raise ValueError("a dataset needs at least one sequence, got none")
        self._tokens = torch.frombuffer(tokens, dtype=torch.int32)
        self._loss_mask = torch.frombuffer(loss_mask, dtype=torch.int8)
        self._ends = ends
        self.num_learned: Sequence[int] = num_learned  # of each sequence
        self.ids: Sequence[int] = ids  # of each sequence: a hash of its content

    def __len__(self) -> int:
        return len(self.num_learned)

    def __getitem__(self, index: int) -> Example:
        start, end = self._ends[index], self._ends[index + 1]
        mask = self._loss_mask[start:end].bool().tolist()
        return Example(tuple(self._tokens[start:end].tolist()), tuple(mask))

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        return self._ends[index + 1] - self._ends[index]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return len(self._tokens)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """The sequences as one batch, padded on the right with token 0."""
        lengths = [self.length(i) for i in indices]
        tokens = torch.zeros(len(indices), max(lengths), dtype=torch.int64)
        loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            start = self._ends[index]
            tokens[row, :length] = self._tokens[start : start + length]
            loss_mask[row, :length] = self._loss_mask[start : start + length].bool()
        return TokenBatch(tokens, loss_mask, torch.tensor(lengths), tuple(self.ids[i] for i in indices))

    def learned_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is learned, int64 [V]."""
        return torch.bincount(self._tokens[self._loss_mask.bool()].long(), minlength=vocab_size)

    @property
    def checksum(self) -> str:
        """SHA-256 over all sequences in order, in hex: the same data, template and cut give the same one."""
        digest = hashlib.sha256()
        for part in (self._tokens, self._loss_mask):
            digest.update(part.numpy().data)
        digest.update(self._ends.tobytes())
        return digest.hexdigest()


def collate(examples: Sequence[Example]) -> TokenBatch:
    """A few examples as one batch."""
    dataset = TokenDataset(examples)
    return dataset.batch(range(len(dataset)))


class BatchOrder:
    """Which sequences the update of each step reads: a function of the seed, open at any step, so a run can resume.

    Rows of a batch have similar lengths. An epoch visits every sequence once, but for a few that fill no batch: others
    each time.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int) -> None:
        self.batch_size = min(batch_size, len(dataset))
        self.seed = seed
        self._dataset = dataset
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Updates that an epoch makes."""
        return len(self._dataset) // self.batch_size

    def __getitem__(self, step: int) -> list[int]:
        """The `batch_size` sequences of a step (from 0)."""
        epoch, number = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[number]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self.seed}/{epoch}")
        order = rng.sample(range(len(self._dataset)), self.batches_per_epoch * self.batch_size)
        size, pool_size = self.batch_size, self.batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=self._dataset.length)
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            batches += rng.sample(groups, len(groups))
        return batches


def content_id(example: Example) -> int:
    """64 bits that two examples share only when their tokens and masks are the same."""
    digest = hashlib.blake2b(array("i", example.tokens).tobytes(), digest_size=8)
    digest.update(bytes(example.loss_mask))
    return int.from_bytes(digest.digest(), "little")
