"""The paper's own way (TAPS, arXiv 2603.27027): EAGLE-2's trees, EAGLE's verification, two ways to use two drafters.

Drafting: EAGLE-2 (arXiv 2406.16858), deterministic top-k by cumulative log-probability at temperature 1, whatever the
request's temperature. That is what the library's drafters do without coupling, and they do it here.
Verification: at each visited node the candidates are tried in turn, each accepted with its probability under the
target; a rejected one's probability becomes zero and the rest is renormalised. One random stream, consumed in order.
Two drafters: of two full trees the one with the higher mean confidence, or both side by side under one root, where a
path that both propose stands twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from taps_ext.drafters.base import Drafter, DrafterState
from taps_ext.reference import Filters
from taps_ext.target.model import TargetModel
from taps_ext.tree import DraftTree, TreeShape

from .loop import PeerResult, Proposal, Verdict, decode, distribution

COMPOSITIONS = ("single", "routed", "merged")


class PaperWay:
    """See the head of this file; a `Peer`.

    Args:
        composition: "single" (one drafter), "routed" or "merged". Merged trees share `num_nodes`: two drafters of
            60 nodes each are 119, as the paper has them; 60 nodes are two trees of 31 and 30.
        depth, branching: as in `TreeShape`.
    """

    def __init__(
        self,
        target: TargetModel,
        drafters: Mapping[str, Drafter],
        composition: str = "single",
        depth: int = 6,
        branching: int = 10,
    ) -> None:
        if composition not in COMPOSITIONS:
            raise ValueError(f"composition must be one of {', '.join(COMPOSITIONS)}, got {composition!r}")
        if (composition == "single") != (len(drafters) == 1):
            raise ValueError(f"composition {composition!r} does not go with {len(drafters)} drafters")
        self.name = f"paper's way, {composition} {' + '.join(drafters)}"
        self.target, self.drafters, self.composition = target, dict(drafters), composition
        self.depth, self.branching = depth, branching

    def generate(
        self,
        prompts: Sequence[Tensor],
        temperature: float,
        num_nodes: int,
        max_new_tokens: int,
        seed: int,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
    ) -> PeerResult:
        """See `Peer.generate`."""
        filters = Filters(temperature, top_k, top_p, min_p)
        return decode(self.target, self.drafters, PaperRun(self, num_nodes, filters, seed), prompts, max_new_tokens)


class PaperRun:
    """One call; see `loop.Run`."""

    def __init__(self, peer: PaperWay, num_nodes: int, filters: Filters, seed: int) -> None:
        self.drafters, self.composition, self.filters = list(peer.drafters.values()), peer.composition, filters
        sizes = shared_sizes(num_nodes, len(self.drafters)) if peer.composition == "merged" else None
        self.shapes = [
            TreeShape(peer.depth, peer.branching, sizes[place] if sizes else num_nodes)
            for place in range(len(self.drafters))
        ]
        self.uniform = random.Random(seed).random

    def first_tokens(self, logits: Tensor) -> list[int]:
        return [_draw(self._row(row), self.uniform()) for row in logits]

    def propose(self, states: Sequence[DrafterState], root_tokens: Tensor, active: Tensor) -> Proposal:
        drafting = zip(self.drafters, states, self.shapes, strict=True)
        trees = [drafter.propose(state, root_tokens, shape, active) for drafter, state, shape in drafting]
        trees = [replace(tree, proposers=torch.full_like(tree.tokens, 1 << d)) for d, tree in enumerate(trees)]
        if self.composition == "merged":
            return Proposal(side_by_side(trees))
        confidences = torch.stack([mean_confidence(tree) for tree in trees])
        choices = confidences.argmax(dim=0)  # of equals the first
        return Proposal(_chosen(trees, choices), choices.tolist())

    def verify(self, proposal: Proposal, logits: Tensor) -> list[Verdict]:
        return [self._walk(proposal.tree, row, logits[row]) for row in range(len(logits))]

    def _walk(self, tree: DraftTree, row: int, logits: Tensor) -> Verdict:
        count = int(tree.num_nodes[row])
        assert tree.proposers is not None
        return accept_zero_renormalise(
            lambda node: self._row(logits[node]),
            tree.tokens[row, :count].tolist(),
            tree.parents[row, :count].tolist(),
            tree.proposers[row, :count].tolist(),
            self.uniform,
        )

    def _row(self, logits: Tensor) -> np.ndarray:
        row: np.ndarray = distribution(logits, self.filters).numpy()
        return row


def shared_sizes(num_nodes: int, num_trees: int) -> list[int]:
    """The node budgets of trees that share a root and have `num_nodes` nodes together, as equal as they can be."""
    drafted, rest = divmod(num_nodes - 1, num_trees)
    return [1 + drafted + (place < rest) for place in range(num_trees)]


def mean_confidence(tree: DraftTree) -> Tensor:
    """float32 [B]: the mean of exp(score) over the drafted nodes; 0 where there are none."""
    drafted = tree.is_node()
    drafted[:, 0] = False
    total = torch.where(drafted, tree.scores.exp(), 0).sum(dim=1)
    return total / drafted.sum(dim=1).clamp_min(1)


def side_by_side(trees: Sequence[DraftTree]) -> DraftTree:
    """All trees under the first one's root, none of their nodes joined; padding closes up behind the last."""
    columns: dict[str, list[list[int]]] = {"tokens": [], "parents": [], "proposers": []}
    for row in range(trees[0].batch_size):
        tokens, parents, proposers = [int(trees[0].tokens[row, 0])], [-1], [(1 << len(trees)) - 1]
        for tree in trees:
            shift, count = len(tokens) - 1, int(tree.num_nodes[row])
            tokens += tree.tokens[row, 1:count].tolist()
            parents += [parent + shift if parent else 0 for parent in tree.parents[row, 1:count].tolist()]
            assert tree.proposers is not None
            proposers += tree.proposers[row, 1:count].tolist()
        for name, values in (("tokens", tokens), ("parents", parents), ("proposers", proposers)):
            columns[name].append(values)
    counts = [len(values) for values in columns["tokens"]]
    padded = {
        name: torch.tensor([[*values, *[0] * (max(counts) - len(values))] for values in rows])
        for name, rows in columns.items()
    }
    return DraftTree(scores=torch.zeros(padded["tokens"].shape), num_nodes=torch.tensor(counts), **padded)


