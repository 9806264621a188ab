"""Merging by the weighted sum of the drafters' probabilities, beside the library's rule, the largest of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from taps_ext import ops
from taps_ext.composition import Composed, Composition
from taps_ext.tree import DraftTree


class SumMerging(Composition):
    """A node scores `log sum_k share_k exp(score_k)` over the drafters that propose it, with their shares of evidence.

    That is the probability which a mixture of the drafters gives the node's path. Children never outscore their
    parents: whoever proposes a node proposes its parent.
    """

    def __init__(self, max_nodes: int, decay: float | None = None) -> None:
        self.max_nodes = max_nodes
        self.decay = decay

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        def stack(name: str) -> Tensor:
            return torch.stack([getattr(tree, name) for tree in trees], dim=1)

        scores = stack("scores")
        if evidence is not None:
            scores[:, :, 1:] += evidence.log_softmax(dim=0).T[:, :, None]
        merged = ops.merge_trees(stack("tokens"), stack("parents"), scores, stack("num_nodes"))
        tree = merged.tree
        places = torch.where(merged.node_map < 0, tree.capacity, merged.node_map).flatten(1)
        sums = torch.zeros(tree.batch_size, tree.capacity + 1, dtype=torch.float64, device=scores.device)
        sums.scatter_add_(1, places, scores.flatten(1).double().exp())
        summed = sums[:, :-1].log().float()
        summed[:, 0] = 0
        return Composed(ops.prune_tree(replace(tree, scores=summed), self.max_nodes), None)
