"""Average drafters: one drafter whose weights lie between those of several (TAPS, arXiv 2603.27027).

The parents are mapped from their files; only the average is in memory. Tensors that are equal in all parents stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..drafters.network import EagleConfig
from .files import DrafterFiles, PathOrId, check_drafter_output, read_drafter_files, write_drafter_files
from .formats import EMBEDDING, LM_HEADS, check_tensors, dtype_name, network_config, published_config

MIN_STEP = Decimal("0.001")  # of a sweep: each of its weights is a whole drafter on disk


@dataclass(frozen=True)
class Parents:
    """Drafters that can be averaged, and the shape that they share."""

    files: tuple[DrafterFiles, ...]
    names: tuple[str, ...]
    config: EagleConfig


def average_drafters(folders: Sequence[PathOrId], weights: Sequence[float] | None, output: PathOrId) -> Path:
    """Write the weighted average of several checkpoints, computed in float32, and return its directory.

    `weights` lie within 0 and 1 and sum to 1 (None: equal weights). Raise ValueError, before anything is written, for
    drafters of different targets, shapes, biases, rope or dtypes.
    """
    weights = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    _check_weights(len(folders), weights)
    check_drafter_output(Path(output))
    return _write(_read_parents(folders), weights, output)


def sweep(first: PathOrId, second: PathOrId, weights: str, output: PathOrId) -> list[Path]:
    """Write averages into output/0.1, output/0.2, ..., named by the weight of the first drafter.

    `weights` is start:stop:step, the end included, such as 0.1:0.9:0.1.
    """
    steps = sweep_weights(weights)
    outputs = [Path(output) / f"{weight:f}" for weight in steps]
    for path in outputs:
        check_drafter_output(path)
    parents = _read_parents([first, second])
    shares = [[float(weight), float(1 - weight)] for weight in steps]
    return [_write(parents, share, path) for share, path in zip(shares, outputs, strict=True)]


def sweep_weights(text: str) -> list[Decimal]:
    """Return the weights of start:stop:step, the end included, as decimals: 0.1:0.9:0.1 has nine, 0.3 among them."""
    try:
        start, stop, step = map(Decimal, text.split(":"))
        in_order = 0 <= start <= stop <= 1 and MIN_STEP <= step <= 1
    except (ValueError, InvalidOperation):
        in_order = False
    if not in_order:
        raise ValueError(
            f"a sweep is start:stop:step with 0 <= start <= stop <= 1 and a step of {MIN_STEP} to 1, "
            f"such as 0.1:0.9:0.1, got {text!r}"
        )
    return [(start + index * step).normalize() + 0 for index in range(int((stop - start) / step) + 1)]


def _check_weights(num_drafters: int, weights: Sequence[float]) -> None:
    in_range = all(0 <= weight <= 1 for weight in weights)
    if num_drafters < 2 or len(weights) != num_drafters or not in_range or not isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"averaging takes at least 2 drafters and as many weights within 0 and 1 that sum to 1, "
            f"got {num_drafters} drafters and the weights {list(weights)}"
        )


def _write(parents: Parents, weights: Sequence[float], output: PathOrId) -> Path:
    first = parents.files[0]
    tensors = {
        name: _average([files.tensors[name] for files in parents.files], weights)
        for name in first.tensors
        if name not in LM_HEADS
    }
    ancestors = [
        {"name": name, **files.provenance, **({"sha256": files.digest} if files.digest else {})}
        for name, files in zip(parents.names, parents.files, strict=True)
    ]
    metadata: dict[str, Any] = {"algorithm": "average", "weights": list(weights), "parents": ancestors}
    if target := first.provenance.get("target"):
        metadata["target"] = target
    config = published_config(parents.config, tensors["fc.weight"].dtype, first.config or {})
    return write_drafter_files(output, config, tensors, metadata)


def _average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if all(torch.equal(tensors[0], other) for other in tensors[1:]):
        return tensors[0]
    total = torch.zeros(tensors[0].shape)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _read_parents(folders: Sequence[PathOrId]) -> Parents:
    """Read drafters of one kind; the longest context length is the common one. Raise ValueError if they differ."""
    inputs = [read_drafter_files(folder) for folder in folders]
    configs = [network_config(files, None) for files in inputs]
    for files, config in zip(inputs, configs, strict=True):
        check_tensors(files, config)
    longest = max(config.max_position_embeddings for config in configs)
    first, *others = (replace(config, max_position_embeddings=longest) for config in configs)
    for files, config in zip(inputs[1:], others, strict=True):
        _check_alike(inputs[0], files, first, config)
    names = tuple(Path(folder).resolve().name for folder in folders)
    return Parents(tuple(inputs), names, first)


def _check_alike(one: DrafterFiles, other: DrafterFiles, first: EagleConfig, second: EagleConfig) -> None:
    """Raise ValueError unless both are drafters of one target, one shape and one dtype."""
    pair = f"{other.folder} and {one.folder}"
    names = [field.name for field in fields(first) if getattr(first, field.name) != getattr(second, field.name)]
    if names:
        raise ValueError(f"{pair} differ in {', '.join(names)}; only drafters of one shape can be averaged")
    if _have_other_targets(other, one):
        raise ValueError(
            f"{pair} are drafters of the targets {other.target['name']} and {one.target['name']}; only drafters of one "
            f"target can be averaged (if the two are the same, say so under taps.target in config.json)"
        )
    if keys := sorted((one.tensors.keys() ^ other.tensors.keys()) - {*LM_HEADS}):
        raise ValueError(
            f"{pair} do not both hold {', '.join(keys)}; export both with --target, which puts the embedding in"
        )
    for name in one.tensors.keys() - {*LM_HEADS}:
        dtypes = [dtype_name(files.tensors[name].dtype) for files in (other, one)]
        if dtypes[0] != dtypes[1]:
            raise ValueError(f"{pair} hold {name} in {dtypes[0]} and {dtypes[1]}; export both with one --dtype")
    if EMBEDDING in one.tensors and not torch.equal(one.tensors[EMBEDDING], other.tensors[EMBEDDING]):
        raise ValueError(f"{pair} hold different embeddings, so their targets differ; average drafters of one target")


def _have_other_targets(one: DrafterFiles, other: DrafterFiles) -> bool:
    """Return whether the two name different targets: by fingerprint, or by name where one has none.

    Names are compared without the owner or the parent directory, so a directory and a hub id of one model are the same.
    """
    prints = [files.target.get("fingerprint") for files in (one, other)]
    if None not in prints:
        return bool(prints[0] != prints[1])
    names = [str(files.target.get("name") or "").rstrip("/").rpartition("/")[2] for files in (one, other)]
    return all(names) and names[0] != names[1]
