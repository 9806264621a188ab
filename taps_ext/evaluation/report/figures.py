"""The numbers of a report: runs as views, a view one label at one temperature, and figures with intervals over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from ..variants import AVERAGE, MERGED, NAMES, PLAIN, SINGLE, Variant
from .cells import Cell, Key, Run, pooled
from .statistics import Array, Sampled, mean, ratio

ROUTING = tuple(name for name in NAMES if name not in (PLAIN, SINGLE, AVERAGE, MERGED))
TOPK = "topk"

Figure = Callable[[Cell], tuple[Array, Array]]  # numerators and denominators by question: a ratio of sums


def micro(cell: Cell) -> tuple[Array, Array]:
    """Acceptance length over all decode steps."""
    return cell.num_accepted + cell.num_steps, cell.num_steps


def macro(cell: Cell) -> tuple[Array, Array]:
    """The mean of the questions' own acceptance lengths; questions without a step are left out."""
    has_steps = cell.num_steps > 0
    lengths = np.divide(*micro(cell), out=np.zeros(len(cell.ids)), where=has_steps)
    return lengths, has_steps.astype(np.float64)


def tokens_per_second(cell: Cell) -> tuple[Array, Array]:
    """Emitted tokens over the questions' share of their batches' time."""
    return cell.tokens, cell.seconds


def forwards_per_token(cell: Cell) -> tuple[Array, Array]:
    """Target forwards, prefills included, over emitted tokens."""
    return cell.num_forwards, cell.tokens


def nodes_per_step(cell: Cell) -> tuple[Array, Array]:
    """Nodes that the target verified, root included."""
    return cell.nodes, cell.num_steps


def equal_to_plain(cell: Cell) -> tuple[Array, Array]:
    """Share of the turns whose tokens are plain decoding's."""
    return cell.equal, cell.turns


def accuracy(cell: Cell) -> tuple[Array, Array]:
    """Share of the scored turns whose answer is right."""
    return cell.right, cell.scored


