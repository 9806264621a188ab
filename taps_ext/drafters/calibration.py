"""What a drafter's word is worth: how much of its log-probability, and how much of the noise, predicts the target.

Coupled drafting ranks the children v of a node by `alpha * log q(v) / T + beta * g(v)`, with the noise g that the
target's own draw will use. Two numbers a depth and temperature, fitted by maximum likelihood of what the target draws
(`training/calibrating.py`), kept beside the weights in a small file that other programs ignore.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..disk import write_text

CALIBRATION_FILE = "calibration.json"
FORMAT = 1
LEAST_TEMPERATURE, MOST = 1e-3, 1e6  # of any number in the file


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
class CalibrationRecord:
    """A calibration and how it was made: what its file holds."""

    calibration: Calibration
    facts: Mapping[str, Any]  # JSON values: target, data, seed, what was gained; nothing that differs from run to run

    def text(self, digest: str | None) -> str:
        """The file's content; `digest` is the SHA-256 of the weights that it belongs to, None where they have none."""
        told = {"format": FORMAT, **self.calibration.to_dict(), "drafter": digest, **self.facts}
        return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in told.items()) + "\n}\n"


def read_calibration(folder: Path, digest: str | None) -> Calibration | None:
    """The calibration in a drafter's folder, or None; ValueError, in a sentence, for a damaged one.

    `digest` is the SHA-256 of the drafter's weights, where it is known: a calibration of other weights is refused.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        calibration = Calibration.from_dict(told)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); calibrate the drafter anew, or delete the file") from error
    drafter = told.get("drafter")
    if digest is not None and drafter is not None and drafter != digest:
        raise ValueError(f"{path} belongs to other weights; calibrate the drafter anew, or delete the file")
    return calibration


def write_calibration(folder: Path, record: CalibrationRecord, digest: str | None) -> Path:
    """The file written into a drafter's folder, whole or not at all; an earlier one is replaced."""
    path = folder / CALIBRATION_FILE
    write_text(path, record.text(digest))
    return path


def _lists(rows: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    return [list(row) for row in rows]
