"""The paper's published figures beside ours, marked as such. They are facts: its tables for temperatures 0 and 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paper.drafting import base_nodes, is_coupled, marked, shared_seeds
from taps_ext.evaluation.counts import View
from taps_ext.evaluation.figures import Row, Table, acceptance_length, entry, value
from taps_ext.evaluation.report import Section
from taps_ext.evaluation.variants import AVERAGE, MERGED, SINGLE

SOURCE = "arXiv 2603.27027"
NODES = 60  # of its trees
TASKS = ("mt_bench", "gsm8k", "math500", "svamp")

Figures = tuple[float, float, float, float]

EAGLE_2: dict[float, dict[str, Figures]] = {
    0.0: {
        "MathInstruct": (2.54, 5.04, 5.28, 4.81),
        "ShareGPT": (3.57, 3.72, 3.81, 3.71),
        "Mixed 35k+35k": (3.37, 4.12, 4.44, 4.16),
        "Mixed 70k+70k": (3.75, 4.68, 4.85, 4.64),
        "Averaged": (2.07, 2.53, 2.57, 2.50),
        "Confidence routed": (3.63, 4.91, 5.25, 4.71),
        "Merged trees": (3.93, 5.32, 5.63, 5.25),
    },
    1.0: {
        "MathInstruct": (2.43, 4.71, 4.61, 4.53),
        "ShareGPT": (3.38, 3.72, 3.43, 3.65),
        "Mixed 35k+35k": (3.10, 4.08, 4.02, 4.03),
        "Mixed 70k+70k": (2.99, 3.76, 3.20, 3.08),
        "Averaged": (2.01, 2.49, 2.42, 2.45),
        "Confidence routed": (3.36, 4.65, 4.62, 4.46),
        "Merged trees": (3.55, 5.01, 4.79, 4.93),
    },
}
HASS: dict[float, dict[str, Figures]] = {
    0.0: {
        "MathInstruct": (2.90, 5.02, 5.35, 3.13),
        "ShareGPT": (3.98, 4.09, 3.98, 4.44),
        "Mixed 35k+35k": (3.92, 4.77, 5.02, 4.15),
        "Mixed 70k+70k": (4.13, 5.53, 5.67, 5.38),
        "Averaged": (2.29, 2.80, 3.12, 2.13),
        "Confidence routed": (3.93, 5.01, 5.37, 4.89),
        "Merged trees": (4.05, 5.42, 5.65, 5.31),
    },
    1.0: {
        "MathInstruct": (2.31, 4.75, 4.63, 2.46),
        "ShareGPT": (3.50, 4.03, 3.61, 3.95),
        "Mixed 35k+35k": (3.46, 4.66, 4.47, 4.57),
        "Mixed 70k+70k": (3.17, 4.16, 3.42, 4.01),
        "Averaged": (2.10, 2.78, 2.90, 2.69),
        "Confidence routed": (3.51, 4.72, 4.55, 4.71),
        "Merged trees": (3.76, 5.21, 4.98, 5.05),
    },
}
METHODS = {r"eagle[-_ ]?2(?!\d)": EAGLE_2, r"hass(?![a-z])": HASS}  # by the beginning of a label
SINGLES = {"math": "MathInstruct", "chat": "ShareGPT", "half": "Mixed 35k+35k", "full": "Mixed 70k+70k"}  # by drafter

TEXT = (
    f"Published ({SOURCE}) are of another target (8 billion parameters), other drafters and other training data "
    "(MathInstruct and ShareGPT); they are here for the pattern, not to compare values. There all EAGLE-2 rows, and "
    "HASS's routed and merged ones, are tokens over one step too few, 3 to 5% above the acceptance length defined here "
    "for answers of 20 to 30 steps; HASS's single and averaged drafters are a mean over questions. Rows may mix "
    "depths of 5 and 8 and answers of 512 and 1,024 tokens; merged trees verify 119 nodes where every other row has "
    "60. The paper drafts top-k, so above temperature 0 the row here is the top-k one where it was run. Figures here "
    "are of the drafter seeds that all rows of the table have."
)


def section(views: Sequence[View]) -> Section:
    """A table per view whose label names a published method, over the tasks that both have."""
    tables = [_table(view) for view in views]
    return Section("Beside the published figures", TEXT, [table for table in tables if len(table.rows)])


def _table(view: View) -> Table:
    theirs = of_label(view.label, view.temperature) if base_nodes(view) == NODES else {}
    tasks = [task for task in view.tasks if task in TASKS]
    ours = {name: variant for name in theirs if (variant := _variant(view, name)) is not None}
    rows: list[Row] = []
    for name, variant in ours.items() if tasks else ():
        row: Row = {"published row": name, "row here": marked(view, variant)}
        for task in tasks:
            own = value(view, variant, task, acceptance_length, shared_seeds(view, ours.values(), task))
            row |= {f"{view.tasks[task]}, published": theirs[name][TASKS.index(task)]}
            row |= entry(f"{view.tasks[task]}, here", own)
        rows.append(row)
    heads = [f"{view.tasks[task]}, {whose}" for task in tasks for whose in ("published", "here")]
    forms = {"published row": "", "row here": "", **dict.fromkeys(heads, ".2f")}
    return Table.of(f"published-{view.slug}", f"Beside the published figures: {view.name}", "", rows, forms)


def _variant(view: View, row: str) -> str | None:
    """The variant that does what a published row did, top-k where there is a difference."""
    names = [name for name in view.variants() if _published_row(view, name) == row]
    return min(names, key=lambda name: is_coupled(view, name), default=None)


def _published_row(view: View, variant: str) -> str | None:
    spec = view.specs[variant]
    if view.nodes(variant) not in (base_nodes(view), None):
        return None
    if spec.composition == SINGLE:
        return SINGLES.get(spec.drafters[0])
    if set(spec.drafters) != {"math", "chat"}:
        return None
    if spec.composition == AVERAGE:
        return "Averaged" if spec.weight is None else None
    if spec.composition == MERGED:
        return "Merged trees" if spec.max_nodes is None and not spec.evidence_decay else None
    return "Confidence routed" if spec.composition == "confidence" else None


def of_label(label: str, temperature: float) -> dict[str, Figures]:
    """The rows of the method that a label begins with, at that temperature; empty if the paper has none."""
    tables = (table for beginning, table in METHODS.items() if re.match(beginning, label.lower()))
    return next(tables, {}).get(temperature, {})
