"""Paired differences in acceptance length that the findings are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from paper.drafting import ROUTING, base_nodes, forms, is_coupled, most_nodes, of_kind, row
from taps_ext.evaluation.counts import View
from taps_ext.evaluation.figures import Picture, Sampled, Table, best, difference, dots
from taps_ext.evaluation.report import Section
from taps_ext.evaluation.variants import AVERAGE, MERGED, SINGLE

TEXT = (
    "Differences in acceptance length over the same questions and drafter seeds, with 95% intervals. Best (worst) "
    "specialist: the one that accepted most (least) of the drafters that the variant averages, routes or merges, "
    "drafting as it does (coupled or top-k); for a drafter alone, of those that any variant does. They are chosen with "
    "hindsight, which favours the best a little."
)

Choice = Callable[[str], "str | None"]  # the variant that stands for it on a task


@dataclass(frozen=True)
class Comparison:
    """`one` against `other`, in words and by task."""

    words: str
    one: str
    other: Choice
    is_drawn: bool = True  # else in the table alone, as it is so large that others would not be seen beside it


def section(views: Sequence[View]) -> Section:
    tables: list[Table] = []
    pictures: list[Picture] = []
    for view in views:
        found = {one: {task: _difference(view, one, task) for task in view.tasks} for one in comparisons(view)}
        known = [one for one, by_task in found.items() if any(by_task.values())]
        rows = [row(view, {"comparison": one.words}, found[one]) for one in known]
        note = "Best and worst are of the task; where both sides are the same variant nothing is compared."
        columns = forms(view, {"comparison": ""}, "+.2f")
        table, drawn = (
            Table.of(f"comparisons-{view.slug}", f"Comparisons: {view.name}", note, kept, columns)
            for kept in (rows, [part for one, part in zip(known, rows, strict=True) if one.is_drawn])
        )
        tables += [table] if rows else []
        if len(drawn.rows):
            caption = "Right of the dashed line the first accepts more. Larger differences are in the table alone."
            pictures.append(dots(drawn, caption, "tokens per step", 0.0))
    return Section("Comparisons", TEXT, tables, pictures)


def _difference(view: View, comparison: Comparison, task: str) -> Sampled | None:
    other = comparison.other(task)
    return None if other in (None, comparison.one) else difference(view, comparison.one, str(other), task)


def comparisons(view: View) -> list[Comparison]:
    """The pairs that there are variants for."""
    kinds = (_special, _merged, _weighted, _mixed, _averaged, _signals, _routed, _drafting)
    return [one for kind in kinds for one in kind(view)]


def _best(view: View, singles: Sequence[str], sign: int = 1) -> Choice:
    return lambda task: best(view, singles, task, sign)


def _always(variant: str) -> Choice:
    return lambda task: variant


def _specialists(view: View) -> list[str]:
    """The drafters that are composed; all where nothing is."""
    composed = {name for variant in view.variants(AVERAGE, *ROUTING, MERGED) for name in view.specs[variant].drafters}
    return [name for name in view.drafters if name in composed] or view.drafters


def _alone(view: View, variant: str, nodes: int | None = None) -> list[str]:
    """The variant's drafters alone, drafting as it does; empty unless all of them were run so."""
    drafters = view.specs[variant].drafters
    names = of_kind(view, drafters, is_coupled(view, variant), nodes)
    return names if len(names) == len(drafters) else []


def _special(view: View) -> Iterator[Comparison]:
    for coupled in (True, False):
        for one, other in combinations(of_kind(view, _specialists(view), coupled), 2):
            yield Comparison(f"{one} vs {other}", one, _always(other), is_drawn=False)


def _merged(view: View) -> Iterator[Comparison]:
    for variant in view.variants(MERGED):
        nodes = view.nodes(variant)
        size = nodes or base_nodes(view)
        if names := _alone(view, variant, size):
            kind = " (equal budget)" if size == base_nodes(view) else ""
            kind = kind if nodes else f" (union, at most {most_nodes(view, variant)} nodes)"
            yield Comparison(f"{variant}{kind} vs best specialist ({size} nodes)", variant, _best(view, names))


def _weighted(view: View) -> Iterator[Comparison]:
    """Merged trees with evidence against the same without."""
    budgeted = [name for name in view.variants(MERGED) if view.nodes(name)]
    for variant, other in ((one, two) for one in budgeted for two in budgeted):
        decays = view.specs[variant].evidence_decay, view.specs[other].evidence_decay
        if decays[0] and not decays[1] and _shape(view, variant) == _shape(view, other):
            yield Comparison(f"{variant} vs {other}", variant, _always(other))


def _shape(view: View, variant: str) -> tuple[object, ...]:
    spec = view.specs[variant]
    return spec.drafters, spec.max_nodes, spec.drafting


def _mixed(view: View) -> Iterator[Comparison]:
    experts = _specialists(view)
    rest = [name for name in view.drafters if name not in experts]
    for coupled in (True, False):
        if names := of_kind(view, experts, coupled):
            for variant in of_kind(view, rest, coupled):
                yield Comparison(f"{variant} vs best specialist", variant, _best(view, names))


def _averaged(view: View) -> Iterator[Comparison]:
    for variant in view.variants(AVERAGE):
        names = _alone(view, variant)
        if names and view.specs[variant].weight is None:
            for words, sign in (("best", 1), ("worst", -1)):
                choice = _best(view, names, sign)
                yield Comparison(f"{variant} vs {words} specialist", variant, choice, is_drawn=False)


def _signals(view: View) -> Iterator[Comparison]:
    """Routing signals against each other, where all else is the same."""
    routed = view.variants(*ROUTING)
    for one, other in ((one, other) for one in routed for other in routed):
        places = [ROUTING.index(view.specs[name].composition) for name in (one, other)]
        if places[0] > places[1] and _shape(view, one) == _shape(view, other):
            yield Comparison(f"{one} vs {other}", one, _always(other))


def _routed(view: View) -> Iterator[Comparison]:
    for variant in view.variants(*ROUTING):
        names = _alone(view, variant)
        if names and view.nodes(variant) == base_nodes(view):
            yield Comparison(f"{variant} vs best specialist", variant, _best(view, names))


def _drafting(view: View) -> Iterator[Comparison]:
    """Drafting with the target's noise against top-k."""
    for variant in view.variants(SINGLE, *ROUTING, MERGED):
        spec = view.specs[variant]
        for other in view.variants(spec.composition):
            rest = view.specs[other]
            shapes = [(part.drafters, part.max_nodes, part.evidence_decay) for part in (spec, rest)]
            if shapes[0] == shapes[1] and is_coupled(view, variant) and rest.drafting == "topk":
                yield Comparison(f"{variant} vs {other}", variant, _always(other), is_drawn=False)
