"""Merged trees: who proposed what was accepted, and how many nodes equal prefixes saved."""

from __future__ import annotations

from collections.abc import Sequence

from ...variants import MERGED
from ..cells import Cell
from ..figures import View
from ..statistics import Array
from ..tables import Column, Entry, Table
from .base import Section

TITLE = "Merged trees"
TEXT = (
    "Accepted draft tokens by who proposed them: a drafter, alone or with others; one alone; several. Saved: nodes "
    "that several drafters proposed are verified once; the share is of all proposed nodes that were kept."
)


def section(views: Sequence[View]) -> Section:
    """A table a view with merged trees."""
    return Section("merging", TITLE, TEXT, tuple(_table(view) for view in views if view.variants(MERGED)))


def saved_nodes(cell: Cell) -> tuple[Array, Array]:
    """Nodes that merging saved, and the nodes proposed."""
    return cell.proposed - (cell.nodes - cell.num_steps), cell.proposed


def saved_a_step(cell: Cell) -> tuple[Array, Array]:
    """Nodes that merging saved, and steps."""
    return saved_nodes(cell)[0], cell.num_steps


def _several(cell: Cell) -> tuple[Array, Array]:
    return cell.num_accepted - cell.alone.sum(axis=1), cell.num_accepted


def _table(view: View) -> Table:
    names = [
        name for name in view.drafters if any(name in view.specs[variant].drafters for variant in view.variants(MERGED))
    ]
    rows: list[tuple[Entry, ...]] = []
    for variant in view.variants(MERGED):
        for task in view.tasks:
            cell = view.cell(variant, task)
            if cell is None:
                continue
            total = max(float(cell.num_accepted.sum()), 1.0)
            any_of, alone = (
                dict(zip(cell.drafters, (counts.sum(axis=0) / total).tolist(), strict=True))
                for counts in (cell.proposers, cell.alone)
            )
            figures = [view.value(variant, task, figure) for figure in (_several, saved_a_step, saved_nodes)]
            rows.append(
                (
                    *(variant, view.title(task)),
                    *(any_of.get(name) for name in names),
                    *(alone.get(name) for name in names),
                    *(None if figure is None else figure.estimate for figure in figures),
                )
            )
    columns = (
        *(Column("variant"), Column("task")),
        *(Column(f"{name}{alone}", ".1%") for alone in ("", " alone") for name in names),
        *(Column("several", ".1%"), Column("nodes saved a step", ".1f"), Column("share saved", ".1%")),
    )
    return Table(f"merging-{view.slug}", f"Proposers and overlap: {view.name}", "", columns, tuple(rows))
