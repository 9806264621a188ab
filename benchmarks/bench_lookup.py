"""Seconds saved on a real target: plain decoding, transformers' prompt look-up, and ours, in turns.

    python benchmarks/bench_lookup.py path/to/target gsm8k.jsonl mt_bench.jsonl --output results.json
                                                                             also writes results.md beside it
    ... --drafters math=path chat=path     also merges the drafters' trees with the look-ups
    ... --shapes 3,1,4 8,4,8               also with these trees (depth, branching, nodes) in every step

Each file holds questions, a JSON object a line with `turns`; the first turn of the first questions is asked through the
target's chat template. benchmarks/repeating.jsonl has ten prompts whose answers repeat them: code to edit, tables to
extract from, texts to quote. All ways decode greedily on one thread, one after the other in one process, and are timed
in processor time; a question's time is the median of its repeats. Every text of ours must equal plain decoding's. The
last line of the output is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from provenance import provenance, write_json
from scipy.stats import bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer

import taps_ext as taps
from taps_ext.checkpoints.files import write_text

PLAIN, STOCK, LOOKUP, MERGED = "plain", "transformers' look-up", "look-up", "merged"
STOCK_TOKENS = 3  # prompt_lookup_num_tokens


class Contest:
    """Every way to answer, on one target."""

    def __init__(self, folder: Path, drafters: dict[str, str], shapes: list[taps.TreeShape], new_tokens: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.new_tokens = new_tokens
        lookup: dict[str, Any] = {LOOKUP: taps.LookupDrafter(self.model.config.vocab_size)}
        self.decoders = {LOOKUP: taps.SpeculativeDecoder(self.model, lookup, "single")}
        contestants, composition = lookup, "single"
        if drafters:
            contestants, composition = {**taps.load_drafters(drafters, self.model), **lookup}, "merged"
            self.decoders[MERGED] = taps.SpeculativeDecoder(self.model, contestants, composition)
        last = list(self.decoders)[-1]
        for shape in shapes:
            name = f"{last}, {shape.depth} levels, {shape.branching} children, {shape.max_nodes} nodes"
            self.decoders[name] = taps.SpeculativeDecoder(self.model, contestants, composition, shape=shape)

    def ways(self, question: str) -> dict[str, Callable[[], list[int]]]:
        """Return what answers a question in each way, with the new tokens."""
        chat = [{"role": "user", "content": question}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        asked: dict[str, Any] = {**inputs, "max_new_tokens": self.new_tokens, "sampling": taps.SamplingParams()}

        def stock() -> list[int]:
            settings = {"do_sample": False, "max_new_tokens": self.new_tokens, "prompt_lookup_num_tokens": STOCK_TOKENS}
            return self.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

        def with_trees(decoder: taps.SpeculativeDecoder) -> Callable[[], list[int]]:
            return lambda: decoder.generate(**asked).new_tokens[0]

        plain = {PLAIN: lambda: taps.plain_generate(self.model, **asked).new_tokens[0], STOCK: stock}
        return plain | {name: with_trees(decoder) for name, decoder in self.decoders.items()}

    def ask(self, question: str, repeats: int) -> dict[str, Any]:
        """Return each way's speed, as a multiple of plain decoding's, and whether our texts are plain decoding's."""
        ways = self.ways(question)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        texts = {}
        for _ in range(repeats):
            for name, answer in ways.items():
                started = time.process_time()
                texts[name] = answer()
                seconds[name].append(time.process_time() - started)
        medians = {name: median(values) for name, values in seconds.items()}
        return {
            "num_tokens": len(texts[PLAIN]),
            "seconds": medians,
            "speed": {name: medians[PLAIN] / value for name, value in medians.items()},
            "is_equal": all(texts[name] == texts[PLAIN] for name in self.decoders),
        }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the mean and the range of the speeds as Markdown, and what merging and adapting gain."""
    ways = [name for name in next(iter(results.values()))[0]["speed"] if name != PLAIN]
    lines = ["| | questions | texts equal | " + " | ".join(ways) + " |", "|---" * (len(ways) + 3) + "|"]
    for name, rows in results.items():
        cells = [name, str(len(rows)), f"{sum(row['is_equal'] for row in rows)}"]
        for way in ways:
            speeds = [row["speed"][way] for row in rows]
            cells.append(f"{fmean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines + ["", *comparisons(results)])


def comparisons(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a sentence a file on merged trees against look-ups, and on adapting trees against the best fixed one."""
    said = []
    for name, rows in results.items():
        speed = {way: [row["speed"][way] for row in rows] for way in rows[0]["speed"]}
        if MERGED in speed and len(rows) > 1:
            gained = [merged - alone for merged, alone in zip(speed[MERGED], speed[LOOKUP], strict=True)]
            low, high = bootstrap((gained,), fmean, vectorized=False, method="percentile", rng=0).confidence_interval
            gain = f"{fmean(gained):+.2f} ({low:+.2f} to {high:+.2f}) over look-ups alone"
            said.append(f"- {name}: merged trees gain {gain}, paired by question")
        if fixed := {way: fmean(values) for way, values in speed.items() if "nodes" in way}:
            best = max(fixed, key=lambda way: fixed[way])
            ratio = fmean(speed[MERGED if MERGED in speed else LOOKUP]) / fixed[best]
            said.append(f"- {name}: the adapting tree has {ratio:.2f} of the speed of the best fixed one ({best})")
    return said


def parse_shape(text: str) -> taps.TreeShape:
    """Return the shape of "depth,branching,nodes"."""
    return taps.TreeShape(*map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--drafters", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--shapes", nargs="+", default=[], type=parse_shape, metavar="DEPTH,BRANCHING,NODES")
    parser.add_argument("--first", type=int, default=0, help="number of the first question of each file")
    parser.add_argument("--count", type=int, default=10, help="questions of each file")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    drafters = dict(one.split("=", 1) for one in given.drafters)
    contest = Contest(given.target, drafters, given.shapes, given.new_tokens)
    adapting = [name for name in contest.decoders if name in (LOOKUP, MERGED)]
    costs = {name: contest.decoders[name].cost_table(measure=True).to_dict() for name in adapting}
    facts = {**provenance(), "target": given.target.name, "costs": costs}
    results: dict[str, list[dict[str, Any]]] = {}
    for path in given.questions:
        lines = path.read_text(encoding="utf-8").splitlines()[given.first :][: given.count]
        results[path.stem] = []
        for number, line in enumerate(lines, start=1):
            results[path.stem].append(contest.ask(json.loads(line)["turns"][0], given.repeats))
            print(f"{path.stem} {number}/{len(lines)}", flush=True)
            write_json(given.output, {**facts, "repeats": given.repeats, "results": results})
    title = f"Speed of {given.target.name} on one CPU thread, as a multiple of plain decoding's: mean (least to most)"
    write_text(given.output.with_suffix(".md"), f"# {title}\n\n{table(results)}\n")
    print(table(results))
    print(json.dumps({name: fmean(row["speed"][adapting[-1]] for row in rows) for name, rows in results.items()}))


if __name__ == "__main__":
    main()
