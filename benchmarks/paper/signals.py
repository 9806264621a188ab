"""Confidence and entropy: do they tell accepted nodes from rejected ones, and the better drafter from the worse?

Their sums per question join the counts (`add`); histograms over the nodes of all questions lie in signals.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from paper.drafting import ROUTING, alone, base_nodes, forms, is_coupled, marked, row, shared_seeds, single
from taps_ext.evaluation.counts import CELL, KEYS, Results, View
from taps_ext.evaluation.figures import COLOURS, Array, Picture, Row, Sampled, Table, entry, panels, ratio, value
from taps_ext.evaluation.report import Section
from taps_ext.evaluation.results import read_lines
from taps_ext.evaluation.steps import NUM_BINS, SIGNALS
from taps_ext.evaluation.variants import AVERAGE, MERGED, SINGLE

TEXT = (
    "Over the nodes that a single drafter drafted (no root): confidence is the probability it gave the path to the "
    "node, entropy that of the distribution the node was taken from, in nats. Rejected is every node not on the "
    "accepted path. AUC: the chance that of an accepted and a rejected node the accepted has the higher confidence, "
    "or the lower entropy (so 0.5 is a coin and more is better for both); within questions: of two nodes of the same "
    "question, with an interval over questions. As a routing signal: how often the drafter with the higher mean "
    "confidence (the lower mean entropy) over all its nodes of a question is the one that accepts more on it. Above "
    "temperature 0 this is of top-k drafting, where it was run: drafters that draft coupled score nodes by "
    "alpha log q / T + beta noise, so their signals are of another distribution."
)
COUPLED = "(coupled: of the noised distribution, not the paper's signal.)"
CONFIDENCE, ENTROPY = SIGNALS
TICKS = {
    CONFIDENCE: {label: NUM_BINS * float(label) ** (1 / 3) for label in ("0", "0.01", "0.1", "0.3", "1")},
    ENTROPY: {str(nats): 10.0 * nats for nats in (0, 2, 4, 6, 8)},
}
SIDES = ("accepted", "rejected")
SUMS = ("num_accepted", "accepted", "num_rejected", "rejected", "pairs", "won")
FILE = "signals.json"

Histograms = dict[tuple[Any, ...], dict[str, Array]]  # by cell and signal: accepted and rejected nodes, [2, NUM_BINS]
Scores = Callable[[Sequence[pd.DataFrame]], Array]  # of cells on the same questions: [Q, D]


# ---- reading


def add(results: Results) -> tuple[Results, Histograms]:
    """The results with the signals' sums of single drafters per question, and the histograms of each cell."""
    rows: list[Row] = []
    histograms: Histograms = {}
    for number, source in enumerate(results.sources):
        if source.is_dir():
            singles = {name for name, spec in results.runs[number]["variants"].items() if spec["composition"] == SINGLE}
            for line in read_lines(source):
                if line["variant"] in singles and line["signals"]:
                    rows.append(_add_line(histograms, number, line))
        elif (source.parent / FILE).is_file():
            first = results.sources.index(source)
            for cell in json.loads((source.parent / FILE).read_text(encoding="utf-8")):
                if cell["run"] == number - first:
                    bins = {name: np.array(part, dtype=float) for name, part in cell["bins"].items()}
                    histograms[(number, *(cell[name] for name in CELL[1:]))] = bins
    questions = results.questions
    if rows:
        found = pd.DataFrame(rows).drop_duplicates(KEYS).set_index(KEYS)
        questions = questions.set_index(KEYS)
        questions = questions.reindex(columns=questions.columns.union(found.columns, sort=False), fill_value=0.0)
        questions.update(found)
    return replace(results, questions=questions.reset_index() if rows else questions), histograms


def _add_line(histograms: Histograms, number: int, line: Mapping[str, Any]) -> Row:
    """The sums of a line, whose bins join the histograms of its cell."""
    key = (number, *(line[name] for name in CELL[1:]))
    found = dict(zip(KEYS, (*key, str(line["question_id"])), strict=True))
    cell = histograms.setdefault(key, {name: np.zeros((2, NUM_BINS)) for name in SIGNALS})
    for name, sides in line["signals"][line["drafters"][0]].items():
        bins = np.zeros((2, NUM_BINS))
        for part, side in zip(bins, SIDES, strict=True):
            part[[int(place) for place in sides[side]["bins"]]] = list(sides[side]["bins"].values())
        cell[name] += bins
        counts = [part for side in SIDES for part in (sides[side]["count"], round(sides[side]["sum"], 6))]
        sums = [*counts, counts[0] * counts[2], pairs_won(bins[0], bins[1])]
        found |= {f"{name} {part}": amount for part, amount in zip(SUMS, sums, strict=True)}
    return found


