"""Results folders of made-up answers, in the runner's format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taps_ext.evaluation import counts, report
from taps_ext.evaluation.figures import Table

DRAFTERS = ("math", "chat")
TASKS = {"gsm8k": 12, "mt_bench": 10, "svamp": 9}  # questions
SETTINGS = {"max_new_tokens": 64, "batch_size": 4, "depth": 6, "branching": 10, "max_nodes": 60, "seed": 0}


def variant(composition: str, drafters: Sequence[str] = DRAFTERS, **options: Any) -> dict[str, Any]:
    """A variant as run.json holds it."""
    base = {"max_nodes": 60, "drafting": "coupled", "evidence_decay": None, "weight": None}
    return {"composition": composition, "drafters": list(drafters), **base, **options}


VARIANTS = {
    "plain": variant("plain", (), max_nodes=None),
    "single:math": variant("single", ("math",)),
    "single:chat": variant("single", ("chat",)),
    "average": variant("average"),
    "average:math+chat,weight=0.25": variant("average", weight=0.25),
    "confidence": variant("confidence"),
    "entropy": variant("entropy"),
    "evidence": variant("evidence", evidence_decay=0.95),
    "merged": variant("merged", max_nodes=None, evidence_decay=0.0),
    "merged@60": variant("merged", evidence_decay=0.95),
    "merged@60,evidence=0": variant("merged", evidence_decay=0.0),
    "single:math@20": variant("single", ("math",), max_nodes=20),
    "single:chat@20": variant("single", ("chat",), max_nodes=20),
    "merged@20": variant("merged", max_nodes=20, evidence_decay=0.95),
    "single:math,topk": variant("single", ("math",), drafting="topk"),
}


def write_results(
    folder: Path,
    label: str = "",
    seed: int = 0,
    variants: Mapping[str, dict[str, Any]] = VARIANTS,
    tasks: Mapping[str, int] = TASKS,
    temperatures: Sequence[float] = (0.0, 1.0),
    settings: Mapping[str, Any] = SETTINGS,
) -> Path:
    """A folder with a run.json and two processes' answers; other seeds are other drafters and other answers."""
    folder.mkdir(parents=True)
    run = {
        "label": label,
        "target": {"name": "made-up", "fingerprint": "0" * 64},
        "drafters": {name: {"name": name, "sha256": f"{index}{seed}" * 32} for index, name in enumerate(DRAFTERS)},
        "variants": dict(variants),
        "tasks": {
            name: {
                "title": name.upper(),
                "source": "made up",
                "num_questions": count,
                "sha256": name,
                "is_scored": True,
            }
            for name, count in tasks.items()
        },
        "temperatures": list(temperatures),
        "settings": dict(settings),
        "provenance": {"command": "made up", "commit": "f" * 40, "device": "cpu"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    random = np.random.default_rng(seed)
    lines = [
        answer(random, name, facts, task, temperature, f"{task}-{number}")
        for task, count in tasks.items()
        for temperature in temperatures
        for number in range(count)
        for name, facts in variants.items()
        if temperature > 0 or facts["drafting"] == "coupled"
    ]
    for process in range(2):
        texts = [json.dumps(line) + "\n" for line in lines[process::2]]
        (folder / f"answers-{process}.jsonl").write_text("".join(texts))
    return folder


def answer(
    random: np.random.Generator, name: str, facts: Mapping[str, Any], task: str, temperature: float, question: str
) -> dict[str, Any]:
    """A line; the drafter of a task's own domain accepts more there, and merged trees a little more than any."""
    drafters = ["average"] if facts["composition"] == "average" else list(facts["drafters"])
    turns = [turn(random, facts, drafters, task) for _ in range(2 if task == "mt_bench" else 1)]
    accepted = [count for one in turns for count in one["num_accepted"]]
    return {
        "question_id": question,
        "category": task,
        "answer_id": "a",
        "model_id": name,
        "tstamp": 0.0,
        "choices": [
            {
                "index": 0,
                "turns": ["text"] * len(turns),
                "decoding_steps": [len(one["num_accepted"]) for one in turns],
                "new_tokens": [len(one["tokens"]) for one in turns],
                "wall_time": [round(0.04 * len(one["num_accepted"]), 6) for one in turns],
                "accept_lengths": [count + 1 for count in accepted],
            }
        ],
        "variant": name,
        "task": task,
        "temperature": temperature,
        "seed": 0,
        "rows": 4,
        "turns": turns,
        "drafters": drafters,
        "signals": {one: signals(random, sum(accepted)) for one in drafters},
    }


def turn(random: np.random.Generator, facts: Mapping[str, Any], drafters: Sequence[str], task: str) -> dict[str, Any]:
    """A turn of 10 steps; plain decoding has one a token."""
    own = {"gsm8k": "math", "svamp": "math", "mt_bench": "chat"}[task]
    is_plain, is_merged = not drafters, facts["composition"] == "merged"
    mean = 0.35 + 0.35 * (own in drafters) + 0.05 * is_merged
    accepted = [0] * 30 if is_plain else random.binomial(6, mean, size=10).tolist()
    nodes = 1 if is_plain else (facts["max_nodes"] or 100)
    routed = facts["composition"] in ("confidence", "entropy", "evidence")
    lean = [0.8 if name == own else 0.2 for name in drafters] if routed else None
    names = [
        random.choice(drafters, p=lean) if routed else (drafters[0] if len(drafters) == 1 else None) for _ in accepted
    ]
    bits = {name: 1 << index for index, name in enumerate(drafters)}
    masks = [
        [int(random.integers(1, 4)) if is_merged else bits[str(name)] for _ in range(count)]
        for name, count in zip(names, accepted, strict=True)
    ]
    return {
        "prompt_length": 20,
        "tokens": [1] * (1 + sum(accepted) + len(accepted)),
        "finish_reason": "length",
        "num_accepted": accepted,
        "num_nodes": [nodes] * len(accepted),
        "num_proposed": [0 if is_plain else nodes - 1 + 15 * is_merged] * len(accepted),
        "chosen": [None if is_merged or is_plain else str(name) for name in names],
        "proposers": masks,
        "equals_plain": is_plain or bool(random.integers(0, 8)),
        "is_right": bool(random.integers(0, 2)) if task != "mt_bench" else None,
    }


def signals(random: np.random.Generator, num_accepted: int) -> dict[str, Any]:
    """Confidences of accepted nodes are higher, entropies lower."""
    sides = {"accepted": (num_accepted, 0.6, 1.0), "rejected": (590 - num_accepted, 0.05, 2.0)}
    found: dict[str, Any] = {"confidence": {}, "entropy": {}}
    for side, (count, confidence, entropy) in sides.items():
        certain = np.clip(random.normal(confidence, 0.1, size=count), 0.0, 1.0)
        found["confidence"][side] = histogram(certain, np.minimum(99, np.floor(100 * np.cbrt(certain))))
        nats = np.abs(random.normal(entropy, 0.5, size=count))
        found["entropy"][side] = histogram(nats, np.minimum(99, np.floor(10 * nats)))
    return found


def histogram(values: np.ndarray, bins: np.ndarray) -> dict[str, Any]:
    """As a line holds it."""
    indices, counts = np.unique(bins.astype(int), return_counts=True)
    named = {str(index): int(count) for index, count in zip(indices, counts, strict=True)}
    return {"count": len(values), "sum": float(values.sum()), "bins": named}


def as_read(tables: Sequence[Table]) -> dict[str, list[dict[str, str]]]:
    """Tables by name, as their CSV files hold them."""
    return {table.name: list(csv.DictReader(io.StringIO(table.csv))) for table in tables}


def read_tables(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The tables of a folder's report."""
    return as_read([table for section in report.sections(counts.read([folder])) for table in section.tables])


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
