"""The embedded tiny corpus as two tasks: prompts that the embedded models were not trained on, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from ...tiny.corpus import answered_prompts
from ..answers import same_number
from .base import Task
from .questions import Question

NUM_QUESTIONS = 80
SEED = 0


@dataclass(frozen=True)
class TinyPrompts:
    """Held-out prompts of a domain; a chat's may go on with a conversation."""

    domain: str

    def __str__(self) -> str:
        return f"the embedded corpus, {self.domain}"

    def questions(self) -> list[Question]:
        """The first 80: they are the same on every machine."""
        return [
            Question(
                f"tiny_{self.domain}-{number:03}", self.domain, (asked["content"],), (answer["content"],), tuple(before)
            )
            for number, (*before, asked, answer) in enumerate(answered_prompts(self.domain, NUM_QUESTIONS, SEED))
        ]


TINY_MATH = Task("tiny_math", "tiny math", TinyPrompts("math"), same_number)
TINY_CHAT = Task("tiny_chat", "tiny chat", TinyPrompts("chat"))
