"""Drafter checkpoints: the published EAGLE-2 and HASS formats as they are found, loaded against a target, and saved.

How a folder is read and written is in `checkpoint_files.py`, what it means in `published_format.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..drafters.eagle import EagleDrafter, compute_dtype_and_device
from ..drafters.network import EagleConfig, EagleNetwork
from .calibration import read_calibration
from .files import DrafterFiles, read_folder, write_folder
from .formats import EMBEDDING, LM_HEADS, check_fits, check_tensors, network_config, published_config
from .tensor_files import StoredTensor

PathOrId = str | os.PathLike[str]

COMPARED_ROWS = 8192  # of two embeddings at a time, to bound the memory


@dataclass(frozen=True)
class _Target:
    """What a drafter needs of a target."""

    embedding: nn.Module
    lm_head: nn.Module
    config: Any


def load_drafters(paths: Mapping[str, PathOrId], target: Any) -> dict[str, EagleDrafter]:
    """A drafter for each name, in the order given (which breaks ties between drafters); see `load_drafter`."""
    return {name: load_drafter(path, target, name) for name, path in paths.items()}


def load_drafter(path_or_id: PathOrId, target: Any, name: str | None = None) -> EagleDrafter:
    """The drafter in a folder or hub repository with its calibration, sharing the target's embedding and lm_head.

    Args:
        path_or_id: a folder with config.json and model.safetensors or pytorch_model.bin (also sharded, also the state
            folder of accelerate), or a hub id. Code in it is never run.
        target: a transformers model with an lm_head, or a `TargetModel`.
        name: how stats and compositions call it; by default the last part of `path_or_id`.

    Raises ValueError or FileNotFoundError, in one sentence, when the checkpoint does not fit the target.
    """
    part = _target_part(target)
    files = read_folder(path_or_id)
    network = network_of(files, part.config)
    calibration = read_calibration(files.folder, files.digest)
    _warn_of_foreign(files, EMBEDDING, "embedding", part.embedding)
    for key in LM_HEADS:
        _warn_of_foreign(files, key, "lm_head", part.lm_head)
    dtype, device = compute_dtype_and_device(part.lm_head, part.embedding)
    network = network.to(device, dtype).eval().requires_grad_(False)
    return EagleDrafter(network, part.embedding, part.lm_head, name or Path(path_or_id).resolve().name, calibration)


def load_network(path_or_id: PathOrId) -> EagleNetwork:
    """The trainable network of a checkpoint, in the dtype of its file and without a target: to go on training it."""
    return network_of(read_folder(path_or_id))


def save_drafter(
    network: EagleNetwork,
    folder: PathOrId,
    *,
    embedding: nn.Module | Tensor,
    target_config: Any,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """The folder written: exactly the published keys, the embedding included, in the network's dtype.

    Args:
        embedding: the target's, a module or its weight [V, H].
        target_config: of the target; it gives special tokens and the context length.
        metadata: provenance, JSON values (algorithm, target, domain, trained length, ...); kept in config.json under
            `taps` and in the header of model.safetensors.
    """
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    assert isinstance(weight, Tensor)
    config = network.config
    if weight.shape != (config.vocab_size, config.hidden_size):
        raise ValueError(
            f"the embedding must be {[config.vocab_size, config.hidden_size]}, got {list(weight.shape)}; "
            f"save a drafter with the embedding of its own target"
        )
    dtype = network.fc.weight.dtype
    tensors = {EMBEDDING: weight.detach().to(dtype), **network.state_dict()}
    stored = {name: StoredTensor.of(tensor) for name, tensor in tensors.items()}
    return write_folder(folder, published_config(config, dtype, target_config), stored, dict(metadata or {}))


def network_of(files: DrafterFiles, target_config: Any | None = None) -> EagleNetwork:
    """The network of the files, checked against its own shapes and, when there is one, against the target."""
    config = network_config(files, target_config)
    if target_config is not None:
        check_fits(files, config, target_config)
    check_tensors(files, config)
    return build_network(files, config)


def build_network(files: DrafterFiles, config: EagleConfig) -> EagleNetwork:
    """The network of files that were checked."""
    with torch.device("meta"):
        network = EagleNetwork(config)
    network.load_state_dict({name: files.tensors[name].read() for name in network.state_dict()}, assign=True)
    return network


def same_up_to_rounding(held: Tensor, own: Tensor) -> bool:
    """Whether two matrices are the same, one of them perhaps rounded to float16 or bfloat16."""
    return held.shape == own.shape and all(
        torch.allclose(a.to(own.device, own.dtype), b, rtol=1e-2, atol=1e-4)
        for a, b in zip(torch.split(held, COMPARED_ROWS), torch.split(own, COMPARED_ROWS), strict=True)
    )


def _target_part(target: Any) -> _Target:
    model: Any = target if hasattr(target, "get_output_embeddings") else getattr(target, "model", None)
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"the target must be a transformers model or a TargetModel, got {type(target).__name__}")
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or lm_head is None:
        raise ValueError(f"the target {type(model).__name__} has no lm_head; load it with AutoModelForCausalLM")
    config = model.config
    return _Target(embedding, lm_head, config.get_text_config() if hasattr(config, "get_text_config") else config)


def _warn_of_foreign(files: DrafterFiles, key: str, what: str, module: nn.Module) -> None:
    """Warn when the checkpoint carries another embedding or lm_head than the target's, which is the one used."""
    held, own = files.tensors.get(key), getattr(module, "weight", None)
    if held is None or own is None or own.device.type == "meta" or not own.is_floating_point():
        return  # nothing to compare: quantised or offloaded weights
    if not same_up_to_rounding(held.read(), own.detach()):
        warnings.warn(
            f"the {what} in {files.folder} differs from the target's, which is used instead; "
            f"the drafter may have been trained for another target",
            stacklevel=3,
        )
