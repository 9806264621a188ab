"""The tree that pays: which drafters draft, how deep, and how many nodes the target verifies, by what things cost.

A step is worth `E[tokens it commits] - rate * milliseconds`, where `rate` is the number of tokens per millisecond that
the call commits. Maximising that in each step maximises tokens per second (Dinkelbach's method for ratios). A node's
expected tokens are the probability that the target accepts it: exp(score), corrected by how often nodes of its depth
and kind were accepted in this call. Nodes that several proposed are one kind, those of each proposer alone another:
what drafters agree on is better than their scores say, and what only one proposes is worse. Costs come from a
`CostTable`, never from a clock in mid-call, so that the same table, prompt and seed give the same trees. The text does
not depend on any of it.

Dims: B rows, N nodes, S sizes, L depths, D drafters, K kinds (of each drafter alone, of the extension, of several).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..tree import DraftTree, TreeShape

DECAY = 0.95  # per step, of the accepted and expected nodes of each depth
PRIOR_NODES = 2.0  # accepted and expected nodes that each depth begins with
MEAN = 0.1  # weight of a step in the running means of tokens and milliseconds
LEAST_SHARE = 0.5  # of what the cheapest node costs: less probable ones are not proposed
SMALLEST = 1e-6  # probability that is proposed, where nodes cost nothing
HOPE = 0.7  # probability of a drafted token that a drafter gets the benefit of, until it has drafted
MOST_LOST, MOST_GAINED = 0.4, 2.0  # tokens per row: drafting that lost so much pauses; it has no more to lose than that
SURPRISE = 0.5  # weight of what was accepted against what was expected, in a drafter's balance
LOSS_SHARE = 0.02  # of the tokens: pauses are so long that drafting in vain costs no more


@dataclass(frozen=True)
class CostTable:
    """Hold what the parts of a decode step cost on one machine, for one batch size."""

    sizes: tuple[int, ...]  # ascending from 1: nodes per row
    step_ms: tuple[float, ...]  # of scoring and verifying that many nodes in every row
    draft_ms: dict[str, tuple[float, float]]  # by drafter: of its first level, and of each further one
    branching: int  # the largest one that costs hardly more than a narrow one

    def __post_init__(self) -> None:
        """Raise ValueError unless sizes ascend from 1 and costs are numbers above 0 (of drafting, at least 0)."""
        sizes, costs = list(self.sizes), list(self.step_ms)
        if not sizes or sizes[0] != 1 or sizes != sorted(set(sizes)):
            raise ValueError(f"the sizes of a cost table must ascend from 1, got {sizes}")
        if len(costs) != len(sizes) or not all(0 < ms < math.inf for ms in costs):
            raise ValueError(f"a cost table needs a finite cost above 0 for each size, got {costs}")
        if self.branching < 1 or not all(0 <= ms < math.inf for pair in self.draft_ms.values() for ms in pair):
            raise ValueError("a cost table needs draft costs of at least 0 and a branching of at least 1")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        draft_ms = {name: list(pair) for name, pair in self.draft_ms.items()}
        return {**vars(self), "sizes": list(self.sizes), "step_ms": list(self.step_ms), "draft_ms": draft_ms}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CostTable:
        """Return the table of `to_dict`'s values; raise ValueError, in a sentence, for anything else."""
        try:
            return cls(
                tuple(map(int, values["sizes"])),
                tuple(map(float, values["step_ms"])),
                {str(name): (float(first), float(more)) for name, (first, more) in values["draft_ms"].items()},
                int(values["branching"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a cost table needs sizes, step_ms, draft_ms and branching ({error!r})") from error


HostOutlook = tuple[list[list[float]], list[int], list[list[float]]]  # an `Outlook`, copied to the host


@dataclass(frozen=True)
class StepPlan:
    """Say who drafts in a step, and up to which shape."""

    shape: TreeShape
    drafts: tuple[bool, ...]  # per drafter


@dataclass(frozen=True)
class Outlook:
    """Hold what a step's tree promises: expected accepted nodes, of all rows together."""

    gains: Tensor  # float32 [1 + D, S], of the best nodes of each size: of the whole tree, then without each drafter's
    levels: Tensor  # int64 [D], the levels that each drafter drafted
    promised: Tensor  # float32 [B, K * L], exp(score) summed over each row's verified nodes, by kind and depth


class TreeBudget:
    """Choose the trees of one call, and learn from what the target accepts.

    Where the host may read the tree without waiting (on a CPU), its own outlook decides its size. On a device the
    previous step's does, which came with that step's one read.
    """

    def __init__(self, costs: CostTable, shape: TreeShape, drafters: Sequence[str], batch_size: int) -> None:
        limit = max(size for size in costs.sizes if size <= shape.max_nodes)
        branching = min(shape.branching, costs.branching)
        self.shape = replace(shape, max_nodes=limit, branching=branching, adapts=False)
        self.sizes = [size for size in costs.sizes if size <= limit]
        self.step_ms = costs.step_ms[: len(self.sizes)]
        # Of a node in the tree whose nodes cost least, on average.
        pairs = list(zip(self.sizes, self.step_ms, strict=True))[1:]
        self._least_node_ms = min(((ms - self.step_ms[0]) / (size - 1) for size, ms in pairs), default=0.0)
        self.draft_ms = [costs.draft_ms[name] for name in drafters]
        self.batch_size = batch_size
        self.tokens, self.ms = float(batch_size), self.step_ms[0]  # of a step: running means
        self.num_depths = shape.depth + 1  # deeper nodes count as the deepest that drafters draft
        self.accepted = torch.full((batch_size, (len(drafters) + 2) * self.num_depths), PRIOR_NODES)
        self.expected = self.accepted.clone()
        self.balance = [0.0] * len(drafters)  # tokens that each drafter's own nodes brought, its drafting paid
        self.waits = [0] * len(drafters)  # steps until it drafts again
        for index in range(len(drafters)):
            hope, loss = self._prospect(index)
            if hope < 0:
                self._pause(index, loss)
        self._size = limit
        self._plan = StepPlan(self.shape, (True,) * len(drafters))
        self._resting = StepPlan(self.shape, (False,) * len(drafters))

    @property
    def rate(self) -> float:
        """Tokens per millisecond that the call commits, all rows together."""
        return self.tokens / self.ms

    def plan(self) -> StepPlan:
        """Return who drafts in the coming step: everyone but those that were left out as not worth their cost."""
        drafts = tuple(wait == 0 for wait in self.waits)
        self.waits = [max(0, wait - 1) for wait in self.waits]
        if not any(drafts):
            self._plan = self._resting
            return self._plan
        deeper = [more for (_, more), is_drafting in zip(self.draft_ms, drafts, strict=True) if is_drafting]
        # One more level adds at most the probability of the nodes that it expands.
        rate = self.rate / self.batch_size  # costs are of all rows together
        min_mass = rate * max(deeper, default=0.0)
        min_score = math.log(max(rate * self._least_node_ms * LEAST_SHARE, SMALLEST))
        if self.shape.min_score is not None:
            min_score = max(min_score, self.shape.min_score)
        self._plan = StepPlan(replace(self.shape, min_mass=min_mass, min_score=min(0.0, min_score)), drafts)
        return self._plan

    def is_concerned(self, tree: DraftTree, is_costly: bool) -> bool:
        """Return whether there is something to cut or to judge; `is_costly`: a network has drafted."""
        return tree.capacity > 1 or is_costly

    def cut(self, tree: DraftTree, active: Tensor) -> tuple[DraftTree, Outlook]:
        """Return the trees with as many nodes per row as pay, and the outlook of the trees given."""
        gains, levels = self._outlook(tree, active)
        if tree.tokens.is_cpu:
            self._size, _ = self._best_size(gains[0].tolist())
        kept = ops.prune_tree(tree, self._size)
        places = self._places(kept)
        is_drafted = kept.is_node() & (kept.parents >= 0) & active[:, None]
        chances = torch.where(is_drafted, kept.scores.exp(), 0)
        promised = chances.new_zeros(self.expected.shape).scatter_add_(1, places, chances)
        return kept, Outlook(gains, levels, promised)

    def record(
        self, outlook: HostOutlook | None, num_accepted: Sequence[int | None], proposers: Sequence[Sequence[int]]
    ) -> None:
        """Learn from a step: its outlook (None: nobody drafted) and how much was accepted (None: the row had ended).

        `proposers` are those of each row's accepted nodes, as bits.
        """
        ms = self.step_ms[0]
        if outlook is not None:
            gains, levels, promised = outlook
            accepted = [[] if count is None else row for count, row in zip(num_accepted, proposers, strict=True)]
            ms = self.step_ms[self.sizes.index(self._size)] + self._judge(gains, levels, accepted)
            self._size, _ = self._best_size(gains[0])
            self._correct(promised, accepted)
        self.ms += MEAN * (ms - self.ms)
        self.tokens += MEAN * (sum(count + 1 for count in num_accepted if count is not None) - self.tokens)

    def _correct(self, promised: list[list[float]], accepted: Sequence[Sequence[int]]) -> None:
        """Compare each row's accepted nodes, as bits of their proposers, with what its tree promised."""
        expected = torch.tensor(promised)
        found = torch.zeros_like(expected)
        several = found.shape[1] // self.num_depths - 1
        for row, nodes in enumerate(accepted):
            for depth, bits in enumerate(nodes, start=1):
                kind = several if bits & (bits - 1) else bits.bit_length() - 1
                found[row, kind * self.num_depths + min(depth, self.num_depths - 1)] += 1
        self.accepted = PRIOR_NODES + DECAY * (self.accepted - PRIOR_NODES) + found
        self.expected = PRIOR_NODES + DECAY * (self.expected - PRIOR_NODES) + expected

    def _proposed(self, tree: DraftTree) -> Tensor:
        """Return which nodes each drafter, and the extension, has proposed, bool [D + 1, B, N]."""
        assert tree.proposers is not None
        bits = 1 << torch.arange(len(self.draft_ms) + 1, device=tree.proposers.device)
        return (tree.proposers & bits[:, None, None]) != 0

    def _places(self, tree: DraftTree) -> Tensor:
        """Return each node's kind and depth as one index, int64 [B, N]."""
        proposed = self._proposed(tree)
        index = torch.arange(len(proposed), device=proposed.device)[:, None, None]
        kind = torch.where(proposed.sum(dim=0) == 1, (proposed * index).sum(dim=0), len(proposed))
        return kind * self.num_depths + self._depths(tree)

    def _depths(self, tree: DraftTree) -> Tensor:
        return ops.tree_depths(tree.parents, tree.num_nodes).clamp(max=self.num_depths - 1)

    def _outlook(self, tree: DraftTree, active: Tensor) -> tuple[Tensor, Tensor]:
        """Return `gains` and `levels` of the trees."""
        proposed = self._proposed(tree)
        correction = (self.accepted / self.expected).to(tree.tokens.device).gather(1, self._places(tree))
        is_drafted = tree.is_node() & (tree.parents >= 0) & active[:, None]
        chances = torch.where(is_drafted, (tree.scores.exp() * correction).clamp(max=1), 0)
        drafters = proposed[: len(self.draft_ms)]
        own = drafters & (proposed.sum(dim=0) == 1)
        parts = torch.cat([chances[None], chances.masked_fill(own, 0)])
        best = parts.sort(dim=2, descending=True).values.cumsum(dim=2).sum(dim=1)  # [1 + D, N]
        places = [min(size - 1, best.shape[1]) for size in self.sizes]
        sums = torch.nn.functional.pad(best, (1, 0))
        gains = torch.stack([sums[:, place] for place in places], dim=1)
        levels = torch.where(drafters, self._depths(tree), 0).amax(dim=(1, 2))
        return gains, levels

    def _best_size(self, gains: list[float]) -> tuple[int, float]:
        """Return the number of nodes per row that pays best, and what its step is worth, in tokens."""
        worth = [gain - self.rate * ms for gain, ms in zip(gains, self.step_ms, strict=True)]
        index = max(range(len(worth)), key=worth.__getitem__)
        return self.sizes[index], worth[index]

    def _judge(self, gains: list[list[float]], levels: list[int], accepted: Sequence[Sequence[int]]) -> float:
        """Compare the step with one without each drafter's nodes, leave out who does not pay; return drafting's ms.

        What was accepted tells more than what was expected, but comes with much noise: the balance takes their mean.
        """
        _, worth = self._best_size(gains[0])
        drafting = [index for index, is_drafting in enumerate(self._plan.drafts) if is_drafting]
        ms = {index: self._drafting_ms(index, levels[index]) for index in drafting}
        chosen = self.sizes.index(self._size)
        for index in drafting:
            gained = worth - self._best_size(gains[1 + index])[1] - self.rate * ms[index]
            own = sum(bits == 1 << index for nodes in accepted for bits in nodes)
            gained += SURPRISE * (own - (gains[0][chosen] - gains[1 + index][chosen]))
            self.balance[index] = min(self.balance[index] + gained, MOST_GAINED * self.batch_size)
        lost = [index for index in drafting if self.balance[index] < -MOST_LOST * self.batch_size]
        if worth - self.rate * sum(ms.values()) > -self.rate * self.step_ms[0]:
            # Somebody pays. Two drafters that propose the same nodes both seem useless: only one of them is left out.
            lost = sorted(lost, key=self.balance.__getitem__)[:1]
        for index in lost:
            self._pause(index, -self.balance[index])
        return sum(ms.values())

    def _drafting_ms(self, index: int, num_levels: int) -> float:
        first, more = self.draft_ms[index]
        return first + more * max(0, num_levels - 1)

    def _prospect(self, index: int) -> tuple[float, float]:
        """Return what the best chain that a drafter may draft is worth, in tokens, and what drafting it costs."""
        chains = []
        for depth in range(1, min(self.shape.depth, self.sizes[-1] - 1) + 1):
            cost = self.rate * self._drafting_ms(index, depth)
            verifying = self.step_ms[bisect_left(self.sizes, depth + 1)] - self.step_ms[0]
            gain = self.batch_size * sum(HOPE**level for level in range(1, depth + 1))
            chains.append((gain - self.rate * verifying - cost, cost))
        return max(chains, default=(0.0, 0.0))

    def _pause(self, index: int, loss: float) -> None:
        """Leave a drafter out for so many steps that the loss, in tokens, is a small share of what they bring."""
        self.balance[index] = 0.0
        self.waits[index] = math.ceil(len(self.waits) * loss / (LOSS_SHARE * self.tokens))
