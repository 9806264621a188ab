"""The main tables: acceptance length by variant and task."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures import View, macro, mean_over, micro
from ..pictures import Dot, Panel, Picture
from ..tables import Column, Entry
from .base import MEAN, Section, mean_nodes, of, style, variant_table

TITLE = "Acceptance length"
TEXT = (
    "Tokens that a decode step adds: accepted draft tokens and the target's own one, over all steps of all questions "
    "(micro), or as the mean of the questions' own acceptance lengths (macro). The prefill and its token are no step. "
    "Intervals hold 95% of 2,000 resamples of the questions."
)


def section(views: Sequence[View]) -> Section:
    """Micro and macro tables of each view, and a picture of the first."""
    tables = []
    for view in views:
        note = settings_note(view)
        micro_title, macro_title = TITLE, "Acceptance length, mean of the questions"
        extra = (
            (Column("nodes verified a step", ".1f"), lambda variant, view=view: mean_nodes(view, variant)),
            (Column("drafter seeds", "d"), lambda variant, view=view: _num_seeds(view, variant)),
            (Column("range over seeds"), lambda variant, view=view: _seed_range(view, variant)),
        )
        shown = extra if any((_num_seeds(view, variant) or 0) > 1 for variant in view.variants()) else extra[:1]
        tables.append(variant_table(view, "acceptance", micro_title, note, of(view, micro), extra=shown))
        tables.append(variant_table(view, "acceptance-macro", macro_title, note, of(view, macro)))
    return Section("acceptance", TITLE, TEXT, tuple(tables), tuple(_picture(view) for view in views))


def settings_note(view: View) -> str:
    """What was the same for every row, and which cells are not complete."""
    settings = view.runs[0].configuration["settings"]
    note = (
        f"Trees of {settings['depth']} levels, {settings['branching']} children a node and {settings['max_nodes']} "
        f"nodes (root included) unless the row says otherwise (@N); at most {settings['max_new_tokens']} new tokens; "
        f"questions: {', '.join(f'{view.title(task)} {_num_questions(view, task)}' for task in view.tasks)}."
    )
    partial = [
        f"{variant} on {view.title(task)} has {len(cell.ids)}"
        for variant in view.specs
        for task in view.tasks
        if (cell := view.cell(variant, task)) is not None and len(cell.ids) < _num_questions(view, task)
    ]
    return note + (f" Not complete: {'; '.join(partial)}." if partial else "")


def _num_questions(view: View, task: str) -> int:
    counts = [
        run.configuration["tasks"][task]["num_questions"] for run in view.runs if task in run.configuration["tasks"]
    ]
    return int(max(counts))


def _num_seeds(view: View, variant: str) -> int | None:
    return max((len(view.replicates(variant, task)) for task in view.tasks), default=None)


def _seed_range(view: View, variant: str) -> Entry:
    """The least and the greatest mean over tasks of one drafter seed."""
    seeds = sorted({seed for task in view.tasks for seed in view.replicates(variant, task)})
    means = [mean_over([view.value(variant, task, micro, [seed]) for task in view.tasks]) for seed in seeds]
    values = [figure.value for figure in means if figure is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else None


def _picture(view: View) -> Picture:
    variants = view.usual()
    panels = []
    for task in view.tasks:
        dots = [
            Dot(variant, figure.estimate, style(view, variant))
            for variant in variants
            if (figure := view.value(variant, task, micro)) is not None
        ]
        best = view.extreme(view.singles(), task)
        value = None if best is None else view.value(best, task, micro)
        panels.append(Panel(view.title(task), tuple(dots), None if value is None else value.value))
    means = [(one, mean_over([view.value(one, task, micro) for task in view.tasks])) for one in variants]
    dots = [Dot(one, figure.estimate, style(view, one)) for one, figure in means if figure is not None]
    if len(view.tasks) > 1 and dots:
        panels.append(Panel(MEAN, tuple(dots)))
    return Picture(
        f"acceptance-{view.slug}",
        f"{TITLE}: {view.name}",
        "Trees of the usual size and the union, with 95% intervals; the dashed line is the best single drafter of the "
        "task. Hollow: top-k drafting, or merged trees without evidence.",
        (tuple(panels),),
        x="tokens a step",
    )
