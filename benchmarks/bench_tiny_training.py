"""What each drafter of a tiny world is worth: acceptance lengths with the real decoder, beside its training time.

    python benchmarks/bench_tiny_training.py FOLDER --output results.json

FOLDER is what `runs/tiny.sh FOLDER` made. A single drafter, 60 nodes and 6 levels, held-out
prompts of every domain, greedy and at temperature 1, micro average over all steps.
The script prints a table for people and, as its last line, one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from provenance import provenance, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import corpus

import taps_ext

TEMPERATURES = (0.0, 1.0)


def measure(folder: Path, num_prompts: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """A row a drafter: acceptance lengths by domain and temperature, and what its training took."""
    target: Any = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "target", padding_side="left")
    facts = json.loads((folder / "recipe.json").read_text())
    runs, domains = facts["runs"], facts["corpus"]["domains"]
    prompts = {domain: _encode(tokenizer, corpus.prompts(domain, num_prompts)) for domain in domains}
    rows = []
    for path in sorted((folder / "runs").glob("*/final")):
        name = path.parent.name
        drafter = taps_ext.load_drafter(path, target)
        decoder = taps_ext.SpeculativeDecoder(target, {name: drafter}, "single", shape=taps_ext.TreeShape())
        lengths = {
            f"{domain}, T={temperature:g}": round(_acceptance(decoder, inputs, temperature, max_new_tokens), 3)
            for domain, inputs in prompts.items()
            for temperature in TEMPERATURES
        }
        rows.append({"drafter": name, "acceptance_length": lengths, **_training(runs.get(name))})
    return rows


def _encode(tokenizer: Any, prompts: Sequence[Any]) -> Any:
    return tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def _acceptance(decoder: taps_ext.SpeculativeDecoder, inputs: Any, temperature: float, max_new_tokens: int) -> float:
    sampling = taps_ext.SamplingParams(temperature, seed=0)
    stats = decoder.generate(
        inputs["input_ids"], inputs["attention_mask"], sampling=sampling, max_new_tokens=max_new_tokens
    ).stats
    return stats.acceptance_length


def _training(run: dict[str, Any] | None) -> dict[str, Any]:
    """Of a trained drafter; an average was not trained."""
    if run is None:
        return {"steps": None, "cpu_seconds": None, "estimate": None}
    estimate = round(run["estimate"]["acceptance_length"], 3)
    return {"steps": run["steps"], "cpu_seconds": run["cpu_seconds"], "estimate": estimate}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = list(rows[0]["acceptance_length"])
    print(f"{'drafter':28}" + "".join(f"{column:>13}" for column in columns) + f"{'steps':>8}{'cpu seconds':>13}")
    for row in rows:
        lengths = "".join(f"{row['acceptance_length'][column]:13.2f}" for column in columns)
        trained = f"{row['steps']:8}{row['cpu_seconds']:13.1f}" if row["steps"] else ""
        print(f"{row['drafter']:28}{lengths}{trained}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the drafters of a tiny world.")
    parser.add_argument("folder", type=Path, help="what runs/tiny.sh made")
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--prompts", type=int, default=40, help="of each domain")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.folder, options.prompts, options.max_new_tokens)
    print_table(rows)
    if options.output:
        write_json(options.output, {"provenance": provenance(), "rows": rows})
    print(json.dumps({row["drafter"]: row["acceptance_length"] for row in rows}, separators=(",", ":")))


if __name__ == "__main__":
    main()
