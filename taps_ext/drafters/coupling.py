"""Coupled drafting: the noise that the target's next draws will look at, as the drafters of a group look at it.

The target's draw is keyed by (seed, position, token) and known before anything is drafted. At each node a calibrated
drafter ranks and scores the tokens by `alpha * log q / T + beta * noise` in place of `log q`: it proposes what the
target is about to draw. The emitted text does not depend on it.

Dims: D drafters, B rows, R = D * B trees (drafter by drafter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..sampling import SamplingRows
from .calibration import Calibration


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
