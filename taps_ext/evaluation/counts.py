"""Results as counts, a row per answered question, from results directories or a report.json; and views of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .results import PROVENANCE, RUN_FILE, read_lines
from .variants import MERGED, PLAIN, Variant

FORMAT, VERSION = "taps_ext evaluation report", 2
PARTS = ("label", "target", "drafters", "variants", "tasks", "temperatures", "settings")  # of a configuration
CELL = ["run", "variant", "task", "temperature"]
KEYS = [*CELL, "question"]


@dataclass(frozen=True, eq=False)
class Results:
    """Counts per question, and what each results directory was asked.

    `questions` has a row per run, variant, task, temperature and question. Its counts are summed over turns: `turns`,
    `tokens`, `seconds` (share of the batch's time), `steps`, `accepted`, `nodes` (verified, roots included), `proposed`
    (drafted nodes, once per drafter that proposed them), `equal` (turns equal to plain decoding's), `scored`, `right`,
    `depth D` (steps that accepted D tokens), and per drafter `chosen NAME` (steps), `proposers NAME` and `alone NAME`
    (accepted nodes that it proposed, and that no other did).
    """

    runs: Sequence[Mapping[str, Any]]  # run.json, its provenance included
    questions: pd.DataFrame
    sources: Sequence[Path] = ()  # of each run: the directory or the report.json that it was read from


def read(paths: Sequence[Path]) -> Results:
    """Read results directories, directories that hold some (one level down), and report.json files.

    Raise ValueError in one sentence for missing or damaged results, and for results that cannot be compared.
    """
    parts = [part for path in paths for part in _read_path(path)]
    sources, runs = [source for source, _, _ in parts], [run for _, run, _ in parts]
    labels: dict[str, list[dict[str, str]]] = {}
    frames = [
        frame.assign(run=number, label=run["label"], seed=_seed(run, labels.setdefault(run["label"], [])))
        for number, (_, run, frame) in enumerate(parts)
    ]
    _check_settings(runs)
    questions = pd.concat(frames, ignore_index=True).fillna(0)
    _check_repeated(runs, questions)
    return Results(runs, questions, sources)


def _read_path(path: Path) -> list[tuple[Path, dict[str, Any], pd.DataFrame]]:
    if path.is_file():
        return [(path, *part) for part in _read_json(path)]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a directory that taps-ext evaluate wrote, or a report.json")
    folders = sorted(file.parent for pattern in (RUN_FILE, f"*/{RUN_FILE}") for file in path.glob(pattern))
    if not folders:
        raise ValueError(f"{path} holds no results: neither it nor a directory in it has a {RUN_FILE}")
    return [(folder, *_read_folder(folder)) for folder in folders]


def _read_folder(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Read a results directory; a torn last line is left out, and the first answer to a question counts."""
    run = _read_run(folder / RUN_FILE)
    rows = []
    for line in read_lines(folder):
        try:
            if line["variant"] not in run["variants"] or line["task"] not in run["tasks"]:
                raise ValueError(f"{RUN_FILE} knows no variant {line['variant']!r} of task {line['task']!r}")
            rows.append(_row(line))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{folder}: the answer of {line['variant']} to {line['question_id']!r} of {line['task']} was not "
                f"written by taps-ext evaluate: {reason}; delete that line"
            ) from error
    if not rows:
        raise ValueError(f"{folder} has no answers yet; resume taps-ext evaluate")
    frame = pd.DataFrame(rows).drop_duplicates(KEYS[1:])
    return run, _in_order(frame, run)


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in PARTS if name not in run]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the JSON object of a run ({error}); leave its directory out") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; give a directory that taps-ext evaluate wrote")
    return {PROVENANCE: {}, **run}


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts of one answer."""
    turns, choice = line["turns"], line["choices"][0]
    accepted = [count for turn in turns for count in turn["num_accepted"]]
    chosen = Counter(name for turn in turns for name in turn["chosen"])
    masks = [mask for turn in turns for step in turn["proposers"] for mask in step]
    row = {name: line[name] for name in CELL[1:]} | {
        "question": str(line["question_id"]),
        "turns": len(turns),
        "tokens": sum(choice["new_tokens"]),
        "seconds": round(sum(choice["wall_time"]) / line["rows"], 6),
        "steps": len(accepted),
        "accepted": sum(accepted),
        "nodes": sum(sum(turn["num_nodes"]) for turn in turns),
        "proposed": sum(sum(turn["num_proposed"]) for turn in turns),
        "equal": sum(bool(turn["equals_plain"]) for turn in turns),
        "scored": sum(turn["is_right"] is not None for turn in turns),
        "right": sum(bool(turn["is_right"]) for turn in turns),
    }
    row |= {f"depth {depth}": steps for depth, steps in Counter(accepted).items()}
    for bit, name in enumerate(line["drafters"]):
        row |= {
            f"chosen {name}": chosen[name],
            f"proposers {name}": sum(mask >> bit & 1 for mask in masks),
            f"alone {name}": masks.count(1 << bit),
        }
    return row


def _in_order(frame: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows by task, temperature and variant as the configuration lists them, questions as answered."""
    tasks, variants = list(run["tasks"]), list(run["variants"])
    places = [frame["task"].map(tasks.index), frame["temperature"].astype(float), frame["variant"].map(variants.index)]
    return frame.iloc[np.lexsort([np.asarray(place) for place in reversed(places)])]


