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
import logging
import math
import os
import re
import shutil
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

logger = logging.getLogger(__name__)

PathOrId = str | os.PathLike[str]

CONFIG_FILE = "config.json"
CALIBRATION_FILE = "calibration.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
SHARDS = {SAFETENSORS_FILE: "model-*.safetensors", BIN_FILE: "pytorch_model-*.bin"}
WEIGHT_FILES = tuple(file for whole in SHARDS for file in (whole, f"{whole}.index.json"))
# `accelerate.save_state` in the HASS trainer writes the frozen lm_head beside the drafter.
ACCELERATE_HEADS = ("pytorch_model_1.bin", "model_1.safetensors")
# Prefixes of published names: wrappers of torch and accelerate, EAGLE's model, this library's training.
WRAPPERS = ("module.", "model.", "ea_layer.", "_orig_mod.", "network.")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = "sha256"  # of model.safetensors, in config.json under `taps`
HASHED_BYTES = 1 << 22  # of a file at a time
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
        """Return what config.json says of the drafter's making, without the digest of the weights."""
        return {key: value for key, value in self._taps.items() if key != DIGEST}

    @property
    def target(self) -> dict[str, Any]:
        """Return the name of the drafter's target and, where training wrote it, a fingerprint of the weights."""
        target = self.provenance.get("target")
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
    file = find_weights(name, also=(CONFIG_FILE, CALIBRATION_FILE))
    config_file = file.with_name(CONFIG_FILE)
    config = read_json(config_file) if config_file.is_file() else None
    tensors, is_renamed = _read_published(file)
    files = DrafterFiles(file.parent, config, tensors, file.suffix == ".json", is_renamed)
    _check_digest(files)
    return files


def find_weights(name: str, also: Iterable[str] = (), revision: str | None = None, shards: bool = True) -> Path:
    """Return the first of WEIGHT_FILES in a directory or hub repository. Raise FileNotFoundError if there is none.

    From the hub come the file, the small files `also` and the shards (unless `shards` is False); .bin files are fetched
    only where there is no safetensors file.
    """
    for whole, pattern in SHARDS.items():
        files = (whole, f"{whole}.index.json")
        folder = fetch(name, (*also, *files, *((pattern,) if shards else ())), revision)
        if file := next((folder / file for file in files if (folder / file).is_file()), None):
            return file
    raise FileNotFoundError(f"no weights in {name}: none of {', '.join(WEIGHT_FILES)} is there")


def fetch(name: str, patterns: Iterable[str], revision: str | None = None) -> Path:
    """Return a local directory as it is, or one with those files of a hub repository that match the patterns."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"there is no directory {name}, and the hub gave no files of that name ({reason}); give a directory"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of one file, by name. Raise ValueError in one sentence for a file that holds anything else.

    Files of torch before 1.6 are no archives and cannot be mapped; they are read into memory.
    """
    with path.open("rb") as file:  # a file that cannot be opened raises OSError here
        is_archive = zipfile.is_zipfile(file)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # a damaged file raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} cannot be read as tensors and nothing else ({reason}); "
            f"fetch it again, or save the drafter's state_dict() as model.safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors; save the drafter's state_dict() there")
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise ValueError in one sentence."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_weight_map(index_file: Path) -> dict[str, str]:
    """Return the file name of each tensor from an index of shards; all of them lie beside the index."""
    shards = read_json(index_file).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise ValueError(f"{index_file} has no weight_map of tensor names to files; fetch it again")
    if any(Path(shard).name != shard for shard in shards.values()):
        raise ValueError(f"{index_file} names shards outside of its directory; it is not read")
    return shards


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _shards(file: Path) -> list[Path]:
    """Return the files that hold the tensors: `file` itself, or the shards that it names."""
    if file.suffix != ".json":
        return [file]
    shards = sorted(set(read_weight_map(file).values()))
    if missing := [shard for shard in shards if not (file.parent / shard).is_file()]:
        raise FileNotFoundError(f"{file} names {', '.join(missing)}, which is not there; fetch it again")
    return [file.parent / shard for shard in shards]


def _read_published(file: Path) -> tuple[dict[str, Tensor], bool]:
    """Return a drafter's tensors under their published names, and whether any had another name in its file."""
    for head in ACCELERATE_HEADS:
        if (path := file.with_name(head)).is_file():
            logger.info("%s is the lm_head of a training state and is not read; the target's is used", path)
    stored = {name: tensor for shard in _shards(file) for name, tensor in read_tensors(shard).items()}
    names: dict[str, str] = {}
    for name in stored:
        plain = _without_wrappers(name)
        if plain in names:
            raise ValueError(f"{file.parent} holds {plain} twice, as {names[plain]} and {name}; keep one")
        if not plain.endswith("rotary_emb.inv_freq"):
            names[plain] = name
    return {plain: stored[name] for plain, name in names.items()}, any(p != name for p, name in names.items())


def _without_wrappers(name: str) -> str:
    while (wrapper := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name[len(wrapper) :]
    return name


def _check_digest(files: DrafterFiles) -> None:
    path = files.folder / SAFETENSORS_FILE
    if files.digest is not None and path.is_file() and sha256(path) != files.digest:
        raise ValueError(
            f"{path} is damaged or was changed: its SHA-256 is not the one in {CONFIG_FILE}; "
            f"fetch it again, or remove taps.{DIGEST} there if the change is meant"
        )


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
    place = folder.resolve()
    check_writable(place.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(f".{glob.escape(place.name)}.{'[0-9a-f]' * 8}.tmp"):  # of a killed process
        _remove(leftover)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(place) as fresh:
        fresh.mkdir()
        weights = fresh / SAFETENSORS_FILE
        _write_safetensors(weights, tensors, {"format": "pt", "taps": json.dumps(metadata)})
        config = {**config, "taps": {**metadata, DIGEST: sha256(weights)}}
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if also_bin:
            torch.save({name: tensor.clone() for name, tensor in tensors.items()}, fresh / BIN_FILE)
    return folder


def check_drafter_output(folder: Path) -> None:
    """Raise ValueError unless a drafter may be written there: nothing, an empty directory, or a drafter to replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new directory")
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    if others := sorted(names - {CONFIG_FILE, SAFETENSORS_FILE, BIN_FILE, CALIBRATION_FILE}):
        raise ValueError(f"{folder} holds other files ({', '.join(others)}); give a new directory")


def check_writable(folder: Path) -> None:
    """Raise OSError in one sentence unless a directory can be written to, or be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder} cannot be a directory, as {existing} is a file; give another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to, as {existing} does not allow it; give another one")


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


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(path) as fresh, fresh.open("xb") as file:
        file.writelines(parts)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, [text.encode()])


def json_text(value: Any) -> str:
    """Return strict JSON, indented by two; NaN and infinity (an empty mean) become null."""
    return json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)


@contextmanager
def written(what: str, folder: Path, way_out: str = RESUME) -> Iterator[None]:
    """Turn a failure of Python, torch or safetensors to write `what` into an OSError of one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(folder).free / 2**30
        raise OSError(
            f"{what} could not be written to {folder} ({_reason(error)}; {free:.1f} GiB are free there); {way_out}"
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
