"""HASS's objective: EAGLE-2's, repeated over what the drafter will see while drafting, and weighted to likely tokens.

A drafter in its n-th level has read its own outputs instead of the target's features for the last n - 1 positions.
Pass n trains that: the query at slot t reads the target's features up to slot t - (n - 1), and the last n - 1 slots
from the streams that earlier passes made. Stream m holds pass m's outputs, one slot later and without their gradients.

Source: HASS (arXiv 2408.15766), sections 3.1 and 3.2; the mask is exact (closed keys have weight 0).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...drafters.eagle_network import EagleNetwork
from ..config import TrainingConfig
from ..features import DraftBatch, Head
from .eagle2 import guess_loss


def hass_losses(
    network: EagleNetwork, head: Head, batch: DraftBatch, config: TrainingConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """A scalar for each alignment pass, in order; take the gradient of each before asking for the next."""
    slots = batch.features.shape[1]
    positions = torch.arange(slots, device=batch.features.device)[None]
    streams = [batch.features]
    for pass_number in range(1, config.alignment_passes + 1):
        guesses = aligned_pass(network, batch.next_embeddings, streams, positions)
        loss = guess_loss(guesses, head, batch, config)
        if config.top_weight:
            learned = batch.loss_mask
            top = top_tokens_loss(head(guesses[learned]), head(batch.next_features[learned]), config.num_top_tokens)
            loss = loss + config.top_weight * top
        yield loss
        if pass_number < config.alignment_passes:
            streams.append(next_stream(streams[-1], guesses))


def aligned_pass(network: EagleNetwork, embeddings: Tensor, streams: list[Tensor], positions: Tensor) -> Tensor:
    """The guesses [B, T, H] of pass n = len(streams); the queries are the last stream's."""
    queries, keys, values = [], [], []
    for stream in streams:
        x = network.project(embeddings, stream)
        query, key, value = network.qkv(x, positions)
        queries.append(query)
        keys.append(key)
        values.append(value)
    mask = None if len(streams) == 1 else alignment_mask(embeddings.shape[1], len(streams)).to(embeddings.device)
    attended = network.attend(queries[-1], torch.cat(keys, dim=2), torch.cat(values, dim=2), mask)
    return network.finish(x, attended)


def alignment_mask(slots: int, num_streams: int) -> Tensor:
    """bool [T, n * T], n = num_streams: which keys of which stream the queries of pass n see.

    Of the target's features (stream 0) those at slots <= t - (n - 1); of stream m >= 1 the slot t - (n - 1 - m) alone.
    """
    offset = torch.arange(slots)[:, None] - torch.arange(slots)
    last = num_streams - 1
    return torch.cat([offset >= last, *(offset == last - m for m in range(1, num_streams))], dim=1)


def next_stream(stream: Tensor, guesses: Tensor) -> Tensor:
    """The features [B, T, H] that the next pass queries from: the first slot as it was, then the shifted guesses."""
    return torch.cat([stream[:, :1], guesses[:, :-1].detach().to(stream.dtype)], dim=1)


def top_tokens_loss(logits: Tensor, target_logits: Tensor, num_top_tokens: int) -> Tensor:
    """Mean cross-entropy (nats) restricted to the target's likeliest tokens; both logits [S, V]."""
    probabilities, tokens = target_logits.softmax(-1).topk(min(num_top_tokens, logits.shape[-1]), dim=-1)
    return -(probabilities * logits.log_softmax(-1).gather(-1, tokens)).sum(-1).mean()
