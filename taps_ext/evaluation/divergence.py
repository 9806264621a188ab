"""Where a speculated text leaves the plain one, and what the target's logits say there: a near-tie, or a fault.

In bfloat16 and float16 the shape of a batch moves logits a little. A step that scores a tree and a step that scores one
token then may disagree on which of two tokens is ahead, when these are nearly level. That is no fault of verification,
and told apart from one by two questions: is each text's token the one that the rule draws from its own step's logits,
and are the two steps' logits about as near to each other as rounding leaves them? How much that is depends on the
target, and is measured on the spot, with stock forwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..decode.decoder import SpeculativeDecoder
from ..decode.plain import plain_generate
from ..decode.state import StepEvent
from ..decode.stats import DecodeStats
from ..decode.step import verify
from ..sampling import SamplingParams
from ..target.model import ScoredTree, TargetModel
from ..tree import DraftTree
from .frequencies import last_logits

MOST_ROUNDINGS = 4.0  # what counts as explained by rounding, in measured roundings
ROUNDINGS = 4  # measured at a place; the largest counts


@dataclass(frozen=True)
class Batch:
    """Prompts that are decoded together, left-padded, and how."""

    input_ids: Tensor  # int64 [B, P]
    attention_mask: Tensor
    temperature: float
    seeds: list[int]
    max_new_tokens: list[int]

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `generate`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "sampling": SamplingParams(self.temperature, seed=self.seeds),
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Evidence:
    """The logits at the place, in both computations."""

    tree_lead: float  # of the speculated token over the plain one, where a tree was scored
    plain_lead: float  # the same, in the plain step
    difference: float  # the largest between the two computations, of any token
    rounding: float  # by which another rounding of what the target reads moves a logit, in stock forwards
    spacing: float  # of the dtype's numbers, at the row's largest logit
    is_drawn: bool  # whether the rule draws each text's token from its own step's logits

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains that the texts part."""
        return self.is_drawn and self.difference <= MOST_ROUNDINGS * max(self.rounding, self.spacing)


@dataclass(frozen=True)
class Divergence:
    """The first place where a row's text is not the plain one."""

    row: int
    place: int  # among the new tokens, from 0
    token: int | None  # None: the text has ended
    plain_token: int | None
    evidence: Evidence | None  # None where one of them has ended: no rounding does that

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.evidence is not None and self.evidence.is_near_tie

    def in_row(self, row: int) -> Divergence:
        """The same in a row of another number."""
        return replace(self, row=row)


class ListeningTarget(TargetModel):
    """A target that keeps the logits of its last forward."""

    def __init__(self, target: TargetModel) -> None:
        self.__dict__.update(vars(target))
        self.logits = torch.empty(0)

    def prefill(self, *arguments: Any, **options: Any) -> ScoredTree:
        return self._kept(super().prefill(*arguments, **options))

    def score(self, *arguments: Any, **options: Any) -> ScoredTree:
        return self._kept(super().score(*arguments, **options))

    def _kept(self, scored: ScoredTree) -> ScoredTree:
        self.logits = scored.logits
        return scored


@dataclass(frozen=True)
class Parting:
    """Where a row leaves the plain text, with the logits that were verified there."""

    place: int
    token: int | None
    logits: Tensor | None  # [V]


class Comparer:
    """Follows a decoder's steps beside the plain texts."""

    def __init__(self, target: ListeningTarget, plain: Sequence[Sequence[int]]) -> None:
        self._target, self._plain = target, plain
        self._lengths = [0] * len(plain)
        self.partings: dict[int, Parting] = {}  # by row

    def see(self, event: StepEvent) -> None:
        """One step's tokens; the target still holds its logits."""
        for row, tokens in enumerate(event.new_tokens):
            if row not in self.partings:
                for index, token in enumerate(tokens):
                    place = self._lengths[row] + index
                    if list(self._plain[row][place : place + 1]) != [token]:
                        node = 0 if event.path is None else int(event.path[row, index])
                        self.partings[row] = Parting(place, token, self._target.logits[row, node].clone())
                        break
            self._lengths[row] += len(tokens)

    def end(self) -> None:
        """Rows that end before the plain text does part from it there."""
        for row, length in enumerate(self._lengths):
            if row not in self.partings and length < len(self._plain[row]):
                self.partings[row] = Parting(length, None, None)


def find_divergences(
    decoder: SpeculativeDecoder, batch: Batch, plain: Sequence[Sequence[int]]
) -> tuple[list[Divergence], DecodeStats]:
    """Where the decoder's texts leave the plain ones, row by row, and how it came to them.

    The decoder's target must be a `ListeningTarget`.
    """
    target = decoder.target
    if not isinstance(target, ListeningTarget):
        raise TypeError("the decoder's target does not listen; build it with a ListeningTarget")
    comparer, events = Comparer(target, plain), decoder.stream(**batch.arguments)
    while True:
        try:
            comparer.see(next(events))
        except StopIteration as end:
            comparer.end()
            return _explained(target, batch, comparer.partings, plain), end.value.stats


