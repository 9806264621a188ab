"""Intervals by resampling questions, and how well one number tells two groups apart. Arrays only."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUM_RESAMPLES = 2000
SEED = 0
LEVEL = 95  # percent of the resamples that an interval holds


@dataclass(frozen=True, eq=False)
class Sampled:
    """A figure, and what it is in each resample of the questions: float64 [NUM_RESAMPLES]. NaN: it has no value."""

    value: float
    samples: Array

    def __sub__(self, other: Sampled) -> Sampled:
        return Sampled(self.value - other.value, self.samples - other.samples)

    def __truediv__(self, other: Sampled) -> Sampled:
        with np.errstate(divide="ignore", invalid="ignore"):
            return Sampled(float(np.divide(self.value, other.value)), self.samples / other.samples)

    @property
    def estimate(self) -> Estimate:
        """The figure with its interval."""
        known = self.samples[np.isfinite(self.samples)]
        if not np.isfinite(self.value) or not len(known):
            return Estimate(float("nan"), float("nan"), float("nan"))
        low, high = np.percentile(known, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        return Estimate(self.value, float(low), float(high))


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval of its resamples."""

    value: float
    low: float
    high: float


@lru_cache(maxsize=64)
def resamples(task: str, num_questions: int) -> Array:
    """How often each resample draws each question: float64 [NUM_RESAMPLES, num_questions], whole numbers.

    A function of its arguments, so that two variants on the same questions meet the same resamples: their difference
    is paired. Tasks are drawn apart from each other.
    """
    random = np.random.default_rng([SEED, zlib.crc32(task.encode()), num_questions])
    evenly = np.full(num_questions, 1 / num_questions)
    return random.multinomial(num_questions, evenly, size=NUM_RESAMPLES).astype(np.float64)


def ratio(numerators: Array, denominators: Array, task: str) -> Sampled:
    """sum(numerators) / sum(denominators) over questions, both [Q]; questions are resampled whole."""
    if not len(numerators):
        return Sampled(float("nan"), np.full(NUM_RESAMPLES, np.nan))
    weights = resamples(task, len(numerators))
    total = float(denominators.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = (weights @ numerators) / (weights @ denominators)
    return Sampled(float(numerators.sum()) / total if total else float("nan"), samples)


def mean(parts: Sequence[Sampled]) -> Sampled:
    """The mean of figures of different tasks, each counting the same."""
    return Sampled(float(np.mean([part.value for part in parts])), np.mean([part.samples for part in parts], axis=0))


def auc(high: Array, low: Array) -> float:
    """P(a member of `high` stands in a higher bin than one of `low`), ties half; histograms [bins].

    NaN if one of them is empty.

    >>> auc(np.array([0, 1, 3]), np.array([2, 2, 0]))
    0.9375
    """
    num_pairs = high.sum() * low.sum()
    return float(pairs_won(high[None], low[None])[0] / num_pairs) if num_pairs else float("nan")


def pairs_won(high: Array, low: Array) -> Array:
    """Per question, the pairs (one of `high`, one of `low`) with the first in the higher bin, ties half: [Q].

    Both are histograms [Q, bins] over the same bins.
    """
    below = np.cumsum(low, axis=1) - low
    return np.asarray((high * (below + low / 2)).sum(axis=1), dtype=np.float64)
