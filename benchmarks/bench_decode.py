"""Where a decode step's time goes: target forward, drafters, tree work, and the rest, in percent.

    python benchmarks/bench_decode.py --output results.json     also draws results.png beside it

The library holds no timers: this script wraps the public ops and the models' methods from outside. A section's time
excludes the sections called inside it, so that the four parts of a step add up to it. Tree work is every op of
`taps_ext.ops`, expand_frontier included, which also does the drafters' log-softmax and top-k over the vocabulary.
The script prints a table for people and, as its last line, one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from provenance import provenance, write_json
from timing import CLOCKS, no_garbage_collection, spread
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import taps_ext
from taps_ext import ops
from taps_ext.decode.step import DecodeStep
from taps_ext.drafters.eagle import EagleConfig, EagleDrafter, EagleNetwork
from taps_ext.target.model import TargetModel

PARTS = {"target": "#4878a8", "drafter": "#6ba368", "tree work": "#d1603d", "rest": "#bbbbbb"}
OPS = [name for name in ops.__all__ if name.islower()]
COMPOSITIONS = ("single", "merged")
LARGE = LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=4096,
)


class SectionClock:
    """Time spent in named sections, each without the sections entered inside it."""

    def __init__(self, clock: str = "wall") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._now = CLOCKS[clock]
        self._stack: list[str] = []
        self._since = 0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls charged to the section."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return wrapper

    def take(self) -> dict[str, float]:
        """The seconds since the last take."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _charge(self) -> None:
        now = self._now()
        if self._stack:
            self.seconds[self._stack[-1]] += (now - self._since) / 1e9
        self._since = now


@contextmanager
def instrumented(clock: SectionClock) -> Iterator[None]:
    """Charge every op, the target's forward and the drafting half of a step to the clock inside the block."""
    with ExitStack() as patches:
        for name in OPS:
            patches.enter_context(mock.patch.object(ops, name, clock.timed(name, getattr(ops, name))))
        for owner, method, section in (
            (TargetModel, "score", "target"),
            (DecodeStep, "propose", "drafter"),
            (DecodeStep, "observe", "drafter"),
        ):
            timed = clock.timed(section, getattr(owner, method))
            patches.enter_context(mock.patch.object(owner, method, timed))
        yield


@dataclass(frozen=True)
class World:
    """A target, drafters for it, and prompts."""

    name: str
    target: TargetModel
    drafters: dict[str, Any]
    prompts: list[Tensor]  # each int64 [1, P]
    max_new_tokens: int


def tiny_world(num_prompts: int) -> World:
    """The embedded models and their held-out prompts of both domains."""
    from taps_ext import tiny

    model, any_tokenizer = tiny.load_target()
    tokenizer: Any = any_tokenizer
    target = TargetModel(model)
    drafters = taps_ext.load_drafters({name: str(path) for name, path in tiny.drafter_paths().items()}, model)
    texts = [
        tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for domain in tiny.DOMAINS
        for prompt in tiny.prompts(domain, num_prompts, seed=0)
    ]
    prompts = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"] for text in texts]
    return World("tiny world", target, dict(drafters), prompts, 96)


