"""Which variants draft alike: drafters alone, coupled or top-k, with the same nodes; and rows over the tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from taps_ext.composition import COMPOSITIONS
from taps_ext.evaluation.counts import View
from taps_ext.evaluation.figures import MEAN, Row, Sampled, entry, mean_over
from taps_ext.evaluation.variants import AVERAGE, MERGED, PLAIN, SINGLE

ROUTING = tuple(name for name in COMPOSITIONS if name not in (SINGLE, MERGED))


def base_nodes(view: View) -> int:
    """Nodes of a tree of which nothing else is said."""
    return int(view.settings["max_nodes"])


def most_nodes(view: View, variant: str) -> int:
    """Nodes that a step verifies at most, root included."""
    return view.nodes(variant) or 1 + len(view.specs[variant].drafters) * (base_nodes(view) - 1)


def is_coupled(view: View, variant: str) -> bool:
    """Whether it drafts with the target's noise; at temperature 0 nothing does."""
    spec = view.specs[variant]
    return view.temperature > 0 and spec.drafting != "topk" and spec.composition not in (AVERAGE, PLAIN)


def marked(view: View, variant: str) -> str:
    """The name, marked where it drafts coupled."""
    return f"{variant} (coupled)" if is_coupled(view, variant) else variant


def single(view: View, drafter: str, nodes: int | None = None, coupled: bool = True) -> str | None:
    """The drafter alone with trees of this size (default: the usual), coupled or top-k where there are both."""
    names = [name for name in view.variants(SINGLE) if view.specs[name].drafters == (drafter,)]
    names = [name for name in names if view.nodes(name) == (nodes or base_nodes(view))]
    return min(names, key=lambda name: is_coupled(view, name) != coupled, default=None)


def of_kind(view: View, drafters: Iterable[str], coupled: bool, nodes: int | None = None) -> list[str]:
    """The drafters alone, coupled or top-k as asked, where they were run so."""
    names = [single(view, drafter, nodes, coupled) for drafter in drafters]
    return [name for name in names if name is not None and is_coupled(view, name) == coupled]


def alone(view: View, drafters: Sequence[str], nodes: int, coupled: bool) -> list[str]:
    """Each of the drafters alone, all coupled or all top-k, as asked where there are both; empty if one is missing."""
    kinds = [of_kind(view, drafters, kind, nodes) for kind in (coupled, not coupled)]
    return next((names for names in kinds if len(names) == len(drafters)), [])


def shared_seeds(view: View, variants: Iterable[str], task: str) -> list[int]:
    """The drafter seeds that all of these variants have, but those that were not run on the task."""
    found = [set(seeds) for name in variants if (seeds := view.seeds(name, task))]
    return sorted(set.intersection(*found)) if found else []


def row(view: View, first: Row, by_task: Mapping[str, Sampled | None]) -> Row:
    """A row's beginning, its figures by task, and their mean."""
    found = {view.tasks[task]: figure for task, figure in by_task.items()}
    if len(found) > 1:
        found[MEAN] = mean_over(list(by_task.values()))
    return first | {head: part for title, figure in found.items() for head, part in entry(title, figure).items()}


def forms(view: View, first: Mapping[str, str], form: str) -> dict[str, str]:
    """The headings and formats of such rows."""
    return {**first, **dict.fromkeys([*view.tasks.values(), *([MEAN] if len(view.tasks) > 1 else [])], form)}