def _seed(run: Mapping[str, Any], seeds: list[dict[str, str]]) -> int:
    """Return the run's drafter seed: the first whose drafters have no other checksum under a name of this run's."""
    own = {name: str(facts["sha256"]) for name, facts in run["drafters"].items()}
    fits = (all(known.get(name, sha) == sha for name, sha in own.items()) for known in seeds)
    number = next((number for number, is_fit in enumerate(fits) if is_fit), len(seeds))
    if number == len(seeds):
        seeds.append({})
    seeds[number].update(own)
    return number


def _check_settings(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError, naming the difference, unless the runs of each label were asked the same."""
    first: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for name, here, there in _differences(run, first.setdefault(run["label"], run)):
            raise ValueError(
                f"two results with the label {run['label']!r} differ in {name} ({there} and {here}), so their rows "
                "cannot be compared; evaluate them with different labels, or report them apart"
            )


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for part in ("target", "settings"):
        for name in {**here[part], **there[part]}:
            if name != "batch_size" and here[part].get(name) != there[part].get(name):
                yield f"{part}.{name}", here[part].get(name), there[part].get(name)
    for name in here["variants"].keys() & there["variants"].keys():
        if here["variants"][name] != there["variants"][name]:
            yield f"variant {name}", here["variants"][name], there["variants"][name]
    for name in here["tasks"].keys() & there["tasks"].keys():
        facts = [(run["tasks"][name]["num_questions"], run["tasks"][name]["sha256"]) for run in (here, there)]
        if facts[0][1] != facts[1][1]:
            yield f"the questions of {name}", *(f"{count} of checksum {sha[:12]}" for count, sha in facts)


def _check_repeated(runs: Sequence[Mapping[str, Any]], questions: pd.DataFrame) -> None:
    """Raise ValueError if the same drafters answer a question twice with one variant; every run has plain's answers."""
    checksums = {
        (number, name): ",".join(sorted(runs[number]["drafters"][drafter]["sha256"] for drafter in spec["drafters"]))
        for number, run in enumerate(runs)
        for name, spec in run["variants"].items()
        if spec["composition"] != PLAIN
    }
    drafters = pd.Series(zip(questions["run"], questions["variant"], strict=True), index=questions.index).map(checksums)
    named = questions.assign(drafters=drafters).dropna(subset="drafters")
    again = named[named.duplicated(["label", "drafters", *KEYS[1:]])]
    for _, row in again.head(1).iterrows():
        raise ValueError(
            f"two results of the same drafters answer question {row['question']!r} of {row['task']} with "
            f"{row['variant']} at temperature {row['temperature']:g}; give only one of them"
        )


# ---- report.json


def to_json(results: Results, tables: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of report.json: the runs, a line per cell with its counts, and a line per table."""
    runs = [json.dumps(run) for run in results.runs]
    counts = results.questions.drop(columns=["label", "seed"])
    cells = [
        json.dumps({**dict(zip(CELL, key, strict=True)), "counts": _columns(cell.drop(columns=CELL))})
        for key, cell in counts.groupby(CELL, sort=False)
    ]
    lines = [json.dumps(table) for table in tables]
    head = json.dumps({"format": FORMAT, "version": VERSION})[:-1]
    parts = {"runs": runs, "cells": cells, "tables": lines}
    return ",\n".join([head, *(f'"{name}": [\n' + ",\n".join(rows) + "\n]" for name, rows in parts.items())]) + "}\n"


def _columns(cell: pd.DataFrame) -> dict[str, list[Any]]:
    """Return the columns that are not zero throughout, whole numbers as such."""
    kept = cell.loc[:, (cell != 0).any()]
    return {
        name: [int(value) if not isinstance(value, str) and value == int(value) else value for value in column.tolist()]
        for name, column in sorted(kept.items())
    }


def _read_json(path: Path) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        is_ours = saved["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{path} is not a report.json of taps-ext; give a results directory, or a report.json")
    if saved["version"] != VERSION:
        raise ValueError(
            f"{path} has version {saved['version']} of its format, and this taps_ext reads version {VERSION}; "
            "make the report again from the results directory"
        )
    try:
        cells: list[list[pd.DataFrame]] = [[] for _ in saved["runs"]]
        for cell in saved["cells"]:
            key = {name: cell[name] for name in CELL[1:]}
            cells[cell["run"]].append(pd.DataFrame(cell["counts"]).assign(**key))
        runs = zip(saved["runs"], cells, strict=True)
        return [(run, pd.concat(own, ignore_index=True)) for run, own in runs]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); make it again") from error


# ---- views


def views(results: Results) -> list[View]:
    """Return a view per label and temperature; raise ValueError for labels that file names cannot tell apart."""
    groups = {key: rows for key, rows in results.questions.groupby(["label", "temperature"])}  # noqa: C416
    found: dict[str, View] = {}
    for label in dict.fromkeys(run["label"] for run in results.runs):
        runs = [run for run in results.runs if run["label"] == label]
        for temperature in sorted(t for name, t in groups if name == label):
            view = View(label, temperature, runs, groups[label, temperature])
            if (other := found.setdefault(view.slug, view)) is not view:
                raise ValueError(
                    f"{other.name!r} and {view.name!r} would have the same file names, *-{view.slug}; report them apart"
                )
    return list(found.values())


class View:
    """The runs of one label at one temperature; variants and tasks in the order of the first run that has them."""

    def __init__(self, label: str, temperature: float, runs: Sequence[Mapping[str, Any]], rows: pd.DataFrame) -> None:
        """Group the rows by variant and task."""
        self.label, self.temperature, self.runs = label, temperature, runs
        self.name = ", ".join([*([label] if label else []), f"T = {temperature:g}"])
        self.slug = "-".join([*([safe(label)] if label else []), f"t{temperature:g}"])
        columns = ["variant", "task", "label", "temperature"]
        groups = rows.set_index("question").groupby(["variant", "task"])
        self._cells = {key: cell.drop(columns=columns) for key, cell in groups}
        self._added: dict[Any, pd.DataFrame] = {}
        facts = [item for run in runs for item in run["variants"].items()]
        specs = dict(reversed(facts))
        self.specs = {
            name: Variant(name, **{**specs[name], "drafters": tuple(specs[name]["drafters"])})
            for name, _ in facts
            if any(variant == name for variant, _ in self._cells)
        }
        titles = {name: facts["title"] for run in runs for name, facts in run["tasks"].items()}
        self.tasks = {name: str(title) for name, title in titles.items() if any(t == name for _, t in self._cells)}
        self.drafters = list(dict.fromkeys(name for run in runs for name in run["drafters"]))
        self.settings: Mapping[str, Any] = runs[0]["settings"]

    def variants(self, *compositions: str) -> list[str]:
        """Return the variants of these compositions; all but plain decoding without any."""
        return [
            name
            for name, spec in self.specs.items()
            if (spec.composition in compositions if compositions else not spec.is_plain)
        ]

    def nodes(self, variant: str) -> int | None:
        """Return a variant's node budget; None for the union of trees."""
        spec = self.specs[variant]
        return spec.max_nodes if spec.composition == MERGED else spec.max_nodes or int(self.settings["max_nodes"])

    def usual(self) -> list[str]:
        """Return the variants with trees of the usual size, the union or what pays, without sweeps over weights."""
        sizes = (self.settings["max_nodes"], None)
        kept = [name for name in self.variants() if self.specs[name].adapts or self.nodes(name) in sizes]
        return [name for name in kept if self.specs[name].weight is None]

    def seeds(self, variant: str, task: str) -> list[int]:
        """Return the drafter seeds that answered the task with the variant."""
        cell = self._cells.get((variant, task))
        return [] if cell is None else sorted(set(cell["seed"]))

    def cell(self, variant: str, task: str, seeds: Sequence[int] | None = None) -> pd.DataFrame | None:
        """Return the counts per question, added over drafter seeds (default: all); None where there are none."""
        key = variant, task, None if seeds is None else tuple(seeds)
        if key not in self._added and (variant, task) in self._cells:
            rows = self._cells[variant, task]
            rows = (rows if seeds is None else rows[rows["seed"].isin(seeds)]).drop(columns=["run", "seed"])
            self._added[key] = rows if rows.index.is_unique else rows.groupby(level=0, sort=False).sum()
        cell = self._added.get(key)
        return None if cell is None or cell.empty else cell

    def aligned(self, names: Sequence[str], task: str, seeds: Sequence[int] | None = None) -> list[pd.DataFrame] | None:
        """Return each variant's counts over the drafter seeds (default: all) and questions that all of them have."""
        if seeds is None:
            seeds = sorted(set.intersection(*(set(self.seeds(name, task)) for name in names)))
        cells = [cell for name in names if (cell := self.cell(name, task, seeds)) is not None]
        if not cells or len(cells) < len(names):
            return None
        common = [one for one in cells[0].index if all(one in cell.index for cell in cells)]
        return [cell.loc[common] for cell in cells] if common else None

    def speeds(self, variant: str, task: str) -> tuple[float, float] | None:
        """Return the variant's and plain decoding's tokens per second on what both answered in the same runs."""
        plain = next(iter(self.variants(PLAIN)), "")
        pair = [self._cells.get((name, task)) for name in (variant, plain)]
        if pair[0] is None or pair[1] is None:
            return None
        keyed = [cell.set_index("run", append=True)[["tokens", "seconds"]] for cell in pair if cell is not None]
        sums = keyed[0].join(keyed[1].add_suffix(" plain"), how="inner").sum()
        if not sums["seconds"] or not sums["tokens plain"]:
            return None
        return float(sums["tokens"] / sums["seconds"]), float(sums["tokens plain"] / sums["seconds plain"])


def safe(name: str) -> str:
    """Return a name for files."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
