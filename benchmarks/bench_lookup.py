"""Seconds saved by look-ups on a real target: plain decoding, transformers' prompt look-up, and ours, in turns.

    python benchmarks/bench_lookup.py path/to/target gsm8k.jsonl mt_bench.jsonl --output results.json
                                                                             also writes results.md beside it

Each file holds questions, a JSON object a line with `turns`; the first turn of the first questions is asked through the
target's chat template. benchmarks/repeating.jsonl has ten prompts whose answers repeat them: code to edit, tables to
extract from, texts to quote. All ways decode greedily on one thread, one after the other in one process, and are timed
in processor time; a question's time is the median of its repeats. The texts of plain decoding and ours must be equal.
The last line of the output is one line of JSON.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import taps_ext
from taps_ext.checkpoints.files import write_text

PLAIN, STOCK, OURS, FIXED = "plain", "transformers' look-up", "look-up, adapting tree", "look-up, 8 nodes"
STOCK_TOKENS = 3  # prompt_lookup_num_tokens


class Contest:
    """Every way to answer, on one target."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.new_tokens = new_tokens
        lookup = {"lookup": taps_ext.LookupDrafter(self.model.config.vocab_size)}
        self.adapting = taps_ext.SpeculativeDecoder(self.model, lookup, "single")
        self.fixed = taps_ext.SpeculativeDecoder(self.model, lookup, "single", shape=taps_ext.TreeShape(8, 4, 8))

    def ways(self, question: str) -> dict[str, Callable[[], list[int]]]:
        """Return what answers a question in each way, with the new tokens."""
        chat = [{"role": "user", "content": question}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ours: dict[str, Any] = {**inputs, "max_new_tokens": self.new_tokens, "sampling": taps_ext.SamplingParams()}

        def stock() -> list[int]:
            settings = {"do_sample": False, "max_new_tokens": self.new_tokens, "prompt_lookup_num_tokens": STOCK_TOKENS}
            return self.model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

        return {
            PLAIN: lambda: taps_ext.plain_generate(self.model, **ours).new_tokens[0],
            STOCK: stock,
            OURS: lambda: self.adapting.generate(**ours).new_tokens[0],
            FIXED: lambda: self.fixed.generate(**ours).new_tokens[0],
        }

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
            "is_equal": texts[PLAIN] == texts[OURS] == texts[FIXED],
        }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the mean and the range of the speeds as Markdown."""
    lines = ["| | questions | texts equal | " + " | ".join((STOCK, FIXED, OURS)) + " |", "|---|---|---|---|---|---|"]
    for name, rows in results.items():
        cells = [name, str(len(rows)), f"{sum(row['is_equal'] for row in rows)}"]
        for way in (STOCK, FIXED, OURS):
            speeds = [row["speed"][way] for row in rows]
            cells.append(f"{fmean(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=10, help="questions of each file")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    contest = Contest(given.target, given.new_tokens)
    costs = contest.adapting.cost_table(measure=True)
    facts = {**provenance(), "target": given.target.name, "costs": costs.to_dict()}
    results: dict[str, list[dict[str, Any]]] = {}
    for path in given.questions:
        lines = path.read_text(encoding="utf-8").splitlines()[: given.count]
        results[path.stem] = []
        for number, line in enumerate(lines, start=1):
            results[path.stem].append(contest.ask(json.loads(line)["turns"][0], given.repeats))
            print(f"{path.stem} {number}/{len(lines)}", flush=True)
            write_json(given.output, {**facts, "repeats": given.repeats, "results": results})
    title = f"Speed of {given.target.name} on one CPU thread, as a multiple of plain decoding's: mean (least to most)"
    write_text(given.output.with_suffix(".md"), f"# {title}\n\n{table(results)}\n")
    print(table(results))
    print(json.dumps({name: fmean(row["speed"][OURS] for row in rows) for name, rows in results.items()}))


if __name__ == "__main__":
    main()
