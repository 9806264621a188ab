"""Where a run and its drafters come from: what must be the same when a run goes on, and what their metadata says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.load import TargetIdentity
from ..drafters import DraftVocabulary
from ..drafters.network import EagleConfig
from ..native import code_version
from .dataset import TokenDataset
from .recipe import ObjectiveConfig, TrainingConfig

# What may differ when a run goes on: how it is computed and watched, not the weights that come out.
FREE = (
    *("log_every", "save_every", "keep_checkpoints", "tracker", "calibrate"),
    *("micro_batch_size", "gradient_checkpointing"),
)


def settings(config: TrainingConfig) -> dict[str, Any]:
    """The fields of a training configuration that the result depends on."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def identity(
    training: TokenDataset,
    validation: TokenDataset | None,
    objective: ObjectiveConfig,
    config: TrainingConfig,
    network: EagleConfig,
    target: str | None,
    vocabulary: DraftVocabulary | None,
) -> dict[str, Any]:
    """What must be the same when a run goes on, by dotted name; `target` is a fingerprint of its weights."""
    parts = {"training": settings(config), "objective": asdict(objective), "network": asdict(network)}
    data = {"training": training.checksum, "validation": validation.checksum if validation else None}
    chosen = {} if vocabulary is None else {"vocabulary": vocabulary.checksum}
    return flat({**parts, "data": data, "target": {"fingerprint": target}, **chosen})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON values by dotted name; lists of plain values stay whole."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            found |= flat(value, f"{key}.")
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], output: Path) -> None:
    """ValueError that names what differs, unless both are the same; `there` is what the output folder was made with."""
    differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differing:
        told = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing)
        raise ValueError(f"{output} holds another run: {told}; give another output, or what that run was started with")


def target_facts(path_or_id: str, identity: TargetIdentity) -> dict[str, Any]:
    """Which target it was, as JSON values: a hub id or the last part of a folder, commit and fingerprint."""
    path = Path(path_or_id).expanduser()
    name = path.resolve().name if path.exists() else path_or_id
    return {"name": name, "commit": identity.revision, "fingerprint": identity.fingerprint}


def calibration_facts(
    target: Mapping[str, Any] | None, dataset: TokenDataset, texts: str | None = None
) -> dict[str, Any]:
    """What a calibration says of its origin; a function of what it was made of, without times or folders.

    `texts`: what the dataset was to the drafter's training, where that is known.
    """
    data = dataset_facts(dataset) | ({} if texts is None else {"texts": texts})
    return {"target": target, "data": data, "code": code_version()}


def dataset_facts(dataset: TokenDataset) -> dict[str, Any]:
    """Size and content of a dataset, as JSON values."""
    return {"num_sequences": len(dataset), "num_tokens": dataset.num_tokens, "sha256": dataset.checksum}
