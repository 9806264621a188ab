"""Losslessness: texts equal to plain decoding's, and answers as right as plain decoding's."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures import View, accuracy, equal_to_plain
from ..tables import Table
from .base import Section, of, variant_table

TITLE = "Losslessness"
TEXT = (
    "Speculation may not change the text. Share of the turns whose tokens are those of plain decoding of the same "
    "question with the same noise: float32 must give 100%; in lower precision the shape of a batch moves logits, "
    "and taps-ext check-lossless tells where. Where answers are scored, their accuracy stands beside plain decoding's, "
    "which it must equal."
)


def section(views: Sequence[View]) -> Section:
    """Two tables a view."""
    tables: list[Table] = []
    for view in views:
        title, note = "Texts equal to plain decoding's", "Share of the turns, token by token."
        tables.append(variant_table(view, "equal-to-plain", title, note, of(view, equal_to_plain), ".1%"))
        note = "Share of the scored turns."
        figure, everything = of(view, accuracy), list(view.specs)
        table = variant_table(view, "accuracy", "Accuracy", note, figure, ".1%", variants=everything)
        tables += [table] if table.rows else []
    return Section("losslessness", TITLE, TEXT, tuple(tables))
