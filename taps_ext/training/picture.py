"""The picture of a run, drawn from its log.jsonl alone: loss and estimated acceptance length over steps."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_whole

TRAINING, HELD_OUT = "0.6", "#0b7fab"


def save(log: Path) -> Path:
    """The file written: training.png beside the log. ValueError where matplotlib is missing or nothing is logged."""
    path = log.with_name("training.png")
    write_whole(path, [draw(log)])
    return path


def draw(log: Path) -> bytes:
    """A PNG: on the left the loss of training and of the held-out conversations, on the right the estimate."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ValueError(f"the picture needs {error.name}: pip install 'taps_ext[cli]'") from error

    steps, validations = read_log(log, "step"), read_log(log, "validation")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*_curve(steps, "loss"), color=TRAINING, label="training")
    left.set(title="loss", xlabel="step")
    right.set(title="estimated acceptance length", xlabel="step")
    if validations:
        left.plot(*_curve(validations, "loss"), color=HELD_OUT, marker="o", markersize=4, label="held out")
        right.plot(*_curve(validations, "acceptance_length"), color=HELD_OUT, marker="o", markersize=4)
        best = max(validations, key=lambda record: float(record["acceptance_length"]))
        right.annotate(
            f"{best['acceptance_length']:.2f}",
            (best["step"], best["acceptance_length"]),
            (4, -12),
            textcoords="offset points",
        )
        left.legend(frameon=False)
    else:
        right.text(0.5, 0.5, "nothing was held out", ha="center", transform=right.transAxes)
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _curve(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in records], [record[name] for record in records]


def read_log(log: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind, "step" or "validation"; a torn last line, which a kill leaves, is none."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == kind:
            records.append(record)
    return records
