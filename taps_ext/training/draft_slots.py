"""Where a drafter would have drafted: for the places of a text, what the target says there and what drafts of every
depth say.

The slot s of a text stands for the draw of token s + 2. A draft of depth d made there comes from a step that began
d - 1 slots before: pass d of the drafter over its own features, as in `acceptance_estimate.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ..drafters.network import EagleNetwork
from .dataset import TokenDataset
from .features import DraftBatch, FeatureSource
from .objectives import next_stream
from .objectives.hass import aligned_attention

BATCH_SEQUENCES = 8  # of one forward of the target
NUM_SEQUENCES = 64  # at least, where there are so many: slots of one text are alike


@dataclass(frozen=True)
class DraftSlots:
    """Slots of many texts. Shapes: S slots, D depths, H hidden."""

    truth: Tensor  # [S, H], the target's features, of which its lm_head makes the logits of the draw
    drafted: Tensor  # [D, S, H], the drafter's features for the same draw, by depth
    # int64 [S], up to which depth a draft can have been made there: each is in an answer from its root on
    reach: Tensor
    sequence: Tensor  # int64 [S], of which text, numbered from 0 in the order they were taken

    def __getitem__(self, index: Tensor) -> DraftSlots:
        """Some of the slots, by a mask or indices [S]."""
        return DraftSlots(self.truth[index], self.drafted[:, index], self.reach[index], self.sequence[index])

    def __len__(self) -> int:
        return len(self.reach)


@torch.no_grad()
def collect(
    network: EagleNetwork, source: FeatureSource, dataset: TokenDataset, depth: int, count: int, seed: int
) -> Iterator[tuple[DraftSlots, int, int]]:
    """At most `count` slots of a data set, chosen by the seed from many texts, a batch at a time: (slots, done, total).

    `network` drafts in its own precision. There are fewer where the answers have fewer tokens.
    """
    dtype = network.fc.weight.dtype
    chosen = _choose(dataset, depth, count, Random(f"{seed}/slots"))
    for start in range(0, len(chosen), BATCH_SEQUENCES):
        part = chosen[start : start + BATCH_SEQUENCES]
        batch = source.draft_batch(dataset.batch([index for index, _ in part]))
        rows = torch.tensor([row for row, (_, slots) in enumerate(part) for _ in slots])
        slots, reach = torch.tensor([entry for _, entries in part for entry in entries]).unbind(1)
        drafted = [made[rows, slots] for made in _passes(network, batch, dtype, depth)]
        made = DraftSlots(
            batch.next_features[rows, slots],
            torch.stack(drafted),
            reach.to(batch.features.device),
            (rows + start).to(batch.features.device),
        )
        yield made, start + len(part), len(chosen)


def _passes(network: EagleNetwork, batch: DraftBatch, dtype: torch.dtype, depth: int) -> Iterator[Tensor]:
    """The drafter's features [B, T, H] of each depth."""
    embeddings, streams = batch.next_embeddings.to(dtype), [batch.features.to(dtype)]
    for _ in range(depth):
        made = network.finish(*aligned_attention(network, embeddings, streams))
        yield made
        streams.append(next_stream(streams[-1], made))


def _choose(dataset: TokenDataset, depth: int, count: int, random: Random) -> list[tuple[int, list[tuple[int, int]]]]:
    """Sequences with some of their slots, each with its reach; of all slots of enough sequences a random part."""
    found: list[tuple[int, int, int]] = []
    for number, index in enumerate(random.sample(range(len(dataset)), len(dataset))):
        if number >= NUM_SEQUENCES and len(found) >= count:
            break
        found += [(index, slot, reach) for slot, reach in _reaches(dataset[index].loss_mask, depth)]
    by_sequence: dict[int, list[tuple[int, int]]] = {}
    for place in sorted(random.sample(range(len(found)), min(count, len(found)))):
        index, slot, reach = found[place]
        by_sequence.setdefault(index, []).append((slot, reach))
    return list(by_sequence.items())


def _reaches(loss_mask: Sequence[bool], depth: int) -> Iterator[tuple[int, int]]:
    """The slots where something can be drafted, with up to which depth.

    A draft of depth d for token t needs a root, token t - d, that a step drew or verified: all from there to t are
    learned. The first of an answer is drawn by the prefill and never drafted.
    """
    run = 0
    for token, learned in enumerate(loss_mask):
        run = run + 1 if learned else 0
        if run > 1 and token > 2:
            yield token - 2, min(run - 1, depth, token - 2)
