"""Results folders, read: lines of answers become counts. ValueErrors are sentences with the file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cells import COUNTS, NUM_BINS, SIGNALS, Cell, Signal
from .runs import PARTS, Key, Run, check_comparable
from .saved import load
from .statistics import Array, pairs_won

RUN, ANSWERS = "run.json", "answers-*.jsonl"


def read(paths: Sequence[Path]) -> tuple[Run, ...]:
    """The runs of results folders, of folders that hold some (one level down), and of report.json files."""
    runs = [run for path in paths for run in _read_path(path)]
    check_comparable(runs)
    return tuple(runs)


def _read_path(path: Path) -> Iterable[Run]:
    if path.is_file():
        return load(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a folder that taps-ext evaluate wrote, or a report.json")
    folders = [path] if (path / RUN).is_file() else sorted(file.parent for file in path.glob(f"*/{RUN}"))
    if not folders:
        raise ValueError(f"{path} holds no results: neither it nor a folder in it has a {RUN}")
    return [read_folder(folder) for folder in folders]


def read_folder(folder: Path) -> Run:
    """A results folder. A last line that a kill tore is left out; the first answer to a question counts."""
    configuration = _configuration(folder / RUN)
    lines: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for where, line in _lines(folder):
        try:
            key = Key(line["variant"], line["task"], float(line["temperature"]))
            if key.variant not in configuration["variants"] or key.task not in configuration["tasks"]:
                raise ValueError(f"{RUN} knows no variant {key.variant!r} of task {key.task!r}")
            counted = _question(line, configuration["variants"][key.variant]["composition"] == "single")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where} is no answer as taps-ext evaluate writes them: {told}") from error
        lines.setdefault(key, {}).setdefault(str(line["question_id"]), counted)
    if not lines:
        raise ValueError(f"{folder} has no answers yet; let taps-ext evaluate go on")
    provenance = configuration.pop("provenance", {})
    cells = {key: _cell(lines[key]) for key in _in_order(lines, configuration)}
    return Run(configuration, provenance, cells)


def _configuration(path: Path) -> dict[str, Any]:
    try:
        configuration = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in PARTS if name not in configuration]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object of a run ({error}); its folder cannot be reported") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; give a folder that taps-ext evaluate wrote")
    return dict(configuration)


def _lines(folder: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, JSON value) of every whole line; a line is whole when its end was written."""
    for path in sorted(folder.glob(ANSWERS)):
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    continue
                where = f"{path}, line {number},"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{where} is no JSON ({error}); mend it or delete the line") from error


def _in_order(lines: Iterable[Key], configuration: Mapping[str, Any]) -> list[Key]:
    variants, tasks = list(configuration["variants"]), list(configuration["tasks"])
    return sorted(lines, key=lambda key: (tasks.index(key.task), key.temperature, variants.index(key.variant)))


def _question(line: Mapping[str, Any], is_single: bool) -> dict[str, Any]:
    """The counts of one answer."""
    turns, drafters, choice = line["turns"], tuple(line["drafters"]), line["choices"][0]
    accepted = [count for turn in turns for count in turn["num_accepted"]]
    chosen = [name for turn in turns for name in turn["chosen"]]
    masks = [mask for turn in turns for step in turn["proposers"] for mask in step]
    bits = [1 << index for index in range(len(drafters))]
    return {
        "drafters": drafters,
        "depths": np.bincount(np.array(accepted, dtype=np.int64)),
        "turns": len(turns),
        "tokens": sum(choice["new_tokens"]),
        "seconds": round(sum(choice["wall_time"]) / line["rows"], 6),
        "nodes": sum(count for turn in turns for count in turn["num_nodes"]),
        "proposed": sum(count for turn in turns for count in turn["num_proposed"]),
        "equal": sum(bool(turn["equals_plain"]) for turn in turns),
        "scored": sum(turn["is_right"] is not None for turn in turns),
        "right": sum(bool(turn["is_right"]) for turn in turns),
        "chosen": [chosen.count(name) for name in drafters],
        "proposers": [sum(bool(mask & bit) for mask in masks) for bit in bits],
        "alone": [masks.count(bit) for bit in bits],
        "signals": _signals(line["signals"][drafters[0]]) if is_single and line["signals"] else {},
    }


def _signals(signals: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each signal the sums, and the histograms [2, NUM_BINS]: accepted, rejected."""
    found = {}
    for name in SIGNALS:
        sides = [signals[name][side] for side in ("accepted", "rejected")]
        bins = np.zeros((2, NUM_BINS))
        for row, side in zip(bins, sides, strict=True):
            for index, count in side["bins"].items():
                row[int(index)] = count
        sums = [figure for side in sides for figure in (side["count"], round(side["sum"], 6))]
        found[name] = {"sums": sums, "bins": bins}
    return found


def _cell(questions: Mapping[str, Mapping[str, Any]]) -> Cell:
    answers = list(questions.values())
    counts = {name: _stacked([answer[name] for answer in answers]) for name in COUNTS}
    names = answers[0]["signals"]
    signals = {name: _signal([answer["signals"][name] for answer in answers]) for name in names}
    return Cell(tuple(questions), answers[0]["drafters"], **counts, signals=signals)


def _stacked(rows: Sequence[Any]) -> Array:
    """The rows as one array; shorter ones are filled with zeros."""
    if np.ndim(rows[0]) == 0:
        return np.array(rows, dtype=np.float64)
    out = np.zeros((len(rows), max(map(len, rows))))
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out


def _signal(parts: Sequence[Mapping[str, Any]]) -> Signal:
    bins = np.stack([part["bins"] for part in parts])
    won = pairs_won(bins[:, 0], bins[:, 1])
    return Signal.of([*np.array([part["sums"] for part in parts]).T, won], bins.sum(axis=0))
