"""Training objectives: one network, two losses; and how long a drafter's drafts would live on held-out text.

`eagle2` is one pass over noisy features; `hass` repeats it over what the drafter will see while it drafts, and adds a
loss on likely tokens. Either way pass n reads n streams of features: the target's, and one for each pass before it.

Sources: EAGLE (arXiv 2401.15077, section 4.2), whose network EAGLE-2 (arXiv 2406.16858) trains in the same way; HASS
(arXiv 2408.15766, sections 3.1 and 3.2; the mask is exact: closed keys have weight 0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..drafters.network import EagleNetwork
from .features import DraftBatch, FeatureSource, Head
from .masks import TokenBatch
from .recipe import ObjectiveConfig

Judge = Callable[[Tensor], Tensor]  # features [S, H] to int64 [S], places of the target's likeliest tokens in `head`'s
Reduce = Callable[[Tensor], Tensor]

NOISE_LENGTH = 512  # tokens, the text length at which `ObjectiveConfig.noise` is the half width
MIN_BLOCK, MAX_BLOCKS = 64, 8  # queries that are attended together at least, and into how many blocks a long text falls
CHUNK_SLOTS = 512  # of which logits exist at a time; fewer cost speed, more cost memory


class PassOutput(NamedTuple):
    """What one pass makes of a batch. Shapes: B rows, T slots, H hidden."""

    loss: Tensor  # float32 scalar with a gradient: the sum over the learned slots, weights applied
    guesses: Tensor  # [B, T, H] in the features' dtype, detached
    is_correct: Tensor  # bool [B, T]: learned slots whose likeliest token is the target's likeliest

    @property
    def num_correct(self) -> Tensor:
        """Return how many slots are correct, an int64 scalar."""
        return self.is_correct.sum()


class ObjectivePass(nn.Module):
    """One pass of an objective as one module: what DDP and FSDP wrap. Its only parameters are `network.*`.

    The graph of a pass ends at its streams: each pass's backward frees its own, whatever passes follow.
    """

    def __init__(
        self,
        network: EagleNetwork,
        head: Head,
        config: ObjectiveConfig,
        gradient_checkpointing: bool = False,
        judge: Judge | None = None,
    ) -> None:
        """`head` makes the logits that are learned; `judge` is needed where these are a draft vocabulary's."""
        super().__init__()
        self.network = network
        self._head = head, judge  # in a tuple: a head that is a module must not become a part of this one
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, batch: DraftBatch, streams: list[Tensor]) -> PassOutput:
        """Return pass n = len(streams), each [B, T, H] without gradient; the queries are the last stream's."""
        guesses = self._guesses(batch.next_embeddings, streams)
        learned = batch.loss_mask
        loss, is_correct = slot_losses(guesses[learned], batch.next_features[learned], *self._head, self.config)
        is_correct = torch.zeros_like(learned).masked_scatter_(learned, is_correct)
        return PassOutput(loss, guesses.detach().to(batch.features.dtype), is_correct)

    def _guesses(self, embeddings: Tensor, streams: list[Tensor]) -> Tensor:
        x, attended = aligned_attention(self.network, embeddings, streams)
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return self.network.finish(x, attended)
        finished: Tensor = checkpoint(self.network.finish, x, attended, use_reentrant=False, preserve_rng_state=False)
        return finished


def first_stream(batch: DraftBatch, config: ObjectiveConfig, seed: int) -> Tensor:
    """Return the features [B, T, H] that pass 1 reads: the target's, for eagle2 with noise."""
    return noisy(batch, config.noise, seed) if config.name == "eagle2" and config.noise else batch.features


def next_stream(stream: Tensor, guesses: Tensor) -> Tensor:
    """Return the features [B, T, H] that the next pass queries from: the first slot as it was, then shifted guesses."""
    return torch.cat([stream[:, :1], guesses[:, :-1].detach().to(stream.dtype)], dim=1)


