"""Paired differences: every variant against the best single drafter, and the pairs that the findings are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from ...variants import AVERAGE, MERGED, SINGLE
from ..figures import ROUTING, TOPK, View, mean_over
from ..pictures import INK, Dot, Panel, Picture, Style
from ..statistics import Sampled
from ..tables import Column, Entry, Table
from .base import MEAN, Section, variant_table

TITLE = "Paired differences"
TEXT = (
    "Differences in acceptance length over the same questions and drafter seeds, with 95% intervals of resampled "
    "questions: an interval without 0 is a difference. Best single: of all single drafters, the one that accepted most "
    "on the task. Best (worst) specialist: the one that accepted most (least) of the drafters that the variant "
    "averages, routes or merges, drafting as it does (coupled or top-k); for a drafter by itself, of those that any "
    "variant does. They are chosen with hindsight, which favours the best a little."
)

Choice = Callable[[str], "str | None"]  # the variant that stands for it on a task


@dataclass(frozen=True)
class Comparison:
    """`one` against `other`, in words and by task."""

    words: str
    one: Choice
    other: Choice
    is_drawn: bool = True  # else told in the table alone, as it is so large that others would not be seen beside it


def section(views: Sequence[View]) -> Section:
    """Two tables and a picture a view."""
    tables: list[Table] = []
    pictures = []
    for view in views:
        if not view.singles():
            continue
        tables.append(_against_best(view))
        compared = [(one, [_difference(view, one, task) for task in view.tasks]) for one in comparisons(view)]
        compared = [(one, found) for one, found in compared if any(part is not None for part in found)]
        tables.append(_named(view, compared))
        if (picture := _picture(view, compared)) is not None:
            pictures.append(picture)
    return Section("differences", TITLE, TEXT, tuple(tables), tuple(pictures))


def _against_best(view: View) -> Table:
    best = {task: view.extreme(view.singles(), task) for task in view.tasks}

    def difference(variant: str, task: str) -> Sampled | None:
        reference = best[task]
        return None if reference is None else view.difference(variant, reference, task)

    told = ", ".join(f"{view.title(task)} {name}" for task, name in best.items() if name is not None)
    title, note = "Against the best single of each task", f"Best single, of all single drafters: {told}."
    return variant_table(view, "against-best-single", title, note, difference, form="+.2f")


def _difference(view: View, comparison: Comparison, task: str) -> Sampled | None:
    one, other = comparison.one(task), comparison.other(task)
    return None if one is None or other is None or one == other else view.difference(one, other, task)


def comparisons(view: View) -> list[Comparison]:
    """The pairs that there are variants for."""
    return [*_special(view), *_merged(view), *_mixed(view), *_averaged(view), *_signals(view), *_drafting(view)]


def specialists(view: View) -> list[str]:
    """The drafters that are composed (averaged, routed or merged); all where nothing is."""
    composed = {name for variant in view.variants(AVERAGE, *ROUTING, MERGED) for name in view.specs[variant].drafters}
    return [name for name in view.drafters if name in composed] or view.drafters


def _always(variant: str) -> Choice:
    return lambda task: variant


def _best(view: View, singles: Sequence[str], is_best: bool = True) -> Choice:
    return lambda task: view.extreme(singles, task, is_best)


def _alone(view: View, variant: str, nodes: int | None = None) -> list[str]:
    """The variant's drafters by themselves, drafting as it does; empty unless all of them were run so."""
    drafters = view.specs[variant].drafters
    found = _of_kind(view, drafters, view.is_coupled(variant), nodes)
    return found if len(found) == len(drafters) else []


def _of_kind(view: View, drafters: Sequence[str], is_coupled: bool, nodes: int | None = None) -> list[str]:
    """The drafters by themselves, coupled or top-k as asked, where they were run so."""
    names = [view.single(drafter, nodes, is_coupled) for drafter in drafters]
    return [name for name in names if name is not None and view.is_coupled(name) == is_coupled]


def _special(view: View) -> Iterator[Comparison]:
    """Specialists against each other: how special are they?"""
    for is_coupled in (True, False):
        for one, other in combinations(_of_kind(view, specialists(view), is_coupled), 2):
            yield Comparison(f"{one} vs {other}", _always(one), _always(other), is_drawn=False)


