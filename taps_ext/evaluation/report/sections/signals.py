"""Confidence and entropy: do they tell accepted nodes from rejected ones, and the better drafter from the worse?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ...steps import NUM_BINS, SIGNALS
from ...variants import AVERAGE, MERGED
from ..cells import Cell, Signal
from ..figures import ROUTING, Figure, View, mean_over
from ..pictures import BLUE, VERMILION, Panel, Picture, Steps
from ..statistics import Array, Sampled, auc
from ..tables import Column, Entry, Table
from .base import MEAN, Section
from .routing import agreement, alone, rightness

TITLE = "Confidence and entropy"
TEXT = (
    "Over the nodes that a single drafter drafted (no root): confidence is the probability it gave the path to the "
    "node, entropy that of the distribution the node was taken from, in nats. Rejected is every node not on the "
    "accepted path. AUC: the chance that of an accepted and a rejected node the accepted has the higher confidence, "
    "or the lower entropy (so 0.5 is a coin and more is better for both); within questions: of two nodes of the same "
    "question, with an interval over questions. As a routing signal: how often the drafter with the higher mean "
    "confidence (the lower mean entropy) over all its nodes of a question is the one that accepts more on it. Above "
    "temperature 0 that is told of top-k drafting, where it was run: drafters that draft coupled score nodes by "
    "alpha log q / T + beta noise, so that what is known of those is of another distribution."
)
COUPLED = "coupled: of the noised distribution, not the paper's signal"
CONFIDENCE, ENTROPY = SIGNALS
CONFIDENCE_TICKS = {label: NUM_BINS * float(label) ** (1 / 3) for label in ("0", "0.01", "0.1", "0.3", "1")}
ENTROPY_TICKS = {str(nats): 10.0 * nats for nats in (0, 2, 4, 6, 8)}


def section(views: Sequence[View]) -> Section:
    """Two tables and two pictures a view that has signals."""
    tables, pictures = [], []
    for view in views:
        if found := _cells(view):
            tables.append(_nodes_table(view, found))
            tables += _routing_tables(view)
            pictures += [_picture(view, found, name) for name in SIGNALS]
    return Section("signals", TITLE, TEXT, tuple(tables), tuple(pictures))


def _cells(view: View) -> list[tuple[str, str, Cell]]:
    """(drafter's variant, task, counts) of single drafters with trees of the usual size, top-k where they were."""
    variants = [view.single(drafter, is_coupled=False) for drafter in view.drafters]
    return [
        (variant, task, cell)
        for variant in variants
        if variant is not None
        for task in view.tasks
        if (cell := view.cell(variant, task)) is not None and cell.signals
    ]


def _told(view: View, variant: str) -> str:
    return f"{variant} (coupled)" if view.is_coupled(variant) else variant


def _note(view: View, variants: Iterable[str]) -> str:
    return f"({COUPLED}.)" if any(view.is_coupled(variant) for variant in variants) else ""


def higher_of_pairs(name: str) -> Figure:
    """Of the pairs of an accepted and a rejected node of a question, those in which the signal is right."""

    def figure(cell: Cell) -> tuple[Array, Array]:
        signal = cell.signals[name]
        return (signal.won if name == CONFIDENCE else signal.pairs - signal.won), signal.pairs

    return figure


def pooled_auc(signal: Signal, name: str) -> float:
    """AUC over the nodes of all questions, oriented as in the table."""
    accepted, rejected = signal.bins
    return auc(accepted, rejected) if name == CONFIDENCE else auc(rejected, accepted)


def _nodes_table(view: View, found: Sequence[tuple[str, str, Cell]]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for variant, task, cell in found:
        row: list[Entry] = [_told(view, variant), view.title(task)]
        within = [view.value(variant, task, higher_of_pairs(name)) for name in SIGNALS]
        for name, figure in zip(SIGNALS, within, strict=True):
            signal = cell.signals[name]
            row += [_mean(signal.accepted, signal.num_accepted), _mean(signal.rejected, signal.num_rejected)]
            row += [pooled_auc(signal, name), None if figure is None else figure.estimate]
        first, second = within
        row.append(None if first is None or second is None else (first - second).estimate)
        rows.append(tuple(row))
    heads = [
        Column(f"{name}: {what}", form)
        for name in SIGNALS
        for what, form in (("accepted", ".3f"), ("rejected", ".3f"), ("AUC", ".3f"), ("AUC within questions", ".3f"))
    ]
    columns = (Column("variant"), Column("task"), *heads, Column("confidence - entropy, AUC within questions", "+.3f"))
    title, note = f"Accepted against rejected nodes: {view.name}", _note(view, [variant for variant, *_ in found])
    return Table(f"signals-{view.slug}", title, note, columns, tuple(rows))


def _mean(sums: Array, counts: Array) -> float | None:
    return float(sums.sum() / counts.sum()) if counts.sum() else None


def _routing_tables(view: View) -> list[Table]:
    """A table for each set of drafters that is routed, or else composed, in the usual size."""
    composed = view.variants(*ROUTING) or view.variants(AVERAGE, MERGED)
    sets = dict.fromkeys(view.specs[name].drafters for name in composed)
    tables = [_routing_table(view, drafters) for drafters in sets if len(drafters) > 1]
    return [table for table in tables if table is not None]


def _routing_table(view: View, drafters: tuple[str, ...]) -> Table | None:
    singles = alone(view, drafters, view.base_nodes, is_coupled=False) or []
    usual = [name for name in view.variants(*ROUTING) if view.nodes(name) == view.base_nodes]
    routed = [name for name in usual if view.specs[name].drafters == drafters]
    seeds = {task: view.shared([*singles, *routed], task) for task in view.tasks}
    confidence, entropy = ([_hits(view, singles, task, name, seeds[task]) for task in view.tasks] for name in SIGNALS)
    pairs = zip(_part(confidence), _part(entropy), strict=True)
    gaps = [None if one is None or two is None else one - two for one, two in pairs]
    rows = [_row("higher mean confidence", _part(confidence)), _row("lower mean entropy", _part(entropy))]
    rows.append(_row("confidence - entropy", gaps))
    for variant in routed:
        right = [rightness(view, variant, task, seeds[task]) for task in view.tasks]
        rows.append(_row(f"majority of {variant}, routed", _part(right)))
    rows.append(_row("one fixed drafter", _part(confidence, 1)))
    rows = [row for row in rows if any(entry is not None for entry in row[1:])]
    if not rows:
        return None
    heads = [*(view.title(task) for task in view.tasks), *([MEAN] if len(view.tasks) > 1 else [])]
    columns = (Column("signal"), *(Column(head, ".1%") for head in heads))
    names = " and ".join([", ".join(drafters[:-1]), drafters[-1]])
    note = (
        f"Share of the questions for which the signal names the drafter, of {names}, that accepts more on them; of "
        "equals each counts its part. The row of differences is in percentage points. One fixed drafter: the one that "
        "is best on most questions of the task, which is known with hindsight only. All are told seed by seed, of the "
        f"drafter seeds that every row has. {_note(view, singles)}"
    ).rstrip()
    title = f"As a routing signal, {names}: {view.name}"
    return Table(f"signal-routing-{'-'.join(drafters)}-{view.slug}", title, note, columns, tuple(rows))


def _part(hits: Sequence[tuple[Sampled, Sampled] | None], side: int = 0) -> list[Sampled | None]:
    return [None if hit is None else hit[side] for hit in hits]


def _row(words: str, found: Sequence[Sampled | None]) -> tuple[Entry, ...]:
    figures = [*found, *([mean_over(found)] if len(found) > 1 else [])]
    return (words, *(None if figure is None else figure.estimate for figure in figures))


def _hits(
    view: View, singles: Sequence[str], task: str, name: str, seeds: Sequence[int]
) -> tuple[Sampled, Sampled] | None:
    """`agreement` of a signal's means with what the drafters accepted, in the same runs of their own."""
    if any((cell := view.cell(single, task, seeds)) is None or name not in cell.signals for single in singles):
        return None

    def means(cells: Sequence[Cell]) -> Array:
        found = np.stack([_mean_by_question(cell.signals[name]) for cell in cells], axis=1)
        return found if name == CONFIDENCE else -found

    return agreement(view, singles, task, means, seeds) if singles else None


def _mean_by_question(signal: Signal) -> Array:
    with np.errstate(invalid="ignore"):
        means = (signal.accepted + signal.rejected) / (signal.num_accepted + signal.num_rejected)
    return np.asarray(means)


def _picture(view: View, found: Sequence[tuple[str, str, Cell]], name: str) -> Picture:
    """A row a drafter, a column a task; each histogram has area 1."""
    is_confidence = name == CONFIDENCE
    edges = range(NUM_BINS + 1)
    grid = []
    for variant in dict.fromkeys(variant for variant, *_ in found):
        panels = []
        for own, task, cell in found:
            if own == variant:
                accepted, rejected = (bins / max(bins.sum(), 1.0) for bins in cell.signals[name].bins)
                marks = (
                    Steps("rejected nodes", edges, rejected.tolist(), VERMILION),
                    Steps("accepted nodes", edges, accepted.tolist(), BLUE),
                )
                panels.append(Panel(f"{_told(view, variant)}\n{view.title(task)}", marks))
        grid.append(tuple(panels))
    return Picture(
        f"{name}-{view.slug}",
        f"{name.capitalize()} of accepted and rejected nodes: {view.name}",
        "Densities; each has area 1."
        + (" The axis is the cube root of confidence." if is_confidence else "")
        + (f" {note}" if (note := _note(view, [variant for variant, *_ in found])) else ""),
        tuple(grid),
        x=name + (" of the path" if is_confidence else ", nats"),
        ticks=CONFIDENCE_TICKS if is_confidence else ENTROPY_TICKS,
    )