def random_world(num_prompts: int, config: LlamaConfig = LARGE) -> World:
    """A Llama of random weights with two random drafters: nothing is accepted, but every step costs what it costs."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.lm_head.weight.mul_(40)  # logits as peaked as trained ones: over flat ones a tree is complete at two levels
    target = TargetModel(model)
    drafters = {
        name: EagleDrafter(random_network(config), target.embedding, target.lm_head, name)
        for name in ("first", "second")
    }
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    prompts = [torch.randint(0, config.vocab_size, (1, 128)) for _ in range(num_prompts)]
    return World(f"random Llama, {size:.0f} M", target, drafters, prompts, 10)


def random_network(config: LlamaConfig) -> EagleNetwork:
    """A network of random weights, frozen as a loaded one is."""
    return EagleNetwork(EagleConfig.for_target(config)).eval().requires_grad_(False)


def measure(world: World, composition: str) -> dict[str, Any]:
    """One row of the results: the parts in percent of a step and in milliseconds, and each op's microseconds.

    Each is the median over the steps, which a step that a busy machine interrupts does not move.
    """
    drafter = next(iter(world.drafters)) if composition == "single" else None
    decoder = taps_ext.SpeculativeDecoder(
        world.target, world.drafters, composition, drafter=drafter, shape=taps_ext.TreeShape()
    )
    steps: list[dict[str, float]] = []
    with no_garbage_collection():
        decode_steps(decoder, world.prompts[0], world.max_new_tokens)  # warm-up
        for prompt in world.prompts:
            steps += decode_steps(decoder, prompt, world.max_new_tokens)
    for step in steps:
        step["tree work"] = sum(step.get(name, 0.0) for name in OPS)
    median_us = {
        name: 1e6 * statistics.median(step.get(name, 0.0) for step in steps) for name in dict.fromkeys([*PARTS, *OPS])
    }
    total_us = sum(median_us[part] for part in PARTS)
    return {
        "world": world.name,
        "composition": composition,
        "num_steps": len(steps),
        "step_ms": spread([1000 * sum(step.get(part, 0.0) for part in PARTS) for step in steps]).as_json(),
        "percent": {part: _short(100 * median_us[part] / total_us) for part in PARTS},
        "median_ms": {part: _short(median_us[part] / 1000) for part in PARTS},
        "tree_work_us": {name: _short(median_us[name]) for name in OPS if median_us[name]},
    }


def decode_steps(decoder: Any, prompt: Tensor, max_new_tokens: int, clock_name: str = "wall") -> list[dict[str, float]]:
    """Each step's seconds by section; the prefill is no step."""
    clock = SectionClock(clock_name)
    steps: list[dict[str, float]] = []
    events = decoder.stream(prompt, max_new_tokens=max_new_tokens)
    with instrumented(clock):
        next(events)
        clock.take()
        while True:
            with clock.section("rest"):
                event = next(events, None)
            if event is None:
                return steps
            steps.append(clock.take())


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'':22} {'':8} {'step':>9}" + "".join(f"{part:>12}" for part in PARTS))
    for row in rows:
        percents = "".join(f"{row['percent'][part]:>11.1f}%" for part in PARTS)
        print(f"{row['world']:22} {row['composition']:8} {row['step_ms']['median']:>7.1f}ms{percents}")
        ops_us = sorted(row["tree_work_us"].items(), key=lambda item: -item[1])
        print(f"{'':22} tree work, us a step: " + ", ".join(f"{name} {us:.0f}" for name, us in ops_us))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A stacked bar a row."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.5 * len(rows)), layout="constrained")
    labels = [f"{row['world']}, {row['composition']}" for row in rows]
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        widths = [row["percent"][part] for row in rows]
        bars = axes.barh(labels, widths, left=left, color=colour, label=part)
        axes.bar_label(bars, [f"{width:.0f}" if width >= 3 else "" for width in widths], label_type="center")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("percent of a decode step")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure where a decode step's time goes.")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file, and a picture beside it")
    parser.add_argument("--worlds", nargs="+", choices=["tiny", "random"], default=["tiny", "random"])
    parser.add_argument("--prompts", type=int, default=8, help="prompts a domain of the tiny world")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], World]] = {
        "tiny": lambda: tiny_world(options.prompts),
        "random": lambda: random_world(1),
    }
    rows = []
    for name in options.worlds:
        world = makers[name]()
        rows += [measure(world, composition) for composition in COMPOSITIONS]
    print_table(rows)
    if options.output:
        write_json(options.output, {"provenance": provenance(), "rows": rows})
        draw(rows, options.output.with_suffix(".png"))
    print(json.dumps({f"{row['world']}, {row['composition']}": row["percent"] for row in rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
