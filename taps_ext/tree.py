"""The draft tree, which is a parent array; the shape that a drafter grows it to; the lengths of rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """Hold a batch of draft trees, one parent array per row; everything else is computed from it.

    Invariants (checked by `validate`): node 0 is the root, the last committed token, with parent -1;
    `parents[i] < i`; siblings carry distinct tokens; a child's score is at most its parent's; nodes at or
    past `num_nodes` are padding with parent 0 and token 0.

    Shapes: B rows, N nodes (the capacity, root included).
    """

    tokens: Tensor  # int64 [B, N]
    parents: Tensor  # int64 [B, N]
    scores: Tensor  # float32 [B, N], cumulative drafter log-probability (nats); the root's is 0, padding's -inf
    num_nodes: Tensor  # int64 [B], root included
    proposers: Tensor | None = None  # int64 [B, N], bit d set: drafter d put this node here (at most 63 drafters)
    entropies: Tensor | None = None  # float32 [B, N], nats, of the distribution that proposed the node; 0 at the root

    @classmethod
    def of_roots(cls, tokens: Tensor) -> DraftTree:
        """Return trees that are only a root; `tokens` is int64 [B]."""
        tokens = tokens[:, None]
        zeros = torch.zeros_like(tokens, dtype=torch.float32)
        return cls(tokens, torch.full_like(tokens, -1), zeros, torch.ones_like(tokens[:, 0]), entropies=zeros)

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        """Number N of node slots per row."""
        return self.tokens.shape[1]

    def is_node(self) -> Tensor:
        """Return bool [B, N]: which slots hold a node; the others are padding."""
        return torch.arange(self.capacity, device=self.tokens.device) < self.num_nodes[:, None]

    def trimmed(self, capacity: int) -> DraftTree:
        """Return the same trees in fewer slots; `capacity` must be at least every row's `num_nodes`."""
        if capacity == self.capacity:
            return self
        return replace(
            self,
            tokens=self.tokens[:, :capacity],
            parents=self.parents[:, :capacity],
            scores=self.scores[:, :capacity],
            proposers=None if self.proposers is None else self.proposers[:, :capacity],
            entropies=None if self.entropies is None else self.entropies[:, :capacity],
        )

    def padded(self, capacity: int) -> DraftTree:
        """Return the same trees in `capacity` slots, at least as many as there are."""
        more = capacity - self.capacity
        if more == 0:
            return self

        def pad(values: Tensor | None, value: float = 0) -> Any:
            return None if values is None else torch.nn.functional.pad(values, (0, more), value=value)

        return replace(
            self,
            tokens=pad(self.tokens),
            parents=pad(self.parents),
            scores=pad(self.scores, -torch.inf),
            proposers=pad(self.proposers),
            entropies=pad(self.entropies),
        )

    def with_rows(self, rows: Tensor, tree: DraftTree) -> DraftTree:
        """Return these trees with the rows int64 [r] replaced by those of `tree`, r rows in as many slots."""

        def put(name: str) -> Any:
            own, other = getattr(self, name), getattr(tree, name)
            return None if own is None or other is None else own.index_copy(0, rows, other)

        return DraftTree(**{field.name: put(field.name) for field in fields(self)})

    def rooted(self, root_tokens: Tensor, active: Tensor) -> DraftTree:
        """Return the same trees with these roots, int64 [B]; rows that are not active, bool [B], keep only the root."""
        roots = DraftTree.of_roots(root_tokens).padded(self.capacity)
        rows = replace(self, tokens=torch.cat([roots.tokens[:, :1], self.tokens[:, 1:]], dim=1))

        def choose(name: str) -> Any:
            own, root = getattr(rows, name), getattr(roots, name)
            if own is None or root is None:
                return None
            return torch.where(active.view(-1, *[1] * (own.ndim - 1)), own, root)

        return DraftTree(**{field.name: choose(field.name) for field in fields(self)})

    def to(self, device: torch.device) -> DraftTree:
        """Return the same trees on a device."""

        def move(values: Tensor | None) -> Any:
            return None if values is None else values.to(device)

        return DraftTree(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def validate(self) -> None:
        """Raise a ValueError that names the first broken invariant. This reads every node on the host."""
        _check_shapes(self)
        for row, count in enumerate(self.num_nodes.tolist()):
            _check_row(row, count, self.tokens[row].tolist(), self.parents[row].tolist(), self.scores[row].tolist())


@dataclass(frozen=True)
class TreeShape:
    """Set how large a tree a drafter grows.

    `depth` counts drafted levels (EAGLE's `depth=5` is `depth=6` here), `branching` the children kept per
    expanded node and the nodes expanded per level (EAGLE's `top_k`), `max_nodes` the nodes kept, root included.
    Nodes that score below `min_score` are not proposed: with log(0.01) a drafter leaves out what it expects to be
    accepted less than once in a hundred times. On a CPU, a level is not drafted where the nodes that it would expand
    have probabilities that sum to less than `min_mass`.

    `TreeShape.auto()` sets limits, within which each step takes the tree that maximises tokens per second.
    """

    depth: int = 6
    branching: int = 10
    max_nodes: int = 60
    min_score: float | None = None  # nats, at most 0; None: the budget alone decides
    min_mass: float = 0.0
    adapts: bool = False  # the other fields are limits

    @classmethod
    def auto(cls, depth: int = 8, branching: int = 10, max_nodes: int = 64) -> TreeShape:
        """Return limits for trees whose size follows from what they cost on this machine and what is accepted.

        >>> TreeShape.auto().adapts
        True
        """
        return cls(depth, branching, max_nodes, adapts=True)

    def __post_init__(self) -> None:
        for name in ("depth", "branching", "max_nodes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TreeShape.{name} must be an integer of at least 1, got {value!r}")
        score: Any = self.min_score
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not score <= 0):
            raise ValueError(f"TreeShape.min_score must be at most 0, a log-probability, got {score!r}")

    def capacity(self, vocab_size: int) -> int:
        """Return the number of node slots of a tree of this shape over `vocab_size` tokens."""
        branching = min(self.branching, vocab_size)
        return min(self.max_nodes, 1 + branching + (self.depth - 1) * branching * branching)

    def frontier_slots(self, vocab_size: int) -> int:
        """Return the number of nodes that a drafter expands below the root: the cache slots of a growing tree."""
        return (self.depth - 1) * min(self.branching, vocab_size)


