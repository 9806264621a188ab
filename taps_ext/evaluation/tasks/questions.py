"""A question: what is asked, after what, and what the answer should come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}, what chat templates read


@dataclass(frozen=True)
class Question:
    """User turns, each asked after the model's own answers to those before it."""

    id: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] | None = None  # one a turn; None: nobody knows the answer
    history: tuple[Message, ...] = ()  # a conversation that the first turn goes on with; it may begin with a system's