class View:
    """The runs of one label at one temperature. Variants and tasks stand in the order of the first run with them."""

    def __init__(self, label: str, temperature: float, runs: Sequence[Run]) -> None:
        self.label, self.temperature, self.runs = label, temperature, tuple(runs)
        self._seeds: list[dict[str, str]] = []  # checksums of drafters by name: those that were evaluated together
        self._cells: dict[tuple[str, str], dict[int, list[Cell]]] = {}
        numbers = [self._seed_of(run) for run in runs]
        for run, number in zip(runs, numbers, strict=True):
            for key, cell in run.cells.items():
                if key.temperature == temperature:
                    own = self._cells.setdefault((key.variant, key.task), {})
                    own.setdefault(self._replicate(run, number, key.variant), []).append(cell)

    def _seed_of(self, run: Run) -> int:
        """The first drafter seed that has no other drafter by a name of the run's."""
        own = run.checksums()
        fits = (all(there.get(name, sha) == sha for name, sha in own.items()) for there in self._seeds)
        number = next((number for number, is_fit in enumerate(fits) if is_fit), len(self._seeds))
        if number == len(self._seeds):
            self._seeds.append({})
        self._seeds[number].update(own)
        return number

    def _replicate(self, run: Run, number: int, variant: str) -> int:
        """The drafter seed that all of the variant's drafters are of, wherever they came first; else the run's."""
        found = {
            next(place for place, there in enumerate(self._seeds) if there.get(name) == sha)
            for name, sha in run.checksums(variant).items()
        }
        return found.pop() if len(found) == 1 else number

    @property
    def name(self) -> str:
        """Of the view, for people."""
        return ", ".join([*([self.label] if self.label else []), f"T = {self.temperature:g}"])

    @property
    def slug(self) -> str:
        """Of the view, for files."""
        return "-".join([*([safe(self.label)] if self.label else []), f"t{self.temperature:g}"])

    @cached_property
    def specs(self) -> dict[str, Variant]:
        """Every variant with a cell here."""
        found: dict[str, Variant] = {}
        for run in self.runs:
            for name, facts in run.configuration["variants"].items():
                if any(variant == name for variant, _ in self._cells):
                    found.setdefault(name, Variant(name, **{**facts, "drafters": tuple(facts["drafters"])}))
        return found

    @cached_property
    def tasks(self) -> list[str]:
        """Every task with a cell here."""
        names = dict.fromkeys(task for run in self.runs for task in run.configuration["tasks"])
        return [name for name in names if any(task == name for _, task in self._cells)]

    @cached_property
    def drafters(self) -> list[str]:
        """Every drafter of the runs."""
        return list(dict.fromkeys(name for run in self.runs for name in run.configuration["drafters"]))

    @property
    def base_nodes(self) -> int:
        """Nodes of a tree of which nothing else is said."""
        return int(self.runs[0].configuration["settings"]["max_nodes"])

    def title(self, task: str) -> str:
        """A task's name for people."""
        facts = next(run.configuration["tasks"][task] for run in self.runs if task in run.configuration["tasks"])
        return str(facts["title"])

    def variants(self, *compositions: str) -> list[str]:
        """The variants of these compositions; of all but plain if none is given."""
        return [
            name
            for name, spec in self.specs.items()
            if (spec.composition in compositions if compositions else spec.composition != PLAIN)
        ]

    @cached_property
    def plain(self) -> str | None:
        """The variant that is plain decoding."""
        return next(iter(self.variants(PLAIN)), None)

    def nodes(self, variant: str) -> int | None:
        """A variant's node budget; None for merged trees without one, the union."""
        spec = self.specs[variant]
        return spec.max_nodes if spec.composition == MERGED else spec.max_nodes or self.base_nodes

    def told(self, variant: str) -> str:
        """The variant's name, and of a merged one whether it is the union or the usual number of nodes."""
        nodes = self.nodes(variant)
        if self.specs[variant].composition != MERGED or nodes not in (None, self.base_nodes):
            return variant
        return f"{variant} ({'union' if nodes is None else 'equal budget'})"

    def most_nodes(self, variant: str) -> int:
        """Nodes that a step verifies at most, root included."""
        return self.nodes(variant) or 1 + len(self.specs[variant].drafters) * (self.base_nodes - 1)

    def is_coupled(self, variant: str) -> bool:
        """Whether it drafts with the target's noise; below temperature 0 nothing does."""
        spec = self.specs[variant]
        return self.temperature > 0 and spec.drafting != TOPK and spec.composition not in (AVERAGE, PLAIN)

    def usual(self) -> list[str]:
        """Variants with trees of the usual size or the whole union, without the sweeps over budgets and weights."""
        sizes = (self.base_nodes, None)
        return [name for name in self.variants() if self.nodes(name) in sizes and self.specs[name].weight is None]

    def replicates(self, variant: str, task: str) -> list[int]:
        """Which drafter seeds it was run with."""
        return sorted(self._cells.get((variant, task), ()))

    def cell(self, variant: str, task: str, replicates: Iterable[int] | None = None) -> Cell | None:
        """The counts, pooled over replicates question by question."""
        own = self._cells.get((variant, task), {})
        parts = [cell for number in sorted(own if replicates is None else replicates) for cell in own.get(number, ())]
        return pooled(parts) if parts else None

    def shared(self, variants: Iterable[str], task: str) -> list[int]:
        """The drafter seeds that all of these variants have, but those that were not run on the task."""
        found = [set(own) for name in variants if (own := self.replicates(name, task))]
        return sorted(set.intersection(*found)) if found else []

    def aligned(self, variants: Sequence[str], task: str, replicates: Iterable[int] | None = None) -> list[Cell] | None:
        """Each variant's counts over the replicates (default: all) and questions that all of them have; None if there
        are none."""
        replicates = self.shared(variants, task) if replicates is None else list(replicates)
        found = [self.cell(name, task, replicates) for name in variants]
        cells = [cell for cell in found if cell is not None]
        return _common(cells) if cells and len(cells) == len(variants) else None

    def value(self, variant: str, task: str, figure: Figure, replicates: Iterable[int] | None = None) -> Sampled | None:
        """A variant's figure on a task; None where it was not run, or the figure has no value."""
        cell = self.cell(variant, task, replicates)
        return None if cell is None else _known(ratio(*figure(cell), task))

    def difference(self, one: str, other: str, task: str, figure: Figure = micro) -> Sampled | None:
        """one - other over the same questions and drafter seeds."""
        pair = self.aligned([one, other], task)
        return None if pair is None else _known(_of(pair[0], task, figure) - _of(pair[1], task, figure))

    def quotient(self, one: str, other: str, task: str, figure: Figure) -> Sampled | None:
        """one / other over the same questions of the same runs: what was measured in turn, in one process."""
        keys = [Key(name, task, self.temperature) for name in (one, other)]
        pairs = [[run.cells[key] for key in keys] for run in self.runs if all(key in run.cells for key in keys)]
        if not pairs:
            return None
        cells = _common([pooled(parts) for parts in zip(*pairs, strict=True)])
        return None if cells is None else _known(_of(cells[0], task, figure) / _of(cells[1], task, figure))

    def single(self, drafter: str, nodes: int | None = None, is_coupled: bool = True) -> str | None:
        """The drafter alone with trees of this size (default: the usual), coupled or top-k where there are both."""
        found = [
            name
            for name in self.variants(SINGLE)
            if self.specs[name].drafters == (drafter,) and self.nodes(name) == (nodes or self.base_nodes)
        ]
        return min(found, key=lambda name: self.is_coupled(name) != is_coupled, default=None)

    def singles(self, drafters: Iterable[str] | None = None, nodes: int | None = None) -> list[str]:
        """Of each drafter (default: of all) the variant that is it alone, where it was run."""
        found = [self.single(name, nodes) for name in (self.drafters if drafters is None else drafters)]
        return [name for name in found if name is not None]

    def extreme(self, variants: Sequence[str], task: str, is_best: bool = True) -> str | None:
        """Of these variants the one that accepts most on the task, or least, over the questions of all that were run
        on it; the first of equals."""
        there = [name for name in variants if self.replicates(name, task)]
        cells = self.aligned(there, task)
        if cells is None:
            return None
        figures = {name: _of(cell, task, micro).value for name, cell in zip(there, cells, strict=True)}
        values = {name: value if is_best else -value for name, value in figures.items() if np.isfinite(value)}
        return max(values, key=lambda name: values[name], default=None)


