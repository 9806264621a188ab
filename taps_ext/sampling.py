"""Sampling parameters, per call or per row, and their tensors."""

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
LIBRARIES = ("taps_ext", "transformers", "torch")  # through which a user's call may come


@dataclass(frozen=True)
class SamplingParams:
    """Say how the target's distribution becomes a token; each field is one value, or one per row.

    `temperature=0` is greedy. `top_k=0`, `top_p=1` and `min_p=0` switch the filters off; they apply in transformers'
    order. An int seed s means s + b for row b, so that row b equals a single run with seed s + b.
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

        seeds = tensor("seed", torch.int64)
        if not isinstance(self.seed, Sequence):
            seeds = seeds + torch.arange(batch_size, device=device)  # int64 wraps around
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


def warn(message: str) -> None:
    """Warn at the line that called this library, whether or not transformers or torch stands between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _check(name: str, value: object, kind: type, lowest: float, highest: float, allowed: str) -> None:
    for one in value if isinstance(value, Sequence) else [value]:
        if not (isinstance(one, kind) and math.isfinite(one) and lowest <= one <= highest):  # type: ignore[arg-type,operator]
            raise ValueError(f"{name} must be {allowed}, got {one!r}")
