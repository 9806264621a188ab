"""Running evidence: how probable each drafter found what was emitted. It takes no further forward of a drafter.

Evidence of drafter k is `sum_i w_i decay^(t - i) log q_k(x_i)` over the tokens x_i of a row up to x_t, at temperature
1: what remains of the log-likelihood of the text. It begins at the prompt's last `MOST_SLOTS` tokens, and w_i is
`PROMPT_WEIGHT` for a prompt's tokens and 1 for the others. Its softmax over drafters is the probability that each is
the one to ask. It depends on the past alone, so that whatever is decided by it leaves the text as it is.

Dims: D drafters, B rows, T slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = -100.0  # nats of a token: nothing rules a drafter out for good, not even logits that overflowed
PROMPT_WEIGHT = 0.3  # of a prompt's token: drafters learn from answers, and know less of what users say
MOST_SLOTS = 64  # of one observation: a prompt's last ones; 0.95 ** 64 is a 27th
MOST_ELEMENTS = 1 << 25  # logits at a time, a prompt's


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """float32 [...], of tokens int64 [...] under the softmax of logits [..., V]; at least `LEAST`, also for NaN."""
    logits = logits.float()
    exact = logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return exact.nan_to_num(nan=LEAST).clamp(min=LEAST)


def observed(
    out: Tensor,
    next_tokens: Tensor,
    num_tokens: Tensor,
    is_prompt: Tensor,
    decay: float,
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """What an observation says of all its tokens but the first, float32 [D, B], and the last slots' logits [D, B, V].

    Args:
        out: [D, B, T, H], the drafters' outputs; slot t predicts the token of slot t + 1.
        next_tokens, num_tokens: int64 [B, T] and [B], as observed. Of a row without tokens the logits mean nothing.
        is_prompt: bool [B], whether all tokens but the last one are a prompt's.
        logits_of: the logits [R, t, V] of outputs [R, t, H].
    """
    num_drafters, batch, num_slots, hidden = out.shape
    window = min(num_slots, MOST_SLOTS)
    slots = num_tokens[:, None] - window + torch.arange(window, device=out.device)  # [B, W], up to the row's last one
    is_predicting = (slots >= 0) & (slots + 1 < num_tokens[:, None])
    weights = decay ** (num_tokens[:, None] - 2 - slots).clamp(min=0).float()
    weights = torch.where(is_prompt[:, None] & (slots + 2 < num_tokens[:, None]), PROMPT_WEIGHT * weights, weights)
    places = slots.clamp(min=0)
    tokens = next_tokens.gather(1, (places + 1).clamp(max=num_slots - 1)).expand(num_drafters, -1, -1)
    outputs = out.gather(2, places[None, :, :, None].expand(num_drafters, -1, -1, hidden)).flatten(0, 1)
    evidence = torch.zeros(num_drafters, batch, device=out.device)
    size = max(1, MOST_ELEMENTS // (num_drafters * batch * vocab_size))
    for first in range(0, window, size):
        part = slice(first, first + size)
        logits = logits_of(outputs[:, part]).unflatten(0, (num_drafters, batch))
        found = weights[:, part] * log_probability(logits, tokens[:, :, part])
        evidence += torch.where(is_predicting[:, part], found, 0).sum(dim=-1)
    return evidence, logits[:, :, -1].clone()  # not a view that keeps all of a prompt's alive
