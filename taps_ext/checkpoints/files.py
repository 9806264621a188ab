"""Files of drafters and targets: find or fetch them, read config and tensors, write files and directories atomically.

Nothing in a directory is ever run. Tensors are mapped from their files, so they take memory only when they are used.

safetensors 0.8 writes a header's metadata in random order (its issue 584: six equal saves with three keys gave four
different files), but a digest identifies a drafter here; and its files are readable for their owner only (mode 0600).
`_write_safetensors` repairs both.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

PathOrId = str | os.PathLike[str]

CONFIG_FILE = "config.json"
CALIBRATION_FILE = "calibration.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
# Prefixes of published names: wrappers of torch and accelerate, EAGLE's model, this library's training.
WRAPPERS = re.compile(r"^((module|model|ea_layer|_orig_mod|network)\.)+")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = "sha256"  # of model.safetensors, in config.json under `taps`
RESUME = "a training run resumes from its last checkpoint when it is started again"


@dataclass(frozen=True)
class DrafterFiles:
    """A drafter's directory: its config, and its tensors under their published names."""

    folder: Path
    config: dict[str, Any] | None  # None: there is no config.json
    tensors: dict[str, Tensor]
    is_sharded: bool = False
    is_renamed: bool = False  # the names in the files carry a wrapper's prefix

    @property
    def provenance(self) -> dict[str, Any]:
        """Return how the drafter was made, from config.json, without the digest of the weights."""
        return {key: value for key, value in self._taps.items() if key != DIGEST}

    @property
    def target(self) -> dict[str, Any]:
        """Return the name of the drafter's target and, where training wrote it, a fingerprint of the weights."""
        target = self._taps.get("target")
        return target if isinstance(target, dict) else {"name": target} if target else {}

    @property
    def digest(self) -> str | None:
        """Return the SHA-256 that model.safetensors should have, None where config.json does not say."""
        return self._taps.get(DIGEST)

    @property
    def _taps(self) -> dict[str, Any]:
        taps = (self.config or {}).get("taps")
        return taps if isinstance(taps, dict) else {}


# --- reading ---------------------------------------------------------------------------------------------------------


def read_drafter_files(path_or_id: PathOrId) -> DrafterFiles:
    """Read a drafter's directory or hub repository. Raise FileNotFoundError or ValueError in one sentence."""
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or not HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"no drafter at {name}: it is neither a directory nor a hub id such as owner/name")
    file, parts = find_weights(name, also=(CONFIG_FILE, CALIBRATION_FILE))
    folder = file.parent
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    stored = read_tensors(parts)
    names: dict[str, str] = {}  # in the files, by published name
    for given in stored:
        published = WRAPPERS.sub("", given)
        if published in names:
            raise ValueError(f"{folder} holds {published} twice, as {names[published]} and {given}; keep one")
        if not published.endswith("rotary_emb.inv_freq"):
            names[published] = given
    tensors = {published: stored[given] for published, given in names.items()}
    is_renamed = any(published != given for published, given in names.items())
    files = DrafterFiles(folder, config, tensors, file.suffix == ".json", is_renamed)
    weights = folder / SAFETENSORS_FILE
    if files.digest is not None and weights.is_file() and sha256(weights) != files.digest:
        raise ValueError(
            f"{weights} is damaged or was changed: its SHA-256 is not the one in {CONFIG_FILE}; "
            f"fetch it again, or remove taps.{DIGEST} there if the change is meant"
        )
    return files


def find_weights(
    name: str, suffix: str | tuple[str, ...] = "", also: Iterable[str] = (), revision: str | None = None
) -> tuple[Path, list[Path]]:
    """Return the file of weights in a directory or hub repository, or the index of its shards, and the files to read.

    From the hub come these files and the small files `also`, and .bin files only where there is no safetensors file.
    Shards without a tensor whose name ends in `suffix` (or in one of several) are left out. Raise FileNotFoundError if
    there are no weights.
    """
    looked_for = []
    for whole in (SAFETENSORS_FILE, BIN_FILE):
        index = f"{whole}.index.json"
        looked_for += [whole, index]
        folder = fetch(name, (*also, whole, index), revision)
        if (folder / whole).is_file():
            return folder / whole, [folder / whole]
        if (folder / index).is_file():
            shards = _shards(folder / index, suffix)
            folder = fetch(name, shards, revision)
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise FileNotFoundError(
                    f"{folder / index} names {', '.join(missing)}, which is not there; fetch it again"
                )
            return folder / index, [folder / shard for shard in shards]
    raise FileNotFoundError(f"no weights in {name}: none of {', '.join(looked_for)} is there")


def fetch(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Return a local directory as it is, or one with those files of a hub repository that match the patterns."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise FileNotFoundError(
            f"there is no directory {name}, and the hub gave no files of that name ({first_line(error)}); "
            f"give a directory"
        ) from error


