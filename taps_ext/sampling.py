"""Sampling parameters, per call or per row, their tensors, and the seed of each row."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
NOISE = "philox4x32-7, splitmix64 rows"  # what a seed means; results under another one cannot be continued
_WORD = 2**64 - 1
LIBRARIES = ("taps_ext", "transformers", "torch")  # through which a user's call may come


@dataclass(frozen=True)
class SamplingParams:
    """Say how the target's distribution becomes a token; each field is one value, or one per row.

    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch the filters off; they apply in transformers'
    order. An int seed s means `row_seed(s, b)` for row b, so that row b equals a single run with that seed.
    """

    temperature: float | Sequence[float] = 0.0
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, Real, 0, math.inf, "finite and at least 0")
        _check("top_k", self.top_k, Integral, 0, INT64_MAX, "an integer of at least 0 (0: off)")
        _check("top_p", self.top_p, Real, 0, 1, "between 0 and 1 (1: off)")
        _check("min_p", self.min_p, Real, 0, 1, "between 0 and 1 (0: off)")
        _check("seed", self.seed, Integral, -INT64_MAX - 1, INT64_MAX, "a 64-bit integer")

    @property
    def is_sampled(self) -> bool:
        """Whether any row is drawn at a temperature above 0."""
        values = self.temperature if isinstance(self.temperature, Sequence) else [self.temperature]
        return any(value > 0 for value in values)

    def rows(self, batch_size: int, device: torch.device | str = "cpu") -> SamplingRows:
        """Return the parameters as tensors, one value per row."""

        def tensor(name: str, dtype: torch.dtype) -> Tensor:
            value = getattr(self, name)
            values = list(value) if isinstance(value, Sequence) else [value] * batch_size
            if len(values) != batch_size:
                raise ValueError(
                    f"{name} has {len(values)} values for a batch of {batch_size}; give one, or one per row"
                )
            return torch.tensor(values, dtype=dtype, device=device)

        if isinstance(self.seed, Sequence):
            seeds = tensor("seed", torch.int64)
        else:
            seeds = torch.tensor([row_seed(self.seed, b) for b in range(batch_size)], device=device)
        return SamplingRows(
            temperature=tensor("temperature", torch.float32),
            top_k=tensor("top_k", torch.int64),
            top_p=tensor("top_p", torch.float32),
            min_p=tensor("min_p", torch.float32),
            seeds=seeds,
        )


@dataclass(frozen=True)
class SamplingRows:
    """Hold `SamplingParams` resolved for a batch: the tensors that `ops.verify_tree` takes."""

    temperature: Tensor  # float32 [B]
    top_k: Tensor  # int64 [B]
    top_p: Tensor  # float32 [B]
    min_p: Tensor  # float32 [B]
    seeds: Tensor  # int64 [B]


def row_seed(seed: int, row: int) -> int:
    """Return the seed of one row of a batch whose seed is an int; the row alone draws the same text with it.

    Row 0 has the seed itself. Row b > 0 has the b-th output of the generator SplitMix64 (Steele et al., OOPSLA 2014)
    started at the seed. In unsigned 64-bit arithmetic that is

        z = seed + b * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)

    read as a signed int64: `row_seed(7, 0)` is 7, `row_seed(7, 1)` is 7191089600892374487. In batches of up to a
    million rows, the rows b > 0 of two seeds that differ by less than 10^12 have no seed in common. Raises ValueError
    for a seed of more than 64 bits or a negative row.
    """
    _check_value("seed", seed, Integral, -INT64_MAX - 1, INT64_MAX, "a 64-bit integer")
    _check_value("row", row, Integral, 0, INT64_MAX, "an integer of at least 0")
    if row == 0:
        return int(seed)
    mixed = int(seed) + int(row) * 0x9E3779B97F4A7C15 & _WORD
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
    mixed ^= mixed >> 31
    return mixed - (mixed >> 63 << 64)


def warn(message: str) -> None:
    """Warn at the line that called this library, whether or not transformers or torch stands between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _check(name: str, value: object, kind: type, lowest: float, highest: float, allowed: str) -> None:
    for one in value if isinstance(value, Sequence) else [value]:
        _check_value(name, one, kind, lowest, highest, allowed)


def _check_value(name: str, value: object, kind: type, lowest: float, highest: float, allowed: str) -> None:
    if not (isinstance(value, kind) and math.isfinite(value) and lowest <= value <= highest):  # type: ignore[arg-type,operator]
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
