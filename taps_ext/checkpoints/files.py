"""A drafter's folder on disk: found or fetched, read without running anything in it, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .calibration import CALIBRATION_FILE
from .disk import check_writable, sync
from .tensor_files import StoredTensor, read_json, read_tensors, sha256, shard_map, write_safetensors

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
BIN_FILE = "pytorch_model.bin"
WEIGHT_FILES = (SAFETENSORS_FILE, SAFETENSORS_FILE + ".index.json", BIN_FILE, BIN_FILE + ".index.json")
# What `accelerate.save_state` of the HASS trainer writes beside the drafter: the frozen lm_head.
ACCELERATE_HEADS = ("pytorch_model_1.bin", "model_1.safetensors")
# What stands before the published names: torch's and accelerate's wrappers, EAGLE's model, this library's training.
WRAPPERS = ("module.", "model.", "ea_layer.", "_orig_mod.", "network.")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = "sha256"  # of model.safetensors, in config.json under `taps`


@dataclass(frozen=True)
class DrafterFiles:
    """What a folder holds, the tensors under their published names; each is read when it is asked for."""

    folder: Path
    config: dict[str, Any] | None  # None: there is no config.json
    tensors: dict[str, StoredTensor]

    @property
    def provenance(self) -> dict[str, Any]:
        """How the drafter was made, as far as it says; without the digest of the file."""
        taps = (self.config or {}).get("taps")
        return {key: value for key, value in taps.items() if key != DIGEST} if isinstance(taps, dict) else {}

    @property
    def target(self) -> dict[str, Any]:
        """What it says of its target: the name, and a fingerprint of the weights where training wrote one."""
        target = self.provenance.get("target")
        return target if isinstance(target, dict) else {"name": target} if target else {}

    @property
    def digest(self) -> str | None:
        """The SHA-256 that the weights should have, where config.json says it."""
        taps = (self.config or {}).get("taps")
        return taps.get(DIGEST) if isinstance(taps, dict) else None


def read_folder(path_or_id: str | os.PathLike[str]) -> DrafterFiles:
    """The config and tensors of a local folder or hub id. Raises FileNotFoundError or ValueError, in a sentence."""
    folder = _locate(path_or_id)
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in _read_weights(folder).items():
        plain = _plain_name(name)
        if plain in tensors:
            raise ValueError(f"{folder} holds {plain} twice, as {tensors[plain].name} and {name}; keep one")
        if not plain.endswith("rotary_emb.inv_freq"):
            tensors[plain] = tensor
    files = DrafterFiles(folder, config, tensors)
    _check_digest(files)
    return files


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, Any],
    also_bin: bool = False,
) -> Path:
    """The folder written: config.json and one model.safetensors, complete on disk before it gets its name.

    The metadata goes into both files, with the digest of the weights into config.json. `also_bin` adds the same
    tensors as pytorch_model.bin. One tensor is in memory at a time. A drafter that stood there is replaced; a folder
    that holds anything else raises ValueError.
    """
    folder = Path(folder)
    check_output(folder)
    place = folder.resolve()
    check_writable(place.parent)
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.parent / f".{place.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)  # what a killed process left
    fresh.mkdir()
    try:
        header = {"format": "pt", "taps": json.dumps(metadata)}
        digest = write_safetensors(fresh / SAFETENSORS_FILE, tensors, header)
        config = {**config, "taps": {**metadata, DIGEST: digest}}
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if also_bin:
            torch.save({name: tensor.read() for name, tensor in tensors.items()}, fresh / BIN_FILE)
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        _replace(place, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def check_output(folder: Path) -> None:
    """Raises ValueError unless a drafter may be written there: nothing, an empty folder, or a drafter to replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    found = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    if strangers := sorted(found - {CONFIG_FILE, SAFETENSORS_FILE, BIN_FILE, CALIBRATION_FILE}):
        raise ValueError(f"{folder} holds other files ({', '.join(strangers)}); give a new folder")


def _locate(path_or_id: str | os.PathLike[str]) -> Path:
    """The local folder, fetched from the hub when the name is a hub id and no folder."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_id)
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no drafter at {name}: it is neither a folder nor a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    small = (CONFIG_FILE, CALIBRATION_FILE)
    patterns = ((SAFETENSORS_FILE, "model-*.safetensors"), (BIN_FILE, "pytorch_model-*.bin"))
    for weights in patterns:  # the second kind is fetched only where the first is missing
        try:
            folder = Path(snapshot_download(name, allow_patterns=[*small, *weights, f"{weights[0]}.index.json"]))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FileNotFoundError(
                f"no folder {name} here, and the hub gave no drafter of that name ({reason}); give a folder"
            ) from error
        if any((folder / file).is_file() for file in WEIGHT_FILES):
            break
    return folder


def _read_weights(folder: Path) -> dict[str, StoredTensor]:
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no weights in {folder}: none of {', '.join(WEIGHT_FILES)} is there")
    for head in ACCELERATE_HEADS:
        if (folder / head).is_file():
            logger.info("%s is the lm_head of a training state and is not read; the target's is used", folder / head)
    if not file.name.endswith(".index.json"):
        return read_tensors(file)
    shards = sorted(set(shard_map(file).values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(f"{file} names {', '.join(missing)}, which is not there; fetch it again")
    return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}


def _check_digest(files: DrafterFiles) -> None:
    """The weights are the ones that were written with their config; a file from elsewhere has no digest to compare."""
    path = files.folder / SAFETENSORS_FILE
    if files.digest is not None and path.is_file() and sha256(path) != files.digest:
        raise ValueError(
            f"{path} is damaged or was changed: its SHA-256 is not the one in {CONFIG_FILE}; "
            f"fetch it again, or remove taps.{DIGEST} there if the change is meant"
        )


def _plain_name(name: str) -> str:
    """The published name of a tensor, without the wrappers that trainers leave in front of it."""
    while (wrapper := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name[len(wrapper) :]
    return name


def _replace(folder: Path, fresh: Path) -> None:
    """Give `fresh` the name `folder`, and a drafter that stood there the name `fresh`, in one step where it can be."""
    if not folder.exists():
        fresh.rename(folder)
    elif not _exchange(folder, fresh):
        aside = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        fresh.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
    sync(folder.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders, so that there is one at either name at any time; False where the system cannot."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # of Linux; Python has no name for it
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0
