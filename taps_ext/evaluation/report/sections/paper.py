"""The paper's published figures beside ours, marked as such."""

from __future__ import annotations

from collections.abc import Sequence

from .. import published
from ..figures import AVERAGE, MERGED, SINGLE, View, micro
from ..tables import Column, Entry, Table
from .base import Section

TITLE = "Beside the published figures"
TEXT = (
    f"Published ({published.SOURCE}) are another target (8 billion parameters), other drafters and training data, "
    "and an acceptance length counted over one step too few; they are here for the pattern, not to compare values. "
    "Their merged trees verify 119 nodes where every other row has 60. The paper drafts top-k, so above temperature 0 "
    "the row here is the top-k one where it was run."
)


def section(views: Sequence[View]) -> Section:
    """A table a view whose label names a published method, over the tasks that both have."""
    tables = [_table(view) for view in views]
    return Section("published", TITLE, TEXT, tuple(table for table in tables if table is not None))


def _table(view: View) -> Table | None:
    theirs = published.of_label(view.label, view.temperature)
    tasks = [task for task in view.tasks if task in published.TASKS]
    rows: list[tuple[Entry, ...]] = []
    for name, figures in theirs.items():
        variant = _variant(view, name)
        if variant is not None:
            row: list[Entry] = [name, variant]
            for task in tasks:
                own = view.value(variant, task, micro)
                row += [figures[published.TASKS.index(task)], None if own is None else own.estimate]
            rows.append(tuple(row))
    if not rows or not tasks:
        return None
    heads = [f"{view.title(task)}, {whose}" for task in tasks for whose in ("published", "here")]
    columns = (Column("published row"), Column("row here"), *(Column(head, ".2f") for head in heads))
    return Table(f"published-{view.slug}", f"{TITLE}: {view.name}", "", columns, tuple(rows))


def _variant(view: View, row: str) -> str | None:
    """The variant that does what a published row did, top-k where there is a difference."""
    found = [name for name in view.variants() if _published_row(view, name) == row]
    return min(found, key=view.is_coupled, default=None)


def _published_row(view: View, variant: str) -> str | None:
    spec = view.specs[variant]
    if view.nodes(variant) not in (view.base_nodes, None):
        return None
    if spec.composition == SINGLE:
        return published.SINGLES.get(spec.drafters[0])
    if spec.drafters != ("math", "chat") and spec.drafters != ("chat", "math"):
        return None
    if spec.composition == AVERAGE:
        return "Averaged" if spec.weight is None else None
    if spec.composition == MERGED:
        return "Merged trees" if spec.max_nodes is None and not spec.evidence_decay else None
    return "Confidence routed" if spec.composition == "confidence" else None
