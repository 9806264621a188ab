"""What more drafters cost: forwards, milliseconds a decode step and memory of 1, 2, 4 and 8 of them, by composition.

    python benchmarks/bench_drafters.py --output results.json     also draws results.png beside it

Drafters of one target share the lm_head product of a level; their networks run one after the other. *Evidence* lets
one drafter per row draft; the others only observe what was committed. Merged trees have the node budget of one
drafter's, so that the target verifies as much in every composition.

A forward is one pass of one network, over all frontier nodes of a level (drafting) or all slots of a step (observing).
The script prints a table for people and, as its last line, one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_decode import LARGE, OPS, PARTS, World, decode_steps, random_network, random_world, tiny_world
from provenance import provenance, write_json
from timing import CLOCKS, no_garbage_collection, spread
from torch import Tensor

import taps_ext
from taps_ext.drafters import EagleDrafter, growth

COMPOSITIONS = {"confidence": "#d1603d", "evidence": "#6ba368", "merged": "#4878a8"}
MIB = 2**20


@dataclass(frozen=True)
class Crowd:
    """A world, and a way to load one more drafter of its shape into memory of its own."""

    world: World
    new_drafter: Callable[[int], EagleDrafter]


def tiny_crowd(num_prompts: int) -> Crowd:
    """The embedded specialists, in turn: the third of two is the first once more."""
    from taps_ext import tiny

    world, paths = tiny_world(num_prompts), list(tiny.drafter_paths().values())
    return Crowd(
        world, lambda place: taps_ext.load_drafter(paths[place % len(paths)], world.target, f"drafter {place}")
    )


def random_crowd(num_prompts: int) -> Crowd:
    """Random drafters of a random Llama: nothing is accepted, but every step costs what it costs."""
    world = random_world(num_prompts)
    embedding, lm_head = world.target.embedding, world.target.lm_head
    world.drafters.clear()
    return Crowd(world, lambda place: EagleDrafter(random_network(LARGE), embedding, lm_head, f"drafter {place}"))


@contextmanager
def counted(forwards: Counter[str]) -> Iterator[None]:
    """The networks' forwards inside the block, by what they are for."""

    def counting(owner: Any, method: str, purpose: str, num_networks: Callable[[Any], int]) -> Any:
        original = getattr(owner, method)

        def wrapper(self: Any, *arguments: Any, **kwargs: Any) -> Any:
            forwards[purpose] += num_networks(self)
            return original(self, *arguments, **kwargs)

        return mock.patch.object(owner, method, wrapper)

    drafting = counting(growth._Frontier, "forward", "drafting", lambda frontier: len(frontier.networks))
    with drafting, counting(EagleDrafter, "_extend_committed", "observing", lambda drafter: 1):
        yield


def live_bytes() -> int:
    """The memory of all tensors that Python can reach, each piece once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.device.type == "cpu" and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(crowd: Crowd, num_drafters: int, composition: str, clock: str) -> dict[str, Any]:
    """One row of the results; times are medians over the steps of all prompts."""
    world, before = crowd.world, live_bytes()
    drafters = {f"drafter {place}": crowd.new_drafter(place) for place in range(num_drafters)}
    shape = taps_ext.TreeShape()
    budget = {"max_nodes": shape.max_nodes} if composition == "merged" else {}
    decoder = taps_ext.SpeculativeDecoder(world.target, drafters, composition, shape=shape, **budget)
    weights = live_bytes() - before
    steps: list[dict[str, float]] = []
    forwards: Counter[str] = Counter()
    with no_garbage_collection():
        decode_steps(decoder, world.prompts[0], 3, clock)  # warm-up
        with counted(forwards):
            for prompt in world.prompts:
                steps += decode_steps(decoder, prompt, world.max_new_tokens, clock)
    forwards["observing"] -= num_drafters * len(world.prompts)  # of the prompts, which are no step
    return {
        "world": world.name,
        "composition": composition,
        "num_drafters": num_drafters,
        "num_steps": len(steps),
        "drafting_forwards": _short(forwards["drafting"] / len(steps)),
        "observing_forwards": _short(forwards["observing"] / len(steps)),
        "weights_mib": _short(weights / MIB),
        **_timed(steps),
    }


def _timed(steps: list[dict[str, float]]) -> dict[str, Any]:
    """A step, and its parts, in milliseconds."""
    for step in steps:
        step["tree work"] = sum(step.get(name, 0.0) for name in OPS)
    return {
        "step_ms": spread([1000 * sum(step.get(part, 0.0) for part in PARTS) for step in steps]).as_json(),
        "median_ms": {part: _short(1000 * statistics.median(step.get(part, 0.0) for step in steps)) for part in PARTS},
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':66}{'ms a step':>46}")
    print(
        f"{'':20}{'drafters':>9} {'composition':12}{'drafting':>9}{'observing':>10}{'MiB':>7}"
        + "".join(f"{name:>10}" for name in ("step", *PARTS))
    )
    for row in rows:
        times = [row["step_ms"]["median"], *(row["median_ms"][part] for part in PARTS)]
        print(
            f"{row['world']:20}{row['num_drafters']:>9} {row['composition']:12}{row['drafting_forwards']:>9.1f}"
            f"{row['observing_forwards']:>10.1f}{row['weights_mib']:>7.1f}" + "".join(f"{ms:>10.2f}" for ms in times)
        )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Against the number of drafters: forwards, the drafters' time and the weights; a row of pictures a world."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    worlds = list(dict.fromkeys(row["world"] for row in rows))
    figure, grid = plt.subplots(
        len(worlds), 3, figsize=(10, 0.6 + 2.8 * len(worlds)), layout="constrained", squeeze=False
    )
    for world, (forwards, times, memory) in zip(worlds, grid, strict=True):
        for composition, colour in COMPOSITIONS.items():
            line = [row for row in rows if row["world"] == world and row["composition"] in ("single", composition)]
            numbers = [row["num_drafters"] for row in line]
            drafting = [row["drafting_forwards"] for row in line]
            forwards.plot(numbers, drafting, "o-", color=colour, label=composition)
            times.plot(numbers, [row["median_ms"]["drafter"] for row in line], "o-", color=colour)
        memory.plot(numbers, [row["weights_mib"] for row in line], "o-", color="#666666")
        for axes, title in (
            (forwards, f"{world}\ndrafting forwards a step"),
            (times, "drafters, ms a step"),
            (memory, "weights of the drafters, MiB"),
        ):
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("drafters")
            axes.set_xticks(numbers)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what more drafters cost.")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, and a picture beside it")
    parser.add_argument("--worlds", nargs="+", choices=["tiny", "random"], default=["tiny", "random"])
    parser.add_argument("--drafters", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=3, help="prompts a domain of the tiny world")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="thread: its processor time, for busy machines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], Crowd]] = {
        "tiny": lambda: tiny_crowd(options.prompts),
        "random": lambda: random_crowd(1),
    }
    rows = []
    for name in options.worlds:
        crowd = makers[name]()
        for number in options.drafters:
            compositions = ["single"] if number == 1 else list(COMPOSITIONS)  # of one drafter they are all the same
            rows += [measure(crowd, number, composition, options.clock) for composition in compositions]
    print_table(rows)
    if options.output:
        write_json(options.output, {"provenance": provenance(), "rows": rows})
        draw(rows, options.output.with_suffix(".png"))
    steps = {f"{row['world']}, {row['num_drafters']} {row['composition']}": row["step_ms"]["median"] for row in rows}
    print(json.dumps(steps, separators=(",", ":")))


if __name__ == "__main__":
    main()
