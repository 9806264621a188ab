"""EAGLE-2's objective: guess the target's next feature, and through it the target's next distribution.

Source: EAGLE (arXiv 2401.15077), section 4.2; EAGLE-2 (arXiv 2406.16858) trains the same network.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...drafters.eagle_network import EagleNetwork
from ..config import TrainingConfig
from ..features import DraftBatch, Head

NOISE_LENGTH = 512  # tokens, the text length at which `TrainingConfig.noise` is the half width


def eagle2_losses(
    network: EagleNetwork, head: Head, batch: DraftBatch, config: TrainingConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """One scalar: the weighted loss of a teacher-forced pass over noisy features."""
    slots = batch.features.shape[1]
    positions = torch.arange(slots, device=batch.features.device)[None]
    noise = torch.rand(batch.features.shape, generator=generator).to(batch.features) - 0.5
    features = batch.features + noise * (2 * config.noise * NOISE_LENGTH / (slots + 1))
    guesses = network(batch.next_embeddings, features, positions)
    yield guess_loss(guesses, head, batch, config)


def guess_loss(guesses: Tensor, head: Head, batch: DraftBatch, config: TrainingConfig) -> Tensor:
    """The weighted feature and distribution losses of guesses [B, T, H], a mean over the slots to be learned."""
    truth = batch.next_features[batch.loss_mask]
    guesses = guesses[batch.loss_mask].to(truth.dtype)  # autocast makes them bfloat16
    loss = config.feature_weight * F.smooth_l1_loss(guesses, truth)
    if config.distribution_weight:
        loss = loss + config.distribution_weight * distribution_loss(head(guesses), head(truth))
    return loss


def distribution_loss(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of the drafter's distribution against the target's; both logits [S, V]."""
    return F.cross_entropy(logits, target_logits.softmax(-1))
