"""Every op on a GPU: our kernels in a CUDA graph, warm and cold, beside the floor and the plain-PyTorch way.

    python benchmarks/bench_gpu.py --folder results [--seconds 200]

Writes <device>-<date>.json and .md into the folder. Cases run in the order of their importance until the time is up.
`--dry` runs a few small ones on the CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import gpu_report
import gpu_timing
import plain
import sides
import torch
from cases import longest_path
from provenance import provenance, write_json
from sides import Sides
from timing import Spread, compare

from taps_ext.sampling import SamplingParams

# Each list by falling importance: a case's rank is the sum of its places.
NODES = (60, 119, 26, 8, 512, 1024)
BATCHES = (1, 64, 16, 4, 256)
VOCABULARIES = (128_256, 151_936, 32_000)
SAMPLINGS = {
    "1": SamplingParams(temperature=1.0, seed=7),
    "0": SamplingParams(temperature=0.0, seed=7),
    "0.7, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9, seed=7),
}
BY_NODES = {**sides.BY_NODES, "tree work": sides.tree_work}

EXPANSIONS = {"expand_frontier": sides.expand_frontier, "expand_frontier, coupled": sides.expand_coupled}

MOST_INPUT_BYTES = 20 << 30
MOST_PLAIN_BYTES = 16 << 30  # of B * N * V float32 numbers
MOST_PLAIN_US = 0.5e6
PLAIN_SECONDS = 0.12  # for the runs of one plain case


@dataclass(frozen=True)
class Case:
    """One op on one shape; what an op does not have is None."""

    op: str
    batch: int
    nodes: int | None = None
    vocabulary: int | None = None
    sampling: str | None = None  # a key of SAMPLINGS

    def sides(self, device: str, **options: Any) -> Sides:
        if self.op == "verify_tree":
            assert self.nodes is not None
            rows = min(sides.VISITED_ROWS, longest_path(self.nodes))
            sampling = SAMPLINGS[self.sampling or ""]
            shape = (self.nodes, self.vocabulary, torch.bfloat16, self.batch, device)
            return sides.verify_tree(*shape, rows=rows, sampling=sampling, **options)
        if self.op in EXPANSIONS:
            return EXPANSIONS[self.op](self.vocabulary, torch.bfloat16, self.batch, device)
        return BY_NODES[self.op](self.nodes, self.batch, device)

    def rank(self) -> int:
        places = [BATCHES.index(self.batch)]
        places += [NODES.index(self.nodes)] if self.nodes else []
        places += [VOCABULARIES.index(self.vocabulary)] if self.vocabulary else []
        places += [list(SAMPLINGS).index(self.sampling)] if self.sampling else []
        return sum(places)

    def input_bytes(self) -> int:
        if self.op == "compact_kv":
            slots = sides.PREFIX + (self.nodes or 0)
            return 4 * sides.KV_LAYERS * self.batch * sides.KV_HEADS * slots * sides.HEAD_DIM
        return 2 * self.batch * (self.nodes or sides.FRONTIER) * (self.vocabulary or 0)

    def is_checked(self) -> bool:
        """Whether the result is compared with the CPU's: each op, sampling and vocabulary, at one size or two."""
        return self.batch in (1, 4) and self.nodes in (60, None)

    def has_plain(self) -> bool:
        return 2 * self.input_bytes() < MOST_PLAIN_BYTES and (
            self.nodes in (60, None) or self.vocabulary in (128_256, None)
        )


def every_case() -> list[Case]:
    cases = [Case(op, batch, nodes) for op in BY_NODES for nodes in NODES for batch in BATCHES]
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            cases += [Case(op, batch, vocabulary=vocabulary) for op in EXPANSIONS]
            cases += [
                Case("verify_tree", batch, nodes, vocabulary, sampling) for nodes in NODES for sampling in SAMPLINGS
            ]
    return sorted((case for case in cases if case.input_bytes() <= MOST_INPUT_BYTES), key=Case.rank)


def dry_cases() -> list[Case]:
    """The first of every op, on the smallest vocabulary."""
    first: dict[tuple[str, str | None], Case] = {}
    for case in every_case():
        if case.batch == 1 and case.nodes in (60, None) and case.vocabulary in (32_000, None):
            first.setdefault((case.op, case.sampling), case)
    return list(first.values())


