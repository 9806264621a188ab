"""Coupled drafting: drafters use the very noise that the target's next draws will use.

The target's draw is keyed by (seed, position, token), so its noise is known before anything is drafted. At each node a
calibrated drafter ranks and scores the tokens by `alpha * log q / T + beta * noise` in place of `log q`: it proposes
what the target is about to draw. The emitted text does not depend on it.

The two coefficients, per depth and temperature, are the drafter's `Calibration`. They are fitted by maximum likelihood
of what the target draws (`training/calibrate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sampling import SamplingRows

LEAST_TEMPERATURE, MOST = 1e-3, 1e6  # of any number in a calibration


@dataclass(frozen=True)
class Calibration:
    """Hold the two coefficients of coupled drafting, by temperature and depth.

    They are linear between temperatures, linear to 0 below the lowest (the scores then keep the same multiple of
    log q, while the noise counts as little as it does for the target), and constant above the highest.
    """

    temperatures: tuple[float, ...]  # ascending, above 0
    alpha: tuple[tuple[float, ...], ...]  # [temperature][depth - 1], weight of log q / T
    beta: tuple[tuple[float, ...], ...]  # [temperature][depth - 1], weight of the noise

    def __post_init__(self) -> None:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures must ascend, got {list(self.temperatures)}")
        if not self.temperatures[0] >= LEAST_TEMPERATURE or not self.temperatures[-1] <= MOST:
            allowed = f"from {LEAST_TEMPERATURE:g} to {MOST:g}"
            raise ValueError(f"temperatures must be {allowed}, got {list(self.temperatures)}")
        depth = len(self.alpha[0]) if self.alpha else 0
        for name, least in (("alpha", torch.finfo(torch.float32).tiny), ("beta", 0.0)):
            rows = getattr(self, name)
            if depth == 0 or [len(row) for row in rows] != [depth] * len(self.temperatures):
                raise ValueError(f"{name} must be [{len(self.temperatures)} temperatures][as many depths each]")
            if not all(least <= value <= MOST for row in rows for value in row):
                above = "above 0" if least else "at least 0"
                raise ValueError(f"{name} must be {above} and at most {MOST:g}, got {_lists(rows)}")

    @property
    def depth(self) -> int:
        """Number of fitted depths; deeper nodes use the last one's coefficients."""
        return len(self.alpha[0])

    def coefficients(self, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and beta, each float32 [depth, B], for temperatures float32 [B], on their device."""
        knots = torch.tensor((0.0, *self.temperatures), dtype=torch.float32, device=temperature.device)
        upper = torch.bucketize(temperature, knots).clamp(1, len(knots) - 1)
        share = ((temperature - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(max=1)

        def between(rows: tuple[tuple[float, ...], ...]) -> Tensor:
            table = torch.tensor(((0.0,) * self.depth, *rows), dtype=torch.float32, device=temperature.device)
            return torch.lerp(table[upper - 1], table[upper], share[:, None]).T.contiguous()

        least = torch.finfo(torch.float32).tiny  # at temperature 0, where alpha is not used but must be valid
        return between(self.alpha).clamp(min=least), between(self.beta)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"temperatures": list(self.temperatures), "alpha": _lists(self.alpha), "beta": _lists(self.beta)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Return the calibration of `to_dict`'s values; raise ValueError, in a sentence, for anything else."""
        try:
            tables = (tuple(tuple(map(float, row)) for row in values[name]) for name in ("alpha", "beta"))
            return cls(tuple(map(float, values["temperatures"])), *tables)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a calibration needs lists of temperatures, alpha and beta ({error!r})") from error


@dataclass(frozen=True)
class CoupledRows:
    """Hold per-row noise settings for coupled drafting; R: the rows of one drafter, or of several, one after the other.

    Depths past the last calibrated one use its coefficients.
    """

    seeds: Tensor  # int64 [R]
    temperature: Tensor  # float32 [R]; 0 where the noise is not used
    alpha: Tensor  # float32 [depths, R]
    beta: Tensor  # float32 [depths, R]

    @classmethod
    def of(cls, calibration: Calibration, sampling: SamplingRows, device: torch.device) -> CoupledRows:
        """Return the settings of one drafter on its device."""
        temperature = sampling.temperature.to(device)
        return cls(sampling.seeds.to(device), temperature, *calibration.coefficients(temperature))

    @classmethod
    def join(cls, parts: Sequence[CoupledRows | None]) -> CoupledRows | None:
        """Return the settings of several drafters as one; None stands for a drafter that drafts without the noise."""
        coupled = [part for part in parts if part is not None]
        if len(parts) == 1 or not coupled:
            return parts[0]
        depth = max(len(part.alpha) for part in coupled)
        rows = [coupled[0].without_noise() if part is None else part for part in parts]

        def deep(table: Tensor) -> Tensor:
            return torch.cat([table, table[-1:].expand(depth - len(table), -1)])

        return cls(
            torch.cat([part.seeds for part in rows]),
            torch.cat([part.temperature for part in rows]),
            torch.cat([deep(part.alpha) for part in rows], dim=1),
            torch.cat([deep(part.beta) for part in rows], dim=1),
        )

    def without_noise(self) -> CoupledRows:
        """Return the settings of a drafter without calibration in the same rows."""
        return CoupledRows(self.seeds, torch.zeros_like(self.temperature), self.alpha, self.beta)

    def by_depth(self, depth: int, lengths: Tensor) -> list[ops.Coupling]:
        """Return the settings of children at depths 1 to `depth`; `lengths`, int64 [B], are the observed slots."""
        roots = lengths.repeat(len(self.seeds) // len(lengths))  # the root stands at `lengths`
        indices = [min(level, len(self.alpha)) - 1 for level in range(1, depth + 1)]
        return [
            ops.Coupling(self.seeds, roots + level, self.temperature, self.alpha[index], self.beta[index])
            for level, index in enumerate(indices, start=1)
        ]

    def select(self, rows: Tensor) -> CoupledRows:
        """Return the settings of some rows, int64 [r]."""
        return CoupledRows(self.seeds[rows], self.temperature[rows], self.alpha[:, rows], self.beta[:, rows])


def _lists(rows: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    return [list(row) for row in rows]
