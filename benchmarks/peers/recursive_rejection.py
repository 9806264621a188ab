"""One drafter, a tree of fixed shape, children sampled without replacement, recursive rejection sampling.

Sampling: the children of a node are the Gumbel-top-k of the drafter's distribution q at the request's temperature,
which are draws without replacement, in their order (Kool et al., arXiv 1903.06059).
Verification: a child x_k is accepted with probability min(1, p_k(x_k) / q_k(x_k)); after a rejection the target's p_k
becomes its residual max(0, p_k - q_k), renormalised, and q_k loses x_k, renormalised. When no child is accepted the
bonus token is drawn from the last residual. Lossless in distribution.

Source: RSD, recursive rejection sampling (Jeon et al., arXiv 2402.14160); the same rule with a tree chosen by measured
rates is Sequoia's (arXiv 2402.12374); with replacement it is SpecInfer's multi-step sampling (arXiv 2305.09781).
Dims: B rows, N nodes, I inner nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taps_ext.drafters.base import DrafterState
from taps_ext.drafters.eagle import EagleDrafter, EagleState
from taps_ext.reference import Filters
from taps_ext.target.model import TargetModel
from taps_ext.tree import DraftTree

from .loop import PeerResult, Proposal, Verdict, decode, distribution, masked
from .static_tree import Rates, StaticTree, best_tree, expected_acceptance, first_rates, measured_rates

DROPPED = -1e6  # added to the drafter's logit of a filtered token: it is drawn behind all that the filters keep
MAX_CHILDREN = 16
PROMISE_NODES = 30
TUNING_NODES = 128
TUNING_ROUNDS = 2
TUNING_SEED = 1_000_003  # not the seed of what is measured


class RecursiveRejection:
    """See the head of this file; a `Peer`.

    Args:
        tuning_prompts: held-out text, none of what is measured: at the first call with a temperature and filters the
            acceptance rates on it are measured, and every tree with them is the best for these rates.
        depth: drafted levels at most, as `TreeShape.depth`.
        tuning_tokens: new tokens a tuning prompt.
        sharpnesses: powers of the drafter's distribution at the request's temperature to sample from; the one that
            promises most on the tuning prompts is used. (1.0,) is the published method.
    """

    def __init__(
        self,
        target: TargetModel,
        drafter: EagleDrafter,
        tuning_prompts: Sequence[Tensor],
        depth: int = 6,
        tuning_tokens: int = 64,
        sharpnesses: Sequence[float] = (1.0,),
    ) -> None:
        self.name = f"recursive rejection, {drafter.name}" + ("" if tuple(sharpnesses) == (1.0,) else ", sharpened")
        self.target, self.drafter, self.depth = target, drafter, depth
        self.tuning_prompts, self.tuning_tokens = list(tuning_prompts), tuning_tokens
        self.sharpnesses = tuple(sharpnesses)
        self._tunings: dict[Filters, Tuning] = {}

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
        tuning = self.tuning(filters)
        run = StaticRun(self.drafter, best_tree(tuning.rates, num_nodes), filters, seed, tuning.sharpness)
        return decode(self.target, {self.drafter.name: self.drafter}, run, prompts, max_new_tokens)

    def tuning(self, filters: Filters) -> Tuning:
        """What `generate` uses; measured once."""
        if filters not in self._tunings:
            powers = self.sharpnesses if filters.temperature > 0 else (1.0,)
            found = [Tuning(power, self._rates(filters, power)) for power in powers]
            self._tunings[filters] = max(found, key=lambda one: one.promise)
        return self._tunings[filters]

    def _rates(self, filters: Filters, sharpness: float) -> Rates:
        rates = prior = first_rates(self.depth, min(MAX_CHILDREN, self.drafter.vocab_size))
        for tuning_round in range(TUNING_ROUNDS):
            shape = best_tree(rates, TUNING_NODES)
            run = StaticRun(self.drafter, shape, filters, TUNING_SEED + tuning_round, sharpness)
            decode(self.target, {self.drafter.name: self.drafter}, run, self.tuning_prompts, self.tuning_tokens)
            rates = measured_rates(shape, run.paths, prior)
        return rates


@dataclass(frozen=True)
class Tuning:
    """How often the children are accepted that are sampled from this power of the drafter's distribution."""

    sharpness: float
    rates: Rates

    @property
    def promise(self) -> float:
        """The accepted tokens to expect of a tree of middling size."""
        return expected_acceptance(best_tree(self.rates, PROMISE_NODES), self.rates)


