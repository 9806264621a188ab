"""The two ends of a target, embedding and lm_head, read without the layers between; and what tells targets apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.target_files import open_target
from ..drafters.network import rope_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PathOrId = str | os.PathLike[str]

NUM_SAMPLES = 4096  # numbers of each tensor that a fingerprint looks at


@dataclass(frozen=True)
class TargetIdentity:
    """Which target features are of. The same weights are the same target, whatever its name or dtype."""

    name: str  # folder or hub id
    revision: str | None  # commit of a hub id
    hidden_size: int
    ends: str  # fingerprint of the embedding and lm_head: all that is known of a target that is not loaded
    weights: str | None  # fingerprint of all weights

    @property
    def fingerprint(self) -> str:
        """Of all that is known of the target."""
        return self.weights or self.ends

    def check_same(self, other: TargetIdentity, folder: Path) -> None:
        """ValueError unless the features in `folder`, of this target, are those of the other one."""
        both_known = self.weights is not None and other.weights is not None
        same_ends = (self.hidden_size, self.ends) == (other.hidden_size, other.ends)
        if not same_ends or (both_known and self.weights != other.weights):
            raise ValueError(
                f"{folder} holds features of the target {self}, and {other} has other weights; "
                f"give another features.path, or delete that folder"
            )

    def __str__(self) -> str:
        return self.name + (f" ({self.revision[:12]})" if self.revision else "")


@dataclass(frozen=True)
class TargetEnds:
    """All that training needs of a target whose features are stored."""

    embedding: Tensor  # [V, H], in the dtype of its file
    head: Tensor  # [V, H], the weight of the lm_head
    config: Any  # transformers'
    identity: TargetIdentity

    def to(self, dtype: torch.dtype) -> TargetEnds:
        """The same in another precision."""
        return replace(self, embedding=self.embedding.to(dtype), head=self.head.to(dtype))


def identify(model: PreTrainedModel) -> TargetIdentity:
    """The identity of a loaded target."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, Tensor) and isinstance(head, Tensor)
    weights = _fingerprint(model.config, model.parameters())
    return _identity(model.config, embedding, head, weights)


def load_target_ends(path_or_id: PathOrId, revision: str | None = None) -> TargetEnds:
    """The embedding and lm_head of a target, on the CPU: only they are read, so a large target takes little memory.

    Args:
        path_or_id: a folder as `save_pretrained` leaves it, or a hub id. Code in it is never run.
        revision: branch, tag or commit of a hub id.

    Raises OSError or ValueError, in a sentence, when there is no such target or its files lack these tensors.
    """
    files = open_target(path_or_id, revision)
    embedding = files.embedding().read().clone()  # the file is not needed any more
    head = embedding if files.config.tie_word_embeddings else files.lm_head().read().clone()
    return TargetEnds(embedding, head, files.config, _identity(files.config, embedding, head, None))


def _identity(config: Any, embedding: Tensor, head: Tensor, weights: str | None) -> TargetIdentity:
    name, revision = getattr(config, "_name_or_path", "") or "unnamed", getattr(config, "_commit_hash", None)
    return TargetIdentity(name, revision, embedding.shape[1], _fingerprint(config, (embedding, head)), weights)


def _fingerprint(config: Any, tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the layers, the rope and the signs of sampled weights: casts between float types keep signs."""
    config = config.get_text_config()
    theta, scaling = rope_of(config)
    rope = [theta, *((scaling or {}).get(name) for name in ("rope_type", "factor"))]
    digest = hashlib.sha256(json.dumps([config.num_hidden_layers, rope]).encode())
    for tensor in tensors:
        flat = tensor.detach().flatten()
        samples = flat[:: max(1, len(flat) // NUM_SAMPLES)]
        digest.update(json.dumps(list(tensor.shape)).encode())
        digest.update(np.packbits(torch.signbit(samples).cpu().numpy()).tobytes())
    return digest.hexdigest()
