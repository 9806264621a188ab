"""How long a drafter's drafts would live, estimated on held-out text, without decoding.

A chain drafter (one draft a level) at temperature 0 is walked over the text as a decoder would walk: from the slot of
the last committed token it drafts `depth` tokens, so many of them are accepted, and the next step begins behind them
and the bonus token. Draft i of a step that begins at slot t is made by slot t + i - 1 of aligned pass i, and accepted
if it and all drafts before it are the target's likeliest tokens. All steps of all texts are seen in `depth` passes.

On text that the target wrote at temperature 0 the steps are the decoder's own, but for drafts behind the text's end.
On other text the target's likeliest token may not be the one that follows. Trees of many branches live longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import TokenBatch
from .features import FeatureSource
from .objectives import PassOutput, next_stream
from .recipe import ObjectiveConfig

Pass = Callable[..., PassOutput]  # an `ObjectivePass`, perhaps wrapped
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AcceptanceEstimate:
    """What is measured on held-out text; NaN where there was nothing to measure."""

    loss: float  # the objective's without noise: mean over the learned slots, summed over the passes it trains
    accuracy: tuple[float, ...]  # by depth (from 1): share of drafts that are accepted when all before them were
    acceptance_length: float  # 1 + the mean number of accepted drafts of a step


@torch.no_grad()
def estimate(
    model: Pass,
    source: FeatureSource,
    batches: Iterable[TokenBatch],
    config: ObjectiveConfig,
    depth: int = 6,
    reduce: Reduce | None = None,
) -> AcceptanceEstimate:
    """Loss, accuracy by depth and acceptance length of a drafter, by `depth` aligned passes over each batch.

    Args:
        model: an `ObjectivePass` of either objective; in DDP or FSDP every process must bring as many batches.
        config: its objective's.
        reduce: sums a float64 tensor over the processes, each with batches of its own.
    """
    sums = torch.zeros(3 + depth, dtype=torch.float64)  # learned slots, their loss, steps, steps that reach depth d
    for tokens in batches:
        batch = source.draft_batch(tokens)
        streams, is_correct = [batch.features], []
        for n in range(max(depth, config.num_passes)):
            output = model(batch, streams)
            streams.append(next_stream(streams[-1], output.guesses))
            is_correct.append(output.is_correct)
            if n < config.num_passes:
                sums[1] += output.loss.cpu()
        sums[0] += batch.loss_mask.sum().cpu()
        num_accepted = accepted_drafts(torch.stack(is_correct[:depth]))
        for accepted in steps(batch.loss_mask, num_accepted):
            sums[2 : 3 + accepted] += 1
    if reduce is not None:
        sums = reduce(sums.to(source.embedding.device))
    learned, loss, *reached = sums.tolist()
    accuracy = tuple(_ratio(deeper, shallower) for shallower, deeper in pairwise(reached))
    return AcceptanceEstimate(_ratio(loss, learned), accuracy, 1 + _ratio(sum(reached[1:]), reached[0]))


def accepted_drafts(is_correct: Tensor) -> Tensor:
    """int64 [B, T]: how many drafts are accepted of a step that begins at each slot.

    `is_correct` is bool [D, B, T], of learned slots in pass 1 .. D. A chain ends with the learned slots.
    """
    num_accepted = torch.zeros_like(is_correct[0], dtype=torch.int64)
    is_alive = torch.ones_like(is_correct[0])
    for i, correct in enumerate(is_correct):
        is_alive = is_alive & F.pad(correct, (0, i))[:, i:]
        num_accepted += is_alive
    return num_accepted


def steps(loss_mask: Tensor, num_accepted: Tensor) -> list[int]:
    """The accepted drafts of each decode step over a batch: each run of learned slots is an answer, walked alone.

    Both [B, T]. An answer's first token is drawn by the prefill: its first step begins at the slot behind.
    """
    found = []
    for learned, accepted in zip(loss_mask.tolist(), num_accepted.tolist(), strict=True):
        slot = 1
        while slot < len(learned):
            if learned[slot - 1] and learned[slot]:
                found.append(accepted[slot])
                slot += accepted[slot] + 1
            else:
                slot += 1
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