class Meter:
    """Measures cases on one device; remembers what the plain way takes for one row."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.floors = gpu_timing.measure_floors() if device == "cuda" else gpu_timing.Floors(1e10, 1.0, 1.0)
        self.plain_row_us: dict[Case, float] = {}

    def row(self, case: Case) -> dict[str, Any]:
        built = case.sides(self.device)
        row = {name: value for name, value in vars(case).items() if value is not None}
        if case.is_checked():
            row["agrees_with_cpu"] = agree(built.ours(), case.sides("cpu").ours())
        if self.device == "cpu":
            return {**row, "host_us": compare(built.ours, built.plain, pairs=3).ours_us.as_json()}
        times = {"warm": gpu_timing.warm_us(built.ours), "cold": gpu_timing.cold_us(built.ours)}
        for name, value in times.items():
            floor = self.floors.of(built.num_bytes, cold=name == "cold")
            row |= {f"{name}_us": value.as_json(), f"{name}_floor_us": short(floor)}
        row["eager_us"] = gpu_timing.eager_us(built.ours).as_json()
        return row | {name: value.as_json() for name, value in self._plain(case, built)}

    def _plain(self, case: Case, built: Sides) -> Iterator[tuple[str, Spread]]:
        alone = Case(case.op, 1, case.nodes, case.vocabulary, case.sampling)
        if not case.has_plain() or case.batch * self.plain_row_us.get(alone, 0) > MOST_PLAIN_US:
            return
        found = gpu_timing.plain_us(built.plain, PLAIN_SECONDS)
        if case == alone and case.op not in EXPANSIONS:  # whose plain way takes a batch at once
            self.plain_row_us[alone] = found.median
        yield "plain_us", found
        if case.op == "verify_tree" and case.sampling != "0" and case.nodes == 60:
            lazy = case.sides(self.device, method=plain.verify_sampled_lazily)
            yield "plain_lazy_us", gpu_timing.plain_us(lazy.plain, PLAIN_SECONDS)


def short(value: float) -> float:
    return float(f"{value:.4g}")


def agree(actual: object, expected: object) -> bool:
    """Equal integers, and float32 scores to the last digits (sums have another order on a GPU)."""
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return all(_agree(a.cpu(), b) for a, b in pairs)


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def tensors(value: object) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def measure(cases: list[Case], meter: Meter, deadline: float) -> Iterator[dict[str, Any]]:
    for case in cases:
        if time.monotonic() > deadline:
            return
        try:
            yield meter.row(case)
        except RuntimeError as error:  # out of memory, or a launch that failed: say so and go on
            yield {**vars(case), "error": str(error).splitlines()[0]}
        if meter.device == "cuda" and case.input_bytes() > 1 << 30:
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the ops on a GPU.")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=200.0, help="no case begins after this time")
    parser.add_argument("--dry", action="store_true", help="a few small cases on the CPU, nothing published")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    torch.set_num_threads(1)
    meter = Meter("cpu" if options.dry else "cuda")
    cases = dry_cases() if options.dry else every_case()
    device = "dry-run" if options.dry else re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    result: dict[str, Any] = {
        "provenance": provenance(),
        "copy_gb_per_s": round(meter.floors.bytes_per_second / 1e9, 1),
        "empty_launch_us": {"warm": short(meter.floors.launch_warm_us), "cold": short(meter.floors.launch_cold_us)},
        "rows": [],
    }
    target = options.folder / f"{device}-{result['provenance']['date']}.json"
    for row in measure(cases, meter, deadline):
        result["rows"].append(row)
        if len(result["rows"]) % 25 == 0:
            write_json(target, result)
    result["cases_left_out"] = len(cases) - len(result["rows"])
    result["goals"] = gpu_report.goals(result["rows"])
    write_json(target, result)
    target.with_suffix(".md").write_text(gpu_report.markdown(result))
    print(gpu_report.summary(result))
    if any(row.get("agrees_with_cpu") is False for row in result["rows"]):
        raise SystemExit("a result differs from the CPU's")


if __name__ == "__main__":
    main()
