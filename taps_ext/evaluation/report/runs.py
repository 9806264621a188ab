"""Runs: results folders, and what must be the same of those that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cells import Cell

PARTS = ("label", "target", "drafters", "variants", "tasks", "temperatures", "settings")  # of a configuration


@dataclass(frozen=True, order=True)
class Key:
    """Which cell it is, within a run."""

    variant: str
    task: str
    temperature: float


@dataclass(frozen=True, eq=False)
class Run:
    """A results folder: what it was asked, where it ran, and its cells."""

    configuration: Mapping[str, Any]  # run.json but its provenance
    provenance: Mapping[str, Any]
    cells: Mapping[Key, Cell]

    @property
    def label(self) -> str:
        """The name of what is compared, such as EAGLE-2; runs of a label with other drafters are its replicates."""
        return str(self.configuration["label"])

    @property
    def drafters(self) -> frozenset[str]:
        """Checksums of the drafters: the replicate that the run belongs to."""
        return frozenset(str(facts["sha256"]) for facts in self.configuration["drafters"].values())


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
            if run.configuration["variants"][key.variant]["composition"] == "plain":
                continue  # which every run brings
            ids = seen.setdefault((run.label, run.drafters, key), set())
            if again := ids.intersection(cell.ids):
                raise ValueError(
                    f"two results of the same drafters answer question {min(again)!r} of {key.task} with {key.variant} "
                    f"at temperature {key.temperature:g}; give only one of them"
                )
            ids.update(cell.ids)


def _differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for part in ("target", "settings"):
        for name in {**here[part], **there[part]}:
            if name != "batch_size" and here[part].get(name) != there[part].get(name):
                yield f"{part}.{name}", here[part].get(name), there[part].get(name)
    for name in _common(here["variants"], there["variants"]):
        if here["variants"][name] != there["variants"][name]:
            yield f"variant {name}", here["variants"][name], there["variants"][name]
    for name in _common(here["tasks"], there["tasks"]):
        facts, others = here["tasks"][name], there["tasks"][name]
        if facts["num_questions"] == others["num_questions"] and facts["sha256"] != others["sha256"]:
            yield f"the questions of {name}", facts["sha256"][:12], others["sha256"][:12]


def _common(here: Iterable[str], there: Iterable[str]) -> list[str]:
    return [name for name in here if name in set(there)]
