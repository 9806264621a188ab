"""The target's draws at places of a text, with the noise that they come from, a chunk at a time.

The noise is i.i.d. standard Gumbel noise of a seeded generator: of decoding's own noise only the distribution matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from .draft_slots import DraftSlots
from .features import Head

CPU_VALUES, GPU_VALUES = 1 << 18, 1 << 23  # logits of one depth that exist at a time: what a cache holds, and 32 MB
LEAST_ROWS = 16  # of a product with the lm_head, which reads all of it for each chunk
KEPT_VALUES = 1 << 26  # logits and noise that are kept from sweep to sweep: 256 MB
LEAST_WORD = 1e-30  # of the exponential draw whose -log is the noise, which is finite so
MAX_REPEATS = 4  # draws at one place of the text, where there are few places

Progress = Callable[[str, int, int], None]  # what is done, how many of how many


class Chunk(NamedTuple):
    """Some draws. Shapes: S draws, D depths, T temperatures, V vocabulary."""

    logits: Tensor  # float32 [D, S, V], the drafter's
    reach: Tensor  # int64 [S], the depths that count
    noise: Tensor  # float32 [S, V]
    drawn: Tensor  # int64 [T, S]


class Draws:
    """The target's draws at some slots: made anew from the seed for each sweep, a chunk at a time, unless they fit."""

    def __init__(
        self,
        slots: DraftSlots,
        head: Head,
        temperatures: Sequence[float],
        wanted: int,
        seed: str,
        progress: Progress,
    ) -> None:
        """About `wanted` draws with the noise of a seed; `head` gives the target's logits of features."""
        self.slots, self.temperatures = slots, tuple(temperatures)
        self.repeats = min(MAX_REPEATS, max(1, wanted // max(1, len(slots))))
        self._head, self._progress = head, progress
        self._seed = Random(f"{seed}/noise").getrandbits(63)
        self._kept: list[Chunk] | None = None

    @property
    def num_depths(self) -> int:
        """D."""
        return len(self.slots.drafted)

    @property
    def num_places(self) -> Tensor:
        """int64 [D], slots by depth, on the CPU."""
        depths = torch.arange(1, self.num_depths + 1)
        return (self.slots.reach.cpu() >= depths[:, None]).sum(-1)

    def cut(self, depth: int) -> None:
        """Leave the deeper drafts out."""
        self.slots = replace(self.slots, drafted=self.slots.drafted[:depth])

    def chunks(self, what: str) -> Iterator[Chunk]:
        """The draws in their order, the same each time; the noise is that of all depths and temperatures."""
        num_values = (self.num_depths + 1) * len(self.slots) * self.repeats * self._vocab_size
        if self._kept is None and num_values <= KEPT_VALUES:
            self._kept = list(self._make())
        done = 0
        for chunk in self._kept if self._kept is not None else self._make():
            self._progress(what, done, len(self.slots) * self.repeats)
            yield chunk
            done += len(chunk.reach)

    @property
    def _vocab_size(self) -> int:
        return self._head(self.slots.truth[:1]).shape[-1]

    def _make(self) -> Iterator[Chunk]:
        slots, device = self.slots, self.slots.truth.device
        generator = torch.Generator(device).manual_seed(self._seed)
        size = max(LEAST_ROWS, (CPU_VALUES if device.type == "cpu" else GPU_VALUES) // self._vocab_size)
        places = torch.arange(len(slots), device=device).repeat(self.repeats)
        for start in range(0, len(places), size):
            here = places[start : start + size]
            truth = self._head(slots.truth[here])
            noise = torch.empty_like(truth).exponential_(generator=generator).clamp_(min=LEAST_WORD).log_().neg_()
            drawn = torch.stack([(truth / temperature + noise).argmax(-1) for temperature in self.temperatures])
            yield Chunk(self._head(slots.drafted[:, here]), slots.reach[here], noise, drawn)
