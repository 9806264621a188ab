"""A drafter's folder on disk: found or fetched, read without running anything in it, written whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
WEIGHT_FILES = (SAFETENSORS_FILE, SAFETENSORS_FILE + ".index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What `accelerate.save_state` of the HASS trainer writes beside the drafter: the frozen lm_head.
ACCELERATE_HEADS = ("pytorch_model_1.bin", "model_1.safetensors")
WRAPPERS = ("module.", "model.", "ea_layer.", "_orig_mod.")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class DrafterFiles:
    """What a folder holds, the tensors under their published names, on the CPU."""

    folder: Path
    config: dict[str, Any] | None  # None: there is no config.json
    tensors: dict[str, Tensor]


def read_folder(path_or_id: str | os.PathLike[str]) -> DrafterFiles:
    """The config and tensors of a local folder or hub id. Raises FileNotFoundError or ValueError, in a sentence."""
    folder = _locate(path_or_id)
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read_weights(folder).items():
        plain = _plain_name(name)
        if not plain.endswith("rotary_emb.inv_freq"):
            tensors[plain] = tensor
    return DrafterFiles(folder, config, tensors)


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> Path:
    """The folder written: config.json and one model.safetensors, complete on disk before it gets its name.

    A drafter that stood there is replaced; a folder that holds anything else raises ValueError.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    strangers = {path.name for path in folder.iterdir()} - {CONFIG_FILE, SAFETENSORS_FILE} if folder.exists() else set()
    if strangers:
        raise ValueError(f"{folder} holds other files ({', '.join(sorted(strangers))}); give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        (fresh / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, fresh / SAFETENSORS_FILE, metadata={"format": "pt", "taps": json.dumps(metadata)})
        for path in (fresh / CONFIG_FILE, fresh / SAFETENSORS_FILE, fresh):
            _sync(path)
        _replace(folder, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _locate(path_or_id: str | os.PathLike[str]) -> Path:
    """The local folder, fetched from the hub when the name is a hub id and no folder."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_id)
    if folder.exists() or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"no drafter at {name}: it is neither a folder nor a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    patterns = ((SAFETENSORS_FILE, "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))
    for weights in patterns:  # the second kind is fetched only where the first is missing
        try:
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, *weights, f"{weights[0]}.index.json"]))
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise FileNotFoundError(
                f"no folder {name} here, and the hub gave no drafter of that name ({reason}); give a folder"
            ) from error
        if any((folder / file).is_file() for file in WEIGHT_FILES):
            break
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no weights in {folder}: none of {', '.join(WEIGHT_FILES)} is there")
    for head in ACCELERATE_HEADS:
        if (folder / head).is_file():
            logger.info("%s is the lm_head of a training state and is not read; the target's is used", folder / head)
    if not file.name.endswith(".index.json"):
        return _read_file(file)
    shards = set(_read_json(file).get("weight_map", {}).values())
    if any(Path(shard).name != shard for shard in shards):
        raise ValueError(f"{file} names shards outside of its folder; it is not read")
    return {name: tensor for shard in sorted(shards) for name, tensor in _read_file(folder / shard).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; a .bin file is read as tensors only, so nothing in it is run."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors and nothing else ({reason}); "
            f"fetch it again, or save the drafter's state_dict() as {SAFETENSORS_FILE}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} must hold a dict of tensors; save the drafter's state_dict() there")
    return tensors


def _plain_name(name: str) -> str:
    """The published name of a tensor, without the wrappers that trainers leave in front of it."""
    while (wrapper := next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)) is not None:
        name = name[len(wrapper) :]
    return name


def _replace(folder: Path, fresh: Path) -> None:
    """Give `fresh` the name `folder`; a folder cannot be renamed onto a full one, so the old one steps aside first."""
    aside = fresh.with_name(fresh.name + ".old")
    if folder.exists():
        folder.rename(aside)
    fresh.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until the file's (or folder's) content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
