"""Merging: verify the union of all drafters' trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import ops
from ..tree import DraftTree
from .base import Composed


class Merging:
    """The deduplicated union of all trees, or its best `max_nodes` nodes (TAPS, arXiv 2603.27027, merges without
    deduplication or budget)."""

    def __init__(self, max_nodes: int | None = None) -> None:
        self.max_nodes = max_nodes

    def compose(self, trees: Sequence[DraftTree]) -> Composed:
        def stack(name: str) -> torch.Tensor:
            return torch.stack([getattr(tree, name) for tree in trees], dim=1)

        merged = ops.merge_trees(stack("tokens"), stack("parents"), stack("scores"), stack("num_nodes"), self.max_nodes)
        return Composed(merged.tree, None)
