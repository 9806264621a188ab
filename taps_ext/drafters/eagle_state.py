"""What a group of EAGLE-2 drafters keeps of one call: its caches, what it last said, and the evidence for each.

Dims: D drafters, B rows, T slots, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DrafterState
from .coupling import CoupledRows

MIN_CAPACITY = 256  # slots; capacities are powers of two, so a growth at least doubles


@dataclass(eq=False)
class EagleState(DrafterState):
    """One call's caches. The rows' lengths are known on the host too, so that drafting reads no device value."""

    lengths: Tensor  # int64 [B], observed slots
    row_lengths: list[int]  # the same on the host
    last_output: Tensor  # [D, B, H], the output of each row's last observed slot
    keys: Tensor  # [D, B, kv_heads, capacity, head_dim]
    values: Tensor  # [D, B, kv_heads, capacity, head_dim]
    coupled: CoupledRows | None = None  # None: drafted without a look at the noise
    decay: float | None = None  # of the evidence; None: none is kept
    evidence: Tensor | None = None  # float32 [D, B]
    last_logits: Tensor | None = None  # [D, B, V], of `last_output`, where evidence is kept

    @property
    def kv_length(self) -> int:
        """The longest row's length."""
        return max(self.row_lengths)

    @property
    def capacity(self) -> int:
        """Slots of a row in the cache, committed and transient."""
        return self.keys.shape[3]

    def part(self, drafter: int, rows: Sequence[int], places: Tensor | slice, num_slots: int) -> EagleState:
        """One drafter's state of some rows, to draft from: it may share memory with this one, past the rows' ends.

        `places` are the rows again, on the device; `num_slots` are as many as the caches need.
        """

        def some(values: Tensor) -> Tensor:
            return values[drafter : drafter + 1, places]

        return EagleState(
            lengths=self.lengths[places],
            row_lengths=[self.row_lengths[row] for row in rows],
            last_output=some(self.last_output),
            keys=some(self.keys[..., :num_slots, :]),
            values=some(self.values[..., :num_slots, :]),
            coupled=None if self.coupled is None else self.coupled.part(drafter, places),
            last_logits=None if self.last_logits is None else some(self.last_logits),
        )

    def reserve(self, num_slots: int) -> None:
        """Grow the caches to at least `num_slots` a row: rare, by doubling, the committed slots kept."""
        if num_slots <= self.capacity:
            return
        capacity = max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length())
        *rows, held, head_dim = self.keys.shape
        with torch.inference_mode(False):
            grown = [self.keys.new_zeros(*rows, capacity, head_dim) for _ in range(2)]
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            new[..., :held, :] = old
        self.keys, self.values = grown

    def write(self, columns: Tensor | slice, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [D, B, kv_heads, T, head_dim] into the caches' columns, a slice or int64 [B, T]."""
        write(self.keys, columns, keys)
        write(self.values, columns, values)


def write(cache: Tensor, columns: Tensor | slice, states: Tensor) -> None:
    """Put states [D, B, heads, T, head_dim] into the columns of cache [D, B, heads, capacity, head_dim]."""
    if isinstance(columns, slice):
        cache[:, :, :, columns] = states
    else:
        rows = torch.arange(cache.shape[1], device=cache.device)[:, None]
        cache[:, rows, :, columns] = states.permute(1, 3, 0, 2, 4)


def own_state(state: DrafterState) -> EagleState:
    """`state`; TypeError unless an EAGLE drafter made it."""
    if not isinstance(state, EagleState):
        raise TypeError(f"an EAGLE drafter needs the state that its reset() made, got {type(state).__name__}")
    return state
