"""Turn question-answer pairs into chat messages, and capitalise sentences: what the generators share."""

from __future__ import annotations

from collections.abc import Iterable


def as_messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Chat messages of (question, answer) turns, user first."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def capital(text: str) -> str:
    """The text with a capital letter in front."""
    return text[:1].upper() + text[1:]
