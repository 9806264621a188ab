"""What the decode steps of a batch say: counts a step, and the confidences and entropies of accepted nodes and others.

Everything is computed over all steps, rows and nodes at once, after the clock has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decode.state import StepEvent
from ..tree import DraftTree

NUM_BINS = 100
SIGNALS = ("confidence", "entropy")
OUTCOMES = ("rejected", "accepted")


@dataclass(frozen=True)
class RowSteps:
    """The decode steps of one row, in order. Nodes are drafted ones, the root aside, unless it is said."""

    num_accepted: list[int]
    num_nodes: list[int]  # that the target verified, the root included
    num_proposed: list[int]  # summed over the nodes: how many drafters proposed each
    chosen: list[str | None]  # the drafter whose tree it was; None: a tree of several
    proposers: list[list[int]]  # the bit mask of each accepted node

    @classmethod
    def plain(cls, num_tokens: int) -> RowSteps:
        """Those of decoding without drafters: the first token is the prefill's."""
        count = max(num_tokens - 1, 0)
        return cls([0] * count, [1] * count, [0] * count, [None] * count, [[] for _ in range(count)])


@dataclass(frozen=True)
class Signals:
    """Histograms of what was known of each node before it was verified. Dims: B rows, D drafters."""

    counts: Tensor  # int64 [B, D, signals, outcomes, bins]
    sums: Tensor  # float64 [B, D, signals, outcomes], of the values themselves

    def to_dicts(self, drafters: Sequence[str]) -> list[dict[str, Any]]:
        """A row's histograms by drafter, signal and outcome, as JSON values."""
        rows = zip(self.counts.tolist(), self.sums.tolist(), strict=True)
        return [
            {
                drafter: {
                    signal: {outcome: _histogram(counts[d][s][o], sums[d][s][o]) for o, outcome in enumerate(OUTCOMES)}
                    for s, signal in enumerate(SIGNALS)
                }
                for d, drafter in enumerate(drafters)
            }
            for counts, sums in rows
        ]


def sum_signals(parts: Sequence[Signals]) -> Signals:
    """The histograms of several turns of the same rows as one's."""
    counts, sums = (torch.stack([getattr(part, name) for part in parts]) for name in ("counts", "sums"))
    return Signals(counts.sum(dim=0), sums.sum(dim=0))


def _histogram(counts: list[int], total: float) -> dict[str, Any]:
    bins = {str(place): count for place, count in enumerate(counts) if count}
    return {"count": sum(counts), "sum": round(total, 6), "bins": bins}


def bin_of_confidence(confidence: Tensor) -> Tensor:
    """int64: bins that are finer towards 0, where most nodes are."""
    return (NUM_BINS * confidence.pow(1 / 3)).long().clamp(0, NUM_BINS - 1)


def bin_of_entropy(entropy: Tensor) -> Tensor:
    """int64: a tenth of a nat each; the last is open."""
    return (10 * entropy).long().clamp(0, NUM_BINS - 1)


def analyse(events: Sequence[StepEvent], batch_size: int, num_drafters: int) -> tuple[list[RowSteps], Signals]:
    """Each row's steps, and its histograms, from the events of one call; the prefill's is no step."""
    steps = [event for event in events if event.tree is not None]
    if not steps:
        return [RowSteps.plain(1) for _ in range(batch_size)], _no_signals(batch_size, num_drafters)
    tree, path = _stacked(steps)
    is_drafted = tree.is_node()  # of a row that has ended, nothing but the root
    is_drafted[:, 0] = False
    assert tree.proposers is not None
    is_proposed = torch.stack([(tree.proposers >> drafter & 1).bool() & is_drafted for drafter in range(num_drafters)])
    is_accepted = torch.zeros(path.shape[0], path.shape[1] + 1, dtype=torch.bool)
    is_accepted.scatter_(1, torch.where(path >= 0, path, path.shape[1]), True)
    signals = _signals(tree, is_proposed, is_accepted[:, :-1], batch_size)
    masks = tree.proposers.gather(1, path[:, 1:].clamp_min(0))
    return _rows(steps, tree.num_nodes, is_proposed.sum(dim=(0, 2)), masks), signals