def safe(name: str) -> str:
    """A name for files."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _common(cells: Sequence[Cell]) -> list[Cell] | None:
    """Their counts over the questions that all have; None if there are none."""
    common = set.intersection(*(set(cell.ids) for cell in cells))
    ids = [name for name in cells[0].ids if name in common]
    return [cell.at(ids) for cell in cells] if ids else None


def _of(cell: Cell, task: str, figure: Figure) -> Sampled:
    return ratio(*figure(cell), task)


def _known(figure: Sampled) -> Sampled | None:
    return figure if np.isfinite(figure.value) else None


def mean_over(figures: Sequence[Sampled | None]) -> Sampled | None:
    """The mean over tasks; None unless every task has the figure, as another mean would compare unlike things."""
    known = [figure for figure in figures if figure is not None]
    return mean(known) if known and len(known) == len(figures) else None


def views(runs: Sequence[Run]) -> list[View]:
    """A view a label and temperature, those of a label together; ValueError for labels that files cannot tell apart."""
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    found: dict[str, View] = {}
    for label, own in by_label.items():
        for temperature in sorted({key.temperature for run in own for key in run.cells}):
            view = View(label, temperature, own)
            if (other := found.setdefault(view.slug, view)) is not view:
                raise ValueError(
                    f"{other.name!r} and {view.name!r} would have the same file names, *-{view.slug}; report them apart"
                )
    return list(found.values())
