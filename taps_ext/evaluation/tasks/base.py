"""What a task is: questions of one or more turns, where they come from, and when an answer is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .question_file import read_questions
from .questions import Question


class Source(Protocol):
    """Where a task's questions come from when no file is given; its text is a name for people."""

    def questions(self) -> list[Question]: ...


@dataclass(frozen=True)
class Task:
    """A benchmark. `is_right(answer, reference)` is None for tasks whose answers are not scored."""

    name: str
    title: str
    source: Source
    is_right: Callable[[str, str], bool] | None = None

    def load(self, path: str | os.PathLike[str] | None = None, limit: int | None = None) -> list[Question]:
        """The questions, from a file of JSON lines or else from the task's own source.

        With a `limit`, that many of them, evenly spread: MT-Bench, for one, is in order of category. ValueError, in a
        sentence, for a malformed file (with the line), and for a source that cannot be reached.
        """
        _check(limit)
        return spread(read_questions(Path(path)) if path is not None else self.source.questions(), limit)


def load_prompts(path: str | os.PathLike[str], limit: int | None = None) -> list[Question]:
    """Your own prompts, of a file of JSON lines (`read_questions` says which); `limit` as in `Task.load`."""
    _check(limit)
    return spread(read_questions(Path(path)), limit)


def spread(questions: list[Question], limit: int | None) -> list[Question]:
    """`limit` of the questions, evenly spread and in order; all where there are not more."""
    count = len(questions)
    if limit is None or limit >= count:
        return questions
    return [questions[index * count // limit] for index in range(limit)]


def _check(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
