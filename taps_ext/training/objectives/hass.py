"""HASS's part: the attention of a pass over what the drafter will see while drafting.

A drafter in its n-th level has read its own outputs instead of the target's features for the last n - 1 positions.
Pass n trains that: the query at slot t reads the target's features up to slot t - (n - 1), and the last n - 1 slots
from the streams that earlier passes made. Stream m holds pass m's outputs, one slot later and without their gradients.
So every slot up to t is read once, and at t < n - 1, the start of a text, from the drafter's own streams alone.

Source: HASS (arXiv 2408.15766), section 3.2; the mask is exact (closed keys have weight 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...drafters.network import EagleNetwork

MIN_BLOCK, MAX_BLOCKS = 64, 8  # queries that are attended together at least, and into how many blocks a long text falls


def aligned_attention(network: EagleNetwork, embeddings: Tensor, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The layer's input [B, T, H] of pass n = len(streams), and what its queries, the last stream's, read.

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
    """What the queries at slots start .. end - 1 read, [B, end - start, heads * head_dim].

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
