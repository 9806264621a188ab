"""What `taps-ext train` prints at its end, for people and programs: where a run stands, or what a dry run found."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..training.picture import read_log
from ..training.progress import duration, percents

if TYPE_CHECKING:
    from ..training.dry_run import DryRun
    from ..training.trainer import TrainingResult

PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}


@dataclass(frozen=True)
class Outcome:
    """Where a run stands. The records are those of log.jsonl; None: nothing was held out, or not yet validated."""

    result: TrainingResult
    seconds: float  # of this command
    best: Mapping[str, Any] | None
    latest: Mapping[str, Any] | None
    log: Path
    picture: Path | None

    @classmethod
    def read(cls, result: TrainingResult, seconds: float, log: Path, picture: Path | None) -> Outcome:
        """The outcome of a run with this log."""
        records = read_log(log, "validation")
        best = max(records, key=lambda record: float(record["acceptance_length"]), default=None)
        return cls(result, seconds, best, records[-1] if records else None, log, picture)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "finished": self.result.is_finished,
            "step": self.result.step,
            "num_steps": self.result.num_steps,
            "seconds": self.seconds,
            "best": _figures(self.result.best, self.best),
            "final": _figures(self.result.final, self.latest),
            "log": str(self.log),
            "picture": self.picture and str(self.picture),
        }

    def report(self, target: str) -> Group:
        """A row each of the best and the final drafter, where things are, and what to do next."""
        result, parts = self.result, list[RenderableType]()
        if self.best and self.latest:
            table = Table(
                "", "step", "loss", "estimated\nacceptance length", "accuracy by depth", box=None, padding=(0, 2, 0, 0)
            )
            table.add_row("best", *_cells(self.best))
            table.add_row("final" if result.is_finished else "latest", *_cells(self.latest))
            parts += [table, Text()]
        folders = [f"{name} drafter: {path}" for name, path in (("best", result.best), ("final", result.final)) if path]
        files = [f"{name}: {path}" for name, path in (("log", self.log), ("picture", self.picture)) if path]
        state = f"{result.step:,} of {result.num_steps:,} steps, {duration(self.seconds)} in this command"
        parts += map(Text, [*folders, *files, state, *_next_steps(result, target)])
        return Group(*parts)


def _figures(folder: Path | None, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if folder is None:
        return None
    names = ("step", "loss", "accuracy", "acceptance_length")
    return {"folder": str(folder), **{name: record and record[name] for name in names}}


def _cells(record: Mapping[str, Any]) -> list[str]:
    length = f"{record['acceptance_length']:.2f}"
    return [f"{record['step']:,}", f"{record['loss']:.4f}", length, percents(record["accuracy"])]


def _next_steps(result: TrainingResult, target: str) -> Sequence[str]:
    drafter = result.best or result.final
    if drafter is None or not result.is_finished:
        return ()
    folder, name = shlex.quote(str(drafter)), shlex.quote(target)
    return (
        "",
        "next:",
        f"  taps-ext validate {folder} --target {name}",
        f'  taps-ext generate --target {name} --drafter {folder} --prompt "..."',
    )


def dry_run_report(facts: DryRun) -> Table:
    """What a run will take."""
    table = Table(show_header=False, **PLAIN)
    table.add_row("parameters", f"{facts.num_parameters:,}")
    table.add_row("training data", f"{facts.num_sequences:,} conversations, {facts.num_tokens:,} tokens")
    table.add_row("steps", f"{facts.num_steps:,} of {facts.seconds_per_step:.3g} s")
    table.add_row("time", f"{duration(3600 * facts.hours)}, without validations")
    table.add_row("memory", f"{_size(facts.peak_memory_bytes)} at its peak, in this process or on its GPU")
    table.add_row("a checkpoint", _size(facts.checkpoint_bytes))
    table.add_row("stored features", "none" if facts.feature_bytes is None else _size(facts.feature_bytes))
    return table


def dry_run_dict(facts: DryRun) -> dict[str, Any]:
    """For --json."""
    return asdict(facts)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:,.1f} MiB"
