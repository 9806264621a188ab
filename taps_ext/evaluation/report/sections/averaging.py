"""The interpolation sweep: drafters of averaged weights between two specialists."""

from __future__ import annotations

from collections.abc import Sequence

from ...variants import AVERAGE
from ..figures import View, mean_over, micro, safe
from ..pictures import Line, Panel, Picture, Style
from ..statistics import Sampled
from ..tables import Column, Entry, Table
from .base import MEAN, SINGLE_COLOURS, Section

TITLE = "Averaging two drafters"
TEXT = (
    "Acceptance length of one drafter whose weights are w of the first drafter's and 1 - w of the second's; the ends "
    "are the two themselves. An average has no calibration and drafts top-k, and so do the ends above temperature 0: "
    "without such runs they are missing. On a task all points are of the drafter seeds that each of them has."
)

Point = tuple[float, str]  # the first drafter's weight, and the variant


def section(views: Sequence[View]) -> Section:
    """A table and a picture a pair of drafters and view."""
    tables, pictures = [], []
    for view in views:
        for pair in dict.fromkeys(view.specs[name].drafters for name in view.variants(AVERAGE)):
            points = _points(view, pair)
            if len(pair) == 2 and len(points) > 2:
                tables.append(_table(view, pair, points))
                pictures.append(_picture(view, pair, points))
    return Section("averaging", TITLE, TEXT, tuple(tables), tuple(pictures))


def _points(view: View, pair: tuple[str, ...]) -> list[Point]:
    """The ends and the averages between, by weight."""
    averages = [name for name in view.variants(AVERAGE) if view.specs[name].drafters == pair]
    inner = [
        (0.5 if view.specs[name].weight is None else float(view.specs[name].weight or 0), name) for name in averages
    ]
    ends = [(float(index == 0), view.single(drafter, is_coupled=False)) for index, drafter in enumerate(pair)]
    usual = [point for point in inner if view.nodes(point[1]) == view.base_nodes]
    alike = [(weight, name) for weight, name in ends if name is not None and not view.is_coupled(name)]
    return sorted([*usual, *alike])


def _name(view: View, pair: tuple[str, ...]) -> str:
    """Of the files."""
    return f"averaging-{'-'.join(map(safe, pair))}-{view.slug}"


def _length(view: View, points: Sequence[Point], variant: str, task: str) -> Sampled | None:
    """Over the drafter seeds that all points have."""
    return view.value(variant, task, micro, view.shared([name for _, name in points], task))


def _table(view: View, pair: tuple[str, ...], points: Sequence[Point]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for weight, variant in points:
        found = [_length(view, points, variant, task) for task in view.tasks]
        figures: list[Sampled | None] = [*found, *([mean_over(found)] if len(found) > 1 else [])]
        rows.append((variant, weight, *(None if figure is None else figure.estimate for figure in figures)))
    heads = [*(view.title(task) for task in view.tasks), *([MEAN] if len(view.tasks) > 1 else [])]
    columns = (Column("variant"), Column(f"weight of {pair[0]}", ".2f"), *(Column(head, ".2f") for head in heads))
    return Table(_name(view, pair), f"{pair[0]} and {pair[1]} averaged: {view.name}", "", columns, tuple(rows))


def _picture(view: View, pair: tuple[str, ...], points: Sequence[Point]) -> Picture:
    lines = []
    for index, task in enumerate(view.tasks):
        found = [(weight, figure.estimate) for weight, name in points if (figure := _length(view, points, name, task))]
        weights, values = [weight for weight, _ in found], [estimate.value for _, estimate in found]
        band = {side: [getattr(estimate, side) for _, estimate in found] for side in ("low", "high")}
        look = Style(SINGLE_COLOURS[index % len(SINGLE_COLOURS)], "osD^"[index % 4])
        if found:
            lines.append(Line(view.title(task), weights, values, look, **band))
    return Picture(
        _name(view, pair),
        f"{pair[0]} and {pair[1]} averaged: {view.name}",
        "Bands are 95% intervals.",
        ((Panel("", tuple(lines)),),),
        f"weight of {pair[0]} (the rest: {pair[1]})",
        "tokens a step",
    )
