"""Results folders, read: lines of answers become counts. ValueErrors are sentences with the file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..results import PROVENANCE, RUN_FILE, read_lines
from ..steps import NUM_BINS, SIGNALS
from ..variants import PLAIN, SINGLE
from .cells import COUNTS, Cell, Key, Run, Signal
from .saved import load
from .statistics import Array, pairs_won

PARTS = ("label", "target", "drafters", "variants", "tasks", "temperatures", "settings")  # of a configuration


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
    folders = sorted(file.parent for pattern in (RUN_FILE, f"*/{RUN_FILE}") for file in path.glob(pattern))
    if not folders:
        raise ValueError(f"{path} holds no results: neither it nor a folder in it has a {RUN_FILE}")
    return [read_folder(folder) for folder in folders]


def read_folder(folder: Path) -> Run:
    """A results folder. A last line that a kill tore is left out; the first answer to a question counts."""
    configuration = _configuration(folder / RUN_FILE)
    lines: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for line in read_lines(folder):
        try:
            key = Key(line["variant"], line["task"], float(line["temperature"]))
            if key.variant not in configuration["variants"] or key.task not in configuration["tasks"]:
                raise ValueError(f"{RUN_FILE} knows no variant {key.variant!r} of task {key.task!r}")
            counted = _question(line, configuration["variants"][key.variant]["composition"] == SINGLE)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{folder}: the answer of {line['variant']} to {line['question_id']!r} of {line['task']} is none as "
                f"taps-ext evaluate writes them: {told}"
            ) from error
        lines.setdefault(key, {}).setdefault(str(line["question_id"]), counted)
    if not lines:
        raise ValueError(f"{folder} has no answers yet; let taps-ext evaluate go on")
    provenance = configuration.pop(PROVENANCE, {})
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
    sums, counts = np.array([part["sums"] for part in parts]).T, bins.sum(axis=2)
    won = pairs_won(bins[:, 0], bins[:, 1])
    return Signal.of([*sums, counts[:, 0] * counts[:, 1], won], bins.sum(axis=0))


def check_comparable(runs: Sequence[Run]) -> None:
    """ValueError, naming what differs, unless the runs of each label asked the same, and a variant a question once."""
    first: dict[str, Run] = {}
    seen: dict[tuple[object, ...], set[str]] = {}
    for run in runs:
        other = first.setdefault(run.label, run)
        for name, here, there in _differences(run.configuration, other.configuration):
            raise ValueError(
                f"two results with the label {run.label!r} differ in {name} ({there} and {here}), so their rows "
                "cannot be compared; evaluate them with different labels, or report them apart"
            )
        for key, cell in run.cells.items():
            if run.configuration["variants"][key.variant]["composition"] == PLAIN:
                continue  # which every run brings
            drafters = tuple(sorted(run.checksums(key.variant).items()))
            ids = seen.setdefault((run.label, drafters, key), set())
            if again := ids.intersection(cell.ids):
                raise ValueError(
                    f"two results of the same drafters answer question {min(again)!r} of {key.task} with {key.variant} "
                    f"at temperature {key.temperature:g}; give only one of them"
                )
            ids.update(cell.ids)


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for part in ("target", "settings"):
        for name in {**here[part], **there[part]}:
            if name != "batch_size" and here[part].get(name) != there[part].get(name):
                yield f"{part}.{name}", here[part].get(name), there[part].get(name)
    for name in _common(here["variants"], there["variants"]):
        if here["variants"][name] != there["variants"][name]:
            yield f"variant {name}", here["variants"][name], there["variants"][name]
    for name in _common(here["tasks"], there["tasks"]):
        facts, others = here["tasks"][name], there["tasks"][name]
        if facts["sha256"] != others["sha256"]:
            asked = [f"{one['num_questions']} of checksum {one['sha256'][:12]}" for one in (facts, others)]
            yield f"the questions of {name}", *asked


def _common(here: Iterable[str], there: Iterable[str]) -> list[str]:
    return [name for name in here if name in set(there)]
