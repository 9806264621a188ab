"""The embedded prompts as two tasks: questions that the embedded models were not trained on, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from ...tiny import PROMPTS, assets
from ..answers import same_number
from .base import Task
from .question_file import read_questions
from .questions import Question


@dataclass(frozen=True)
class TinyPrompts:
    """Held-out prompts of a domain; a prompt of chat may continue a conversation."""

    domain: str

    def __str__(self) -> str:
        return f"the embedded corpus, {self.domain}"

    def questions(self) -> list[Question]:
        """Return the domain's 80 embedded questions, each with the generator's answer as its reference."""
        return [question for question in read_questions(assets() / PROMPTS) if question.category == self.domain]


TINY_MATH = Task("tiny_math", "tiny math", TinyPrompts("math"), same_number)
TINY_CHAT = Task("tiny_chat", "tiny chat", TinyPrompts("chat"))
