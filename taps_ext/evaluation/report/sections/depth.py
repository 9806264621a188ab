"""Acceptance by depth: of the steps that accepted a node at a depth, how many accepted one deeper."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ..figures import View
from ..pictures import Line, Panel, Picture
from ..statistics import Array
from ..tables import Column, Entry, Table
from .base import Section, style

TITLE = "Acceptance by depth"
TEXT = (
    "Conditional: P(a draft token at depth d is accepted, given that the one at depth d - 1 was). A level whose "
    "one before fewer than 20 steps reached is left out."
)
FEWEST = 20  # steps at the depth before: of fewer a share says nothing


def section(views: Sequence[View]) -> Section:
    """A table and a picture a view."""
    tables = [_table(view) for view in views]
    return Section("depth", TITLE, TEXT, tuple(tables), tuple(_picture(view) for view in views))


def conditional(steps_by_depth: Array, num_levels: int) -> list[float | None]:
    """The shares from depth 1 to the last level, of the steps that accepted 0, 1, ... nodes."""
    steps = np.pad(steps_by_depth, (0, max(num_levels + 1 - len(steps_by_depth), 0)))
    reached = np.cumsum(steps[::-1])[::-1]
    return [float(deeper / shallower) if shallower >= FEWEST else None for shallower, deeper in pairwise(reached)]


def _shares(view: View, variant: str, task: str) -> list[float | None]:
    cell = view.cell(variant, task)
    num_levels = view.runs[0].configuration["settings"]["depth"]
    return [] if cell is None else conditional(cell.depths.sum(axis=0), num_levels)


def _table(view: View) -> Table:
    found = [(task, variant, _shares(view, variant, task)) for task in view.tasks for variant in view.variants()]
    depth = max((len(shares) for *_, shares in found), default=0)
    rows: list[tuple[Entry, ...]] = [
        (variant, view.title(task), *shares, *[None] * (depth - len(shares)))
        for task, variant, shares in found
        if shares
    ]
    columns = (Column("variant"), Column("task"), *(Column(f"depth {d}", ".1%") for d in range(1, depth + 1)))
    return Table(f"depth-{view.slug}", f"{TITLE}: {view.name}", "", columns, tuple(rows))


def _picture(view: View) -> Picture:
    """The usual sizes only: other budgets have a picture of their own."""
    shown = [variant for variant in view.usual() if style(view, variant).dashes == "-"]
    panels = []
    for task in view.tasks:
        lines = []
        for variant in shown:
            shares = [share for share in _shares(view, variant, task) if share is not None]
            if shares:
                lines.append(Line(view.told(variant), range(1, len(shares) + 1), shares, style(view, variant)))
        panels.append(Panel(view.title(task), tuple(lines)))
    caption = (
        "Share of the steps that go one level deeper; trees of the usual size and the union. What the first pictures "
        "draw hollow is in the table alone."
    )
    depths = {
        str(depth): depth for panel in panels for line in panel.marks if isinstance(line, Line) for depth in line.x
    }
    title, y = f"{TITLE}: {view.name}", "accepted, given the one before"
    return Picture(f"depth-{view.slug}", title, caption, (tuple(panels),), "depth", y, dict(sorted(depths.items())))
