"""Files that are on disk whole or not at all, and what it looks like when the disk takes no more."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GO_ON = "a training run goes on from its last checkpoint when it is started again"


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """OSError, in a sentence, unless a folder can be written to, or be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a folder, as {existing} is a file; give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to, as {existing} does not allow it; give another one")


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file so that a reader, or a machine that lost power, sees the old one, if any, or the new one."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with fresh.open("xb") as file:
            for part in parts:
                file.write(part)
        sync(fresh)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text."""
    write_whole(path, [text.encode()])


def json_text(value: Any) -> str:
    """Strict JSON, indented by two: what is not a number (an empty mean) becomes null."""
    return json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)


@contextmanager
def written(what: str, folder: Path, way_out: str = GO_ON) -> Iterator[None]:
    """Says what could not be written, as an OSError in one sentence, whether Python, torch or safetensors failed."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 2**30
        raise OSError(
            f"{what} could not be written to {folder} ({_reason(error)}; {free:.1f} GiB are free there); {way_out}"
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "inline_container" in str(error):  # torch.save names a line of its own code
        return "the disk took a part of a file"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return value
