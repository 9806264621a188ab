"""Tokens a second, the speed-up over plain decoding, and target forwards a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..figures import View, forwards_per_token, tokens_per_second
from ..statistics import Sampled
from ..tables import Table
from .base import Section, of, variant_table

TITLE = "Speed"
TEXT = (
    "Speed-up is tokens a second over plain decoding's on the same questions, decoded in turn in the same process. A "
    "small target gains less, or loses: its forward costs about as much as a drafter's, of which a step runs one a "
    "level. Target forwards are what a large target saves, so forwards a token is the figure that carries over to one "
    "as long as its forwards are bound by memory; tokens a second are those of the machine named under provenance."
)


def section(views: Sequence[View]) -> Section:
    """Three tables a view."""
    tables: list[Table] = []
    for view in views:
        plain = view.plain
        if plain is not None:
            note = "Tokens a second over plain decoding's."
            tables.append(variant_table(view, "speed-up", "Speed-up over plain decoding", note, _speed_up(view, plain)))
        everyone = list(view.specs)
        note = "A batch's seconds are shared out evenly over its rows."
        speed = of(view, tokens_per_second)
        tables.append(
            variant_table(view, "tokens-per-second", "Tokens a second", note, speed, ".1f", variants=everyone)
        )
        note = "Of a row, its prefill included; plain decoding has 1 but for the cut at the end of a text."
        title, figure = "Target forwards a token", of(view, forwards_per_token)
        tables.append(variant_table(view, "forwards", title, note, figure, ".3f", variants=everyone))
    return Section("speed", TITLE, TEXT, tuple(tables))


def _speed_up(view: View, plain: str) -> Callable[[str, str], Sampled | None]:
    return lambda variant, task: view.quotient(variant, plain, task, tokens_per_second)
