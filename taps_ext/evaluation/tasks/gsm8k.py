"""GSM8K, grade-school word problems (Cobbe et al. 2021, arXiv 2110.14168): the test split."""

from __future__ import annotations

from ..answers import same_number
from .base import Task
from .hub import HubSet, Record
from .questions import Question


def _of_hub(number: int, row: Record) -> Question:
    return Question(f"gsm8k-test-{number:04}", "grade-school-math", (row["question"],), (row["answer"],))


GSM8K = Task("gsm8k", "GSM8K", HubSet("openai/gsm8k", "main", "test", _of_hub), same_number)