def _explained(
    target: TargetModel, batch: Batch, partings: Mapping[int, Parting], plain: Sequence[Sequence[int]]
) -> list[Divergence]:
    """The partings, with what the logits say where both texts have a token."""
    found = []
    spoken = {row: one.place for row, one in partings.items() if one.token is not None and one.place < len(plain[row])}
    plain_logits = _plain_logits(target, batch, spoken)
    for row, parting in sorted(partings.items()):
        plain_token = plain[row][parting.place] if parting.place < len(plain[row]) else None
        evidence = None
        if row in spoken:
            steps, tokens = (parting.logits, plain_logits[row]), (parting.token, plain_token)
            evidence = _evidence(target, _Draw(batch, row, parting.place), tokens, steps, plain[row][: parting.place])
        found.append(Divergence(row, parting.place, parting.token, plain_token, evidence))
    return found


def _evidence(
    target: TargetModel, draw: _Draw, tokens: tuple[Any, Any], steps: tuple[Any, Any], before: Sequence[int]
) -> Evidence:
    """What the tree's logits [V] and the plain step's say of their tokens, behind a text."""
    (token, plain_token), (tree, plain) = tokens, steps
    coarsest = max(torch.finfo(dtype).eps for dtype in (target.model.dtype, tree.dtype))
    is_drawn = draw.of(tree) == token and draw.of(plain) == plain_token
    tree, plain = tree.double().cpu(), plain.double().cpu()
    return Evidence(
        tree_lead=float(tree[token] - tree[plain_token]),
        plain_lead=float(plain[token] - plain[plain_token]),
        difference=_apart(tree, plain),
        rounding=_rounding(target, draw.batch, draw.row, before, coarsest),
        spacing=coarsest * 2.0 ** math.floor(math.log2(max(float(plain.nan_to_num(0.0, 0.0, 0.0).abs().max()), 1e-30))),
        is_drawn=is_drawn,
    )


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where there is NaN. A token that both rule out is no difference."""
    return float(torch.where(one == other, 0.0, (one - other).abs()).nan_to_num(math.inf, math.inf).max())


@dataclass(frozen=True)
class _Draw:
    """The draw of one token: whose noise, and where."""

    batch: Batch
    row: int
    place: int

    def of(self, logits: Tensor) -> int:
        """The token that the rule draws from logits [V]."""
        sampling = SamplingParams(self.batch.temperature, seed=[self.batch.seeds[self.row]]).rows(1, logits.device)
        root = DraftTree.of_roots(torch.zeros(1, dtype=torch.int64, device=logits.device))
        position = int(self.batch.attention_mask[self.row].sum()) + self.place
        return int(verify(logits[None, None], root, sampling, torch.tensor([position]).to(logits.device)).bonus_tokens)


class _Recorder(LogitsProcessor):
    """Changes nothing, and keeps the logits of some rows at the places where they are wanted."""

    def __init__(self, places: Mapping[int, int]) -> None:
        self.logits: dict[int, Tensor] = {}
        self._places, self._place = places, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for row, place in self._places.items():
            if place == self._place:
                self.logits[row] = scores[row].clone()
        self._place += 1
        return scores


def _plain_logits(target: TargetModel, batch: Batch, places: Mapping[int, int]) -> dict[int, Tensor]:
    """The logits [V] of each of the rows at its place, from plain decoding once more, as far as the last of them."""
    if not places:
        return {}
    recorder, length = _Recorder(places), max(places.values()) + 1
    arguments = {**batch.arguments, "max_new_tokens": [min(length, most) for most in batch.max_new_tokens]}
    plain_generate(target, **arguments, logits_processor=[recorder])
    return recorder.logits


@torch.inference_mode()
def _rounding(target: TargetModel, batch: Batch, row: int, new_tokens: Sequence[int], eps: float) -> float:
    """How far rounding alone moves a logit behind a row's text.

    Stock forwards of the text, without padding, neighbours or cache: one as it is, and some whose embeddings are each
    rounded to a number beside. All that comes behind is rounded differently then, as in a step of another shape.
    """
    prompt = batch.input_ids[row][batch.attention_mask[row].bool()].tolist()
    exact = target.embedding(torch.tensor([[*prompt, *new_tokens]], device=target.device))
    generator = torch.Generator().manual_seed(0)
    noise = 2 * torch.rand(ROUNDINGS, *exact.shape[1:], generator=generator).to(exact.device) - 1
    rounded = (exact.float() * (1 + eps * noise)).to(exact.dtype)
    logits = last_logits(target.model, inputs_embeds=torch.cat([exact, rounded]))
    return _apart(logits[1:], logits[:1])
