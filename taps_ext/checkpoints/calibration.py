"""A drafter's calibration on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..drafters.coupling import Calibration
from .disk import write_text

CALIBRATION_FILE = "calibration.json"
FORMAT = 1


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
