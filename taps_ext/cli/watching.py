"""What a person sees of a training run: a bar or lines, with the numbers of log.jsonl, and the picture of the log."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_whole
from ..training.trainer import Observer, UpdateRecord, ValidationRecord
from . import terminal
from .terminal import Report, duration, note

TRAINING, HELD_OUT = "0.6", "#0b7fab"  # colours


@contextmanager
def screen() -> Iterator[Screen]:
    """Yield an observer that shows a run on stderr: a bar on a terminal, lines elsewhere."""
    with terminal.progress() as report:
        yield Screen(report, has_bar=not isinstance(report, terminal.TimedLines))


class Screen(Observer):
    """Shows a run. Without a bar: a line for each record of the log, and one every half minute between them."""

    def __init__(self, report: Report, has_bar: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._report, self._has_bar, self._clock = report, has_bar, clock
        self._last_line, self._num_steps = clock(), 0

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Show how far some work besides updates is."""
        self._report(what, done, total)

    def start(self, first_step: int, num_steps: int) -> None:
        """Say where a resumed run goes on."""
        self._num_steps = num_steps
        if 0 < first_step < num_steps:
            note(f"resuming after step {first_step} of {num_steps}")

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        """Show the means since the last record of the log, the speed and the time left."""
        left = f"{duration(record.seconds_left)} left"
        if self._has_bar:  # which has 80 columns, and counts the steps
            accuracy = " ".join(f"{share:.0%}" for share in record.accuracy)
            self._report(f"loss {record.loss:.4f}, {accuracy}, {left}", record.step, self._num_steps)
        elif is_logged or self._clock() - self._last_line >= terminal.LINE_EVERY_S:
            numbers = f"loss {record.loss:7.4f}  accuracy {percents(record.accuracy)}"
            self._line(record.step, f"{numbers}  {record.tokens_per_second:,.0f} tokens/s  {left}")

    def validated(self, record: ValidationRecord) -> None:
        """Show the figures of the held-out conversations in one line."""
        best = ", the best so far" if record.is_best else ""
        numbers = f"held out: loss {record.loss:7.4f}  accuracy by depth {percents(record.accuracy)}"
        self._line(record.step, f"{numbers}  estimated acceptance length {record.acceptance_length:.2f}{best}")

    def note(self, sentence: str) -> None:
        """Print a sentence, above the bar if there is one."""
        note(sentence)

    def _line(self, step: int, text: str) -> None:
        note(f"step {step:{len(str(self._num_steps))}}/{self._num_steps}  {text}")
        self._last_line = self._clock()


def percents(shares: Sequence[float]) -> str:
    """Return the shares as percentages of one width; a dash for a share of nothing."""
    return " ".join("   -" if math.isnan(share) else f"{share:4.0%}" for share in shares)


# ---- the picture of a run, drawn from its log alone


def save_picture(log: Path) -> Path:
    """Write training.png beside the log, and return its path; raise ValueError where matplotlib is missing."""
    path = log.with_name("training.png")
    write_whole(path, [draw_picture(log)])
    return path


def draw_picture(log: Path) -> bytes:
    """Return a PNG: on the left the loss of training and of the held-out conversations, on the right the estimate."""
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
    """Return the records of a kind, "step" or "validation"; a torn last line, which a kill leaves, is skipped."""
    records = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == kind:
            records.append(record)
    return records
