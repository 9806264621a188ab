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
    "Intervals hold 95% of 2,000 resamples of the questions. A row is a variant, named as it was asked for; the table "
    "of variants under provenance spells each out. @N: a step verifies at most N nodes, root included. merged: the "
    "union of its drafters' trees; merged@N: the best N nodes of the union, weighted by evidence of how well each "
    "drafter did so far, unweighted with evidence=0; with as many nodes as every other tree it is the comparison at "
    "equal budget. topk: drafted without a look at the target's noise, as averages always are; it differs above "
    "temperature 0 only."
)


def section(views: Sequence[View]) -> Section:
    """Micro and macro tables and a picture of each view."""
    tables = []
    for view in views:
        note = settings_note(view)
        micro_title, macro_title = TITLE, "Acceptance length, mean of the questions"
        extra = (
            (Column("node budget"), lambda variant, view=view: _budget(view, variant)),
            (Column("nodes verified a step", ".1f"), lambda variant, view=view: mean_nodes(view, variant)),
            (Column("drafter seeds", "d"), lambda variant, view=view: _num_seeds(view, variant)),
            (Column("range over seeds"), lambda variant, view=view: _seed_range(view, variant)),
        )
        shown = extra if any((_num_seeds(view, variant) or 0) > 1 for variant in view.variants()) else extra[:2]
        tables.append(variant_table(view, "acceptance", micro_title, note, of(view, micro), extra=shown))
        tables.append(variant_table(view, "acceptance-macro", macro_title, "", of(view, macro)))
    return Section("acceptance", TITLE, TEXT, tuple(tables), tuple(_picture(view) for view in views))


def settings_note(view: View) -> str:
    """What was the same for every row, and which cells are not complete."""
    settings = view.runs[0].configuration["settings"]
    note = (
        f"Trees of {settings['depth']} levels, {settings['branching']} children a node and {settings['max_nodes']} "
        f"nodes (root included) where the table says nothing else; at most {settings['max_new_tokens']} new tokens; "
        f"questions: {', '.join(f'{view.title(task)} {_num_questions(view, task)}' for task in view.tasks)}."
    )
    partial = [told for task in view.tasks if (told := _missing(view, task))]
    return note + (f" Not complete: {'; '.join(partial)}." if partial else "")


def _missing(view: View, task: str) -> str:
    """How many questions there are at least, and where; "" if everything is there."""
    asked = _num_questions(view, task)
    counts = {name: len(cell.ids) for name in view.specs if (cell := view.cell(name, task)) is not None}
    partial = [name for name, count in counts.items() if count < asked]
    if not partial:
        return ""
    where = "" if len(partial) == len(counts) else f" ({', '.join(partial)})"
    return f"{view.title(task)}, fewest {min(counts.values())} of {asked}{where}"


def _budget(view: View, variant: str) -> str:
    nodes = view.nodes(variant)
    return f"union, at most {view.most_nodes(variant)}" if nodes is None else str(nodes)


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
            Dot(view.told(variant), figure.estimate, style(view, variant))
            for variant in variants
            if (figure := view.value(variant, task, micro)) is not None
        ]
        best = view.extreme(view.singles(), task)
        value = None if best is None else view.value(best, task, micro)
        panels.append(Panel(view.title(task), tuple(dots), None if value is None else value.value))
    means = [(one, mean_over([view.value(one, task, micro) for task in view.tasks])) for one in variants]
    dots = [Dot(view.told(one), figure.estimate, style(view, one)) for one, figure in means if figure is not None]
    if len(view.tasks) > 1:
        panels.append(Panel(MEAN, tuple(dots)))
    return Picture(
        f"acceptance-{view.slug}",
        f"{TITLE}: {view.name}",
        "Trees of the usual size and the union, with 95% intervals; the dashed line is the best single drafter of the "
        "task. Hollow: top-k drafting, or merged trees without evidence. A figure is of all drafter seeds that its "
        "variant was run with: the table says of how many.",
        (tuple(panels),),
        x="tokens a step",
    )