def read_tensors(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Map the tensors of some files, by name. Raise ValueError in one sentence for a file that holds anything else.

    Files of torch before 1.6 are no archives and cannot be mapped; they are read into memory.
    """
    stored: dict[str, Tensor] = {}
    for path in paths:
        with path.open("rb") as file:  # a file that cannot be opened raises OSError here
            is_archive = zipfile.is_zipfile(file)
        try:
            if path.suffix == ".safetensors":
                tensors = load_file(path)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except Exception as error:  # a damaged file raises anything
            raise ValueError(
                f"{path} cannot be read as tensors and nothing else ({first_line(error)}); "
                f"fetch it again, or save the drafter's state_dict() as model.safetensors"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"{path} must hold a dict of tensors; save the drafter's state_dict() there")
        stored |= {str(name): tensor.detach() for name, tensor in tensors.items()}
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise ValueError in one sentence."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, its type where there is none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _shards(index: Path, suffix: str | tuple[str, ...]) -> list[str]:
    """Return the shards with a tensor whose name ends in `suffix`; all of them lie beside the index."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index} has no weight_map of tensor names to files; fetch it again")
    if any(Path(shard).name != shard for shard in shards.values()):
        raise ValueError(f"{index} names shards outside of its directory; it is not read")
    return sorted({shard for name, shard in shards.items() if name.endswith(suffix)})


# --- writing ---------------------------------------------------------------------------------------------------------


def write_drafter_files(
    folder: PathOrId,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    also_bin: bool = False,
) -> Path:
    """Write config.json and model.safetensors, and return the directory. Equal arguments give equal bytes.

    The metadata goes into both files, the digest of the weights into config.json. `also_bin` adds the same tensors as
    pytorch_model.bin. A drafter in that directory is replaced; a directory with anything else in it raises ValueError.
    """
    folder = Path(folder)
    check_drafter_output(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_directory(folder) as fresh:
        weights = fresh / SAFETENSORS_FILE
        _write_safetensors(weights, tensors, {"format": "pt", "taps": json.dumps(metadata)})
        config = {**config, "taps": {**metadata, DIGEST: sha256(weights)}}
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if also_bin:
            torch.save({name: tensor.clone() for name, tensor in tensors.items()}, fresh / BIN_FILE)
    return folder


def check_drafter_output(folder: Path) -> None:
    """Raise ValueError unless a drafter may be written there: nothing, an empty directory, or a drafter to replace."""
    check_output(folder, {CONFIG_FILE, SAFETENSORS_FILE, BIN_FILE, CALIBRATION_FILE})


def check_output(folder: Path, names: set[str]) -> None:
    """Raise ValueError unless `folder` is free, or a directory in which there are only files of these names."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new directory")
    held = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    if others := sorted(held - names):
        raise ValueError(f"{folder} holds other files ({', '.join(others)}); give a new directory")


def check_writable(folder: Path) -> None:
    """Raise OSError in one sentence unless a directory can be written to, or be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a directory, as {existing} is a file; give another one")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written to, as {existing} does not allow it ({error.strerror})"
        raise PermissionError(f"{reason}; give another one") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a new file or directory, which takes the place of `path` when the block ends.

    A reader, and a machine that lost power, sees the old one, if any, or the new one, whole. If the block raises, the
    old one stays and nothing else is left.
    """
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield fresh
        for part in (*fresh.rglob("*"), fresh):
            sync(part)
        if not path.is_dir():
            fresh.replace(path)
        elif not _exchange(fresh, path):  # for an instant there is no directory of this name
            aside = path.with_name(f".{path.name}.old")
            _remove(aside)
            path.rename(aside)
            fresh.rename(path)
            _remove(aside)
        sync(path.parent)
    finally:
        _remove(fresh)


@contextmanager
def replacing_directory(folder: Path) -> Iterator[Path]:
    """Yield a new directory that takes the place of `folder` when the block ends; see `replacing`.

    What a killed process left beside it is removed. Raise OSError if it cannot be written.
    """
    place = folder.resolve()
    check_writable(place.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.{'[0-9a-f]' * 8}.tmp"):
        _remove(leftover)
    with replacing(place) as fresh:
        fresh.mkdir()
        yield fresh


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all; see `replacing`. Raise OSError for a directory, which would be replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file")
    with replacing(path) as fresh, fresh.open("xb") as file:
        file.writelines(parts)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, [text.encode()])


def json_text(value: Any) -> str:
    """Return strict JSON, indented by two; NaN and infinity (an empty mean) become null."""
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(strict, indent=2, ensure_ascii=False)


@contextmanager
def written(what: str, folder: Path, way_out: str = RESUME) -> Iterator[None]:
    """Turn a failure of Python, torch or safetensors to write `what` into an OSError of one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        if "inline_container" in reason:  # torch.save names a line of its own code
            reason = "the disk took a part of a file"
        free = shutil.disk_usage(folder).free / 2**30
        raise OSError(
            f"{what} could not be written to {folder} ({reason}; {free:.1f} GiB are free there); {way_out}"
        ) from error


def sync(path: Path) -> None:
    """Wait until the content of a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = {**json.loads(file.read(length)), "__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        assert len(text) == length, "the same entries take the same space"
        file.seek(8)
        file.write(text)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two directories in one step; return False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux has it, Python has no name for it
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
