"""MT-Bench, open questions of two turns (Zheng et al. 2023, arXiv 2306.05685). Its answers are not scored here."""

from __future__ import annotations

from .base import Task
from .hub import HubSet, Record, label
from .questions import Question


def _of_hub(number: int, row: Record) -> Question:
    turns, references = tuple(row["prompt"]), tuple(row["reference"] or ())
    known = references if len(references) == len(turns) else None
    return Question(f"mt_bench-{row['prompt_id']}", label(row["category"]), turns, known)


MT_BENCH = Task("mt_bench", "MT-Bench", HubSet("HuggingFaceH4/mt_bench_prompts", None, "train", _of_hub))
