"""Trees of one shape for every step: which node has how many children, chosen by how often each child is accepted.

Source: the positional acceptance assumption of Sequoia (arXiv 2402.12374): whether the r-th child that was sampled at
a node is accepted depends on r (here also on the node's depth) alone. Then the expected number of accepted tokens is
the sum over the nodes of the product of the rates on their paths. No node is worth more than its parent or its elder
sibling, so the best tree of N nodes is made of the N most valuable ones, and needs no dynamic programme.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Rates = Sequence[Sequence[float]]  # [depth of the parent][rank]: how often this child of a visited node is accepted
PRIOR_WEIGHT = 4.0  # visits that a rate's prior counts as
FIRST_RATE = 0.6  # before anything is known: each child is accepted with this probability if none before it was


@dataclass(frozen=True)
class StaticTree:
    """A parent array, level by level, the children of a node side by side in the order of their ranks."""

    parents: tuple[int, ...]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of each node, by rank."""
        found: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents[1:], start=1):
            found[parent].append(node)
        return tuple(map(tuple, found))

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """The nodes that have children: those that the drafter expands, level by level."""
        return tuple(node for node, children in enumerate(self.children) if children)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The inner nodes of each depth."""
        deepest = max((self.depths[node] for node in self.inner), default=-1)
        return tuple(tuple(node for node in self.inner if self.depths[node] == d) for d in range(deepest + 1))

    @cached_property
    def child_table(self) -> Tensor:
        """int64 [N, most children], -1 where a node has no further child."""
        width = max(1, *map(len, self.children))
        return torch.tensor([[*children, *[-1] * (width - len(children))] for children in self.children])

    @cached_property
    def sees(self) -> Tensor:
        """bool [inner nodes, inner nodes]: itself and its ancestors."""
        place = {node: i for i, node in enumerate(self.inner)}
        table = torch.eye(len(self.inner), dtype=torch.bool)
        for node in self.inner[1:]:
            table[place[node]] |= table[place[self.parents[node]]]
        return table


def best_tree(rates: Rates, num_nodes: int) -> StaticTree:
    """The tree of `num_nodes` nodes, root included, of the largest expected acceptance; as deep as there are rates."""
    kept: list[tuple[int, int, int]] = []  # depth, parent's place in this list, rank
    heap = [(-rates[0][0], 1, -1, 0, 1.0)]  # value, depth, parent's place, rank, parent's value
    while heap and len(kept) < num_nodes - 1:
        value, depth, parent, rank, above = heapq.heappop(heap)
        kept.append((depth, parent, rank))
        if depth < len(rates):
            heapq.heappush(heap, (value * rates[depth][0], depth + 1, len(kept) - 1, 0, -value))
        if rank + 1 < len(rates[depth - 1]):
            heapq.heappush(heap, (-above * rates[depth - 1][rank + 1], depth, parent, rank + 1, above))
    return _numbered(kept)


def expected_acceptance(shape: StaticTree, rates: Rates) -> float:
    """The accepted tokens a step to expect of a tree."""
    values = [1.0]
    for node, parent in enumerate(shape.parents[1:], start=1):
        values.append(values[parent] * rates[shape.depths[parent]][shape.children[parent].index(node)])
    return sum(values) - 1


def first_rates(depth: int, num_ranks: int) -> Rates:
    """What to explore with."""
    return [[FIRST_RATE * (1 - FIRST_RATE) ** rank for rank in range(num_ranks)]] * depth


def measured_rates(shape: StaticTree, paths: Iterable[Sequence[int]], prior: Rates) -> Rates:
    """The rates in the accepted paths of many steps with one tree; few visits leave them near the prior.

    A node counts for the ranks that it has: whether a child is accepted does not depend on those behind it.
    """
    accepted, visits = torch.zeros(2, len(prior), len(prior[0]), dtype=torch.float64)
    for path in paths:
        for node, follower in zip(path, [*path[1:], None], strict=True):
            depth, children = shape.depths[node], shape.children[node]
            if children:
                visits[depth, : len(children)] += 1
            if follower is not None:
                accepted[depth, children.index(follower)] += 1
    pooled = (accepted.sum(0) + PRIOR_WEIGHT * torch.tensor(prior[0])) / (visits.sum(0) + PRIOR_WEIGHT)
    rates = (accepted + PRIOR_WEIGHT * pooled) / (visits + PRIOR_WEIGHT)
    falling: list[list[float]] = rates.cummin(dim=1).values.tolist()  # `best_tree` takes ranks in their order
    return falling


def _numbered(kept: Sequence[tuple[int, int, int]]) -> StaticTree:
    """The nodes renumbered level by level, siblings together."""
    number, parents = {-1: 0}, [-1]
    waiting: dict[int, list[tuple[int, int, int]]] = {}  # by depth: parent's new number, rank, place
    for depth in range(1, max((depth for depth, _, _ in kept), default=0) + 1):
        level = [(number[parent], rank, place) for place, (d, parent, rank) in enumerate(kept) if d == depth]
        waiting[depth] = sorted(level)
        for parent, _, place in waiting[depth]:
            number[place] = len(parents)
            parents.append(parent)
    return StaticTree(tuple(parents))
