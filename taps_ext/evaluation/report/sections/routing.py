"""Routing: which drafter is chosen on which task, by step and by question, and how often rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..cells import Cell
from ..figures import ROUTING, View
from ..pictures import Panel, Picture, Shares
from ..statistics import Array, Sampled, ratio
from ..tables import Column, Entry, Table
from .base import Section

Scores = Callable[[Sequence[Cell]], Array]

TITLE = "Routing decisions"
TEXT = (
    "Share of the decode steps in which each drafter was chosen, and of the questions where it was chosen most often "
    "(ties are shared). Right: that majority is the drafter that alone, in a run of its own, accepted most on "
    "that question, seed by seed. What it has to beat is one fixed drafter, the one that is best on most questions of "
    "the task, which is known with hindsight only."
)


def section(views: Sequence[View]) -> Section:
    """A table and a picture a view with a routing variant."""
    shown = [view for view in views if _routed(view)]
    return Section("routing", TITLE, TEXT, tuple(map(_table, shown)), tuple(map(_picture, shown)))


def _routed(view: View) -> list[tuple[str, str]]:
    """Variants, and the tasks that they were run on."""
    return [
        (variant, task)
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


def agreement(
    view: View, variants: Sequence[str], task: str, scores: Scores, replicates: Iterable[int] | None = None
) -> tuple[Sampled, Sampled] | None:
    """How often the drafter of the highest score is the one that accepts most by itself, and how often a fixed one is:
    the one that is it most often. It is told seed by seed (default: of those that all have); questions without a value
    are left out.

    Args:
        variants: the drafters by themselves, and what else `scores` wants the cells of.
        scores: of the cells of one seed, [Q, D].
    """
    counts: dict[str, Array] = {}  # by question: seeds, hits, and how often each drafter is the best
    for seed in view.shared(variants, task) if replicates is None else replicates:
        cells = view.aligned(variants, task, [seed])
        if cells is None:
            continue
        found = scores(cells)
        truth = lengths(cells[: found.shape[1]])
        known = np.isfinite(found).all(axis=1) & np.isfinite(truth).all(axis=1)
        chosen, best = winners(found[known]), winners(truth[known])
        parts = np.column_stack([np.ones(len(best)), (chosen * best).sum(axis=1), best])
        for name, row in zip(np.array(cells[0].ids)[known], parts, strict=True):
            counts[name] = counts.get(name, 0.0) + row
    if not counts:
        return None
    total, hits, *bests = np.array(list(counts.values())).T
    return ratio(hits, total, task), ratio(max(bests, key=np.sum), total, task)


def rightness(
    view: View, variant: str, task: str, replicates: Iterable[int] | None = None
) -> tuple[Sampled, Sampled] | None:
    """`agreement` of a routed variant's majorities with the drafters' runs of their own."""
    spec = view.specs[variant]
    singles = alone(view, spec.drafters, view.nodes(variant) or view.base_nodes, view.is_coupled(variant))

    def majorities(cells: Sequence[Cell]) -> Array:
        routed = cells[-1]
        chosen = routed.chosen[:, [routed.drafters.index(name) for name in spec.drafters]]
        return np.where(chosen.sum(axis=1, keepdims=True) > 0, chosen, np.nan)

    return None if singles is None else agreement(view, [*singles, variant], task, majorities, replicates)


def _shares(view: View, variant: str, task: str) -> tuple[dict[str, float], dict[str, float]]:
    """By drafter, of the steps and of the questions; a question counts once a drafter seed."""
    cells = [cell for seed in view.replicates(variant, task) if (cell := view.cell(variant, task, [seed])) is not None]
    chosen = np.concatenate([cell.chosen for cell in cells])
    steps = chosen.sum(axis=0) / chosen.sum()
    questions = winners(chosen[chosen.sum(axis=1) > 0]).mean(axis=0)
    first, second = (dict(zip(cells[0].drafters, part.tolist(), strict=True)) for part in (steps, questions))
    return first, second


def _table(view: View) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for variant, task in _routed(view):
        steps, questions = _shares(view, variant, task)
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
    used = [name for name in view.drafters if any(name in view.specs[variant].drafters for variant, _ in found)]
    panels = []
    for index, title in enumerate(("steps", "questions, by majority")):
        marks = []
        for variant, task in found:
            shares = _shares(view, variant, task)[index]
            marks.append(Shares(f"{view.title(task)}, {variant}", {name: shares.get(name, 0.0) for name in used}))
        panels.append(Panel(title, tuple(marks)))
    caption = "Share of each drafter."
    return Picture(f"routing-{view.slug}", f"{TITLE}: {view.name}", caption, (tuple(panels),))
