"""Merging: verify the union of all drafters' trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..tree import DraftTree
from .base import Composed, Composition, check_decay


class Merging(Composition):
    """The deduplicated union of all trees, or its best `max_nodes` nodes (TAPS, arXiv 2603.27027, merges without
    deduplication or budget). With a `decay`, scores are weighted by each drafter's share of the evidence."""

    def __init__(self, max_nodes: int | None = None, decay: float | None = None) -> None:
        self.max_nodes = max_nodes
        self.decay = None if decay is None else check_decay(decay)

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        def stack(name: str) -> Tensor:
            return torch.stack([getattr(tree, name) for tree in trees], dim=1)

        scores = stack("scores")
        if evidence is not None:
            scores[:, :, 1:] += evidence.log_softmax(dim=0).T[:, :, None]
        merged = ops.merge_trees(stack("tokens"), stack("parents"), scores, stack("num_nodes"), self.max_nodes)
        return Composed(merged.tree, None)
