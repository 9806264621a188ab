"""Running evidence: how probable a drafter found the committed text. It needs no additional forward of the drafter.

The evidence for a drafter is `sum_i w_i decay^(t - i) log q(x_i)` over the tokens x_i of a row up to x_t, at
temperature 1: the discounted log-likelihood of the text. It begins at the prompt's last `MAX_SLOTS` tokens; w_i is
`PROMPT_WEIGHT` for the prompt's tokens and 1 for the others. Its softmax over drafters is the probability that each is
the best one to ask. It depends on the past alone, so decisions based on it leave the text as it is.

Dims: B rows, T slots, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

LEAST = -100.0  # nats of a token: no token rules a drafter out for good, not even one whose logits overflowed
OUTSIDE = 0.01  # probability of all tokens outside a draft vocabulary: it covers 99% of the text by default
PROMPT_WEIGHT = 0.3  # drafters learn from answers, and know less of what users write
MAX_SLOTS = 64  # of one observation, the last ones of a prompt; 0.95 ** 64 is a 27th
MAX_ELEMENTS = 1 << 25  # logits in memory at a time while a prompt is observed


def token_log_probs(logits: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Return the log-probability, float32 [...], of tokens int64 [...] under logits [..., V]; at least `LEAST`.

    Under logits [..., D] of a draft vocabulary the tokens are indices into it. Those outside, -1, share `OUTSIDE`
    evenly: a token that a drafter cannot propose counts as much as one that it finds very improbable.
    """
    logits = logits.float()
    exact = logits.gather(-1, tokens.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(dim=-1)
    exact = exact.nan_to_num(nan=LEAST).clamp(min=LEAST)
    if (num_outside := vocab_size - logits.shape[-1]) > 0:
        exact = torch.where(tokens < 0, math.log(OUTSIDE / num_outside), exact)
    return exact


def of_text(log_probs: Tensor, is_prompt: bool, decay: float) -> float:
    """Return the evidence of one row's appended tokens, from the log-probabilities float32 [T] that they had.

    The tokens that count are those that count in `of_observation`: of a prompt the last `MAX_SLOTS`, without the first.
    """
    if is_prompt:
        log_probs = log_probs[1:][1 - MAX_SLOTS :]
    weights = decay ** torch.arange(len(log_probs) - 1, -1, -1)
    if is_prompt:
        weights[:-1] *= PROMPT_WEIGHT
    return float((weights * log_probs.clamp(min=LEAST)).sum())


def of_observation(
    outputs: Tensor,
    next_tokens: Tensor,
    num_tokens: Tensor,
    is_prompt: Tensor,
    decay: float,
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the evidence of all observed tokens but the first, float32 [B], and the last slots' logits [B, V].

    Args:
        outputs: [B, T, H], the drafter's; slot t predicts the token of slot t + 1.
        next_tokens, num_tokens: int64 [B, T] and [B], as observed, the tokens as places in the logits. The logits of a
            row without tokens are meaningless.
        is_prompt: bool [B], whether all tokens but the last one belong to a prompt.
        logits_of: computes the logits [B, t, V] of outputs [B, t, H].
    """
    batch_size, num_slots, hidden_size = outputs.shape
    window = min(num_slots, MAX_SLOTS)
    slots = num_tokens[:, None] - window + torch.arange(window, device=outputs.device)  # [B, W], up to the last one
    is_predicting = (slots >= 0) & (slots + 1 < num_tokens[:, None])
    weights = decay ** (num_tokens[:, None] - 2 - slots).clamp(min=0).float()
    weights = torch.where(is_prompt[:, None] & (slots + 2 < num_tokens[:, None]), PROMPT_WEIGHT * weights, weights)
    slots = slots.clamp(min=0)
    tokens = next_tokens.gather(1, (slots + 1).clamp(max=num_slots - 1))
    outputs = outputs.gather(1, slots[:, :, None].expand(-1, -1, hidden_size))
    evidence = torch.zeros(batch_size, device=outputs.device)
    size = max(1, MAX_ELEMENTS // (batch_size * vocab_size))
    for first in range(0, window, size):
        part = slice(first, first + size)
        logits = logits_of(outputs[:, part])
        log_probs = weights[:, part] * token_log_probs(logits, tokens[:, part], vocab_size)
        evidence += torch.where(is_predicting[:, part], log_probs, 0).sum(dim=-1)
    return evidence, logits[:, -1].clone()  # not a view that keeps all logits of a prompt alive
