"""Training objectives: one network, two losses. What a trainer calls for each pass of an update.

`eagle2` is one pass over noisy features; `hass` repeats it over what the drafter will see while it drafts, and adds a
loss on likely tokens. Either way pass n reads n streams of features: the target's, and one for each pass before it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...drafters.network import EagleNetwork
from ..features import DraftBatch, Head
from ..recipe import ObjectiveConfig
from .eagle2 import noisy
from .hass import aligned_attention
from .losses import Judge, slot_losses

__all__ = ["Judge", "ObjectivePass", "PassOutput", "first_stream", "next_stream"]


class PassOutput(NamedTuple):
    """What one pass makes of a batch. Shapes: B rows, T slots, H hidden."""

    loss: Tensor  # float32 scalar with a gradient: the sum over the learned slots, weights applied
    guesses: Tensor  # [B, T, H] in the features' dtype, detached
    is_correct: Tensor  # bool [B, T]: learned slots whose likeliest token is the target's likeliest

    @property
    def num_correct(self) -> Tensor:
        """int64 scalar: how many slots are correct."""
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
        """Pass n = len(streams), each [B, T, H] without gradient; the queries are the last stream's."""
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
    """The features [B, T, H] that pass 1 reads: the target's, for eagle2 with noise. See `eagle2.noisy`."""
    return noisy(batch, config.noise, seed) if config.name == "eagle2" and config.noise else batch.features


def next_stream(stream: Tensor, guesses: Tensor) -> Tensor:
    """The features [B, T, H] that the next pass queries from: the first slot as it was, then the shifted guesses."""
    return torch.cat([stream[:, :1], guesses[:, :-1].detach().to(stream.dtype)], dim=1)
