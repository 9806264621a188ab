"""What a section is, and what several of them need: tables of variants by task, and each variant's look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...variants import AVERAGE, MERGED, PLAIN, SINGLE
from ..figures import TOPK, Figure, View, mean_over, nodes_per_step
from ..pictures import BLUE, BROWN, GREEN, INK, ORANGE, PINK, PURPLE, QUIET, SKY, VERMILION, Picture, Style
from ..statistics import Sampled
from ..tables import Column, Entry, Table

MEAN = "mean over tasks"
SINGLE_COLOURS = (BLUE, VERMILION, GREEN, PINK)
COLOURS = {PLAIN: QUIET, AVERAGE: QUIET, "confidence": SKY, "entropy": BROWN, "evidence": ORANGE, MERGED: INK}
MARKERS = {AVERAGE: "X", "confidence": "s", "entropy": "D", "evidence": "^", MERGED: "P"}


@dataclass(frozen=True)
class Section:
    """A part of the report: a heading, sentences, tables and pictures, in this order."""

    name: str  # in links
    title: str
    text: str
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def style(view: View, variant: str) -> Style:
    """Single drafters by colour, compositions and the union by colour and marker; top-k and unweighted ones dashed."""
    spec = view.specs[variant]
    is_topk = spec.drafting == TOPK or (spec.composition == AVERAGE and view.temperature > 0)
    is_unweighted = spec.composition == MERGED and spec.max_nodes is not None and not spec.evidence_decay
    is_dashed = is_topk or is_unweighted
    colour = COLOURS.get(spec.composition, INK)
    if spec.composition == SINGLE:
        colour = SINGLE_COLOURS[view.drafters.index(spec.drafters[0]) % len(SINGLE_COLOURS)]
    if spec.composition == MERGED and spec.max_nodes is None:
        return Style(PURPLE, "*", "--" if is_dashed else "-")
    return Style(colour, MARKERS.get(spec.composition, "o"), "--" if is_dashed else "-")


def variant_table(
    view: View,
    name: str,
    title: str,
    note: str,
    figure: Callable[[str, str], Sampled | None],
    form: str = ".2f",
    variants: Sequence[str] | None = None,
    extra: Sequence[tuple[Column, Callable[[str], Entry]]] = (),
    has_interval: bool = True,
) -> Table:
    """A row a variant, a column a task and one for their mean, of `figure(variant, task)`; no empty rows."""
    rows: list[tuple[Entry, ...]] = []
    tasks = [task for task in view.tasks if any(figure(one, task) is not None for one in view.specs)]
    for variant in view.variants() if variants is None else variants:
        found = [figure(variant, task) for task in tasks]
        if all(one is None for one in found):
            continue
        figures = [*found, mean_over(found)] if len(tasks) > 1 else found
        entries = [None if one is None else one.estimate if has_interval else one.value for one in figures]
        rows.append((variant, *(entry(variant) for _, entry in extra), *entries))
    heads = [view.title(task) for task in tasks] + ([MEAN] if len(tasks) > 1 else [])
    columns = (Column("variant"), *(column for column, _ in extra), *(Column(head, form) for head in heads))
    return Table(f"{name}-{view.slug}", f"{title}: {view.name}", note, columns, tuple(rows))


def of(view: View, figure: Figure) -> Callable[[str, str], Sampled | None]:
    """The figure by variant and task."""
    return lambda variant, task: view.value(variant, task, figure)


def mean_nodes(view: View, variant: str) -> float | None:
    """Nodes that the target verified a step, root included: the mean over tasks."""
    figure = mean_over([view.value(variant, task, nodes_per_step) for task in view.tasks if view.cell(variant, task)])
    return None if figure is None else figure.value
