"""Acceptance lengths of the same prompts under two ways, their paired difference, and what is said of it.

An acceptance length is the micro average over steps. The error of a difference is that of the difference of two such
ratios over the same prompts, whose runs (of several drafter seeds) are one cluster each: linearised, as surveys do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beyond_cells import Cell


@dataclass(frozen=True)
class Difference:
    """Of two acceptance lengths, and its standard error."""

    value: float
    error: float

    def __format__(self, digits: str) -> str:
        return f"{self.value:+{digits or '.2f'}} ± {self.error:{digits or '.2f'}}"

    def __str__(self) -> str:
        return format(self)


@dataclass(frozen=True)
class Sample:
    """Tokens (accepted and bonus) and steps of each prompt, over one or several runs."""

    tokens: Mapping[tuple[str, int], int]
    steps: Mapping[tuple[str, int], int]

    @classmethod
    def of(cls, results: Iterable[tuple[Cell, Mapping[str, Any]]]) -> Sample:
        tokens: dict[tuple[str, int], int] = {}
        steps: dict[tuple[str, int], int] = {}
        for cell, result in results:
            for place, (accepted, count) in enumerate(zip(result["accepted"], result["steps"], strict=True)):
                prompt = (cell.domain, place)
                tokens[prompt] = tokens.get(prompt, 0) + accepted + count
                steps[prompt] = steps.get(prompt, 0) + count
        return cls(tokens, steps)

    @property
    def length(self) -> float:
        """Acceptance length; NaN without a step."""
        return math.nan if not any(self.steps.values()) else sum(self.tokens.values()) / sum(self.steps.values())

    def __sub__(self, other: Sample) -> Difference:
        """Paired by prompt."""
        influences = [mine - its for mine, its in zip(self._influences(), other._influences(), strict=True)]
        count = len(influences)
        variance = sum(value * value for value in influences) / max(count - 1, 1)
        return Difference(self.length - other.length, math.sqrt(variance / count))

    def _influences(self) -> list[float]:
        """How far each prompt moves the ratio, times the number of prompts; their mean is 0."""
        length, per_prompt = self.length, sum(self.steps.values()) / len(self.steps)
        return [(self.tokens[prompt] - length * self.steps[prompt]) / per_prompt for prompt in sorted(self.tokens)]


def claim(name: str, found: Mapping[Any, Difference], holds: Any) -> dict[str, Any]:
    """Whether it holds everywhere, in how many cells, the least of them, and where it fails."""
    worst = min(found, key=lambda cell: found[cell].value)
    failed = [cell for cell, difference in found.items() if not holds(difference)]
    shown = "; ".join(f"{found[cell]:.3f} at {_place(cell)}" for cell in failed or [worst])
    detail = f"{len(found) - len(failed)} of {len(found)}; {'not' if failed else 'least'} {shown}"
    return {"claim": name, "holds": not failed, "detail": detail}


def _place(cell: Any) -> str:
    return cell if isinstance(cell, str) else ", ".join(map(_told, cell))


def _told(value: Any) -> str:
    return f"T = {value:g}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, aligned for people."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(entry.ljust(width) for entry, width in zip(entries, widths, strict=True)) + " |"

    return [line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]
