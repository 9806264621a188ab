"""Coupled drafting: the noise that the target's next draws will look at, as the drafters of a group look at it.

The target's draw is keyed by (seed, position, token) and known before anything is drafted. At each node a calibrated
drafter ranks and scores the tokens by `alpha * log q / T + beta * noise` in place of `log q`: it proposes what the
target is about to draw. The emitted text does not depend on it.

Dims: D drafters, B rows, R = D * B trees (drafter by drafter).
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
    """The two coefficients by temperature and depth.

    They are linear between temperatures, linear to 0 below the lowest (the scores then keep the same multiple of
    log q, while the noise counts as little as it does for the target), and constant above the highest.
    """

    temperatures: tuple[float, ...]  # ascending, above 0
    alpha: tuple[tuple[float, ...], ...]  # [temperature][depth - 1]
    beta: tuple[tuple[float, ...], ...]  # the same

    def __post_init__(self) -> None:
        if not self.temperatures or list(self.temperatures) != sorted(set(self.temperatures)):
            raise ValueError(f"temperatures must ascend, got {list(self.temperatures)}")
        depth = len(self.alpha[0]) if self.alpha else 0
        for name, least in (("alpha", torch.finfo(torch.float32).tiny), ("beta", 0.0)):
            rows = getattr(self, name)
            if depth == 0 or [len(row) for row in rows] != [depth] * len(self.temperatures):
                raise ValueError(f"{name} must be [{len(self.temperatures)} temperatures][as many depths each]")
            if not all(least <= value <= MOST for row in rows for value in row):
                above = "above 0" if least else "at least 0"
                raise ValueError(f"{name} must be {above} and at most {MOST:g}, got {_lists(rows)}")
        if not self.temperatures[0] >= LEAST_TEMPERATURE or not self.temperatures[-1] <= MOST:
            allowed = f"from {LEAST_TEMPERATURE:g} to {MOST:g}"
            raise ValueError(f"temperatures must be {allowed}, got {list(self.temperatures)}")

    @property
    def depth(self) -> int:
        """Depths that were fitted; deeper nodes use the last one's."""
        return len(self.alpha[0])

    def coefficients(self, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and beta, each float32 [depth, B], for temperatures float32 [B] on their device."""
        knots = torch.tensor((0.0, *self.temperatures), dtype=torch.float32, device=temperature.device)
        upper = torch.bucketize(temperature, knots).clamp(1, len(knots) - 1)
        share = ((temperature - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(max=1)

        def between(rows: tuple[tuple[float, ...], ...]) -> Tensor:
            table = torch.tensor(((0.0,) * self.depth, *rows), dtype=torch.float32, device=temperature.device)
            return torch.lerp(table[upper - 1], table[upper], share[:, None]).T.contiguous()

        least = torch.finfo(torch.float32).tiny  # at temperature 0, where alpha counts for nothing but must be valid
        return between(self.alpha).clamp(min=least), between(self.beta)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"temperatures": list(self.temperatures), "alpha": _lists(self.alpha), "beta": _lists(self.beta)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Calibration:
        """The calibration of `to_dict`'s values; ValueError, in a sentence, for anything else."""
        try:
            tables = (tuple(tuple(map(float, row)) for row in told[name]) for name in ("alpha", "beta"))
            return cls(tuple(map(float, told["temperatures"])), *tables)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a calibration needs lists of temperatures, alpha and beta ({error!r})") from error


@dataclass(frozen=True)
class CoupledRows:
    """What of a call's sampling its drafters look at. Depths past the last one that was calibrated use that one's."""

    seeds: Tensor  # int64 [D, B]
    temperature: Tensor  # float32 [D, B]; 0 where a drafter is not calibrated: it drafts as without noise
    alpha: Tensor  # float32 [depths, D, B]
    beta: Tensor  # float32 [depths, D, B]

    def at(self, depth: int, lengths: Tensor) -> ops.Coupling:
        """For the children of depth `depth` (from 1) of all trees; `lengths` int64 [B] are the slots observed."""
        level = min(depth, len(self.alpha)) - 1
        positions = (lengths + depth).expand_as(self.seeds)  # the root stands at `lengths`
        values = (self.seeds, positions, self.temperature, self.alpha[level], self.beta[level])
        return ops.Coupling(*(value.flatten() for value in values))

    def part(self, drafter: int, rows: Tensor | slice) -> CoupledRows:
        """Those of one drafter, and of the rows, a slice or int64 [b]."""
        one = slice(drafter, drafter + 1)
        return CoupledRows(
            self.seeds[one, rows], self.temperature[one, rows], self.alpha[:, one, rows], self.beta[:, one, rows]
        )


def couple(
    calibrations: Sequence[Calibration | None], sampling: SamplingRows, device: torch.device
) -> CoupledRows | None:
    """The rows as these drafters see them on their device; None: no drafter is calibrated."""
    depth = max((one.depth for one in calibrations if one is not None), default=0)
    if depth == 0:
        return None
    temperature = sampling.temperature.to(device)
    tables = [_tables(one, temperature, depth) for one in calibrations]
    is_calibrated = torch.tensor([one is not None for one in calibrations], device=device)
    return CoupledRows(
        seeds=sampling.seeds.to(device).expand(len(calibrations), -1),
        temperature=torch.where(is_calibrated[:, None], temperature, 0),
        alpha=torch.stack([alpha for alpha, _ in tables], dim=1),
        beta=torch.stack([beta for _, beta in tables], dim=1),
    )


def _tables(calibration: Calibration | None, temperature: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """alpha and beta [depth, B]; of a drafter without calibration anything that is valid."""
    if calibration is None:
        ones = torch.ones(depth, len(temperature), device=temperature.device)
        return ones, ones
    levels = torch.arange(depth, device=temperature.device).clamp(max=calibration.depth - 1)
    alpha, beta = calibration.coefficients(temperature)
    return alpha[levels], beta[levels]


def _lists(rows: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    return [list(row) for row in rows]
