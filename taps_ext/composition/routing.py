"""Routing: each step, each row, one drafter's tree. Ties go to the first drafter; a tree without nodes never wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tree import DraftTree
from .base import Composed, choose, mean_over_nodes


class ConfidenceRouting:
    """The tree with the highest mean confidence, exp(score), over its nodes (TAPS, arXiv 2603.27027)."""

    def compose(self, trees: Sequence[DraftTree]) -> Composed:
        means = torch.stack([mean_over_nodes(tree, tree.scores.exp()) for tree in trees])
        return choose(trees, means.nan_to_num(nan=-1.0).argmax(dim=0))


class EntropyRouting:
    """The tree whose nodes were proposed by the distributions of lowest mean entropy (TAPS, arXiv 2603.27027)."""

    def compose(self, trees: Sequence[DraftTree]) -> Composed:
        means = torch.stack([mean_over_nodes(tree, _entropies(tree)) for tree in trees])
        return choose(trees, means.nan_to_num(nan=float("inf")).argmin(dim=0))


def _entropies(tree: DraftTree) -> torch.Tensor:
    if tree.entropies is None:
        raise ValueError("entropy routing needs trees with entropies; this drafter proposes none")
    return tree.entropies
