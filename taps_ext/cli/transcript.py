"""Tokens of a decode step as text, each piece with the drafters that proposed it: what a person watches arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a longer character to


@dataclass(frozen=True)
class Span:
    """A piece of text and who proposed its tokens: no drafter (the target's own token), one, or several."""

    text: str
    proposers: tuple[str, ...]


class Transcript:
    """The text of one row, token by token. Holds a token back while its character is unfinished."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window = 0  # decoding starts here: a token's text depends on the one before it (leading spaces)
        self._shown = 0  # tokens whose text has been handed out

    def add(self, tokens: Sequence[int], proposers: Sequence[Sequence[str]]) -> list[Span]:
        """The spans that a step's tokens add: `proposers` has an entry a draft token, what follows is the target's."""
        spans = []
        for index, token in enumerate(tokens):
            self._tokens.append(int(token))
            names = tuple(proposers[index]) if index < len(proposers) else ()
            spans.append(Span(self._new_text(), names))
        return join_spans(spans)

    def finish(self) -> list[Span]:
        """What is still held back when no more tokens come: an unfinished character, if anything."""
        return join_spans([Span(self._new_text(final=True), ())])

    def _new_text(self, final: bool = False) -> str:
        before = self._decode(self._tokens[self._window : self._shown])
        after = self._decode(self._tokens[self._window :])
        if after.endswith(UNFINISHED) and not final:
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def join_spans(spans: Iterable[Span]) -> list[Span]:
    """The same text in as few spans as possible: neighbours of the same proposers become one, empty ones go."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].proposers == span.proposers:
            joined[-1] = Span(joined[-1].text + span.text, span.proposers)
        elif span.text:
            joined.append(span)
    return joined
