"""The short of a results folder: acceptance lengths by variant, task and temperature, and whether texts are plain's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .results import PROVENANCE, RUN_FILE, read_lines

Place = tuple[str, str, float]  # variant, task, temperature


@dataclass
class Cell:
    """What a variant did on a task at a temperature, in sum."""

    num_questions: int = 0
    num_equal: int = 0  # questions whose answers are plain decoding's, token by token
    num_accepted: int = 0
    num_steps: int = 0

    @property
    def acceptance_length(self) -> float:
        """Accepted draft tokens a decode step + 1, over all steps; NaN without a step."""
        return (self.num_accepted + self.num_steps) / self.num_steps if self.num_steps else float("nan")


@dataclass(frozen=True)
class Summary:
    """Everything that a folder holds, in the order of its variants, tasks and temperatures."""

    folder: str
    label: str
    dtype: str  # of the target
    end_tokens: Any  # that end an answer, by name
    cells: dict[Place, Cell]

    @property
    def num_texts(self) -> int:
        """Answers of all variants, plain decoding's aside, which is compared with."""
        return sum(cell.num_questions for cell in self.cells.values())

    @property
    def num_different(self) -> int:
        """Answers that are not plain decoding's."""
        return self.num_texts - sum(cell.num_equal for cell in self.cells.values())

    @property
    def is_broken(self) -> bool:
        """Whether texts differ where nothing excuses it."""
        return self.num_different > 0 and self.dtype == "float32"

    def verdict(self) -> str:
        """Whether the texts are the target's own, in a sentence."""
        if not self.num_texts:
            return "Nothing but plain decoding was evaluated."
        if not self.num_different:
            return f"All {self.num_texts} answers equal plain decoding's, token by token."
        told = f"{self.num_different} of {self.num_texts} answers differ from plain decoding's"
        if self.is_broken:
            return f"{told.upper()} IN FLOAT32: A BUG, PLEASE REPORT IT (taps-ext check-lossless says where they part)."
        return f"{told}; {self.dtype} rounds with the shape of a batch (taps-ext check-lossless says where they part)."

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        names = ("variant", "task", "temperature")
        cells = [
            {**dict(zip(names, place, strict=True)), **asdict(cell), "acceptance_length": cell.acceptance_length}
            for place, cell in self.cells.items()
        ]
        told = {"folder": self.folder, "label": self.label, "dtype": self.dtype, "end_tokens": self.end_tokens}
        return {**told, "num_texts": self.num_texts, "num_different": self.num_different, "cells": cells}


def summarise(folder: Path) -> Summary:
    """The summary of a results folder, of as much as there is."""
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    cells: dict[Place, Cell] = {
        (variant, task, temperature): Cell()
        for variant in run["variants"]
        for task in run["tasks"]
        for temperature in run["temperatures"]
    }
    for line in read_lines(folder):
        cell = cells[line["variant"], line["task"], line["temperature"]]
        counts = [count for turn in line["turns"] for count in turn["num_accepted"]]
        cell.num_questions += 1
        cell.num_equal += all(turn["equals_plain"] for turn in line["turns"])
        cell.num_accepted += sum(counts)
        cell.num_steps += len(counts)
    plain = {label for label, variant in run["variants"].items() if variant["composition"] == "plain"}
    shown = {place: cell for place, cell in cells.items() if cell.num_questions and place[0] not in plain}
    ends = run[PROVENANCE].get("end_tokens")
    return Summary(str(folder), run["label"], run["settings"]["dtype"], ends, shown)