def noisy(batch: DraftBatch, noise: float, seed: int) -> Tensor:
    """Return the batch's features [B, T, H] plus uniform noise of half width `noise` * 512 / tokens of the row.

    A row's noise is a function of the seed, its id and its length only: the same in any batch, and behind any padding.
    CPU and CUDA draw different noise from one seed.
    """
    noised = batch.features.clone()
    for row, (length, row_id) in enumerate(zip(batch.lengths.tolist(), batch.ids, strict=True)):
        half_width = noise * NOISE_LENGTH / (length + 1)
        generator = torch.Generator(noised.device).manual_seed(_row_seed(seed, row_id))
        uniform = torch.rand(length, noised.shape[-1], generator=generator, device=noised.device)
        noised[row, :length] += ((uniform - 0.5) * (2 * half_width)).to(noised.dtype)
    return noised


def _row_seed(seed: int, row_id: int) -> int:
    """Return 64 well mixed bits: the CPU's generator reads only the low half of its seed."""
    digest = hashlib.blake2b(f"{seed}/{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


# ---- the attention of a pass over what the drafter will see while drafting


def aligned_attention(network: EagleNetwork, embeddings: Tensor, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the layer's input [B, T, H] of pass n = len(streams), and what its queries, the last stream's, read.

    A drafter in its n-th level has read its own outputs instead of the target's features for the last n - 1 positions.
    Pass n trains that: the query at slot t reads the target's features up to slot t - (n - 1), and the last n - 1 slots
    from the streams that earlier passes made. Stream m holds pass m's outputs, one slot later and without their
    gradients. So every slot up to t is read once, and at t < n - 1 from the drafter's own streams alone.
    Right padding is behind every query that counts, and so is never read by one.
    """
    num_slots = embeddings.shape[1]
    positions = torch.arange(num_slots, device=embeddings.device)[None]
    keys, values = [], []
    for stream in streams:
        x = network.project(embeddings, stream)
        query, key, value = network.qkv(x, positions)
        keys.append(key)
        values.append(value)
    if len(streams) == 1:
        return x, network.attend(query, key, value, None)
    block = max(MIN_BLOCK, -(-num_slots // MAX_BLOCKS))
    starts = range(0, num_slots, block)
    attended = [_attend_block(network, query, keys, values, start, min(start + block, num_slots)) for start in starts]
    return x, torch.cat(attended, dim=1)


def _attend_block(
    network: EagleNetwork, query: Tensor, keys: list[Tensor], values: list[Tensor], start: int, end: int
) -> Tensor:
    """Return what the queries at slots start .. end - 1 read, [B, end - start, heads * head_dim].

    They see no key behind `end`, and of each stream but the first one slot a query: of all n * T columns only those
    that some query of the block sees are computed.
    """
    last = len(keys) - 1
    slots = torch.arange(end, device=query.device)
    offsets, seen = slots[start:end, None] - slots, []
    spans = []
    for m in range(len(keys)):
        distance = last - m  # of the newest slot that is read from stream m
        spans.append(slice(0 if m == 0 else max(start - distance, 0), max(end - distance, 0)))
        is_seen = offsets >= distance if m == 0 else offsets == distance
        seen.append(is_seen[:, spans[m]])
    key = torch.cat([stream[:, :, span] for stream, span in zip(keys, spans, strict=True)], dim=2)
    value = torch.cat([stream[:, :, span] for stream, span in zip(values, spans, strict=True)], dim=2)
    return network.attend(query[:, :, start:end], key, value, torch.cat(seen, dim=1))


# ---- the losses of guesses


def slot_losses(
    guesses: Tensor, truth: Tensor, head: Head, judge: Judge | None, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Return the loss of guesses [S, H] against features [S, H] of the target, and bool [S]: likeliest tokens agree.

    The loss is a sum over the slots, float32 under autocast too: smooth L1 (mean over H), and cross-entropies in nats.
    With the head of a draft vocabulary both distributions are over its tokens. The likeliest token is then also the
    vocabulary's, but where no gradient is needed `judge` looks at all of the target's tokens: a validation is exact,
    and an update does not pay for the large product.
    """
    guesses = guesses.to(truth.dtype)  # autocast makes them bfloat16
    feature_loss = F.smooth_l1_loss(guesses, truth, reduction="sum") / truth.shape[-1]
    token_loss, is_correct = _TokenLoss.apply(guesses, truth, head, judge, config)
    return config.feature_weight * feature_loss + token_loss, is_correct


class _TokenLoss(torch.autograd.Function):
    """Sum `_token_loss` over slots, chunk by chunk; the gradient is ready when the forward pass is done.

    Logits are large (a vocabulary of 128,256: 4 GB for 8,000 slots in float32), so they exist for one chunk at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, guesses: Tensor, truth: Tensor, head: Head, judge: Judge | None, config: ObjectiveConfig
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        judge = None if needs_gradient else judge
        gradients, correct, total = [], [], guesses.new_zeros(())
        for chunk, true_chunk in zip(guesses.split(CHUNK_SLOTS), truth.split(CHUNK_SLOTS), strict=True):
            with torch.set_grad_enabled(needs_gradient):
                chunk = chunk.detach().requires_grad_(needs_gradient)
                loss, is_correct = _token_loss(chunk, true_chunk, head, judge, config)
                if needs_gradient:
                    gradients += torch.autograd.grad(loss, chunk)
            total += loss.detach()
            correct.append(is_correct)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients))
        is_correct = torch.cat(correct)
        ctx.mark_non_differentiable(is_correct)
        return total, is_correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None, None, None


def _token_loss(
    guesses: Tensor, truth: Tensor, head: Head, judge: Judge | None, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Return both cross-entropies of a chunk as one, against the weighted sum of what they are taken against."""
    with torch.no_grad():
        target_logits = head(truth)
        # max: the first of equals, like argmax, and three times as fast
        likeliest = target_logits.max(-1).indices if judge is None else judge(truth)
        weights = target_logits.softmax(-1)
        if config.name == "hass":
            top = weights.topk(min(config.num_top_tokens, weights.shape[-1]), dim=-1)
            weights *= config.distribution_weight
            weights.scatter_add_(-1, top.indices, config.top_weight * top.values)
        else:
            weights *= config.distribution_weight
    logits = head(guesses)
    return F.cross_entropy(logits, weights, reduction="sum"), logits.detach().max(-1).indices == likeliest


# ---- how long drafts would live


@dataclass(frozen=True)
class AcceptanceEstimate:
    """What is measured on held-out text; NaN where there was nothing to measure."""

    loss: float  # the objective's without noise: mean over the learned slots, summed over the passes it trains
    accuracy: tuple[float, ...]  # by depth (from 1): share of drafts that are accepted when all before them were
    acceptance_length: float  # 1 + the mean number of accepted drafts of a step


@torch.no_grad()
def estimate(
    model: Callable[..., PassOutput],
    source: FeatureSource,
    batches: Iterable[TokenBatch],
    config: ObjectiveConfig,
    depth: int = 6,
    reduce: Reduce | None = None,
) -> AcceptanceEstimate:
    """Return loss, accuracy by depth and acceptance length of a drafter, by `depth` aligned passes over each batch.

    A chain drafter (one draft a level) at temperature 0 is walked over the text as a decoder would walk: from the slot
    of the last committed token it drafts `depth` tokens, some of them are accepted, and the next step begins behind
    them and the bonus token. Draft i of a step that begins at slot t is made by slot t + i - 1 of aligned pass i, and
    accepted if it and all drafts before it are the target's likeliest tokens. On text that the target wrote at
    temperature 0 the steps are the decoder's own, but for drafts behind the text's end.

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
    """Return int64 [B, T], how many drafts are accepted of a step that begins at each slot.

    `is_correct` is bool [D, B, T], of learned slots in pass 1 .. D. A chain ends with the learned slots.
    """
    num_accepted = torch.zeros_like(is_correct[0], dtype=torch.int64)
    is_alive = torch.ones_like(is_correct[0])
    for i, correct in enumerate(is_correct):
        is_alive = is_alive & F.pad(correct, (0, i))[:, i:]
        num_accepted += is_alive
    return num_accepted


def steps(loss_mask: Tensor, num_accepted: Tensor) -> list[int]:
    """Return the accepted drafts of each decode step over a batch: each run of learned slots is an answer.

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