def accept_zero_renormalise(
    probabilities: Callable[[int], np.ndarray],
    tokens: Sequence[int],
    parents: Sequence[int],
    proposers: Sequence[int],
    uniform: Callable[[], float],
) -> Verdict:
    """EAGLE's loop over one tree; `probabilities` gives the target's distribution float64 [V] at a node.

    Nodes with the same path of tokens are one place: its candidates are the children of all of them, each token tried
    once, and the target is read at the first.
    """
    children: list[list[int]] = [[] for _ in tokens]
    for node, parent in enumerate(parents[1:], start=1):
        children[parent].append(node)
    place = [0]
    masks: list[int] = []
    while True:
        p = probabilities(place[0]).copy()
        candidates = [child for node in place for child in children[node]]
        accepted = _first_accepted(p, list(dict.fromkeys(tokens[child] for child in candidates)), uniform)
        if accepted is None:
            return Verdict(_path(parents, place[0]), _draw(p, uniform()), masks)
        place = [child for child in candidates if tokens[child] == accepted]
        masks.append(int(np.bitwise_or.reduce([proposers[node] for node in place])))


def _first_accepted(p: np.ndarray, candidates: Sequence[int], uniform: Callable[[], float]) -> int | None:
    """The accepted token; p [V] loses those that were rejected."""
    for token in candidates:
        if uniform() * p.sum() < p[token]:  # p / p.sum(): renormalised
            return token
        p[token] = 0
    return None


def _draw(p: np.ndarray, uniform: float) -> int:
    sums = p.cumsum()
    return min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(p) - 1)


def _path(parents: Sequence[int], node: int) -> list[int]:
    path = [node]
    while path[-1] != 0:
        path.append(parents[path[-1]])
    return path[::-1]


def _chosen(trees: Sequence[DraftTree], choices: Tensor) -> DraftTree:
    """Of each row the chosen tree."""
    rows = torch.arange(len(choices))

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(tree, name) for tree in trees])[choices, rows]

    return DraftTree(pick("tokens"), pick("parents"), pick("scores"), pick("num_nodes"), proposers=pick("proposers"))
