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
from .progress import Progress

BATCH_SEQUENCES = 8  # of one forward of the target
NUM_SEQUENCES = 64  # at least, where there are so many: slots of one text are alike


@dataclass(frozen=True)
class DraftSlots:
    """Slots of many texts. Shapes: S slots, D depths, H hidden."""

    # [1 + D, S, H], of which the lm_head makes the logits of one draw: the target's, then the drafter's by depth
    features: Tensor
    # int64 [S], up to which depth a draft can have been made there: each is in an answer from its root on
    reach: Tensor
    sequence: Tensor  # int64 [S], of which text, numbered from 0 in the order they were taken

    def __getitem__(self, index: Tensor) -> DraftSlots:
        """Some of the slots, by a mask or indices [S]."""
        return DraftSlots(self.features[:, index], self.reach[index], self.sequence[index])

    def __len__(self) -> int:
        return len(self.reach)

    @property
    def num_places(self) -> Tensor:
        """Return int64 [D], on the CPU: at how many of them a draft of each depth can be."""
        depths = torch.arange(1, len(self.features))
        return (self.reach.cpu() >= depths[:, None]).sum(-1)

    def cut(self, depth: int) -> DraftSlots:
        """Return the slots without the deeper drafts."""
        return DraftSlots(self.features[: 1 + depth], self.reach, self.sequence)


@torch.no_grad()
def collect(
    network: EagleNetwork,
    source: FeatureSource,
    dataset: TokenDataset,
    depth: int,
    count: int,
    seed: int,
    progress: Progress,
) -> DraftSlots:
    """Return at most `count` slots of a data set, chosen by the seed from many texts.

    `network` drafts in its own dtype. Raise ValueError for texts without a slot.
    """
    chosen, parts = _choose(dataset, depth, count, Random(f"{seed}/slots")), []
    for start in range(0, len(chosen), BATCH_SEQUENCES):
        progress("texts", start, len(chosen))
        part = chosen[start : start + BATCH_SEQUENCES]
        batch = source.draft_batch(dataset.batch([index for index, _ in part]))
        rows = torch.tensor([row for row, (_, slots) in enumerate(part) for _ in slots])
        slots, reach = torch.tensor([entry for _, entries in part for entry in entries]).unbind(1)
        drafted = (made[rows, slots] for made in _passes(network, batch, depth))
        features = torch.stack([batch.next_features[rows, slots], *drafted])
        parts.append(DraftSlots(features, *(ids.to(features.device) for ids in (reach, rows + start))))
    if not parts:
        raise ValueError(
            "the texts have no place where something could be drafted; give conversations with longer answers"
        )
    features = torch.cat([part.features for part in parts], dim=1)
    return DraftSlots(features, *(torch.cat([getattr(part, name) for part in parts]) for name in ("reach", "sequence")))


def _passes(network: EagleNetwork, batch: DraftBatch, depth: int) -> Iterator[Tensor]:
    """The drafter's features [B, T, H] of each depth."""
    dtype = network.fc.weight.dtype
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
