"""Routing: each step, each row, one drafter's tree. Ties go to the first drafter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree import DraftTree
from .base import Composed, Composition, check_decay, choose, mean_over_nodes


class ConfidenceRouting(Composition):
    """The tree with the highest mean confidence, exp(score), over its nodes (TAPS, arXiv 2603.27027), if it has any."""

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        means = torch.stack([mean_over_nodes(tree, tree.scores.exp()) for tree in trees])
        return choose(trees, means.nan_to_num(nan=-1.0).argmax(dim=0))


class EntropyRouting(Composition):
    """The tree whose nodes were proposed by the distributions of lowest mean entropy (TAPS, arXiv 2603.27027)."""

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        means = torch.stack([mean_over_nodes(tree, _entropies(tree)) for tree in trees])
        return choose(trees, means.nan_to_num(nan=float("inf")).argmin(dim=0))


class EvidenceRouting(Composition):
    """The drafter that gave the text so far the highest discounted probability; the others need not draft at all.

    Unlike confidence it looks at what was accepted, not at what a drafter thinks of itself, which the noise of coupled
    drafting would raise in all of them.
    """

    def __init__(self, decay: float) -> None:
        self.decay: float = check_decay(decay)

    def choose(self, evidence: Tensor | None) -> Tensor:
        assert evidence is not None
        return evidence.argmax(dim=0)

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        return choose(trees, self.choose(evidence))


def _entropies(tree: DraftTree) -> torch.Tensor:
    if tree.entropies is None:
        raise ValueError("entropy routing needs trees with entropies; this drafter proposes none")
    return tree.entropies
