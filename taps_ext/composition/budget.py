"""One node budget for a whole batch: its best nodes, wherever they are."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import ops
from ..tree import DraftTree


def share_budget(tree: DraftTree, joint_budget: int) -> DraftTree:
    """The best `joint_budget` nodes of all rows together, every root included; ties to the first row, the first node.

    Nodes never outscore their parents, so that what is kept is closed under ancestors. `joint_budget` is at least B.
    The rows stay padded to one another in the target's forward: what is saved is what a row does not verify beyond
    the longest one, or on a device, where nobody knows that one, beyond what it could be.
    """
    is_drafted = tree.is_node()
    is_drafted[:, 0] = False
    scores = tree.scores.masked_fill(~is_drafted, -torch.inf)
    order = scores.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    is_kept = (ranks < joint_budget - tree.batch_size).view_as(scores)
    is_kept[:, 0] = True
    most = min(tree.capacity, joint_budget - tree.batch_size + 1)
    return ops.prune_tree(replace(tree, scores=tree.scores.masked_fill(~is_kept, -torch.inf)), most)
