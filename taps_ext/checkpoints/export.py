"""Drafters for other programs: EAGLE, HASS, vLLM and SGLang. What each variant changes is in docs/checkpoints.md.

Any folder that can be read can be exported, training states included; what they lack is taken from the target.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..drafters.network import EagleConfig
from .files import DrafterFiles, check_output, read_folder, write_folder
from .formats import (
    EMBEDDING,
    FC_BIAS,
    LM_HEADS,
    check_finite,
    check_fits,
    check_tensors,
    network_config,
    published_config,
)
from .load import same_up_to_rounding
from .loaders import LOADERS, SGLANG_ARCHITECTURE, problems
from .target_files import TargetFiles, open_target
from .tensor_files import StoredTensor

PathOrId = str | os.PathLike[str]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_drafter(
    drafter: PathOrId,
    to: str,
    output: PathOrId,
    *,
    target: PathOrId | None = None,
    dtype: str | None = None,
    also_bin: bool = False,
) -> Path:
    """The folder written, in the form that a loader reads; ValueError with the reasons where it could not.

    Args:
        drafter: folder or hub id, in any form that `load_drafter` reads, or a training state.
        to: eagle, hass, vllm (these read the canonical folder) or sglang.
        target: folder or hub id; of it come the config and embedding that the drafter lacks, and the context length.
            Only these are read.
        dtype: of the tensors, float32, bfloat16 or float16; None: as the drafter's own.
        also_bin: write pytorch_model.bin too, for readers that know no safetensors.
    """
    if to not in LOADERS:
        raise ValueError(f"a drafter can be exported to {', '.join(LOADERS)}, got {to!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_output(Path(output))
    target_files = None if target is None else open_target(target)
    files = canonical(read_folder(drafter), target_files, dtype)
    if to == "sglang":
        files = _for_sglang(files)
    if reasons := problems(to, files, None if target_files is None else target_files.config):
        raise ValueError(f"{drafter} cannot be exported to {to}: {'; '.join(reasons)}")
    assert files.config is not None
    return write_folder(output, files.config, files.tensors, files.provenance, also_bin)


def canonical(files: DrafterFiles, target: TargetFiles | None, dtype: str | None = None) -> DrafterFiles:
    """The canonical form of any drafter's files, its tensors unread; ValueError where something is missing or wrong."""
    if FC_BIAS in files.tensors and not bool(files.tensors[FC_BIAS].read().any()):
        files = replace(files, tensors={name: part for name, part in files.tensors.items() if name != FC_BIAS})
    config = _checked_config(files, target)
    tensors = {EMBEDDING: _embedding(files, target), **files.tensors}
    chosen = DTYPES[dtype] if dtype else tensors["fc.weight"].dtype
    tensors = {
        name: replace(tensor.cast(chosen), file=None) for name, tensor in tensors.items() if name not in LM_HEADS
    }
    published = published_config(config, chosen, _known_of_target(files, target))
    return DrafterFiles(files.folder, {**published, "taps": _provenance(files, target)}, tensors)


def _checked_config(files: DrafterFiles, target: TargetFiles | None) -> EagleConfig:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no config.json")  # the target was named to fill this in
        config = network_config(files, target and target.config)
    if target is not None:
        check_fits(files, config, target.config)
    check_tensors(files, config)
    return config


def _embedding(files: DrafterFiles, target: TargetFiles | None) -> StoredTensor:
    """The drafter's own, which must be the target's where both are known; else the target's."""
    held = files.tensors.get(EMBEDDING)
    if held is None:
        if target is None:
            raise ValueError(f"{files.folder} holds no embedding; name its target, whose embedding is put in: --target")
        return target.embedding()
    check_finite(files, [EMBEDDING])
    if target is not None and not same_up_to_rounding(held.read(), target.embedding().read()):
        raise ValueError(
            f"the embedding in {files.folder} differs from that of {target.name}; give the target that it was trained "
            f"for, or none to keep the embedding"
        )
    return held


def _known_of_target(files: DrafterFiles, target: TargetFiles | None) -> dict[str, Any]:
    """Special tokens and context length; what the drafter's own config says of the tokens stays."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    of_target = {} if target is None else {name: getattr(target.config, name, None) for name in names}
    own = files.config or {}
    return {**of_target, **{name: own[name] for name in names[:3] if name in own}}


def _provenance(files: DrafterFiles, target: TargetFiles | None) -> dict[str, Any]:
    """What the drafter says of itself, else where it came from."""
    if files.provenance:
        return files.provenance
    imported = {"imported_from": files.folder.resolve().name}
    return imported if target is None else {**imported, "target": {"name": target.short_name}}


def _for_sglang(files: DrafterFiles) -> DrafterFiles:
    """SGLang's own architecture name, and the fc.bias that its network has: zero where the drafter has none."""
    weight = files.tensors["fc.weight"]
    zeros = StoredTensor(weight.dtype, weight.shape[:1], lambda: torch.zeros(weight.shape[0], dtype=weight.dtype))
    return replace(
        files,
        config={**(files.config or {}), "architectures": [SGLANG_ARCHITECTURE]},
        tensors={FC_BIAS: zeros, **files.tensors},
    )
