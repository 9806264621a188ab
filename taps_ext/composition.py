"""Compositions: the policies that make one draft tree out of the trees of several drafters.

A composition sees draft trees and the evidence for each drafter, and nothing else: any drafter, any number of them.
Ties go to the first drafter. Dims: D drafters, B rows, N nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .tree import DraftTree

EVIDENCE_DECAY = 0.95  # per token: evidence from 45 tokens ago counts a tenth


@dataclass(frozen=True)
class Composed:
    """Hold the tree to verify, and the drafter that was chosen for each row."""

    tree: DraftTree  # with `proposers`
    choice: Tensor | None  # int64 [B], index of the drafter; None: all drafters took part


class Composition(ABC):
    """Combine draft trees: the base class of the policies."""

    decay: float | None = None  # per token, of the evidence that the policy uses; None: it uses none

    def choose(self, evidence: Tensor | None) -> Tensor | None:
        """Return the choice, int64 [B]: the one drafter per row that is to draft. None: all of them draft.

        Args:
            evidence: float32 [D, B], see `DrafterState`; None where `decay` is None.
        """
        return None

    @abstractmethod
    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        """Return one tree per row, from one tree per drafter; a drafter that did not draft brings only its root."""


class Single(Composition):
    """Verify the tree of the only drafter."""

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        return select_trees(trees[:1], torch.zeros_like(trees[0].num_nodes))


class ConfidenceRouting(Composition):
    """Verify the tree with the highest mean confidence, exp(score), over its drafted nodes.

    Source: TAPS (arXiv 2603.27027).
    """

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        means = torch.stack([mean_over_nodes(tree, tree.scores.exp()) for tree in trees])
        return select_trees(trees, means.nan_to_num(nan=-1.0).argmax(dim=0))


class EntropyRouting(Composition):
    """Verify the tree whose proposing distributions have the lowest mean entropy.

    Source: TAPS (arXiv 2603.27027).
    """

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        means = torch.stack([mean_over_nodes(tree, _entropies(tree)) for tree in trees])
        return select_trees(trees, means.nan_to_num(nan=float("inf")).argmin(dim=0))


class EvidenceRouting(Composition):
    """Verify the tree of the drafter that gave the text so far the highest discounted probability.

    The other drafters need not draft. Evidence is about committed text; confidence is a drafter's opinion of its own
    tree, which the noise of coupled drafting raises in every drafter.
    """

    def __init__(self, decay: float) -> None:
        self.decay: float = check_decay(decay)

    def choose(self, evidence: Tensor | None) -> Tensor:
        assert evidence is not None
        return evidence.argmax(dim=0)

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        return select_trees(trees, self.choose(evidence))


class Merging(Composition):
    """Verify the deduplicated union of all trees, or its best `max_nodes` nodes.

    With a `decay`, each drafter's scores are weighted by its share of the evidence before the nodes are ranked.

    Source: TAPS (arXiv 2603.27027), which merges without deduplication or budget.
    """

    def __init__(self, max_nodes: int | None = None, decay: float | None = None) -> None:
        self.max_nodes = max_nodes
        self.decay = None if decay is None else check_decay(decay)

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        tokens, parents, scores, num_nodes = _stacked(trees)
        if evidence is not None:
            scores[:, :, 1:] += evidence.log_softmax(dim=0).T[:, :, None]
        return Composed(ops.merge_trees(tokens, parents, scores, num_nodes, self.max_nodes).tree, None)


COMPOSITIONS: dict[str, Callable[[int | None, float | None], Composition]] = {
    "single": lambda max_nodes, decay: Single(),
    "confidence": lambda max_nodes, decay: ConfidenceRouting(),
    "entropy": lambda max_nodes, decay: EntropyRouting(),
    "evidence": lambda max_nodes, decay: EvidenceRouting(EVIDENCE_DECAY if decay is None else decay),
    "merged": lambda max_nodes, decay: _merging(max_nodes, decay),
}


def make_composition(name: str, max_nodes: int | None = None, evidence_decay: float | None = None) -> Composition:
    """Return the composition of that name; raise ValueError for options that it does not have.

    Args:
        name: a key of `COMPOSITIONS`.
        max_nodes: node budget of a merged tree; None: the whole union.
        evidence_decay: the factor by which evidence shrinks per token, 0.95 by default. "merged" weights its scores by
            evidence if it has a budget (`max_nodes`) or if a decay is given; 0 switches the weights off.
    """
    if name not in COMPOSITIONS:
        raise ValueError(f"composition must be one of {', '.join(COMPOSITIONS)}, got {name!r}")
    if max_nodes is not None and name != "merged":
        raise ValueError(f"max_nodes budgets a merged tree, got composition {name!r}; set TreeShape.max_nodes instead")
    if max_nodes is not None and max_nodes < 1:
        raise ValueError(f"max_nodes of the merged tree must be at least 1, got {max_nodes}")
    if evidence_decay is not None and name not in ("evidence", "merged"):
        raise ValueError(f"evidence_decay goes with composition evidence or merged, got {name!r}")
    return COMPOSITIONS[name](max_nodes, evidence_decay)


def select_trees(trees: Sequence[DraftTree], choice: Tensor) -> Composed:
    """Return, per row, the tree of the chosen drafter; `choice` is int64 [B], the trees share their capacity."""
    rows = torch.arange(len(choice), device=choice.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(tree, name) for tree in trees])[choice, rows]

    selected = DraftTree(pick("tokens"), pick("parents"), pick("scores"), pick("num_nodes"))
    proposers = torch.where(selected.is_node(), (torch.ones_like(choice) << choice)[:, None], 0)
    entropies = None if any(tree.entropies is None for tree in trees) else pick("entropies")
    return Composed(replace(selected, proposers=proposers, entropies=entropies), choice)


def add_tree(tree: DraftTree, other: DraftTree, proposer: int) -> DraftTree:
    """Return the union of a composed tree and another one of the same root, in as many slots as it may need.

    `proposer` is the bit mask of the other tree's nodes; those of the composed tree keep their own.
    """
    capacity = max(tree.capacity, other.capacity)
    tree = tree.padded(capacity)
    merged, node_map = ops.merge_trees(*_stacked([tree, other.padded(capacity)]))
    assert merged.proposers is not None and tree.proposers is not None
    places = node_map[:, 0]  # of the composed tree's nodes; -1: padding, which goes to a slot that is left out
    known = torch.nn.functional.pad(torch.zeros_like(merged.tokens), (0, 1))
    known.scatter_(1, torch.where(places < 0, merged.capacity, places), tree.proposers)
    return replace(merged, proposers=known[:, :-1] | torch.where(merged.proposers >= 2, proposer, 0))


def share_budget(tree: DraftTree, joint_budget: int) -> DraftTree:
    """Keep the best `joint_budget` nodes of all rows together, every root included; ties go to the first row and node.

    Nodes never outscore their parents, so the kept nodes are closed under ancestors. `joint_budget` is at least B.
    The target's forward still pads every row to the longest one (on a device, where the host does not know the longest
    row, to its possible length): what is saved is what lies beyond that.
    """
    is_drafted = tree.is_node()
    is_drafted[:, 0] = False
    scores = tree.scores.masked_fill(~is_drafted, -torch.inf)
    order = scores.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    is_kept = (ranks < joint_budget - tree.batch_size).view_as(scores)
    is_kept[:, 0] = True
    largest = min(tree.capacity, joint_budget - tree.batch_size + 1)
    return ops.prune_tree(replace(tree, scores=tree.scores.masked_fill(~is_kept, -torch.inf)), largest)


def mean_over_nodes(tree: DraftTree, values: Tensor) -> Tensor:
    """Return the mean of `values` [B, N] over the drafted nodes (root excluded), float32 [B]; NaN if there are none."""
    drafted = tree.is_node()
    drafted[:, 0] = False
    return torch.where(drafted, values, 0).sum(dim=1) / drafted.sum(dim=1)


def check_decay(decay: Any) -> float:
    """Return `decay` as a float; raise ValueError unless it lies above 0 and at most 1."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise ValueError(f"evidence_decay must be above 0 and at most 1, or 0 with merged, got {decay!r}")
    return float(decay)


def _stacked(trees: Sequence[DraftTree]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, parents, scores [B, D, N] and num_nodes [B, D] of trees that share their capacity."""

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(tree, name) for tree in trees], dim=1)

    return stack("tokens"), stack("parents"), stack("scores"), stack("num_nodes")


def _merging(max_nodes: int | None, decay: float | None) -> Merging:
    """Return a `Merging` that weights by evidence if it has a budget, or if a decay is given."""
    if decay is None and max_nodes is not None:
        decay = EVIDENCE_DECAY
    return Merging(max_nodes, None if decay == 0 else decay)


def _entropies(tree: DraftTree) -> Tensor:
    if tree.entropies is None:
        raise ValueError("entropy routing needs trees with entropies; this drafter proposes none")
    return tree.entropies
