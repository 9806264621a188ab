"""Average drafters: one drafter whose weights lie between those of several (TAPS, arXiv 2603.27027).

The parents are mapped from their files; only the average is in memory. Tensors that are equal in all parents stay so.
Of different draft vocabularies the average has all tokens: its network has no rows that belong to single tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal, InvalidOperation
from math import isclose
from pathlib import Path

import torch
from torch import Tensor

from ..drafters.base import DraftVocabulary
from ..drafters.network import EagleConfig
from .files import DIGEST, DrafterFiles, PathOrId, check_drafter_output, read_drafter_files, write_drafter_files
from .formats import (
    EMBEDDING,
    LM_HEADS,
    MASK,
    OFFSETS,
    VOCABULARY,
    checked_config,
    dtype_name,
    published_config,
    read_vocabulary,
)

MIN_STEP = Decimal("0.001")  # of a sweep: each of its weights is a whole drafter on disk


def average_drafters(folders: Sequence[PathOrId], weights: Sequence[float] | None, output: PathOrId) -> Path:
    """Write the weighted average of several checkpoints, computed in float32, and return its directory.

    `weights` lie within 0 and 1 and sum to 1 (None: equal weights). Raise ValueError, before anything is written, for
    drafters of different targets, shapes, biases, rope or dtypes, and for draft vocabularies in some only.
    """
    count = len(folders)
    weights = [1 / count] * count if weights is None else list(weights)
    in_range = all(0 <= weight <= 1 for weight in weights)
    if count < 2 or len(weights) != count or not in_range or not isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"averaging takes at least 2 drafters and as many weights within 0 and 1 that sum to 1, "
            f"got {count} drafters and the weights {weights}"
        )
    return _write(folders, {Path(output): weights})[0]


def sweep(first: PathOrId, second: PathOrId, weights: str, output: PathOrId) -> list[Path]:
    """Write averages into output/0.1, output/0.2, ..., named by the weight of the first drafter.

    `weights` is start:stop:step, the end included, such as 0.1:0.9:0.1.
    """
    steps = sweep_weights(weights)
    return _write([first, second], {Path(output) / f"{step:f}": [float(step), float(1 - step)] for step in steps})


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


def _write(folders: Sequence[PathOrId], weights: Mapping[Path, Sequence[float]]) -> list[Path]:
    """Write an average into each of the directories in `weights`, and return them."""
    for path in weights:
        check_drafter_output(path)
    parents = [read_drafter_files(folder) for folder in folders]
    vocabulary, config, first = _common_vocabulary(parents), _common_config(parents), parents[0]
    published = published_config(config, first.tensors["fc.weight"].dtype, first.config or {}, vocabulary)
    maps = {} if vocabulary is None else {OFFSETS: vocabulary.d2t, MASK: vocabulary.t2d}
    ancestors = [
        {"name": Path(folder).resolve().name, **files.provenance, **({DIGEST: files.digest} if files.digest else {})}
        for folder, files in zip(folders, parents, strict=True)
    ]
    of_target = {"target": target} if (target := first.provenance.get("target")) else {}
    for path, shares in weights.items():
        tensors = {
            name: _average([files.tensors[name] for files in parents], shares)
            for name in first.tensors
            if name not in (*LM_HEADS, *VOCABULARY)
        }
        metadata = {"algorithm": "average", "weights": list(shares), "parents": ancestors, **of_target}
        write_drafter_files(path, published, {**maps, **tensors}, metadata)
    return list(weights)


def _average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if all(torch.equal(tensors[0], other) for other in tensors[1:]):
        return tensors[0]
    total = torch.zeros(tensors[0].shape)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


def _common_config(parents: Sequence[DrafterFiles]) -> EagleConfig:
    """Return the drafters' shape, with the longest context length. Raise ValueError if they are not of one kind."""
    configs = [checked_config(files) for files in parents]
    longest = max(config.max_position_embeddings for config in configs)
    first, *others = (replace(config, max_position_embeddings=longest) for config in configs)
    for files, config in zip(parents[1:], others, strict=True):
        _check_alike(parents[0], files, first, config)
    return first


def _common_vocabulary(parents: Sequence[DrafterFiles]) -> DraftVocabulary | None:
    """Return the draft vocabulary with the tokens of all; None where no drafter has one."""
    found = [vocabulary for files in parents if (vocabulary := read_vocabulary(files)) is not None]
    if not found:
        return None
    if len(found) < len(parents):
        whole = next(files.folder for files in parents if OFFSETS not in files.tensors)
        raise ValueError(
            f"{whole} drafts over the whole vocabulary, and another one over a draft vocabulary; "
            f"export the latter with --whole-vocabulary and --target, or train both alike"
        )
    tokens = torch.cat([vocabulary.tokens for vocabulary in found]).unique()
    return DraftVocabulary(tokens, found[0].vocab_size)


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
    if keys := sorted((one.tensors.keys() ^ other.tensors.keys()) - {*LM_HEADS, *VOCABULARY}):
        raise ValueError(
            f"{pair} do not both hold {', '.join(keys)}; export both with --target, which puts the embedding in"
        )
    for name in one.tensors.keys() - {*LM_HEADS, *VOCABULARY}:
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
