"""What the peers share: the decode loop over the library's target and drafters, and the distribution to draw from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from taps_ext.decode.stats import DecodeStats
from taps_ext.drafters.base import Drafter, DrafterState
from taps_ext.reference import Filters
from taps_ext.target.model import TargetModel
from taps_ext.tree import DraftTree, Lengths


@dataclass(frozen=True)
class PeerResult:
    """The texts of one call and what was accepted, counted as the library counts it."""

    new_tokens: list[list[int]]  # per prompt, EOS included
    stats: DecodeStats  # num_accepted, num_nodes and choices of every decode step of every prompt


class Peer(Protocol):
    """A method with its models, ready to be measured."""

    name: str

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
        """Continue prompts, each int64 [P] or [1, P], all as one batch; the text ends at EOS or max_new_tokens.

        `num_nodes` are the nodes that the target scores a step, root included. The text has the target's distribution
        under temperature and filters, and comes from a random stream of its own: it is no other method's text.
        """


@dataclass(frozen=True)
class Proposal:
    """The trees of one step; siblings may carry the same token, and scores are not looked at."""

    tree: DraftTree
    choices: list[int] | None = None  # the drafter that a row's tree is from, where one was chosen


@dataclass(frozen=True)
class Verdict:
    """What a step keeps of one row's tree."""

    path: list[int]  # the root and the accepted nodes
    bonus_token: int
    proposers: list[int]  # of each accepted node, the bit mask of the drafters that proposed it


class Run(Protocol):
    """One call of a peer, with its random stream."""

    def first_tokens(self, logits: Tensor) -> list[int]:
        """A token for each row of logits [B, V]."""

    def propose(self, states: Sequence[DrafterState], root_tokens: Tensor, active: Tensor) -> Proposal:
        """A tree a row."""

    def verify(self, proposal: Proposal, logits: Tensor) -> list[Verdict]:
        """What is kept of each row's tree, given the target's logits [B, N, V] of its nodes."""


@torch.inference_mode()
def decode(
    target: TargetModel, drafters: Mapping[str, Drafter], run: Run, prompts: Sequence[Tensor], max_new_tokens: int
) -> PeerResult:
    """Prefill, then propose, score, verify, commit and observe until every row has ended."""
    lengths = [prompt.numel() for prompt in prompts]
    target.refuse_longer_than_exact(max(lengths) + max_new_tokens)
    text = _Text(target, drafters, len(prompts), max_new_tokens)
    packed = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        packed[row, : lengths[row]] = prompt.flatten()
    packed, device = packed.to(target.device), target.device
    kv, states = target.new_cache(len(prompts)), [drafter.reset(len(prompts)) for drafter in drafters.values()]
    scored = target.prefill(packed, Lengths.of(lengths, device), kv)
    roots = run.first_tokens(scored.logits[:, 0])
    for row, token in enumerate(roots):
        text.extend(row, [token])
    last_positions = torch.tensor(lengths, device=device) + max_new_tokens - 2
    counts, features = lengths, scored.features
    ends = torch.tensor(roots, device=device)[:, None]
    next_tokens = packed.roll(-1, dims=1).scatter(1, kv.lengths.tensor[:, None] - 1, ends)
    while not text.is_finished:
        num_tokens = Lengths.of(counts, device)
        for drafter, state in zip(drafters.values(), states, strict=True):
            drafter.observe(state, features, next_tokens, num_tokens)
        active = torch.tensor(text.active, device=device)
        proposal = run.propose(states, torch.tensor(roots, device=device), active)
        scored = target.score(proposal.tree, kv, last_positions)
        verdicts = run.verify(proposal, scored.logits)
        counts = [len(one.path) if is_active else 0 for one, is_active in zip(verdicts, text.active, strict=True)]
        path = _padded([one.path for one in verdicts], proposal.tree.capacity).to(device)
        committed = Lengths.of(counts, device)
        target.commit(path, kv.lengths.plus(committed), kv)
        kept = [_tokens(proposal.tree.tokens[row], one) for row, one in enumerate(verdicts)]
        text.record(proposal, verdicts, kept)
        roots = [tokens[-1] if count else root for tokens, count, root in zip(kept, counts, roots, strict=True)]
        counts = [count if is_active else 0 for count, is_active in zip(counts, text.active, strict=True)]
        next_tokens = _padded(kept, max(map(len, kept)), fill=0).to(device)
        slots = path[:, : next_tokens.shape[1]].clamp_min(0)
        features = scored.features.gather(1, slots[:, :, None].expand(-1, -1, scored.features.shape[-1]))
    return PeerResult(text.new_tokens, text.stats)


def distribution(logits: Tensor, filters: Filters) -> Tensor:
    """float64 [..., V]: what the target draws from, of logits [..., V]; at T = 0 all of it on the likeliest token."""
    if filters.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).double()
    return masked(logits, filters, -torch.inf).softmax(dim=-1)


def masked(logits: Tensor, filters: Filters, dropped: float) -> Tensor:
    """float64 logits / T [..., V], with `dropped` added where the filters keep no token; temperature above 0."""
    scaled = logits.double() / filters.temperature
    return scaled if filters[1:] == Filters()[1:] else torch.where(keeps(scaled, filters), scaled, scaled + dropped)


def keeps(scaled: Tensor, filters: Filters) -> Tensor:
    """bool [..., V]: `reference.kept_tokens` for many rows of logits / T, but for ties at top-p's edge."""
    ranked, order = scaled.sort(dim=-1, descending=True)
    is_kept = torch.ones_like(ranked, dtype=torch.bool)
    if 0 < filters.top_k < scaled.shape[-1]:
        is_kept = ranked >= ranked[..., filters.top_k - 1, None]
    if filters.top_p < 1:
        share = torch.where(is_kept, ranked, -torch.inf).softmax(dim=-1)
        is_kept = is_kept & (share.cumsum(dim=-1) - share < filters.top_p)
    if filters.min_p > 0:
        is_kept = is_kept & (ranked - ranked[..., :1] >= math.log(filters.min_p))
    is_kept[..., 0] = True
    return torch.zeros_like(is_kept).scatter(-1, order, is_kept)


class _Text:
    """The rows' new tokens and the statistics."""

    def __init__(self, target: TargetModel, drafters: Mapping[str, Drafter], batch_size: int, longest: int) -> None:
        eos: Any = target.model.generation_config.eos_token_id
        self.eos_tokens = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
        self.longest = longest
        self.new_tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self.active = [True] * batch_size
        self.stats = DecodeStats(tuple(drafters), batch_size)

    @property
    def is_finished(self) -> bool:
        return not any(self.active)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.active[row]:
                self.new_tokens[row].append(token)
                self.stats.num_tokens[row] += 1
                self.active[row] = token not in self.eos_tokens and len(self.new_tokens[row]) < self.longest

    def record(self, proposal: Proposal, verdicts: Sequence[Verdict], kept: Sequence[Sequence[int]]) -> None:
        num_nodes = proposal.tree.num_nodes.tolist()
        for row, verdict in enumerate(verdicts):
            if self.active[row]:
                choice = None if proposal.choices is None else proposal.choices[row]
                self.stats.record(row, num_nodes[row], choice, verdict.proposers)
                self.extend(row, kept[row])
        self.stats.num_target_forwards += 1


def _tokens(tokens: Tensor, verdict: Verdict) -> list[int]:
    """The accepted tokens and the bonus token, of a row's tree tokens [N]."""
    return [*tokens[verdict.path[1:]].tolist(), verdict.bonus_token]


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int = -1) -> Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
