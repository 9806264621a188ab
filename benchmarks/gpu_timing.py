"""Measuring an op on a GPU: what it takes inside a CUDA graph, with its input in the L2 cache or out of it.

Warm: a graph of many calls of the op, replayed between two device events; the time of a call is the share of one.
Cold: before each replay of a graph of one call, a buffer larger than the L2 cache is written; the events stand right
around the replay, so an event's own microsecond or two is in the figure: compare it with an empty kernel's, measured
alike. Eager: calls from Python one after the other, by the host's clock, the device idle at both ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Spread, no_garbage_collection, spread

WARM_SAMPLES, COLD_SAMPLES, EAGER_SAMPLES = 9, 15, 5
GRAPH_US = 300.0  # about so long is the replay of a warm graph, far longer than its launch
MOST_CALLS = 64  # in a graph
FLUSH_BYTES = 256 << 20  # several times the L2 cache


@dataclass(frozen=True)
class Floors:
    """What no op can beat: a copy's bytes a second, and an empty kernel's microseconds, measured as the ops are."""

    bytes_per_second: float
    launch_warm_us: float
    launch_cold_us: float

    def of(self, num_bytes: int, *, cold: bool = False) -> float:
        """Microseconds: the bytes at the speed of the copy, or the empty launch where that is longer."""
        return max(num_bytes / self.bytes_per_second * 1e6, self.launch_cold_us if cold else self.launch_warm_us)


def measure_floors() -> Floors:
    def empty() -> None:
        torch.cuda._sleep(0)

    return Floors(copy_bandwidth(), warm_us(empty).median, cold_us(empty).median)


def copy_bandwidth(num_bytes: int = 2 << 30, rounds: int = 9) -> float:
    """Bytes a second, read and written, of the best of some long copies within the device."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / min(_event_us(lambda: target.copy_(source), 1) for _ in range(rounds)) * 1e6


def warm_us(call: Callable[[], object]) -> Spread:
    single = captured(call, 1)
    single.replay()
    estimate = _event_us(single.replay, 20)
    calls = min(MOST_CALLS, max(1, round(GRAPH_US / estimate)))
    graph = captured(call, calls)
    replays = max(1, round(3 * GRAPH_US / (calls * estimate)))
    _event_us(graph.replay, 1)
    return spread([_event_us(graph.replay, replays) / calls for _ in range(WARM_SAMPLES)])


def cold_us(call: Callable[[], object]) -> Spread:
    graph = captured(call, 1)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    pairs = [(_event(), _event()) for _ in range(COLD_SAMPLES)]
    torch.cuda.synchronize()
    for start, end in pairs:
        flush.zero_()  # busy long enough for the host to queue what follows
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) * 1e3 for start, end in pairs])


def eager_us(call: Callable[[], object], calls: int = 20) -> Spread:
    call()
    with no_garbage_collection():
        return spread([_host_us(call, calls) for _ in range(EAGER_SAMPLES)])


def plain_us(call: Callable[[], object], seconds: float) -> Spread:
    """By the host's clock, after one run that does not count; at least two runs, more while `seconds` last."""
    first = _host_us(call, 1)
    runs = min(20, max(2, int(seconds * 1e6 / first)))
    with no_garbage_collection():
        return spread([_host_us(call, 1) for _ in range(runs)])


def captured(call: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls; the results of one are memory for the next."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _event_us(call: Callable[[], object], repeats: int) -> float:
    start, end = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def _host_us(call: Callable[[], object], repeats: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / (1000 * repeats)