@dataclass(frozen=True)
class SampledTree(Proposal):
    """Trees with the distributions that their children were sampled from."""

    draft_logits: Tensor | None = None  # float64 [B, I, V], of what was sampled from; None without inner nodes
    active: tuple[bool, ...] = ()


class StaticRun:
    """One call; see `loop.Run`."""

    def __init__(
        self, drafter: EagleDrafter, shape: StaticTree, filters: Filters, seed: int, sharpness: float = 1.0
    ) -> None:
        self.drafter, self.shape, self.filters, self.sharpness = drafter, shape, filters, sharpness
        self.generator = torch.Generator().manual_seed(seed)
        self.paths: list[list[int]] = []  # of every active row and step

    def first_tokens(self, logits: Tensor) -> list[int]:
        drawn: list[int] = _draw(distribution(logits, self.filters), self.generator).tolist()
        return drawn

    def propose(self, states: Sequence[DrafterState], root_tokens: Tensor, active: Tensor) -> SampledTree:
        (state,) = states
        assert isinstance(state, EagleState)
        growth = _Growth(self.drafter, state)
        batch_size, num_nodes = len(root_tokens), len(self.shape.parents)
        tokens = root_tokens.new_zeros(batch_size, num_nodes)
        tokens[:, 0] = root_tokens
        rows = []
        for depth, level in enumerate(self.shape.levels):
            logits = growth.logits(self.shape, depth, tokens)
            is_greedy = self.filters.temperature == 0
            rows.append(logits.double() if is_greedy else self.sharpness * masked(logits, self.filters, DROPPED))
            self._sample_children(tokens, level, rows[-1])
        parents = torch.tensor(self.shape.parents).expand(batch_size, -1).contiguous()
        num = torch.full((batch_size,), num_nodes)
        tree = DraftTree(tokens, parents, torch.zeros(tokens.shape), num, proposers=torch.ones_like(tokens))
        return SampledTree(tree, None, torch.cat(rows, dim=1) if rows else None, tuple(active.tolist()))

    def verify(self, proposal: Proposal, logits: Tensor) -> list[Verdict]:
        assert isinstance(proposal, SampledTree)
        path, bonus = recursive_rejection(
            logits, proposal.tree.tokens, proposal.draft_logits, self.shape, self.filters, self.generator
        )
        paths = [[node for node in row if node >= 0] for row in path.tolist()]
        self.paths += [row for row, active in zip(paths, proposal.active, strict=True) if active]
        return [Verdict(row, token, [1] * (len(row) - 1)) for row, token in zip(paths, bonus.tolist(), strict=True)]

    def _sample_children(self, tokens: Tensor, level: Sequence[int], draft_logits: Tensor) -> None:
        """Write the children of a level's nodes into tokens [B, N]; draft_logits [B, nodes of the level, V]."""
        keys = draft_logits
        if self.filters.temperature > 0:  # a Gumbel variable is minus the log of an exponential one
            keys = keys - torch.empty_like(keys).exponential_(generator=self.generator).log()
        children = [self.shape.children[node] for node in level]
        best = keys.topk(max(map(len, children)), dim=-1).indices
        for place, nodes in enumerate(children):
            tokens[:, nodes[0] : nodes[-1] + 1] = best[:, place, : len(nodes)]


