"""What a drafter needs of a target that is not loaded: its config, its embedding and its lm_head, from its files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import WEIGHT_FILES
from .tensor_files import StoredTensor, read_tensors, shard_map

EMBEDDING_SUFFIX = "embed_tokens.weight"
LM_HEAD_SUFFIX = "lm_head.weight"
TARGET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # the oldest models, such as gpt2, have no owner


@dataclass(frozen=True)
class TargetFiles:
    """A target's folder or hub repository; of its weights only the files that are asked for are fetched or opened."""

    name: str  # as it was given
    revision: str | None
    config: Any  # transformers' config of the text model

    @property
    def short_name(self) -> str:
        """The hub id, or the folder's own name."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name

    def embedding(self) -> StoredTensor:
        """[V, H], the input embedding."""
        return self._checked(EMBEDDING_SUFFIX)

    def lm_head(self) -> StoredTensor:
        """[V, H], the output matrix: the embedding where the two are tied."""
        return self._checked(EMBEDDING_SUFFIX if self.config.tie_word_embeddings else LM_HEAD_SUFFIX)

    def _checked(self, suffix: str) -> StoredTensor:
        tensor = self._find(suffix)
        expected = (self.config.vocab_size, self.config.hidden_size)
        if tensor.shape != expected or not tensor.dtype.is_floating_point:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{tensor.name} of {self.name} must be {list(expected)} of floats by its config, "
                f"got {list(tensor.shape)} of {dtype}; give the target as it was before it was quantised"
            )
        return tensor

    def _find(self, suffix: str) -> StoredTensor:
        """The one tensor whose name ends so; whatever comes before differs between families of models."""
        for weights in WEIGHT_FILES:
            if (file := _fetch(self.name, weights, self.revision)) is None:
                continue
            if weights.endswith(".index.json"):
                shards = shard_map(file)
                shard = shards.get(_only(suffix, list(shards), file), "")
                if (file := _fetch(self.name, shard, self.revision)) is None:
                    raise FileNotFoundError(f"the target {self.name} has no {shard}, which its index names")
            tensors = read_tensors(file)
            return tensors[_only(suffix, list(tensors), file)]
        raise FileNotFoundError(f"no weights in the target {self.name}: none of {', '.join(WEIGHT_FILES)} is there")


def open_target(path_or_id: str | os.PathLike[str], revision: str | None = None) -> TargetFiles:
    """The target in a folder or hub repository. Raises FileNotFoundError or ValueError, in a sentence."""
    from transformers import AutoConfig

    name = os.fspath(path_or_id)
    if not (Path(name) / "config.json").is_file() and (Path(name).exists() or not TARGET_ID.fullmatch(name)):
        raise FileNotFoundError(f"no target at {name}: it is neither a folder with config.json nor a hub id")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers says in many ways that a config is none
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(f"the config of the target {name} cannot be read ({reason})") from error
    return TargetFiles(name, revision, config.get_text_config())


def _only(suffix: str, names: list[str], file: Path) -> str:
    found = [name for name in names if name.endswith(suffix)]
    if len(found) != 1:
        raise ValueError(f"{file} must hold one tensor named ...{suffix}, got {', '.join(found) or 'none'}")
    return found[0]


def _fetch(name: str, file: str, revision: str | None) -> Path | None:
    """The local path of a target's file, None when it has none of that name."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None
