"""SVAMP, arithmetic stories with changed wording (Patel et al. 2021, arXiv 2103.07191): the 300 of the test split."""

from __future__ import annotations

from ..answers import same_number
from .base import Task
from .hub import HubSet, Record
from .questions import Question


def _of_hub(number: int, row: Record) -> Question:
    story = f"{row['Body'].strip()} {row['Question'].strip()}"
    return Question(f"svamp-{row['ID']}", row["Type"].lower(), (story,), (str(row["Answer"]),))


SVAMP = Task("svamp", "SVAMP", HubSet("ChilleD/SVAMP", None, "test", _of_hub), same_number)