def _stacked(steps: Sequence[StepEvent]) -> tuple[DraftTree, Tensor]:
    """All steps' trees as one batch of S * B rows on the CPU, and the accepted paths in them, -1 behind."""
    trees: list[DraftTree] = [event.tree for event in steps if event.tree is not None]
    capacity = max(tree.capacity for tree in trees)
    trees = [tree.padded(capacity) for tree in trees]

    def cat(name: str) -> Any:
        values = [getattr(tree, name) for tree in trees]
        if all(value is None for value in values):
            return None
        # A tree of roots alone, in which nobody drafted, has no entropies.
        return torch.cat(
            [torch.zeros_like(t.scores) if v is None else v for t, v in zip(trees, values, strict=True)]
        ).cpu()

    names = ("tokens", "parents", "scores", "num_nodes", "proposers", "entropies")
    paths = [event.path for event in steps if event.path is not None]
    path = torch.cat([torch.nn.functional.pad(one, (0, capacity - one.shape[1]), value=-1) for one in paths])
    return DraftTree(**{name: cat(name) for name in names}), path.cpu()


def _signals(tree: DraftTree, is_proposed: Tensor, is_accepted: Tensor, batch_size: int) -> Signals:
    num_drafters = len(is_proposed)
    rows = torch.arange(len(is_accepted)) % batch_size
    cell = rows[:, None] * len(OUTCOMES) + is_accepted  # of a row and an outcome
    confidence = tree.scores.exp()
    found = {"confidence": (confidence, bin_of_confidence(confidence))}
    if tree.entropies is not None:
        found["entropy"] = (tree.entropies, bin_of_entropy(tree.entropies))
    empty = _no_signals(batch_size, num_drafters)
    for s, signal in enumerate(SIGNALS):
        for d in range(num_drafters if signal in found else 0):
            values, bins = (each[is_proposed[d]] for each in found[signal])
            cells, num_cells = cell[is_proposed[d]], batch_size * len(OUTCOMES)
            counts = torch.bincount(cells * NUM_BINS + bins, minlength=num_cells * NUM_BINS)
            empty.counts[:, d, s] = counts.view(batch_size, len(OUTCOMES), NUM_BINS)
            sums = torch.bincount(cells, weights=values.double(), minlength=num_cells)
            empty.sums[:, d, s] = sums.view(batch_size, len(OUTCOMES))
    return empty


def _no_signals(batch_size: int, num_drafters: int) -> Signals:
    shape = (batch_size, num_drafters, len(SIGNALS), len(OUTCOMES))
    return Signals(torch.zeros(*shape, NUM_BINS, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64))


def _rows(steps: Sequence[StepEvent], num_nodes: Tensor, num_proposed: Tensor, masks: Tensor) -> list[RowSteps]:
    """The steps row by row, without those after a row's end."""
    batch_size = len(steps[0].num_accepted)
    most = max(count or 0 for event in steps for count in event.num_accepted)
    columns = [
        values.view(len(steps), batch_size, -1).tolist() for values in (num_nodes, num_proposed, masks[:, :most])
    ]
    rows = [RowSteps([], [], [], [], []) for _ in range(batch_size)]
    for event, nodes, proposed, bits in zip(steps, *columns, strict=True):
        for b, (row, count, choice) in enumerate(zip(rows, event.num_accepted, event.choices, strict=True)):
            if count is not None:
                row.num_accepted.append(count)
                row.num_nodes.append(nodes[b][0])
                row.num_proposed.append(proposed[b][0])
                row.chosen.append(choice if isinstance(choice, str) else None)
                row.proposers.append(bits[b][:count])
    return rows
