"""Routing: which drafter is chosen on which task, by step and by question, and how often rightly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cells import Cell
from ..figures import ROUTING, View
from ..pictures import Panel, Picture, Shares
from ..statistics import Array, Sampled, ratio
from ..tables import Column, Entry, Table
from .base import Section

TITLE = "Routing decisions"
TEXT = (
    "Share of the decode steps in which each drafter was chosen, and of the questions where it was chosen most often "
    "(ties are shared). Right: that majority is the drafter that alone, in a run of its own, accepted most on "
    "that question. What it has to beat is one fixed drafter, the one that is best on most questions of the task, "
    "which is known with hindsight only."
)


def section(views: Sequence[View]) -> Section:
    """A table and a picture a view with a routing variant."""
    shown = [view for view in views if _routed(view)]
    return Section("routing", TITLE, TEXT, tuple(map(_table, shown)), tuple(map(_picture, shown)))


def _routed(view: View) -> list[tuple[str, str, Cell]]:
    """(variant, task, its counts)"""
    return [
        (variant, task, cell)
        for task in view.tasks
        for variant in view.variants(*ROUTING)
        if (cell := view.cell(variant, task)) is not None and cell.chosen.any()
    ]


def winners(scores: Array) -> Array:
    """By question, 1 for the drafter with the largest score, shared out among equals: [Q, D]."""
    is_best = scores == scores.max(axis=1, keepdims=True)
    return np.asarray(is_best / is_best.sum(axis=1, keepdims=True))


def alone(view: View, drafters: Sequence[str], nodes: int, is_coupled: bool) -> list[str] | None:
    """The variants that are each of these drafters by itself, all coupled or all top-k, as asked where there are both;
    None if one was not run."""
    for side in (is_coupled, not is_coupled):
        found = [view.single(drafter, nodes, side) for drafter in drafters]
        known = [name for name in found if name is not None]
        if len(known) == len(drafters) and len({view.is_coupled(name) for name in known}) == 1:
            return known
    return None


def lengths(cells: Sequence[Cell]) -> Array:
    """Acceptance lengths by question and cell: [Q, D]; NaN without a step."""
    with np.errstate(invalid="ignore"):
        return np.stack([cell.num_accepted / cell.num_steps for cell in cells], axis=1) + 1


def agreement(scores: Array, truth: Array, task: str) -> tuple[Sampled, Sampled] | None:
    """How often the drafter of the highest score is that of the highest truth, and how often a fixed one is: the one
    that is it most often. Both are [Q, D]; questions without a value are left out."""
    known = np.isfinite(scores).all(axis=1) & np.isfinite(truth).all(axis=1)
    if not known.any():
        return None
    chosen, best = winners(scores[known]), winners(truth[known])
    ones = np.ones(len(best))
    return ratio((chosen * best).sum(axis=1), ones, task), ratio(best[:, best.sum(axis=0).argmax()], ones, task)


def rightness(view: View, variant: str, task: str) -> tuple[Sampled, Sampled] | None:
    """`agreement` of a routed variant's majorities with the drafters' runs of their own."""
    spec = view.specs[variant]
    singles = alone(view, spec.drafters, view.nodes(variant) or view.base_nodes, view.is_coupled(variant))
    cells = None if singles is None else view.aligned([*singles, variant], task)
    if cells is None:
        return None
    routed = cells[-1]
    chosen = routed.chosen[:, [routed.drafters.index(name) for name in spec.drafters]]
    majorities = np.where(chosen.sum(axis=1, keepdims=True) > 0, chosen, np.nan)
    return agreement(majorities, lengths(cells[:-1]), task)


def _shares(cell: Cell) -> tuple[dict[str, float], dict[str, float]]:
    """By drafter, of the steps and of the questions."""
    steps = cell.chosen.sum(axis=0) / cell.chosen.sum()
    questions = winners(cell.chosen[cell.chosen.sum(axis=1) > 0]).mean(axis=0)
    first, second = (dict(zip(cell.drafters, part.tolist(), strict=True)) for part in (steps, questions))
    return first, second


def _table(view: View) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for variant, task, cell in _routed(view):
        steps, questions = _shares(cell)
        right = rightness(view, variant, task)
        rows.append(
            (
                *(variant, view.title(task)),
                *(steps.get(name) for name in view.drafters),
                *(questions.get(name) for name in view.drafters),
                *((None, None) if right is None else (right[0].estimate, right[1].estimate)),
            )
        )
    used = [index for index in range(2, 2 + 2 * len(view.drafters)) if any(row[index] is not None for row in rows)]
    heads = [f"{what}: {name}" for what in ("steps", "questions") for name in view.drafters]
    columns = (
        *(Column("variant"), Column("task")),
        *(Column(head, ".1%") for head in heads),
        *(Column("right", ".1%"), Column("one fixed drafter", ".1%")),
    )
    kept = [0, 1, *used, len(columns) - 2, len(columns) - 1]
    table_rows = tuple(tuple(row[index] for index in kept) for row in rows)
    return Table(
        f"routing-{view.slug}", f"{TITLE}: {view.name}", "", tuple(columns[index] for index in kept), table_rows
    )


def _picture(view: View) -> Picture:
    found = _routed(view)
    used = [name for name in view.drafters if any(name in cell.drafters for *_, cell in found)]
    panels = []
    for index, title in enumerate(("steps", "questions, by majority")):
        marks = []
        for variant, task, cell in found:
            shares = _shares(cell)[index]
            marks.append(Shares(f"{view.title(task)}, {variant}", {name: shares.get(name, 0.0) for name in used}))
        panels.append(Panel(title, tuple(marks)))
    caption = "Share of each drafter."
    return Picture(f"routing-{view.slug}", f"{TITLE}: {view.name}", caption, (tuple(panels),))
