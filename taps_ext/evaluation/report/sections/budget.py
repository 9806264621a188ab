"""Acceptance against the nodes that the target verifies: the comparison at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...variants import AVERAGE, MERGED, SINGLE, Variant
from ..figures import TOPK, View, micro, nodes_per_step
from ..pictures import Line, Panel, Picture
from ..statistics import Estimate
from ..tables import Column, Entry, Table
from .base import Section, style

TITLE = "Node budgets"
TEXT = (
    "The target verifies every node, so variants are comparable where they verify as many. The budget is the largest "
    "number of nodes of a step, root included; beside it stands how many there were. On a task all figures are of the "
    "drafter seeds that every variant was run with."
)

Family = tuple[Variant, bool]
Point = tuple[float, Estimate]  # nodes verified a step, and the acceptance length


def section(views: Sequence[View]) -> Section:
    """A table and a picture a view in which a variant was run with several budgets."""
    tables, pictures = [], []
    for view in views:
        families = _families(view)
        if any(len(variants) > 1 for variants in families):
            tables.append(_table(view, families))
            if (picture := _picture(view, families)) is not None:
                pictures.append(picture)
    return Section("budget", TITLE, TEXT, tuple(tables), tuple(pictures))


def _families(view: View) -> list[list[str]]:
    """Variants that differ in their budget alone, smallest first; a union, which has none, is a family of its own."""
    families: dict[Family, list[str]] = {}
    for variant in view.variants():
        spec = view.specs[variant]
        if spec.composition != AVERAGE:
            family = replace(spec, label="", max_nodes=None), view.nodes(variant) is None
            families.setdefault(family, []).append(variant)
    return [sorted(names, key=lambda name: view.nodes(name) or 0) for names in families.values()]


def _table(view: View, families: Sequence[Sequence[str]]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    points = _points(view, families)
    for variant in (name for names in families for name in names):
        told: Entry = view.nodes(variant) or "union"
        rows += [
            (variant, view.title(task), told, *points[variant, task])
            for task in view.tasks
            if (variant, task) in points
        ]
    columns = (
        *(Column("variant"), Column("task"), Column("budget", ",d")),
        *(Column("nodes verified a step", ".1f"), Column("acceptance length", ".2f")),
    )
    return Table(f"budget-{view.slug}", f"{TITLE}: {view.name}", "", columns, tuple(rows))


def _points(view: View, families: Sequence[Sequence[str]]) -> dict[tuple[str, str], Point]:
    """By variant and task, over the drafter seeds that all have."""
    found = {}
    variants = [name for names in families for name in names]
    for task in view.tasks:
        seeds = view.shared(variants, task)
        for variant in variants:
            length, nodes = (view.value(variant, task, figure, seeds) for figure in (micro, nodes_per_step))
            if length is not None and nodes is not None:
                found[variant, task] = nodes.value, length.estimate
    return found


def _picture(view: View, families: Sequence[Sequence[str]]) -> Picture | None:
    """Of the tasks with a sweep."""
    panels, points = [], _points(view, families)
    shown = [names for names in families if len(names) > 1 or view.nodes(names[0]) is None]
    for task in view.tasks:
        lines = []
        for names in shown:
            own = [points[name, task] for name in names if (name, task) in points]
            if not own:
                continue
            x, estimates = zip(*sorted(own, key=lambda point: point[0]), strict=True)
            band = {side: [getattr(estimate, side) for estimate in estimates] for side in ("low", "high")}
            lines.append(
                Line(_name(view, names), x, [estimate.value for estimate in estimates], style(view, names[0]), **band)
            )
        if any(len(line.x) > 1 for line in lines):
            panels.append(Panel(view.title(task), tuple(lines)))
    if not panels:
        return None
    caption = (
        "Each point is a budget; the union of trees of the usual size is a point of its own. Bands are 95% intervals."
    )
    title = f"Acceptance by nodes verified: {view.name}"
    return Picture(f"budget-{view.slug}", title, caption, (tuple(panels),), "nodes verified a step", "tokens a step")


def _name(view: View, names: Sequence[str]) -> str:
    """Of a family: its composition, the drafter of a single one, and what is not the default."""
    spec = view.specs[names[0]]
    is_of_some = spec.composition == SINGLE or list(spec.drafters) != view.drafters
    parts = [f"{spec.composition}:{'+'.join(spec.drafters)}" if is_of_some else spec.composition]
    if spec.composition == MERGED:
        kind = "by evidence" if spec.evidence_decay else "unweighted"
        parts.append("union" if spec.max_nodes is None else kind)
    return ", ".join([*parts, *([TOPK] if spec.drafting == TOPK else [])])