def _merged(view: View) -> Iterator[Comparison]:
    for variant in view.variants(MERGED):
        nodes = view.nodes(variant)
        size = nodes or view.base_nodes
        if alone := _alone(view, variant, size):
            union = f"{variant} (union, at most {view.most_nodes(variant)} nodes)"
            words = f"{view.told(variant) if nodes else union} vs best specialist ({size} nodes)"
            yield Comparison(words, _always(variant), _best(view, alone))
    weighted = [name for name in view.variants(MERGED) if view.nodes(name) and view.specs[name].evidence_decay]
    for variant in weighted:
        spec = view.specs[variant]
        for other in view.variants(MERGED):
            rest = view.specs[other]
            same = (rest.drafters, rest.max_nodes, rest.drafting) == (spec.drafters, spec.max_nodes, spec.drafting)
            if same and not rest.evidence_decay:
                yield Comparison(f"{variant} vs {other}", _always(variant), _always(other))


def _mixed(view: View) -> Iterator[Comparison]:
    experts = specialists(view)
    rest = [name for name in view.drafters if name not in experts]
    for is_coupled in (True, False):
        if alone := _of_kind(view, experts, is_coupled):
            for variant in _of_kind(view, rest, is_coupled):
                yield Comparison(f"{variant} vs best specialist", _always(variant), _best(view, alone))


def _averaged(view: View) -> Iterator[Comparison]:
    for variant in view.variants(AVERAGE):
        alone = _alone(view, variant)
        if alone and view.specs[variant].weight is None:
            for words, is_best in (("best", True), ("worst", False)):
                choice = _best(view, alone, is_best)
                yield Comparison(f"{variant} vs {words} specialist", _always(variant), choice, is_drawn=False)


def _signals(view: View) -> Iterator[Comparison]:
    """Routing signals against each other, where all else is the same."""
    found = view.variants(*ROUTING)
    for one in found:
        for other in found:
            spec, rest = view.specs[one], view.specs[other]
            same = (spec.drafters, spec.max_nodes, spec.drafting) == (rest.drafters, rest.max_nodes, rest.drafting)
            if same and ROUTING.index(spec.composition) > ROUTING.index(rest.composition):
                yield Comparison(f"{one} vs {other}", _always(one), _always(other))
    for variant in found:
        alone = _alone(view, variant)
        if alone and view.nodes(variant) == view.base_nodes:
            yield Comparison(f"{variant} vs best specialist", _always(variant), _best(view, alone))


def _drafting(view: View) -> Iterator[Comparison]:
    """Drafting with the target's noise against top-k."""
    for variant in view.variants(SINGLE, *ROUTING, MERGED):
        spec = view.specs[variant]
        for other in view.variants(spec.composition):
            rest = view.specs[other]
            same = (rest.drafters, rest.max_nodes, rest.evidence_decay) == (
                *(spec.drafters, spec.max_nodes),
                spec.evidence_decay,
            )
            if same and view.is_coupled(variant) and rest.drafting == TOPK:
                yield Comparison(f"{variant} vs {other}", _always(variant), _always(other), is_drawn=False)


def _named(view: View, compared: Sequence[tuple[Comparison, Sequence[Sampled | None]]]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    has_mean = len(view.tasks) > 1
    for comparison, found in compared:
        figures = [*found, *([mean_over(found)] if has_mean else [])]
        rows.append((comparison.words, *(None if figure is None else figure.estimate for figure in figures)))
    heads = [*(view.title(task) for task in view.tasks), *([MEAN] if has_mean else [])]
    columns = (Column("comparison"), *(Column(head, "+.2f") for head in heads))
    note = "Best and worst are of the task; where both sides are the same variant nothing is compared."
    return Table(f"comparisons-{view.slug}", f"Comparisons: {view.name}", note, columns, tuple(rows))


def _picture(view: View, compared: Sequence[tuple[Comparison, Sequence[Sampled | None]]]) -> Picture | None:
    compared = [(one, found) for one, found in compared if one.is_drawn]
    if not compared:
        return None
    columns = {view.title(task): [found[index] for _, found in compared] for index, task in enumerate(view.tasks)}
    if len(view.tasks) > 1:
        columns[MEAN] = [mean_over(found) for _, found in compared]
    panels = []
    for title, figures in columns.items():
        pairs = zip(compared, figures, strict=True)
        dots = [Dot(one.words, figure.estimate, Style(INK)) for (one, _), figure in pairs if figure is not None]
        panels.append(Panel(title, tuple(dots), reference=0.0))
    caption = (
        "Differences in acceptance length with 95% intervals; right of the dashed line the first accepts more. Those "
        "of specialists, averages and kinds of drafting are larger and in the table alone."
    )
    title = f"Comparisons: {view.name}"
    return Picture(f"comparisons-{view.slug}", title, caption, (tuple(panels),), x="tokens a step")
