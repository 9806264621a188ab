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
MOST_BYTES = 1 << 30  # of logits; larger cases run with B = 1 only


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
                cases[f"expand_frontier V={vocabulary} B={batch} {name}"] = partial(
                    sides.expand_frontier, vocabulary, dtype, batch
                )
                for nodes in NODES:
                    if batch == 1 or batch * nodes * vocabulary * dtype.itemsize <= MOST_BYTES:
                        cases[f"verify_tree N={nodes} V={vocabulary} B={batch} {name}"] = partial(
                            sides.verify_tree, nodes, vocabulary, dtype, batch
                        )
    return cases


def headline_cases() -> dict[str, tuple[Callable[[], Sides], float | None]]:
    """The published ratios: (inputs, the goal that issue and README promise, or None where it is context)."""
    verify = partial(sides.verify_tree, 60, 128_256)
    cases: dict[str, tuple[Callable[[], Sides], float | None]] = {
        "tree work N=60": (partial(sides.tree_work, 60), 20.0),
        "tree work N=512": (partial(sides.tree_work, 512), 50.0),
        "tree work N=60, against lean Python": (partial(sides.tree_work, 60, method=plain.tree_work_lean), None),
        "tree work N=512, against lean Python": (partial(sides.tree_work, 512, method=plain.tree_work_lean), None),
    }
    for rows in (1, 4, 7):
        cases[f"verify_tree T=1 rows={rows}"] = (partial(verify, rows=rows), 8.0 if rows == 4 else None)
    cases["verify_tree T=1 rows=4 bfloat16"] = (partial(verify, torch.bfloat16), None)
    cases["verify_tree T=1 rows=4, against lazy softmax"] = (partial(verify, method=plain.verify_sampled_lazily), None)
    cases["verify_tree T=0 rows=4"] = (partial(verify, sampling=SamplingParams(temperature=0.0)), None)
    return cases


# ---- pytest-benchmark


@cache
def bandwidth() -> float:
    return memory_bandwidth()


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
        "floor_us": float(f"{built.num_bytes / bandwidth() * 1e6:.4g}"),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':48} {'ours':>10} {'plain':>11} {'floor':>8}   {'plain / ours':>12} {'(quartiles)':>15}  goal")
    for row in rows:
        ratio = row["ratio"]
        quartiles = f"({ratio['lower_quartile']:.1f} - {ratio['upper_quartile']:.1f})"
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        times = f"{row['ours_us']['median']:8.1f}us {row['plain_us']['median']:9.1f}us {row['floor_us']:6.1f}us"
        print(f"{row['name']:48} {times}   {ratio['median']:12.1f} {quartiles:>15}  {goal}", flush=True)


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
    if options.grid:
        rows = [measure(name, make(), min(options.pairs, 7), options.clock) for name, make in op_cases().items()]
    else:
        rows = [
            measure(name, make(), options.pairs, options.clock, goal) for name, (make, goal) in headline_cases().items()
        ]
    print_table(rows)
    result = {
        "provenance": provenance(),
        "clock": options.clock,
        "bandwidth_gb_per_s": round(bandwidth() / 1e9, 2),
        "rows": rows,
    }
    if options.output:
        write_json(options.output, result)
    print(json.dumps({row["name"]: row["ratio"]["median"] for row in rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
