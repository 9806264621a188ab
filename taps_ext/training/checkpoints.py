"""Checkpoints of a run: folders that get their name when they are whole and on disk, and the newest whole one again.

A folder holds what `Accelerator.save_state` writes, and `state.json` with the size and CRC-32 of each of its files.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.files import sync, write_text, written
from .progress import ValidationRecord

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT = 1
STATE_FILE = "state.json"
NAME = re.compile(r"step-\d{8,}")
READ_BYTES = 1 << 20  # of a file at a time


class DamagedCheckpointError(ValueError):
    """A folder that was a checkpoint once: the sentence says what is wrong with it."""


@dataclass(frozen=True)
class RunState:
    """All that a run resumes from besides weights and optimizer: data and learning rate are functions of the step."""

    step: int  # updates that are done
    identity: Mapping[str, Any]  # what must be the same when the run goes on
    layout: str  # how processes held the weights: "replicated" or "sharded"
    best: ValidationRecord | None
    last: ValidationRecord | None


class Checkpoints:
    """The folder `checkpoints` of a run. The methods are for the main process, but for `save` and `load`."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def newest(self) -> tuple[Path | None, RunState | None, list[str]]:
        """The newest whole checkpoint, what is in it, and a sentence for each damaged one that is newer."""
        complaints: list[str] = []
        for folder in reversed(self._folders()):
            try:
                return folder, _read(folder), complaints
            except DamagedCheckpointError as error:
                complaints.append(f"checkpoint {folder.name} is damaged and left out: {error}")
        return None, None, complaints

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing or removing."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)

    def save(self, accelerator: Accelerator, state: RunState) -> Path:
        """The folder of a new checkpoint; called by every process. OSError, in a sentence, leaves the others alone."""
        folder = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{folder.name}"
        try:
            with written(f"checkpoint {folder.name}", self.folder, self._way_out()):
                if accelerator.is_main_process:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                accelerator.wait_for_everyone()
                accelerator.save_state(str(partial))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    _write_state(partial, state)
                    self._publish(partial, folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        accelerator.wait_for_everyone()
        return folder

    def load(self, accelerator: Accelerator, folder: Path, state: RunState) -> None:
        """Put a checkpoint's weights and optimizer into what the accelerator has prepared; called by every process."""
        if state.layout != layout(accelerator):
            raise ValueError(
                f"checkpoint {folder.name} holds {state.layout} weights, and this launch wants {layout(accelerator)} "
                f"ones; resume it as it was started, with FSDP or without"
            )
        accelerator.load_state(str(folder))

    def _publish(self, partial: Path, folder: Path) -> None:
        _remove(folder)  # one that is damaged, or there would be nothing to write
        partial.rename(folder)
        sync(self.folder)
        folders = self._folders()
        current = folders.index(folder)
        for old in (*folders[: max(0, current + 1 - self.keep)], *folders[current + 1 :]):
            _remove(old)  # those of later steps are damaged: the run would have gone on from them

    def _way_out(self) -> str:
        names = [path.name for path in self._folders()]
        return f"{names[-1]} is whole, and the run goes on from there" if names else "there is none before it"

    def _folders(self) -> list[Path]:
        """By step."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def layout(accelerator: Accelerator) -> str:
    """How the processes hold the weights."""
    return "sharded" if accelerator.distributed_type.value == "FSDP" else "replicated"


def _write_state(folder: Path, state: RunState) -> None:
    """state.json, after everything else is on disk."""
    files: dict[str, dict[str, int]] = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    content = {"format": FORMAT, **asdict(state), "files": files}
    write_text(folder / STATE_FILE, json.dumps({**content, "crc32": _content_crc32(content)}, indent=1) + "\n")


def _read(folder: Path) -> RunState:
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if content.pop("crc32") != _content_crc32(content):
            raise DamagedCheckpointError(f"{STATE_FILE} is not what was written")
        if content["format"] != FORMAT:
            raise ValueError(f"{folder} has format {content['format']}, this version reads {FORMAT}")
        files: dict[str, dict[str, int]] = content.pop("files")
        records = {name: content[name] and ValidationRecord(**_tuples(content[name])) for name in ("best", "last")}
        state = RunState(content["step"], content["identity"], content["layout"], **records)
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{STATE_FILE} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{STATE_FILE} cannot be read") from error
    for name, expected in files.items():
        _check_file(folder / name, name, expected)
    return state


def _check_file(path: Path, name: str, expected: Mapping[str, int]) -> None:
    if not path.is_file():
        raise DamagedCheckpointError(f"{name} is missing")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise DamagedCheckpointError(f"{name} has {size} bytes instead of {expected['bytes']}")
    if _crc32(path) != expected["crc32"]:
        raise DamagedCheckpointError(f"{name} is not what was written")


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that records hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _content_crc32(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill on the way leaves no half of it under its name."""
    if folder.exists():
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)
