"""What is counted of each question; a cell, one variant on one task at one temperature; a run, a folder's cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from .statistics import Array


@dataclass(frozen=True, eq=False)
class Signal:
    """A drafter's confidence or entropy over the nodes it drafted: sums a question [Q], and all nodes' histograms."""

    num_accepted: Array
    accepted: Array  # the signal summed over accepted nodes
    num_rejected: Array
    rejected: Array
    pairs: Array  # of an accepted and a rejected node of the same run and question
    won: Array  # those of them in which the accepted node's is higher, ties half
    bins: Array  # [2, NUM_BINS], of all questions: accepted, rejected

    @classmethod
    def of(cls, sums: Iterable[Array], bins: Array) -> Signal:
        """Of the sums in the order of the fields, and the histograms."""
        return cls(**dict(zip(SUMS, sums, strict=True)), bins=bins)


SUMS = ("num_accepted", "accepted", "num_rejected", "rejected", "pairs", "won")


@dataclass(frozen=True, eq=False)
class Cell:
    """Counts by question, summed over its turns; float64 arrays of whole numbers (but seconds and signals).

    >>> cell.num_steps + cell.num_accepted  # the tokens of all decode steps, [Q]; over num_steps: the acceptance length
    """

    ids: tuple[str, ...]
    drafters: tuple[str, ...]  # the axis D
    depths: Array  # [Q, K]: steps that accepted 0, 1, ... draft tokens
    turns: Array  # [Q]
    tokens: Array  # [Q], emitted
    seconds: Array  # [Q], a question's share of its batches' time
    nodes: Array  # [Q], verified, roots included
    proposed: Array  # [Q], drafted nodes, each as often as drafters proposed it
    equal: Array  # [Q], turns whose tokens are plain decoding's
    scored: Array  # [Q], turns with a reference
    right: Array  # [Q], turns answered as the reference says
    chosen: Array  # [Q, D], steps in which the drafter was chosen
    proposers: Array  # [Q, D], accepted nodes that the drafter proposed
    alone: Array  # [Q, D], accepted nodes that nobody else proposed
    signals: Mapping[str, Signal] = field(default_factory=dict)  # of a single drafter's run, by name

    @property
    def num_steps(self) -> Array:
        """Decode steps, [Q]; the prefill is none."""
        return np.asarray(self.depths.sum(axis=1))

    @property
    def num_accepted(self) -> Array:
        """Accepted draft tokens, [Q]."""
        return np.asarray(self.depths @ np.arange(self.depths.shape[1], dtype=np.float64))

    @property
    def num_forwards(self) -> Array:
        """Target forwards of the question's row, [Q]: its steps and a prefill a turn."""
        return self.num_steps + self.turns

    def at(self, ids: Sequence[str]) -> Cell:
        """These questions, in this order; the signals' histograms stay those of all."""
        if tuple(ids) == self.ids:
            return self
        place = {name: index for index, name in enumerate(self.ids)}
        rows = [place[name] for name in ids]
        signals = {
            name: Signal.of((getattr(signal, part)[rows] for part in SUMS), signal.bins)
            for name, signal in self.signals.items()
        }
        return replace(self, ids=tuple(ids), signals=signals, **{name: getattr(self, name)[rows] for name in COUNTS})


COUNTS = tuple(part.name for part in fields(Cell) if part.name not in ("ids", "drafters", "signals"))


def pooled(cells: Sequence[Cell]) -> Cell:
    """The cells' counts added question by question, over the questions of any; drafters are those of the first."""
    if len(cells) == 1:
        return cells[0]
    ids = tuple(dict.fromkeys(name for cell in cells for name in cell.ids))
    place = {name: index for index, name in enumerate(ids)}
    rows = [np.array([place[name] for name in cell.ids], dtype=np.int64) for cell in cells]

    def total(parts: Sequence[Array]) -> Array:
        width = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
        out = np.zeros((len(ids), *width))
        for where, part in zip(rows, parts, strict=True):
            index = (where,) if part.ndim == 1 else (where, slice(part.shape[1]))
            out[index] += part
        return out

    counts = {name: total([getattr(cell, name) for cell in cells]) for name in COUNTS}
    signals = {name: _pooled_signal([cell.signals[name] for cell in cells], total) for name in cells[0].signals}
    return Cell(ids, cells[0].drafters, **counts, signals=signals)


def _pooled_signal(parts: Sequence[Signal], total: Callable[[Sequence[Array]], Array]) -> Signal:
    sums = [total([getattr(part, name) for part in parts]) for name in SUMS]
    return Signal.of(sums, np.sum([part.bins for part in parts], axis=0))


@dataclass(frozen=True, order=True)
class Key:
    """Which cell it is, within a run."""

    variant: str
    task: str
    temperature: float


@dataclass(frozen=True, eq=False)
class Run:
    """A results folder: what it was asked, where it ran, and its cells."""

    configuration: Mapping[str, Any]  # run.json but its provenance
    provenance: Mapping[str, Any]
    cells: Mapping[Key, Cell]

    @property
    def label(self) -> str:
        """The name of what is compared, such as EAGLE-2; runs of a label with other drafters are its replicates."""
        return str(self.configuration["label"])

    def checksums(self, variant: str | None = None) -> dict[str, str]:
        """Of the drafters that take part in the variant, by name; of all without one."""
        drafters = self.configuration["drafters"]
        names = drafters if variant is None else self.configuration["variants"][variant]["drafters"]
        return {name: str(drafters[name]["sha256"]) for name in names}
