"""The picture of a calibration: predicted against observed acceptance, and the coefficients by depth."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..checkpoints.files import write_whole
from .calibration_report import COUPLED, TOPK, CalibrationReport, Measures

STYLES = {COUPLED: "#0b7fab", TOPK: "0.6"}
LABELS = {COUPLED: "with the target's noise", TOPK: "the drafter's own scores"}
FEWEST = 20  # children of a bin that is drawn: of fewer the frequency says nothing


def save(report: CalibrationReport, path: Path) -> Path:
    """The PNG written. ValueError where matplotlib is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [draw(report)])
    return path


def draw(report: CalibrationReport) -> bytes:
    """A PNG: a panel a temperature with all depths together, and below it alpha and beta by depth."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"the picture needs {error.name}: pip install 'taps_ext[cli]'") from error

    temperatures = report.calibration.temperatures
    figure: Any = Figure(figsize=(max(7.0, 3.2 * len(temperatures)), 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    reliability = upper.subplots(1, len(temperatures), sharex=True, sharey=True, squeeze=False)[0]
    for panel, temperature in zip(reliability, temperatures, strict=True):
        _draw_reliability(panel, report, temperature)
    reliability[0].set(ylabel="drawn by the target")
    reliability[0].legend(frameon=False, loc="upper left", fontsize="small")
    for panel, name in zip(lower.subplots(1, 2), ("alpha", "beta"), strict=True):
        _draw_coefficients(panel, report, name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _draw_reliability(panel: Any, report: CalibrationReport, temperature: float) -> None:
    """Bins of the best children by the probability they are given; a perfect drafter's lie on the diagonal."""
    panel.plot([0, 1], [0, 1], color="0.85", linewidth=1)
    for rule, colour in STYLES.items():
        sums = Measures.total([cell.rules[rule] for cell in report.at(temperature)])
        bins = zip(sums.num_children, sums.predicted, sums.observed, strict=True)
        points = [(predicted / n, observed / n) for n, predicted, observed in bins if n >= FEWEST]
        panel.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=LABELS[rule])
    panel.set(title=f"temperature {temperature:g}", xlabel="probability given", xlim=(0, 1), ylim=(0, 1))
    _finish(panel)


def _draw_coefficients(panel: Any, report: CalibrationReport, name: str) -> None:
    temperatures, rows = report.calibration.temperatures, getattr(report.calibration, name)
    for number, (temperature, row) in enumerate(zip(temperatures, rows, strict=True)):
        shade = 0.3 + 0.7 * (number + 1) / len(temperatures)
        panel.plot(range(1, len(row) + 1), row, color=STYLES[COUPLED], alpha=shade, marker="o", markersize=4)
        place = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
        panel.annotate(f"{temperature:g}", (len(row), row[-1]), (8, 0), **place)
    panel.set(title=f"{name}, by temperature", xlabel="depth", xticks=range(1, report.calibration.depth + 1))
    panel.set_ylim(bottom=0)
    _finish(panel)


def _finish(panel: Any) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
