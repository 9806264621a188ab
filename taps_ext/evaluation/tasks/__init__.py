"""Benchmarks, a file each, by name in `TASKS`; and questions of one's own."""

from __future__ import annotations

from .base import Task, load_prompts
from .gsm8k import GSM8K
from .math500 import MATH500
from .mt_bench import MT_BENCH
from .question_file import read_questions
from .questions import Message, Question
from .svamp import SVAMP
from .tiny import TINY_CHAT, TINY_MATH

__all__ = ["TASKS", "Message", "Question", "Task", "find_task", "load_prompts", "read_questions"]

TASKS: dict[str, Task] = {
    "mt_bench": MT_BENCH,
    "gsm8k": GSM8K,
    "math500": MATH500,
    "svamp": SVAMP,
    "tiny_math": TINY_MATH,
    "tiny_chat": TINY_CHAT,
}


def find_task(name: str) -> Task:
    """The task of that name; ValueError, with the names that there are."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}; your own prompts go with --prompts")
    return TASKS[name]