def to_json(histograms: Histograms) -> str:
    """The text of signals.json, a line per cell."""
    lines = [
        json.dumps(
            {
                **dict(zip(CELL, key, strict=True)),
                "bins": {name: part.astype(int).tolist() for name, part in bins.items()},
            }
        )
        for key, bins in histograms.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def pairs_won(high: Array, low: Array) -> float:
    """Pairs (one of `high`, one of `low`) with the first in the higher bin, ties half; both are histograms [bins]."""
    below = np.cumsum(low) - low
    return float((high * (below + low / 2)).sum())


def auc(high: Array, low: Array) -> float:
    """P(a member of `high` stands in a higher bin than one of `low`), ties half; NaN if one is empty."""
    pairs = high.sum() * low.sum()
    return pairs_won(high, low) / float(pairs) if pairs else float("nan")


# ---- the section


def section(results: Results, views: Sequence[View], histograms: Histograms) -> Section:
    tables: list[Table] = []
    pictures: list[Picture] = []
    for view in views:
        cells: dict[tuple[str, str], dict[str, Array]] = {}
        for (number, variant, task, temperature), bins in histograms.items():
            if (results.runs[number]["label"], temperature) == (view.label, view.temperature):
                have = cells.setdefault((variant, task), {name: np.zeros((2, NUM_BINS)) for name in SIGNALS})
                cells[variant, task] = {name: have[name] + bins[name] for name in SIGNALS}
        names = [single(view, drafter, coupled=False) for drafter in view.drafters]
        places = [(name, task) for name in names if name for task in view.tasks if (name, task) in cells]
        if places:
            tables += [_nodes_table(view, places, cells), *_routing_tables(view)]
            pictures += [_picture(view, places, cells, name) for name in SIGNALS]
    return Section("Confidence and entropy", TEXT, tables, pictures)


def _note(view: View, variants: Sequence[str]) -> str:
    return COUPLED if any(is_coupled(view, name) for name in variants) else ""


def higher_of_pairs(name: str) -> Callable[[pd.DataFrame], tuple[Any, Any]]:
    """Of the pairs of an accepted and a rejected node of a question, those in which the signal is right."""

    def figure(cell: pd.DataFrame) -> tuple[Any, Any]:
        won, pairs = cell[f"{name} won"], cell[f"{name} pairs"]
        return (won if name == CONFIDENCE else pairs - won), pairs

    return figure


def _nodes_table(
    view: View, places: Sequence[tuple[str, str]], cells: Mapping[tuple[str, str], Mapping[str, Array]]
) -> Table:
    rows = []
    for variant, task in places:
        cell = view.cell(variant, task)
        assert cell is not None
        sums, within = cell.sum(), {}
        row: Row = {"variant": marked(view, variant), "task": view.tasks[task]}
        for name in SIGNALS:
            for side in SIDES:
                count = sums[f"{name} num_{side}"]
                row[f"{name}: {side}"] = float(sums[f"{name} {side}"] / count) if count else None
            accepted, rejected = cells[variant, task][name]
            row[f"{name}: AUC"] = auc(accepted, rejected) if name == CONFIDENCE else auc(rejected, accepted)
            within[name] = value(view, variant, task, higher_of_pairs(name))
            row |= entry(f"{name}: AUC within questions", within[name])
        both = [part for name in SIGNALS for part in higher_of_pairs(name)(cell)]
        rows.append(row | entry(GAP, ratio(task, *both)))
    heads = [f"{name}: {part}" for name in SIGNALS for part in (*SIDES, "AUC", "AUC within questions")]
    columns = {"variant": "", "task": "", **dict.fromkeys(heads, ".3f"), GAP: "+.3f"}
    title, note = f"Accepted against rejected nodes: {view.name}", _note(view, [variant for variant, _ in places])
    return Table.of(f"signals-{view.slug}", title, note, rows, columns)


GAP = "confidence - entropy, AUC within questions"


def _picture(
    view: View, places: Sequence[tuple[str, str]], cells: Mapping[tuple[str, str], Mapping[str, Array]], name: str
) -> Picture:
    """Densities by bin, a panel per task and drafter."""
    titles = [f"{marked(view, variant)}\n{view.tasks[task]}" for variant, task in places]
    figure, axes = panels(titles, 1.9, 2.2, num_columns=len({task for _, task in places}))
    for place, axis in zip(places, axes.values(), strict=True):
        for side, colour, bins in zip(SIDES, COLOURS, cells[place][name], strict=False):
            axis.stairs(bins / max(bins.sum(), 1), range(NUM_BINS + 1), fill=True, color=colour, alpha=0.4, label=side)
        axis.set(yticks=[], xticks=list(TICKS[name].values()), xticklabels=list(TICKS[name]))
    figure.legend(
        *next(iter(axes.values())).get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False
    )
    caption = "Densities; each has area 1." + (
        " The axis is the cube root of confidence." if name == CONFIDENCE else ""
    )
    title = f"{name.capitalize()} of accepted and rejected nodes: {view.name}"
    return Picture(
        f"{name}-{view.slug}", title, f"{caption} {_note(view, [one for one, _ in places])}".rstrip(), figure
    )


# ---- as a routing signal


def _routing_tables(view: View) -> list[Table]:
    """A table for each set of drafters that is routed, or else composed, in the usual size."""
    composed = view.variants(*ROUTING) or view.variants(AVERAGE, MERGED)
    sets = dict.fromkeys(view.specs[name].drafters for name in composed)
    tables = [_routing_table(view, drafters) for drafters in sets if len(drafters) > 1]
    return [table for table in tables if len(table.rows)]


def _routing_table(view: View, drafters: tuple[str, ...]) -> Table:
    singles = alone(view, drafters, base_nodes(view), coupled=False)
    usual = [name for name in view.variants(*ROUTING) if view.nodes(name) == base_nodes(view)]
    routed = [name for name in usual if view.specs[name].drafters == drafters]
    hits: dict[str, dict[str, Any]] = {}
    for task in view.tasks:
        seeds = shared_seeds(view, [*singles, *routed], task)
        confidence, entropy = (_sums(view, singles, task, seeds, _means(name)) for name in SIGNALS)
        known = confidence is not None and entropy is not None
        hits.setdefault("higher mean confidence", {})[task] = _share(task, confidence)
        hits.setdefault("lower mean entropy", {})[task] = _share(task, entropy)
        gap = ratio(task, *confidence[:2], *entropy[:2]) if known else None
        hits.setdefault("confidence - entropy", {})[task] = gap
        for variant in routed:
            own = alone(view, drafters, view.nodes(variant) or base_nodes(view), is_coupled(view, variant))
            majority = _sums(view, [*own, variant], task, seeds, _majorities(drafters)) if own else None
            hits.setdefault(f"majority of {variant}, routed", {})[task] = _share(task, majority)
        hits.setdefault("one fixed drafter", {})[task] = confidence and ratio(task, confidence[2], confidence[1])
    order = sorted(hits, key=lambda words: words == "one fixed drafter")
    rows = [row(view, {"signal": words}, hits[words]) for words in order if any(hits[words].values())]
    names = " and ".join([", ".join(drafters[:-1]), drafters[-1]])
    note = (
        f"Share of the questions for which the signal names the drafter, of {names}, that accepts more on them; of "
        "equals each counts its part. The row of differences is in percentage points. One fixed drafter: the one that "
        "is best on most questions of the task, which is known with hindsight only. All are counted seed by seed, of "
        f"the drafter seeds that every row has. {_note(view, singles)}"
    ).rstrip()
    name, title = f"signal-routing-{'-'.join(drafters)}-{view.slug}", f"As a routing signal, {names}: {view.name}"
    return Table.of(name, title, note, rows, forms(view, {"signal": ""}, ".1%"))


def _share(task: str, sums: tuple[Any, Any, Any] | None) -> Sampled | None:
    return None if sums is None else ratio(task, *sums[:2])


def winners(scores: Array) -> Array:
    """By question, 1 for the drafter with the largest score, shared out among equals: [Q, D]."""
    is_best = scores == scores.max(axis=1, keepdims=True)
    return np.asarray(is_best / is_best.sum(axis=1, keepdims=True))


def _sums(
    view: View, variants: Sequence[str], task: str, seeds: Sequence[int], scores: Scores
) -> tuple[Any, Any, Any] | None:
    """By question, summed over seeds: how often the drafter of the highest score is the one that accepts most alone,
    how many seeds there are, and how often a fixed drafter is it (the one that is most often).

    `variants` are the drafters alone, then what else `scores` takes the cells of; questions without a value are left
    out.
    """
    found: list[pd.DataFrame] = []
    for seed in seeds if variants else ():
        cells = view.aligned(variants, task, [seed])
        if cells is None:
            continue
        scored = scores(cells)
        with np.errstate(invalid="ignore"):
            lengths = np.stack([cell["accepted"] / cell["steps"] for cell in cells[: scored.shape[1]]], axis=1)
        known = np.isfinite(scored).all(axis=1) & np.isfinite(lengths).all(axis=1)
        chosen, best = winners(scored[known]), winners(lengths[known])
        table = np.column_stack([(chosen * best).sum(axis=1), np.ones(len(best)), best])
        found.append(pd.DataFrame(table, index=cells[0].index[known]))
    if not found:
        return None
    sums = pd.concat(found).groupby(level=0, sort=False).sum()
    return sums[0], sums[1], sums[sums.columns[2:][sums.iloc[:, 2:].sum().argmax()]]


def _means(name: str) -> Scores:
    """The mean of a signal over all nodes of a question, lower entropies scoring higher."""

    def scores(cells: Sequence[pd.DataFrame]) -> Array:
        sums = [cell[f"{name} accepted"] + cell[f"{name} rejected"] for cell in cells]
        numbers = [cell[f"{name} num_accepted"] + cell[f"{name} num_rejected"] for cell in cells]
        found = np.stack([one / number.replace(0, np.nan) for one, number in zip(sums, numbers, strict=True)], axis=1)
        return np.asarray(found if name == CONFIDENCE else -found)

    return scores


def _majorities(drafters: Sequence[str]) -> Scores:
    """In how many steps of a question a routed variant, the last cell, chose each drafter."""

    def scores(cells: Sequence[pd.DataFrame]) -> Array:
        chosen = cells[-1][[f"chosen {name}" for name in drafters]].to_numpy(dtype=float)
        return np.where(chosen.sum(axis=1, keepdims=True) > 0, chosen, np.nan)

    return scores
