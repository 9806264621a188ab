"""report.json: all counts of a report, no texts and no tokens; a report made from it is the same report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cells import COUNTS, SUMS, Cell, Key, Run, Signal
from .statistics import Array

FORMAT, VERSION = "taps_ext evaluation report", 1
PARTS = (*SUMS, "bins")  # of a signal


def dump(runs: Sequence[Run]) -> str:
    """The text of report.json: a line a cell, so that two of them can be compared."""
    facts = [json.dumps({"configuration": run.configuration, "provenance": run.provenance}) for run in runs]
    cells = [
        json.dumps({"run": number, **vars(key), **_cell_to_json(cell)}, separators=(",", ":"))
        for number, run in enumerate(runs)
        for key, cell in run.cells.items()
    ]
    head = json.dumps({"format": FORMAT, "version": VERSION})[:-1]
    return f'{head},\n"runs": [\n{_lines(facts)}\n],\n"cells": [\n{_lines(cells)}\n]}}\n'


def _lines(parts: Sequence[str]) -> str:
    return ",\n".join(parts)


def load(path: Path) -> list[Run]:
    """The runs of a report.json; ValueError, in a sentence, for any other file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        is_ours = saved["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is no report.json of taps-ext; give a results folder, or a report.json")
    if saved["version"] != VERSION:
        raise ValueError(
            f"{path} has version {saved['version']} of its format, this taps_ext reads version {VERSION}; "
            "make the report again from the results folder"
        )
    try:
        cells: list[dict[Key, Cell]] = [{} for _ in saved["runs"]]
        for record in saved["cells"]:
            key = Key(record["variant"], record["task"], float(record["temperature"]))
            cells[record["run"]][key] = _cell_from_json(record)
        return [
            Run(run["configuration"], run["provenance"], own) for run, own in zip(saved["runs"], cells, strict=True)
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from error


def _cell_to_json(cell: Cell) -> dict[str, Any]:
    counts = {name: _numbers(getattr(cell, name)) for name in COUNTS}
    signals = {name: {part: _numbers(getattr(signal, part)) for part in PARTS} for name, signal in cell.signals.items()}
    return {"drafters": cell.drafters, "ids": cell.ids, **counts, "signals": signals}


def _cell_from_json(record: Mapping[str, Any]) -> Cell:
    num_questions, drafters = len(record["ids"]), tuple(record["drafters"])
    counts = {name: np.array(record[name], dtype=np.float64) for name in COUNTS}
    if any(len(column) != num_questions for column in counts.values()):
        raise ValueError(f"a column has not {num_questions} questions")
    signals = {
        name: Signal(**{part: np.array(signal[part], dtype=np.float64) for part in PARTS})
        for name, signal in record["signals"].items()
    }
    return Cell(tuple(record["ids"]), drafters, **counts, signals=signals)


def _numbers(values: Array) -> Any:
    """Nested lists; whole numbers as such."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [int(value) if value == int(value) else value for value in values.tolist()]
