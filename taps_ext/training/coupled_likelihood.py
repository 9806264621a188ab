"""How likely the target's draws are under a drafter that sees the noise, and the two coefficients that make them so.

The target draws y = argmax_v(log p(v) / T + g(v)); a drafter with logits x gives v the probability
softmax(alpha * x / T + beta * g)(v). The mean of -log of what it gives to y is convex in (alpha, beta): damped Newton.

Source: conditional logit (McFadden 1974). Dims: S draws, V vocabulary, C cells (a depth and a temperature each).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ALPHA = 1e-3  # a drafter that knows nothing: its children are those of the noise
PRIOR = 1.0  # places' worth of a pull towards EAGLE-2: against too few places, and a perfect drafter has no optimum
MAX_SWEEPS, CLOSE_ENOUGH = 40, 1e-5  # a coefficient is written down with four digits behind the point


class Likelihood(NamedTuple):
    """Sums over draws, all float64: -log-likelihood in nats, its gradient and second derivative in (alpha, beta)."""

    loss: Tensor  # [C], or of one cell []
    gradient: Tensor  # [C, 2]
    hessian: Tensor  # [C, 2, 2]


def likelihood(
    logits: Tensor, noise: Tensor, drawn: Tensor, temperature: float, alpha: float, beta: float
) -> Likelihood:
    """The sums of one cell, of logits and noise float [S, V] and the drawn tokens int64 [S]."""
    scores = torch.add(noise * beta, logits, alpha=alpha / temperature)
    of_drawn, largest = scores.gather(1, drawn[:, None]), scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1)
    loss = total.log() + (largest - of_drawn)[:, 0]
    weighted, dot = (weights * logits, weights.mul_(noise)), torch.linalg.vecdot
    second = (dot(weighted[0], logits), dot(weighted[0], noise), dot(weighted[1], noise))
    mean = torch.stack([part.sum(-1) for part in weighted], dim=-1).double() / total[:, None]
    xx, xg, gg = (part.double() / total for part in second)
    spread = torch.stack((xx, xg, xg, gg), dim=-1).view(-1, 2, 2) - mean[:, :, None] * mean[:, None, :]
    gradient = mean - torch.stack([part.gather(1, drawn[:, None])[:, 0] for part in (logits, noise)], dim=-1)
    unit = torch.tensor([1 / temperature, 1.0], dtype=torch.float64, device=logits.device)  # of x / T and g
    hessian = spread.sum(0) * unit[:, None] * unit
    return Likelihood(loss.double().sum(), gradient.sum(0) * unit, hessian)


def fit(
    evaluate: Callable[[Tensor], Likelihood], temperatures: Tensor, num_places: Tensor, with_noise: bool = True
) -> Tensor:
    """The coefficients float64 [C, 2] that make the draws likeliest: alpha above 0, beta at least 0.

    Args:
        evaluate: the sums over all places at coefficients [C, 2]. One call is one sweep over the data, for all cells.
        temperatures: [C]. The start is EAGLE-2: alpha = temperature, beta = 0.
        num_places: [C], at least 1.
        with_noise: fit beta; else it stays 0.
    """
    least = torch.tensor([LEAST_ALPHA, 0.0], dtype=torch.float64)
    start = torch.stack((temperatures.double(), torch.zeros(len(temperatures)).double()), dim=-1)
    trial, best, sums = start, start, None
    for _ in range(MAX_SWEEPS):
        found = _with_prior(evaluate(trial), trial - start, num_places)
        if sums is None:
            sums = found
        better = found.loss <= sums.loss
        best = torch.where(better[:, None], trial, best)
        sums = Likelihood(*(_where(better, new, old) for new, old in zip(found, sums, strict=True)))
        # A step that was too long is halved; from a better point, a new one is made.
        step = torch.where(better[:, None], _newton(best, sums, least, with_noise), (trial - best) / 2)
        trial = torch.maximum(best + step, least)
        if bool(((trial - best).abs() < CLOSE_ENOUGH).all()):
            break
    return best


def _newton(point: Tensor, sums: Likelihood, least: Tensor, with_noise: bool) -> Tensor:
    """The step [C, 2] to the minimum of the quadratic where no coefficient is below its least one.

    It lies where the gradient is 0, or else on one of the two edges.
    """
    found = [_along(1, point, sums, least)]  # beta is 0
    if with_noise:
        inside = -torch.linalg.solve(sums.hessian, sums.gradient[..., None])[..., 0]
        found += [_along(0, point, sums, least), inside]
    steps = torch.stack(found)  # [1 or 3, C, 2]
    curved = torch.einsum("nci,cij,ncj->nc", steps, sums.hessian, steps)
    value = (steps * sums.gradient).sum(-1) + curved / 2
    value = value.masked_fill((point + steps < least - CLOSE_ENOUGH).any(-1), torch.inf)
    return steps.gather(0, value.argmin(0)[None, :, None].expand(1, -1, 2))[0]


def _along(fixed: int, point: Tensor, sums: Likelihood, least: Tensor) -> Tensor:
    """The step [C, 2] to the minimum on the edge where one coefficient is the least it may be."""
    free, step = 1 - fixed, least - point
    slope = sums.gradient[:, free] + sums.hessian[:, 0, 1] * step[:, fixed]
    step[:, free] = torch.maximum(step[:, free], -slope / sums.hessian[:, free, free])
    return step


def _with_prior(sums: Likelihood, away: Tensor, num_places: Tensor) -> Likelihood:
    """Means over the places, with the pull back from `away` [C, 2]."""
    count = num_places.double()
    share = PRIOR / count
    return Likelihood(
        sums.loss / count + share / 2 * away.square().sum(-1),
        sums.gradient / count[:, None] + share[:, None] * away,
        sums.hessian / count[:, None, None] + share[:, None, None] * torch.eye(2).double(),
    )


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)
