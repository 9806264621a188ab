"""Measuring two ways of doing one thing, fairly: one thread, warm, alternating, medians with their spread.

Neighbours on the machine slow both sides of a pair alike, so the ratio is taken pair by pair and its median reported.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter_ns, "thread": time.thread_time_ns}  # thread: its processor time, for busy machines
SAMPLE_SECONDS = 1e-3  # a sample repeats its call for about this long, so that the clock's resolution does not matter


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    lower: float
    upper: float
    count: int

    def as_json(self, digits: int = 4) -> dict[str, float | int]:
        def short(value: float) -> float:
            return float(f"{value:.{digits}g}")

        return {
            "median": short(self.median),
            "lower_quartile": short(self.lower),
            "upper_quartile": short(self.upper),
            "count": self.count,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured: microseconds a call on both sides, and plain / ours pair by pair."""

    ours_us: Spread
    plain_us: Spread
    ratio: Spread

    def as_json(self) -> dict[str, Any]:
        return {"ours_us": self.ours_us.as_json(), "plain_us": self.plain_us.as_json(), "ratio": self.ratio.as_json()}


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, len(values))


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread inside the block; the former number afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not again inside the block."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def compare(
    ours: Callable[[], object], plain: Callable[[], object], *, pairs: int = 41, warmup: int = 3, clock: str = "wall"
) -> Comparison:
    """Time both callables in alternation (ours, plain, ours, plain, ...) on one thread."""
    now = CLOCKS[clock]
    with one_thread(), no_garbage_collection():
        repeats = [_repeats(call, warmup) for call in (ours, plain)]
        samples = [(_sample_us(ours, repeats[0], now), _sample_us(plain, repeats[1], now)) for _ in range(pairs)]
    return Comparison(
        ours_us=spread([a for a, _ in samples]),
        plain_us=spread([b for _, b in samples]),
        ratio=spread([b / a for a, b in samples]),
    )


def memory_bandwidth(num_bytes: int = 256 * 2**20, rounds: int = 9, clock: str = "wall") -> float:
    """Bytes a second that this process moves with one thread: the better of a long read and a long copy.

    A floor is "bytes that must move / this"; taking the better of the two makes it the lower, stricter floor.
    """
    source = torch.ones(num_bytes // 4)
    target = torch.empty_like(source)
    now = CLOCKS[clock]
    with one_thread(), no_garbage_collection():
        read_us = min(_sample_us(source.sum, 1, now) for _ in range(rounds))
        copy_us = min(_sample_us(lambda: target.copy_(source), 1, now) for _ in range(rounds))
    return max(num_bytes / read_us, 2 * num_bytes / copy_us) * 1e6


def _repeats(call: Callable[[], object], warmup: int) -> int:
    """How many calls make a sample, from the last of the warm-up calls."""
    duration_us = min(_sample_us(call, 1) for _ in range(max(warmup, 1)))
    return max(1, round(SAMPLE_SECONDS * 1e6 / max(duration_us, 0.1)))


def _sample_us(call: Callable[[], object], repeats: int, now: Callable[[], int] = time.perf_counter_ns) -> float:
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / (1000 * repeats)
