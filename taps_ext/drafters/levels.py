"""The levels of the trees that a group of drafters grows, and how they become draft trees.

Dims: R trees (drafter by drafter), F frontier nodes, K branching.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..tree import DraftTree, TreeShape


@dataclass(frozen=True)
class Level:
    """The nodes of one tree level, F * K of them, and the K of them that are expanded next."""

    tokens: Tensor  # int64 [R, F * K]
    parents: Tensor  # int64 [R, F * K], pool indices
    scores: Tensor  # float32 [R, F * K]
    entropies: Tensor  # float32 [R, F * K]
    frontier: Tensor  # int64 [R, K], indices into this level, best first
    frontier_parents: Tensor  # int64 [R, K], the parents' rows in the expanded layer, 0..F-1

    @classmethod
    def of(cls, expanded: ops.ExpandedFrontier, parent_nodes: Tensor) -> Level:
        """The level below the nodes `parent_nodes` (int64 [R, F], pool indices)."""
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
        """float32 [R, K], best first."""
        return self.scores.gather(1, self.frontier)


def is_complete(levels: list[Level], shape: TreeShape) -> Tensor:
    """bool [R]: no deeper node can enter the kept set, so that the tree is what it would be with all levels.

    A node scores at most its ancestors and loses ties to the nodes before it: below the best frontier score nothing is
    kept when as many nodes as the budget has score no less. Reading it makes the host wait for the device.
    """
    best = levels[-1].frontier_scores[:, 0]
    least = -torch.inf if shape.min_score is None else shape.min_score
    is_over = (best < least) | (best == -torch.inf)
    num_kept = shape.max_nodes - 1
    scores = torch.cat([level.scores for level in levels], dim=1)
    if num_kept == 0 or scores.shape[1] < num_kept:
        return is_over | (num_kept == 0)
    return is_over | (scores.topk(num_kept, dim=1).values[:, -1] >= best)


def to_tree(root_tokens: Tensor, levels: list[Level], shape: TreeShape, capacity: int) -> DraftTree:
    """The best nodes of all levels, in `capacity` slots; `root_tokens` int64 [R]."""
    tree = ops.prune_tree(_pool(root_tokens, levels, shape.min_score), shape.max_nodes)
    return tree.padded(capacity)


def capacity_of(shape: TreeShape, branching: int) -> int:
    """Slots of a tree that is grown to its full depth."""
    return min(shape.max_nodes, 1 + branching + (shape.depth - 1) * branching * branching)


def scatter_rows(into: DraftTree, rows: Tensor, tree: DraftTree) -> DraftTree:
    """`into` with the rows int64 [b] replaced by those of `tree`, of b rows and as many slots."""
    assert into.entropies is not None and tree.entropies is not None
    return DraftTree(
        tokens=into.tokens.index_copy(0, rows, tree.tokens),
        parents=into.parents.index_copy(0, rows, tree.parents),
        scores=into.scores.index_copy(0, rows, tree.scores),
        num_nodes=into.num_nodes.index_copy(0, rows, tree.num_nodes),
        entropies=into.entropies.index_copy(0, rows, tree.entropies),
    )


def split(trees: DraftTree, num_drafters: int, device: torch.device) -> list[DraftTree]:
    """The trees of each drafter, of those of all, drafter by drafter, on the device that asked for them."""
    assert trees.entropies is not None
    fields = (trees.tokens, trees.parents, trees.scores, trees.num_nodes, trees.entropies)
    return [
        DraftTree(tokens, parents, scores, num_nodes, entropies=entropies)
        for tokens, parents, scores, num_nodes, entropies in zip(
            *(field.to(device).chunk(num_drafters) for field in fields), strict=True
        )
    ]


def _pool(root_tokens: Tensor, levels: list[Level], min_score: float | None) -> DraftTree:
    """All nodes drafted, root first, level by level; those below `min_score` as if not there."""
    root = torch.zeros_like(levels[0].scores[:, :1])
    tokens = torch.cat([root_tokens[:, None], *(level.tokens for level in levels)], dim=1)
    scores = torch.cat([root, *(level.scores for level in levels)], dim=1)
    if min_score is not None:
        scores = scores.masked_fill(scores < min_score, -torch.inf)
    return DraftTree(
        tokens=tokens,
        parents=torch.cat([torch.full_like(root_tokens[:, None], -1), *(level.parents for level in levels)], dim=1),
        scores=scores,
        num_nodes=torch.full_like(root_tokens, tokens.shape[1]),
        entropies=torch.cat([root, *(level.entropies for level in levels)], dim=1),
    )
