"""What drafting costs, counted from outside: the library holds no counters and no timers."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

from timing import spread
from torch import Tensor

from taps_ext import ops
from taps_ext.decode.step import DecodeStep
from taps_ext.drafters import EagleNetwork
from taps_ext.target.model import TargetModel


@dataclass
class Counts:
    """What the drafters did so far."""

    forwards: int = 0  # of one network each
    head_rows: int = 0
    levels: int = 0
    drafting_seconds: float = 0.0  # in propose and observe
    is_drafting: bool = field(default=False, repr=False)

    def figures(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if name != "is_drafting"}


@contextmanager
def counting(target: TargetModel) -> Iterator[Counts]:
    """Counts of what the drafters of this target do inside the block."""
    counts = Counts()

    def count_forward(_: tuple[Any, ...]) -> None:
        counts.forwards += 1

    def count_level(_: tuple[Any, ...]) -> None:
        counts.levels += 1

    def count_rows(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if counts.is_drafting:
            counts.head_rows += inputs[0].shape[:-1].numel()

    with ExitStack() as patches:
        for owner, name, note in ((EagleNetwork, "extend", count_forward), (ops, "expand_frontier", count_level)):
            patches.enter_context(mock.patch.object(owner, name, _noted(getattr(owner, name), note)))
        for name in ("propose", "observe"):
            timed = _timed(getattr(DecodeStep, name), counts)
            patches.enter_context(mock.patch.object(DecodeStep, name, timed))
        head: Any = target.lm_head
        patches.callback(head.register_forward_pre_hook(count_rows).remove)
        yield counts


def _noted(function: Any, note: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        note(args)
        return function(*args, **kwargs)

    return wrapper


def _timed(function: Any, counts: Counts) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started, counts.is_drafting = time.perf_counter(), True
        try:
            return function(*args, **kwargs)
        finally:
            counts.drafting_seconds += time.perf_counter() - started
            counts.is_drafting = False

    return wrapper


def timed_steps(events: Iterator[Any], counts: Counts) -> list[dict[str, float]]:
    """Each step's counts and seconds; the prefill is no step."""
    steps = []
    next(events)
    while True:
        before, started = counts.figures(), time.perf_counter()
        if next(events, None) is None:
            return steps
        seconds = time.perf_counter() - started
        steps.append({name: value - before[name] for name, value in counts.figures().items()} | {"seconds": seconds})


def cost_a_step(steps: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    counts = ("forwards", "head_rows", "levels")
    return {
        "steps": len(steps),
        **{name: round(sum(step[name] for step in steps) / len(steps), 3) for name in counts},
        "step_ms": spread([1000 * step["seconds"] for step in steps]).as_json(),
        "drafting_ms": spread([1000 * step["drafting_seconds"] for step in steps]).as_json(),
    }
