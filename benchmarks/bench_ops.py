"""Every op beside the plain-PyTorch way and beside the floor, one torch thread on both sides.

    pytest benchmarks/bench_ops.py                                   every op, size and type, with pytest-benchmark
    python benchmarks/bench_ops.py --output results.json [--grid]    the headline ratios, both sides alternating

The floor is the time that the bytes which must move take at this process's measured memory bandwidth; inputs that fit
a cache can beat it. The script prints a table for people and, as its last line, one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import plain
import pytest
import sides
import torch
from provenance import provenance, write_json
from sides import Sides
from timing import CLOCKS, compare, memory_bandwidth, one_thread

from taps_ext.sampling import SamplingParams

NODES = (26, 60, 119, 512)
BATCHES = (1, 8)
VOCABULARIES = (32_000, 128_256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_BYTES = 600 << 20  # of logits; larger cases run with B = 1 only


def op_cases() -> dict[str, Callable[[], Sides]]:
    """Every measured (op, size, type), by name; building the inputs is left to the call."""
    cases: dict[str, Callable[[], Sides]] = {}
    for op, make in sides.BY_NODES.items():
        for nodes in NODES:
            for batch in BATCHES:
                cases[f"{op} N={nodes} B={batch}"] = partial(make, nodes, batch)
    for vocabulary in VOCABULARIES:
        for name, dtype in DTYPES.items():
            for batch in BATCHES:
                for kind, expand in (("", sides.expand_frontier), (", coupled", sides.expand_coupled)):
                    cases[f"expand_frontier{kind} V={vocabulary} B={batch} {name}"] = partial(
                        expand, vocabulary, dtype, batch
                    )
                for nodes in NODES:
                    if batch == 1 or batch * nodes * vocabulary * dtype.itemsize <= MOST_BYTES:
                        cases[f"verify_tree N={nodes} V={vocabulary} B={batch} {name}"] = partial(
                            sides.verify_tree, nodes, vocabulary, dtype, batch
                        )
    return cases


def headline_cases() -> dict[str, tuple[Callable[[], Sides], float | None]]:
    """The published ratios: (inputs, the goal that issue and README promise, or None where it is context)."""
    cases: dict[str, tuple[Callable[[], Sides], float | None]] = {}
    for nodes, goal in ((60, 20.0), (512, 50.0)):
        work = partial(sides.tree_work, nodes)
        cases[f"tree work N={nodes}"] = (partial(work, method=plain.tree_work_by_index), goal)
        cases[f"tree work N={nodes}, against row views"] = (work, None)
        cases[f"tree work N={nodes}, against lean Python"] = (partial(work, method=plain.tree_work_lean), None)
    verify = partial(sides.verify_tree, 60, 128_256)
    for rows in (1, 4, 7):
        cases[f"verify_tree T=1 rows={rows}"] = (partial(verify, rows=rows), 8.0 if rows == 4 else None)
    cases["verify_tree T=1 rows=4 bfloat16"] = (partial(verify, torch.bfloat16), None)
    cases["verify_tree T=1 rows=4, against lazy softmax"] = (partial(verify, method=plain.verify_sampled_lazily), None)
    for frontier in (sides.FRONTIER, 1):
        coupled = partial(sides.expand_coupled, 128_256, torch.float32, 1, frontier=frontier)
        goal = 0.4 if frontier == sides.FRONTIER else None  # 2.5 times as long at most
        cases[f"expand_frontier coupled F={frontier}, against uncoupled"] = (
            partial(coupled, against_uncoupled=True),
            goal,
        )
        cases[f"expand_frontier coupled F={frontier}"] = (coupled, None)
    cases["verify_tree T=0 rows=4"] = (partial(verify, sampling=SamplingParams(temperature=0.0)), None)
    return cases


# ---- pytest-benchmark


@cache
def bandwidth(clock: str = "wall") -> float:
    return memory_bandwidth(clock=clock)


@cache
def _latest(name: str) -> Sides:
    return op_cases()[name]()


@pytest.fixture
def built(request: pytest.FixtureRequest) -> Iterator[Sides]:
    """One case's inputs, shared by its two tests and then dropped: some are a gigabyte."""
    name, side = request.node.callspec.params["name"], request.node.callspec.params["side"]
    with one_thread():
        yield _latest(name)
    if side == "plain":
        _latest.cache_clear()


@pytest.mark.benchmark(max_time=0.15, min_rounds=3, warmup=True, warmup_iterations=1)
@pytest.mark.parametrize("side", ["ours", "plain"])
@pytest.mark.parametrize("name", list(op_cases()))
def test_op(benchmark: Any, built: Sides, name: str, side: str) -> None:
    benchmark.group = name
    benchmark.extra_info["floor_us"] = built.num_bytes / bandwidth() * 1e6
    benchmark(built.ours if side == "ours" else built.plain)


# ---- the script


def measure(name: str, built: Sides, pairs: int, clock: str, goal: float | None = None) -> dict[str, Any]:
    """One row of the results: both sides in microseconds, their ratio pair by pair, and the floor."""
    comparison = compare(built.ours, built.plain, pairs=pairs, clock=clock)
    return {
        "name": name,
        **comparison.as_json(),
        "goal": goal,
        "floor_us": float(f"{built.num_bytes / bandwidth(clock) * 1e6:.4g}"),
    }


def print_row(row: dict[str, Any]) -> None:
    ratio = row["ratio"]
    quartiles = f"({ratio['lower_quartile']:.3g} - {ratio['upper_quartile']:.3g})"
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    times = f"{row['ours_us']['median']:9.1f}us {row['plain_us']['median']:10.1f}us {row['floor_us']:7.1f}us"
    print(f"{row['name']:48} {times} {ratio['median']:14.3g} {quartiles:>16}  {goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the ops against the plain-PyTorch way.")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--pairs", type=int, default=41, help="alternating pairs for each headline ratio")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="thread: processor time, on busy machines"
    )
    parser.add_argument("--grid", action="store_true", help="every op, size and type instead, with fewer pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = {name: (make, None) for name, make in op_cases().items()} if options.grid else headline_cases()
    pairs = min(options.pairs, 7) if options.grid else options.pairs
    print(f"{'':48} {'ours':>11} {'plain':>12} {'floor':>9} {'plain / ours':>14} {'(quartiles)':>16}  goal")
    rows = []
    for name, (make, goal) in cases.items():
        rows.append(measure(name, make(), pairs, options.clock, goal))
        print_row(rows[-1])
    result = {
        "provenance": provenance(),
        "clock": options.clock,
        "bandwidth_gb_per_s": round(bandwidth(options.clock) / 1e9, 2),
        "rows": rows,
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps({row["name"]: row["ratio"]["median"] for row in rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
