"""The curve of a run: log.jsonl, which reads as if the run had never been interrupted, and accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_text, written
from .progress import StepRecord, ValidationRecord

Record = StepRecord | ValidationRecord
Track = Callable[[Mapping[str, float], int], None]  # figures by name, step


class Journal:
    """Appends one JSON object a record to a file; `kind` is "step" or "validation"."""

    def __init__(self, path: Path, after_step: int, track: Track | None = None) -> None:
        """Opens the file without what a killed run wrote after `after_step`, its last checkpoint's step."""
        kept = [line for line in _lines(path) if _step(line) <= after_step]
        with written(path.name, path.parent):
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._path, self._file = path, path.open("a", encoding="utf-8")
        self._track = track

    def write(self, record: Record) -> None:
        """Add a record."""
        kind = "step" if isinstance(record, StepRecord) else "validation"
        with written(self._path.name, self._path.parent):
            self._file.write(json.dumps({"kind": kind, **asdict(record)}) + "\n")
            self._file.flush()
        if self._track is not None:
            self._track(figures(record), record.step)

    def sync(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a line that did not fit on the disk is given up."""
        with suppress(OSError):
            self._file.close()


def figures(record: Record) -> dict[str, float]:
    """The numbers of a record under the names that trackers show."""
    room, place = ("train", "pass") if isinstance(record, StepRecord) else ("validation", "depth")
    values: dict[str, Any] = asdict(record)
    accuracy: tuple[float, ...] = values.pop("accuracy")
    found = {f"{room}/{name}": float(value) for name, value in values.items() if name not in ("step", "is_best")}
    return found | {f"{room}/accuracy_{place}_{n}": value for n, value in enumerate(accuracy, 1)}


def check_tracker(name: str) -> None:
    """ValueError, in a sentence, unless a run can log to this tracker here."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in ("none", *known):
        raise ValueError(f"training.tracker must be none, {', '.join(known[:-1])} or {known[-1]}, got {name!r}")
    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ValueError(f"training.tracker is {name}, which is not installed here: pip install {name}, or take none")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; infinity for the torn one that a kill leaves at the end."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
