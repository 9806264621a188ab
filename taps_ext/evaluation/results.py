"""A results folder: run.json says of what, answers-<process>.jsonl hold a line an answered question (`record.py`).

A run that was stopped goes on in its folder. Lines are only ever added; what is cut off is a torn last line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import check_writable, write_text, written
from ..decode.budget import CostTable
from .record import Key, key_of, text_of

RUN_FILE = "run.json"
PROVENANCE = "provenance"  # the one part of run.json that may differ when a run goes on
RESUMED, PASSING = "resumed", ("command", "date")  # of it: provenance of later goes elsewhere or with other code
COSTS = "costs"  # of a step, by which variants that adapt choose their trees: `CostTable`
LATE = ("target", "settings.dtype", COSTS)  # parts that are known once the target is loaded
ANSWERS = "answers-*.jsonl"
NUM_TOLD = 4  # of the parts that differ
GO_ON = "an evaluation goes on from its last answers when it is started again"


def check_folder(folder: Path, configuration: Mapping[str, Any]) -> None:
    """ValueError or OSError, in a sentence, unless a run of this configuration can be written there.

    The folder may hold the beginning of the same run. What the configuration does not say yet (`LATE`) is not compared.
    """
    check_writable(folder)
    there = _read_run(folder)
    if there is None:
        if answers := sorted(folder.glob(ANSWERS)):
            raise ValueError(f"{folder} holds {answers[0].name}, but no {RUN_FILE} says of what; give another output")
        return
    del there[PROVENANCE]
    if differing := list(_differences(there, json.loads(json.dumps(configuration)))):
        more = [f"and {len(differing) - NUM_TOLD} more"] if len(differing) > NUM_TOLD else []
        raise ValueError(
            f"{folder} holds results of another configuration: {'; '.join(differing[:NUM_TOLD] + more)}; give another "
            "output, or what those were made with"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs, by dotted name."""
    for name in {**there, **here}:
        key = f"{prefix}{name}"
        if name not in there or name not in here:
            if key not in LATE:
                yield f"{key} is {'there and not here' if name in there else 'here and not there'}"
        elif isinstance(there[name], dict) and isinstance(here[name], dict):
            yield from _differences(there[name], here[name], f"{key}.")
        elif there[name] != here[name]:
            yield f"{key} is {there[name]} there and {here[name]} here"


def _read_run(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); give another output") from error
    if not isinstance(run, dict) or PROVENANCE not in run:
        raise ValueError(f"{path} is not of an evaluation; give another output")
    return run


def read_costs(folder: Path) -> CostTable | None:
    """The costs by which the run in the folder chooses its trees; None where none of them adapts, or no run is."""
    costs = (_read_run(folder) or {}).get(COSTS)
    return None if costs is None else CostTable.from_dict(costs)


def begin(folder: Path, configuration: Mapping[str, Any], provenance: Mapping[str, Any]) -> int:
    """Make the folder ready for a run, or for the rest of one; a lock on it, held until `os.close`."""
    check_folder(folder, configuration)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        check_folder(folder, configuration)  # nobody else writes now
    except ValueError:
        os.close(lock)
        raise
    run = _read_run(folder)
    history = run[PROVENANCE] if run else {**provenance, RESUMED: []}
    if run is not None and _place(provenance) != _place([history, *history[RESUMED]][-1]):
        history[RESUMED].append(provenance)
    with written(RUN_FILE, folder, GO_ON):
        told = {**(run or configuration), PROVENANCE: history}
        write_text(folder / RUN_FILE, json.dumps(told, indent=1) + "\n")
    for path in folder.glob(ANSWERS):
        _cut_torn_line(path)
    return lock


def _place(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's provenance is the same each time that it goes on with the same code in the same place."""
    return {name: value for name, value in provenance.items() if name not in (*PASSING, RESUMED)}


def _lock(folder: Path) -> int:
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another evaluation writes to {folder}; wait for it, or give another output") from None
    return descriptor


def _cut_torn_line(path: Path) -> None:
    """Whatever a process left that was killed while it wrote."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end and not _is_line(data[data.rfind(b"\n", 0, end - 1) + 1 : end]):
        end = data.rfind(b"\n", 0, end - 1) + 1
    if end < len(data):
        os.truncate(path, end)


def _is_line(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The answers in a folder, file by file; ValueError, in a sentence, for a line that is none.

    A last line that is torn, as that of a run under way or killed, is left out.
    """
    for path in sorted(folder.glob(ANSWERS)):
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    break
                try:
                    line = json.loads(data)
                    key_of(line)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: no answer ({error!r}); delete that line") from error
                yield line


class Answers:
    """The answers of a run: what is there, and one process' file to add to."""

    def __init__(self, folder: Path, process: int, plain_label: str) -> None:
        self._folder = folder
        self._keys: set[Key] = set()
        self._plain: dict[Key, list[list[int]]] = {}
        for line in read_lines(folder):
            self._note(line, plain_label)
        self._plain_label = plain_label
        self._file = (folder / f"answers-{process}.jsonl").open("ab")

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def plain_tokens(self, key: Key) -> list[list[int]]:
        """Plain decoding's answer, a list of tokens a turn, once it is there."""
        _, task, temperature, question = key
        return self._plain[self._plain_label, task, temperature, question]

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Lines on disk before this returns."""
        with written("the answers", self._folder, GO_ON):
            self._file.write("".join(map(text_of, lines)).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        for line in lines:
            self._note(line, self._plain_label)

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _note(self, line: dict[str, Any], plain_label: str) -> None:
        key = key_of(line)
        self._keys.add(key)
        if line["variant"] == plain_label:
            self._plain[key] = [turn["tokens"] for turn in line["turns"]]
