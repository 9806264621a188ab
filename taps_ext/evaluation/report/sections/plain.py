"""Beside plain decoding: that texts and answers are its own, and how fast they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..figures import View, accuracy, equal_to_plain, forwards_per_token, tokens_per_second
from ..statistics import Sampled
from ..tables import Table
from .base import Section, of, variant_table

TITLE = "Losslessness and speed"
TEXT = (
    "Speculation may not change the text. Share of the turns whose tokens are those of plain decoding of the same "
    "question with the same noise: float32 must give 100%; in lower precision the shape of a batch moves logits, "
    "and taps-ext check-lossless tells where. Where answers are scored, their accuracy stands beside plain decoding's, "
    "which it must equal. Target forwards are what a large target saves, so forwards a token is the figure that "
    "carries over to one as long as its forwards are bound by memory. Tokens a second are those of the machine named "
    "under provenance, and the speed-up is over plain decoding's on the same questions, decoded in turn in the same "
    "process; neither has an interval, since resampled questions know nothing of how busy the machine was. A small "
    "target gains less, or loses: its forward costs about as much as a drafter's, of which a step runs one a level."
)


def section(views: Sequence[View]) -> Section:
    """Five tables a view."""
    tables: list[Table] = []
    for view in views:
        everyone = list(view.specs)
        title, note = "Texts equal to plain decoding's", "Share of the turns, token by token."
        tables.append(variant_table(view, "equal-to-plain", title, note, of(view, equal_to_plain), ".1%"))
        title, note = "Accuracy", "Share of the scored turns."
        tables.append(variant_table(view, "accuracy", title, note, of(view, accuracy), ".1%", everyone))
        title, note = "Target forwards a token", "Of a row, its prefill included; plain decoding has 1."
        tables.append(variant_table(view, "forwards", title, note, of(view, forwards_per_token), ".3f", everyone))
        title, note = "Tokens a second", "A batch's seconds are shared out evenly over its rows."
        speed = of(view, tokens_per_second)
        tables.append(variant_table(view, "tokens-per-second", title, note, speed, ".1f", everyone, has_interval=False))
        if view.plain is not None:
            title, note = "Speed-up over plain decoding", "Tokens a second over plain decoding's."
            speed = _speed_up(view, view.plain)
            tables.append(variant_table(view, "speed-up", title, note, speed, has_interval=False))
    return Section("plain", TITLE, TEXT, tuple(tables))


def _speed_up(view: View, plain: str) -> Callable[[str, str], Sampled | None]:
    return lambda variant, task: view.quotient(variant, plain, task, tokens_per_second)
