"""The losses of guesses: their distance to the target's features, and of their distributions to the target's.

Logits are large (a vocabulary of 128,256: 4 GB for 8,000 slots in float32), so they exist for one chunk of slots at a
time: the gradient of a chunk's loss is taken at once, in the forward pass, and nothing is computed twice.

Source: EAGLE (arXiv 2401.15077), section 4.2; the loss on likely tokens: HASS (arXiv 2408.15766), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features import Head
from ..recipe import ObjectiveConfig

Judge = Callable[[Tensor], Tensor]  # features [S, H] to int64 [S], places of the target's likeliest tokens in `head`'s

CHUNK_SLOTS = 512  # of which logits exist at a time; fewer cost speed, more cost memory


def slot_losses(
    guesses: Tensor, truth: Tensor, head: Head, judge: Judge | None, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """The loss of guesses [S, H] against features [S, H] of the target, and bool [S]: whose likeliest tokens agree.

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
    """Sum of `_token_loss` over slots, chunk by chunk; the gradient is ready when the forward pass is done."""

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
    """Of a chunk: both cross-entropies as one, against the weighted sum of what they are taken against."""
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
