"""MATH-500, competition problems (Hendrycks et al. 2021, arXiv 2103.03874; the 500 of Lightman et al. 2023)."""

from __future__ import annotations

from ..answers import same_expression
from .base import Task
from .hub import HubSet, Record, label
from .questions import Question


def _of_hub(number: int, row: Record) -> Question:
    return Question(f"math500-{number:03}", label(row["subject"]), (row["problem"],), (row["solution"],))


MATH500 = Task("math500", "MATH-500", HubSet("HuggingFaceH4/MATH-500", None, "test", _of_hub), same_expression)