def recursive_rejection(
    logits: Tensor,
    tokens: Tensor,
    draft_logits: Tensor | None,
    shape: StaticTree,
    filters: Filters,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The accepted paths int64 [B, levels + 1], -1 behind their ends, and the bonus tokens int64 [B].

    Of target logits [B, N, V], tokens [B, N] and draft_logits float64 [B, I, V]. At T = 0 all of p lies on one token,
    which is accepted wherever it is a child: greedy matching, whatever q is.
    """
    rows, table = torch.arange(len(tokens)), shape.child_table
    place = torch.zeros(len(shape.parents), dtype=torch.int64)
    place[list(shape.inner)] = torch.arange(len(shape.inner))
    node, is_open = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
    path = torch.full((len(tokens), len(shape.levels) + 1), -1)
    path[:, 0] = 0
    bonus = torch.zeros_like(rows)
    for depth in range(len(shape.levels) + 1):
        p = distribution(logits[rows, node], filters)
        accepted = torch.full_like(rows, -1)
        if draft_logits is not None and depth < len(shape.levels):
            q_logits = draft_logits[rows, place[node]]
            p, accepted = _try_children(p, q_logits, tokens, table[node], generator)
        ends = is_open & (accepted < 0)
        bonus = torch.where(ends, _draw(p, generator), bonus)
        is_open = is_open & (accepted >= 0)
        node = torch.where(is_open, accepted, node)
        if depth < len(shape.levels):
            path[:, depth + 1] = torch.where(is_open, accepted, -1)
    return path, bonus


def _try_children(
    p: Tensor, q_logits: Tensor, tokens: Tensor, children: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The residual of p [B, V] and the accepted child int64 [B] (-1: none), of children int64 [B, K] (-1: no more)."""
    rows, accepted = torch.arange(len(p)), torch.full((len(p),), -1)
    for child in children.T:
        tried = (child >= 0) & (accepted < 0)
        token = tokens[rows, child.clamp_min(0)]
        q = q_logits.softmax(dim=-1)
        coin = torch.rand(len(p), dtype=torch.float64, generator=generator)
        is_accepted = tried & (coin * q[rows, token] < p[rows, token])
        accepted = torch.where(is_accepted, child, accepted)
        rejected = (tried & ~is_accepted)[:, None]
        p = torch.where(rejected, _residual(p, q), p)
        q_logits = torch.where(rejected, _without(q_logits, token), q_logits)
    return p, accepted


def _residual(p: Tensor, q: Tensor) -> Tensor:
    left = (p - q).clamp_min(0)
    mass = left.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, left / mass, p)  # nothing left: a rejection had probability 0, up to rounding


def _without(q_logits: Tensor, token: Tensor) -> Tensor:
    return q_logits.scatter(1, token[:, None], -torch.inf)


def _draw(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(p, 1, generator=generator)[:, 0]


class _Growth:
    """The drafter's network over a static tree, level by level: its committed slots, then the inner nodes so far."""

    def __init__(self, drafter: EagleDrafter, state: EagleState) -> None:
        self.drafter, self.lengths = drafter, state.lengths.tensor
        longest = state.lengths.longest
        self.keys, self.values = state.keys[:, :, :longest], state.values[:, :, :longest]
        self.committed = torch.arange(longest) < self.lengths[:, None]  # [B, longest]
        self.outputs = state.last_output[:, None]  # [B, inner nodes so far, H]

    def logits(self, shape: StaticTree, depth: int, tokens: Tensor) -> Tensor:
        """The drafter's logits [B, nodes, V] behind a level's inner nodes, of the tree's tokens [B, N] above it."""
        level = shape.levels[depth]
        if depth > 0:
            self._forward(shape, level, depth, tokens[:, list(level)])
        logits: Tensor = self.drafter.lm_head(self.outputs[:, -len(level) :])
        return logits

    def _forward(self, shape: StaticTree, level: Sequence[int], depth: int, tokens: Tensor) -> None:
        network, start = self.drafter.network, self.outputs.shape[1]
        parents = [shape.inner.index(shape.parents[node]) for node in level]
        x = network.project(self.drafter.embedding(tokens), self.outputs[:, parents])
        positions = (self.lengths + depth - 1)[:, None].expand(-1, len(level))
        query, key, value = network.qkv(x, positions)
        self.keys, self.values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        among = shape.sees[start : start + len(level), 1 : start + len(level)]  # the root is the last committed slot
        before = self.committed[:, None].expand(-1, len(level), -1)
        mask = torch.cat([before, among.expand(len(tokens), -1, -1)], dim=2)[:, None]
        out = network.finish(x, network.attend(query, self.keys, self.values, mask))
        self.outputs = torch.cat([self.outputs, out], dim=1)