@dataclass(frozen=True)
class Lengths:
    """Hold a number of tokens per row twice: on the device for the ops, on the host for sizes.

    The host gets its copy from the one read of a decode step, so that nobody has to ask the device.
    """

    tensor: Tensor  # int64 [B]
    host: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Lengths:
        """Return these lengths, copied to the device."""
        return cls(torch.tensor(lengths, dtype=torch.int64, device=device), tuple(lengths))

    @cached_property
    def longest(self) -> int:
        """Largest length of a row."""
        return max(self.host)

    @cached_property
    def is_ragged(self) -> bool:
        """Whether the rows differ in length."""
        return min(self.host) < max(self.host)

    def plus(self, more: Lengths) -> Lengths:
        """Return the sums, row by row, on this one's device."""
        sums = tuple(a + b for a, b in zip(self.host, more.host, strict=True))
        return Lengths(self.tensor + more.tensor.to(self.tensor.device), sums)


def _check_shapes(tree: DraftTree) -> None:
    if tree.tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, N], got {list(tree.tokens.shape)}")
    for name in ("parents", "scores", "proposers", "entropies"):
        value = getattr(tree, name)
        if value is not None and value.shape != tree.tokens.shape:
            raise ValueError(f"{name} must be {list(tree.tokens.shape)} like tokens, got {list(value.shape)}")
    if tree.num_nodes.shape != tree.tokens.shape[:1]:
        raise ValueError(f"num_nodes must be [{tree.batch_size}], got {list(tree.num_nodes.shape)}")


def _check_row(row: int, count: int, tokens: list[int], parents: list[int], scores: list[float]) -> None:
    if not 1 <= count <= len(tokens):
        raise ValueError(f"num_nodes must lie in 1..{len(tokens)}, row {row} has {count}")
    if parents[0] != -1:
        raise ValueError(f"node 0 must be the root with parent -1, row {row} has parent {parents[0]}")
    seen: set[tuple[int, int]] = set()
    for node in range(1, count):
        parent = parents[node]
        if not 0 <= parent < node:
            raise ValueError(f"parents must come before their children: row {row}, node {node} has parent {parent}")
        if (parent, tokens[node]) in seen:
            raise ValueError(f"siblings must carry distinct tokens: row {row}, node {node} repeats {tokens[node]}")
        if not scores[node] <= scores[parent]:
            raise ValueError(f"a child may not outscore its parent: row {row}, node {node} has {scores[node]}")
        seen.add((parent, tokens[node]))
    if any(parent != 0 for parent in parents[count:]):
        raise ValueError(f"padding must have parent 0, row {row} does not")
