"""The levels of growing draft trees, and how they become trees.

Dims: R trees (drafter by drafter), F frontier nodes, K branching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..tree import DraftTree, TreeShape


@dataclass(frozen=True)
class Level:
    """Hold the F * K nodes of one tree level, and which K of them are expanded next.

    All drafted nodes, root first and level by level, are the *pool*: parents are indices into it.
    """

    tokens: Tensor  # int64 [R, F * K]
    parents: Tensor  # int64 [R, F * K], pool indices
    scores: Tensor  # float32 [R, F * K]
    entropies: Tensor  # float32 [R, F * K]
    frontier: Tensor  # int64 [R, K], indices into this level, best first
    frontier_parents: Tensor  # int64 [R, K], the parents' rows in the expanded layer, 0..F-1

    @classmethod
    def of(cls, expanded: ops.ExpandedFrontier, parent_nodes: Tensor) -> Level:
        """Return the level below the nodes `parent_nodes` (int64 [R, F], pool indices)."""
        branching = expanded.tokens.shape[2]
        return cls(
            tokens=expanded.tokens.flatten(1),
            parents=parent_nodes.repeat_interleave(branching, dim=1),
            scores=expanded.scores.flatten(1),
            entropies=expanded.entropies.repeat_interleave(branching, dim=1),
            frontier=expanded.frontier,
            frontier_parents=expanded.frontier // branching,
        )

    @property
    def frontier_scores(self) -> Tensor:
        """Scores of the frontier, float32 [R, K], best first."""
        return self.scores.gather(1, self.frontier)


def is_complete(levels: Sequence[Level], shape: TreeShape) -> Tensor:
    """Return bool [R]: whether no deeper node can be kept, so that the tree is what it would be with all levels.

    A node scores at most its ancestors and loses ties to the nodes before it. So nothing below the best frontier score
    is kept once as many nodes as the budget score no less. Reading the result makes the host wait for the device.
    """
    best = levels[-1].frontier_scores[:, 0]
    least = -torch.inf if shape.min_score is None else shape.min_score
    is_over = (best < least) | (best == -torch.inf)
    num_kept = shape.max_nodes - 1
    scores = torch.cat([level.scores for level in levels], dim=1)
    if num_kept == 0 or scores.shape[1] < num_kept:
        return is_over | (num_kept == 0)
    return is_over | (scores.topk(num_kept, dim=1).values[:, -1] >= best)


def best_nodes(root_tokens: Tensor, levels: Sequence[Level], shape: TreeShape) -> DraftTree:
    """Return the trees of the best `shape.max_nodes` nodes of all levels; `root_tokens` is int64 [R]."""
    root = torch.zeros_like(levels[0].scores[:, :1])
    tokens = torch.cat([root_tokens[:, None], *(level.tokens for level in levels)], dim=1)
    scores = torch.cat([root, *(level.scores for level in levels)], dim=1)
    if shape.min_score is not None:
        scores = scores.masked_fill(scores < shape.min_score, -torch.inf)  # prune_tree drops them
    pool = DraftTree(
        tokens=tokens,
        parents=torch.cat([torch.full_like(root_tokens[:, None], -1), *(level.parents for level in levels)], dim=1),
        scores=scores,
        num_nodes=torch.full_like(root_tokens, tokens.shape[1]),
        entropies=torch.cat([root, *(level.entropies for level in levels)], dim=1),
    )
    return ops.prune_tree(pool, shape.max_nodes)
