"""Acceptance against the nodes that the target verifies: the comparison at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..figures import AVERAGE, MERGED, SINGLE, Spec, View, micro, nodes_per_step
from ..pictures import Line, Panel, Picture
from ..tables import Column, Entry, Table
from .base import Section, style

TITLE = "Node budgets"
TEXT = (
    "The target verifies every node, so variants are comparable where they verify as many. The budget is the largest "
    "number of nodes of a step, root included; beside it stands how many there were."
)


def section(views: Sequence[View]) -> Section:
    """A table and a picture a view in which a variant was run with several budgets, or two with the same."""
    tables, pictures = [], []
    for view in views:
        families = _families(view)
        if any(len(variants) > 1 for variants in families):
            tables.append(_table(view, families))
            pictures.append(_picture(view, families))
    return Section("budget", TITLE, TEXT, tuple(tables), tuple(pictures))


def _families(view: View) -> list[list[str]]:
    """Variants that differ in their budget alone, smallest first; a union, which has none, is a family of its own."""
    families: dict[tuple[Spec, bool], list[str]] = {}
    for variant in view.variants():
        spec = view.specs[variant]
        if spec.composition != AVERAGE:
            family = replace(spec, max_nodes=None), view.nodes(variant) is None
            families.setdefault(family, []).append(variant)
    return [sorted(names, key=lambda name: view.nodes(name) or 0) for names in families.values()]


def _table(view: View, families: Sequence[Sequence[str]]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for variant in dict.fromkeys(name for names in families for name in names):
        budget = view.nodes(variant)
        for task in view.tasks:
            length, nodes = (view.value(variant, task, figure) for figure in (micro, nodes_per_step))
            if length is not None and nodes is not None:
                told: Entry = "union" if budget is None else budget
                rows.append((variant, view.title(task), told, nodes.value, length.estimate))
    columns = (
        *(Column("variant"), Column("task"), Column("budget", ",d")),
        *(Column("nodes verified a step", ".1f"), Column("acceptance length", ".2f")),
    )
    return Table(f"budget-{view.slug}", f"{TITLE}: {view.name}", "", columns, tuple(rows))


def _picture(view: View, families: Sequence[Sequence[str]]) -> Picture:
    panels = []
    for task in view.tasks:
        lines = []
        for names in families:
            points = []
            for name in names:
                length, nodes = (view.value(name, task, figure) for figure in (micro, nodes_per_step))
                if length is not None and nodes is not None:
                    points.append((nodes.value, length.estimate))
            if not points or (len(names) < 2 and view.nodes(names[0]) is not None):
                continue
            x, estimates = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            band = {side: [getattr(estimate, side) for estimate in estimates] for side in ("low", "high")}
            lines.append(
                Line(_name(view, names), x, [estimate.value for estimate in estimates], style(view, names[0]), **band)
            )
        panels.append(Panel(view.title(task), tuple(lines)))
    caption = (
        "Each point is a budget; the union of trees of the usual size is a point of its own. Bands are 95% intervals."
    )
    title = f"Acceptance by nodes verified: {view.name}"
    shown = tuple(panel for panel in panels if panel.marks)
    return Picture(f"budget-{view.slug}", title, caption, (shown,), "nodes verified a step", "tokens a step")


def _name(view: View, names: Sequence[str]) -> str:
    """Of a family: its composition, the drafter of a single one, and what is not the default."""
    spec = view.specs[names[0]]
    parts = [f"{SINGLE}:{spec.drafters[0]}" if spec.composition == SINGLE else spec.composition]
    if spec.composition == MERGED:
        kind = "by evidence" if spec.evidence_decay else "unweighted"
        parts.append("union" if spec.max_nodes is None else kind)
    return ", ".join([*parts, *(["topk"] if spec.drafting == "topk" else [])])
