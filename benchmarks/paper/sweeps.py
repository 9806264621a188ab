"""Two sweeps: drafters of averaged weights between two specialists, and acceptance by the nodes that are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from paper.drafting import base_nodes, forms, is_coupled, row, shared_seeds, single
from taps_ext.evaluation.counts import View, safe
from taps_ext.evaluation.figures import (
    Picture,
    Row,
    Table,
    acceptance_length,
    entry,
    lines,
    value,
)
from taps_ext.evaluation.report import Section
from taps_ext.evaluation.variants import AVERAGE, MERGED, SINGLE

AVERAGING = (
    "Acceptance length of one drafter whose weights are w of the first drafter's and 1 - w of the second's; the ends "
    "are the two themselves. An average has no calibration and drafts top-k, and so do the ends above temperature 0: "
    "without such runs they are missing. On a task all points are of the drafter seeds that each of them has."
)
BUDGETS = (
    "The target verifies every node, so variants are comparable where they verify as many. The budget is the largest "
    "number of nodes of a step, root included; beside it stands how many there were. On a task all figures are of the "
    "drafter seeds that every variant was run with."
)

Point = tuple[float, str]  # the first drafter's weight, and the variant


def averaging(views: Sequence[View]) -> Section:
    tables: list[Table] = []
    pictures: list[Picture] = []
    for view in views:
        for pair in dict.fromkeys(view.specs[name].drafters for name in view.variants(AVERAGE)):
            points = _points(view, pair)
            if len(pair) == 2 and len(points) > 2:
                tables.append(_average_table(view, pair, points))
                pictures.append(_average_picture(view, tables[-1], pair))
    return Section("Averaging two drafters", AVERAGING, tables, pictures)


def _points(view: View, pair: tuple[str, ...]) -> list[Point]:
    """The ends and the averages between, by weight."""
    specs = [view.specs[name] for name in view.variants(AVERAGE) if view.specs[name].drafters == pair]
    inner = [(0.5 if spec.weight is None else spec.weight, spec.label) for spec in specs]
    ends = [(float(place == 0), single(view, drafter, coupled=False)) for place, drafter in enumerate(pair)]
    usual = [point for point in inner if view.nodes(point[1]) == base_nodes(view)]
    return sorted([*usual, *((weight, name) for weight, name in ends if name and not is_coupled(view, name))])


def _average_table(view: View, pair: tuple[str, ...], points: Sequence[Point]) -> Table:
    names, weight = [name for _, name in points], f"weight of {pair[0]}"
    seeds = {task: shared_seeds(view, names, task) for task in view.tasks}
    rows = []
    for share, name in points:
        found = {task: value(view, name, task, acceptance_length, seeds[task]) for task in view.tasks}
        rows.append(row(view, {"variant": name, weight: share}, found))
    title = f"{pair[0]} and {pair[1]} averaged: {view.name}"
    name = f"averaging-{'-'.join(map(safe, pair))}-{view.slug}"
    return Table.of(name, title, "", rows, forms(view, {"variant": "", weight: ".2f"}, ".2f"))


def _average_picture(view: View, table: Table, pair: tuple[str, ...]) -> Picture:
    rows = table.rows.set_index(f"weight of {pair[0]}")
    marks = {"": {title: rows[title].astype(float).dropna() for title in view.tasks.values()}}
    return lines(table, "Intervals are in the table.", marks, f"weight of {pair[0]}", "tokens per step")


def budgets(views: Sequence[View]) -> Section:
    tables: list[Table] = []
    pictures: list[Picture] = []
    for view in views:
        families = _families(view)
        if any(len(names) > 1 for names in families):
            tables.append(_budget_table(view, [name for names in families for name in names]))
            pictures += _budget_picture(view, tables[-1], families)
    return Section("Node budgets", BUDGETS, tables, pictures)


def _families(view: View) -> list[list[str]]:
    """Variants that differ in their budget alone, smallest first; a union, which has none, is a family of its own."""
    families: dict[object, list[str]] = {}
    for variant in view.variants():
        spec = view.specs[variant]
        if spec.composition != AVERAGE:
            family = replace(spec, label="", max_nodes=None), view.nodes(variant) is None
            families.setdefault(family, []).append(variant)
    return [sorted(names, key=lambda name: view.nodes(name) or 0) for names in families.values()]


def _budget_table(view: View, variants: Sequence[str]) -> Table:
    rows: list[Row] = []
    seeds = {task: shared_seeds(view, variants, task) for task in view.tasks}
    for name in variants:
        for task, title in view.tasks.items():
            length = value(view, name, task, acceptance_length, seeds[task])
            if length is not None:
                first = {"variant": name, "task": title, "budget": str(view.nodes(name) or "union")}
                nodes = _nodes_per_step(view, name, task, seeds[task])
                rows.append(first | {"nodes per step": nodes} | entry("acceptance length", length))
    columns = {"variant": "", "task": "", "budget": "", "nodes per step": ".1f", "acceptance length": ".2f"}
    return Table.of(f"budget-{view.slug}", f"Node budgets: {view.name}", "", rows, columns)


def _nodes_per_step(view: View, variant: str, task: str, seeds: Sequence[int]) -> float:
    cell = view.cell(variant, task, seeds)
    assert cell is not None
    return float(cell["nodes"].sum() / cell["steps"].sum())


def _budget_picture(view: View, table: Table, families: Sequence[Sequence[str]]) -> list[Picture]:
    """The tasks with a sweep; a union is a point."""
    marks: dict[str, dict[str, pd.Series]] = {}
    for title, rows in table.rows.groupby("task", sort=False):
        points = rows.set_index("variant")[["nodes per step", "acceptance length"]].astype(float)
        for names in families:
            own = points.loc[[name for name in names if name in points.index]].sort_values("nodes per step")
            if len(own) and (len(names) > 1 or view.nodes(names[0]) is None):
                marks.setdefault(str(title), {})[_family_name(view, names[0])] = own.set_index(
                    "nodes per step"
                ).squeeze(1)
    marks = {title: by_name for title, by_name in marks.items() if any(len(one) > 1 for one in by_name.values())}
    caption = "Each point is a budget; the union of trees of the usual size is a point of its own."
    return [lines(table, caption, marks, "nodes per step", "tokens per step")] if marks else []


def _family_name(view: View, variant: str) -> str:
    spec = view.specs[variant]
    parts = [f"{spec.composition}:{'+'.join(spec.drafters)}" if spec.composition == SINGLE else spec.composition]
    if spec.composition == MERGED:
        kind = "by evidence" if spec.evidence_decay else "unweighted"
        parts.append("union" if spec.max_nodes is None else kind)
    return ", ".join([*parts, *(["topk"] if spec.drafting == "topk" else [])])
