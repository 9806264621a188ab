"""Load and save drafters, and read what a drafter needs of a target that is not loaded.

Dims: V vocabulary, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..drafters import Drafter, DraftVocabulary, LookupDrafter
from ..drafters.eagle import EagleDrafter, LogitRule, compute_dtype_and_device
from ..drafters.network import FEATURE_SIZES, EagleNetwork, rope_of, size_of
from ..sampling import warn
from ..target.model import TargetModel, refuse_unlike_head
from ..target.support import unwrapped
from .corpus import HEADER_FILE, CorpusStore, tokenizer_fingerprint
from .files import (
    DrafterFiles,
    PathOrId,
    find_weights,
    first_line,
    read_drafter_files,
    read_tensors,
    write_drafter_files,
)
from .formats import (
    EMBEDDING,
    LM_HEADS,
    MASK,
    OFFSETS,
    PLAIN_DTYPES,
    checked_config,
    dtype_name,
    published_config,
    read_calibration,
    read_vocabulary,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What the names of a target's two matrices end in, by family.
TARGET_EMBEDDINGS = (EMBEDDING, "wte.weight", "word_embeddings.weight", "embed_in.weight")
TARGET_LM_HEADS = (LM_HEADS[0], "embed_out.weight")
TARGET_ID = re.compile(r"([\w.-]+/)?[\w.-]+")  # the oldest models, such as gpt2, have no owner
LOOKUP = "lookup"  # in place of a directory: a drafter that looks up the text and has no files
COMPARED_ROWS = 8192  # of two embeddings at a time, to bound the memory
NUM_SAMPLES = 4096  # numbers of each tensor that go into a fingerprint


# --- drafters --------------------------------------------------------------------------------------------------------


def load_drafters(paths: Mapping[str, PathOrId], target: Any, tokenizer: Any = None) -> dict[str, Drafter]:
    """Load a drafter for each name, in the order given (which breaks ties between drafters); see `load_drafter`."""
    model = _model_of(target)
    loaded: dict[str, Drafter] = {}
    ends: _Ends | None = None
    for name, path in paths.items():
        if is_lookup(path):
            loaded[name] = _lookup_drafter(path, model, tokenizer, name)
            continue
        ends = ends or _ends_of(model)
        loaded[name] = drafter = _load(path, ends, name)
        # One copy of the lm_head's rows for all drafters of one draft vocabulary.
        eagles = [other for other in loaded.values() if isinstance(other, EagleDrafter)]
        drafter.ends = next(other.ends for other in eagles if other.ends == drafter.ends)
    return loaded


def is_lookup(path_or_id: PathOrId) -> bool:
    """Return whether it means a look-up drafter: "lookup", or the directory of a corpus store."""
    return path_or_id == LOOKUP or (Path(path_or_id).expanduser() / HEADER_FILE).is_file()


def load_drafter(path_or_id: PathOrId, target: Any, name: str | None = None, tokenizer: Any = None) -> Drafter:
    """Load the drafter in a directory or hub repository; it shares the target's embedding and lm_head.

    Args:
        path_or_id: a directory with config.json and model.safetensors or pytorch_model.bin (also sharded, also a state
            directory of accelerate), or a hub id. A calibration.json in it is loaded too. Code in it is never run.
            "lookup" is a `LookupDrafter`, for any target; write a directory of that name as "./lookup". The directory
            of a corpus store (`taps-ext index`) is a `LookupDrafter` that reads it, too.
        target: a transformers model with an lm_head, or a `TargetModel`.
        name: the drafter's name in stats and compositions; by default the last part of `path_or_id`.
        tokenizer: the target's, to refuse a corpus store that was made with another one.

    Raise ValueError or FileNotFoundError in one sentence when the checkpoint does not fit the target.
    """
    return load_drafters({name or Path(path_or_id).resolve().name: path_or_id}, target, tokenizer).popitem()[1]


def load_network(path_or_id: PathOrId) -> EagleNetwork:
    """Load the network of a checkpoint for training: in the dtype of its file, without a target."""
    return network_of(read_drafter_files(path_or_id))


def network_of(files: DrafterFiles, target_config: Any | None = None) -> EagleNetwork:
    """Build the network of a drafter's files, checked against its config and, where it is given, the target's."""
    config = checked_config(files, target_config)
    with torch.device("meta"):
        network = EagleNetwork(config)
    network.load_state_dict({name: files.tensors[name] for name in network.state_dict()}, assign=True)
    return network


def save_drafter(
    network: EagleNetwork,
    folder: PathOrId,
    *,
    embedding: nn.Module | Tensor,
    target_config: Any,
    metadata: Mapping[str, Any] | None = None,
    vocabulary: DraftVocabulary | None = None,
) -> Path:
    """Save exactly the published tensors, the embedding included, in the network's dtype; return the directory.

    With a draft vocabulary, which no program but this one reads, the embedding is left out: the target has it.

    Args:
        embedding: the target's, a module or its weight [V, H].
        target_config: the target's config, for special tokens and the context length.
        metadata: provenance as JSON values (algorithm, target, domain, trained length, ...), kept under `taps` in
            config.json and in the header of model.safetensors.
        vocabulary: what the drafter can propose; None: every token of the target.
    """
    weight = embedding if isinstance(embedding, Tensor) else embedding.weight
    assert isinstance(weight, Tensor)
    config, dtype = network.config, network.fc.weight.dtype
    if [*weight.shape] != (expected := [config.vocab_size, config.hidden_size]):
        raise ValueError(
            f"the embedding must be {expected}, got {[*weight.shape]}; "
            f"save a drafter with the embedding of its own target"
        )
    more = {EMBEDDING: weight.to(dtype)} if vocabulary is None else {OFFSETS: vocabulary.d2t, MASK: vocabulary.t2d}
    published = published_config(config, dtype, target_config, vocabulary)
    return write_drafter_files(folder, published, {**more, **network.state_dict()}, dict(metadata or {}))


def same_up_to_rounding(held: Tensor, expected: Tensor) -> bool:
    """Return whether two matrices are equal, up to rounding of one of them to float16 or bfloat16."""
    return held.shape == expected.shape and all(
        torch.allclose(a.to(b.device, b.dtype), b, rtol=1e-2, atol=1e-4)
        for a, b in zip(torch.split(held, COMPARED_ROWS), torch.split(expected, COMPARED_ROWS), strict=True)
    )


@dataclass(frozen=True)
class _Ends:
    """Hold what a drafter shares with a loaded target, and the target's config."""

    embedding: nn.Module
    lm_head: nn.Module
    config: Any  # of the text model
    rule: LogitRule


def _model_of(target: Any) -> Any:
    return target.model if isinstance(target, TargetModel) else unwrapped(target)


def _ends_of(model: Any) -> _Ends:
    """Return the ends of a target; raise ValueError if they do not make its own logits of its features."""
    embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or lm_head is None:
        raise ValueError(f"the target {type(model).__name__} has no lm_head; load it with AutoModelForCausalLM")
    config = model.config.get_text_config()
    rule, (dtype, _) = LogitRule.of(config), compute_dtype_and_device(lm_head, embedding)
    if all(parameter.device.type != "meta" for parameter in model.parameters()):  # without weights it cannot run
        refuse_unlike_head(model, lambda features: rule.apply(lm_head(features.to(dtype))))
    return _Ends(embedding, lm_head, config, rule)


def _lookup_drafter(path: PathOrId, model: Any, tokenizer: Any, name: str) -> LookupDrafter:
    vocab_size: int = model.config.get_text_config().vocab_size
    if path == LOOKUP:
        return LookupDrafter(vocab_size, name)
    made_with = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    return LookupDrafter(vocab_size, name, store=CorpusStore(path, vocab_size, made_with))


def _load(path_or_id: PathOrId, ends: _Ends, name: str) -> EagleDrafter:
    files = read_drafter_files(path_or_id)
    network = network_of(files, ends.config)
    calibration = read_calibration(files.folder, files.digest)
    for key, module in ((EMBEDDING, ends.embedding), *((key, ends.lm_head) for key in LM_HEADS)):
        _warn_of_foreign(files, key, module)
    dtype, device = compute_dtype_and_device(ends.lm_head, ends.embedding)
    network, vocabulary = network.to(device, dtype).eval().requires_grad_(False), read_vocabulary(files)
    return EagleDrafter(network, ends.embedding, ends.lm_head, name, calibration, ends.rule, vocabulary)


def _warn_of_foreign(files: DrafterFiles, key: str, module: nn.Module) -> None:
    """Warn when the checkpoint holds another embedding or lm_head than the target's, which is the one in use."""
    held, used = files.tensors.get(key), getattr(module, "weight", None)
    if held is None or used is None or used.device.type == "meta" or not used.is_floating_point():
        return  # quantised and offloaded weights cannot be compared
    if not same_up_to_rounding(held, _whole(used)):
        warn(
            f"the {'embedding' if key == EMBEDDING else 'lm_head'} in {files.folder} differs from the target's, which "
            f"is used instead; the drafter may have been trained for another target"
        )


def _whole(weight: Tensor) -> Tensor:
    """Return a weight without its gradient, gathered where tensor parallelism splits it over processes."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full.detach()


# --- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetFiles:
    """A target's directory or hub repository; only the weight files with a tensor that is asked for are fetched."""

    name: str  # as it was given
    revision: str | None
    config: Any  # transformers' config of the text model

    def matrix(self, suffixes: tuple[str, ...]) -> Tensor:
        """Map the embedding or lm_head [V, H]: the one tensor whose name has one of these ends."""
        file, parts = find_weights(self.name, suffixes, revision=self.revision)
        matching = {name: tensor for name, tensor in read_tensors(parts).items() if name.endswith(suffixes)}
        if len(matching) != 1:
            names = " or ...".join(suffixes)
            raise ValueError(f"{file} must hold one tensor named ...{names}, got {', '.join(matching) or 'none'}")
        [(name, tensor)] = matching.items()
        expected = (self.config.vocab_size, size_of(self.config, FEATURE_SIZES))
        if tensor.shape != expected or tensor.dtype not in PLAIN_DTYPES:
            raise ValueError(
                f"{name} of {self.name} must be {list(expected)} of floats by its config, "
                f"got {list(tensor.shape)} of {dtype_name(tensor.dtype)}; give the target as it was before quantisation"
            )
        return tensor


@dataclass(frozen=True)
class TargetIdentity:
    """A target's name and fingerprints: equal weights are the same target, whatever their name and dtype."""

    name: str  # directory or hub id
    revision: str | None  # commit of a hub id
    hidden_size: int
    ends: str  # fingerprint of the embedding and lm_head: all that is known of a target that is not loaded
    weights: str | None  # fingerprint of all weights

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of all weights where it is known, else of the embedding and lm_head."""
        return self.weights or self.ends

    def check_same(self, other: TargetIdentity, folder: Path) -> None:
        """Raise ValueError unless the features in `folder`, which are this target's, are also the other one's."""
        both_known = self.weights is not None and other.weights is not None
        same_ends = (self.hidden_size, self.ends) == (other.hidden_size, other.ends)
        if not same_ends or (both_known and self.weights != other.weights):
            raise ValueError(
                f"{folder} holds features of the target {self}, and {other} has other weights; "
                f"give another features.path, or delete that directory"
            )

    def __str__(self) -> str:
        return self.name + (f" ({self.revision[:12]})" if self.revision else "")


@dataclass(frozen=True)
class TargetEnds:
    """The parts of a target that training needs when its features are stored."""

    embedding: Tensor  # [V, H], in the dtype of its file
    head: Tensor  # [V, H], the weight of the lm_head
    config: Any  # transformers'
    identity: TargetIdentity

    def to(self, dtype: torch.dtype) -> TargetEnds:
        """Return the same in another dtype."""
        return replace(self, embedding=self.embedding.to(dtype), head=self.head.to(dtype))


def open_target(path_or_id: PathOrId, revision: str | None = None) -> TargetFiles:
    """Read the config of a target in a directory or hub repository. Raise OSError or ValueError in one sentence."""
    from transformers import AutoConfig

    name = os.fspath(path_or_id)
    if not (Path(name) / "config.json").is_file() and (Path(name).exists() or not TARGET_ID.fullmatch(name)):
        raise FileNotFoundError(f"no target at {name}: it is neither a directory with config.json nor a hub id")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises anything for a bad config
        raise FileNotFoundError(
            f"the config of the target {name} cannot be read ({first_line(error)}); give a directory or hub id"
        ) from error
    if hasattr(config, "taps"):
        raise ValueError(f"{name} is a drafter, not a target; give it as the drafter, and the model that it drafts for")
    return TargetFiles(name, revision, config.get_text_config())


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raise ValueError in one sentence where transformers fails to load something, for whatever reason."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be loaded ({first_line(error)}); give a directory or hub id") from error


def load_target_ends(path_or_id: PathOrId, revision: str | None = None) -> TargetEnds:
    """Load the embedding and lm_head of a target onto the CPU; its other tensors take no memory.

    Args:
        path_or_id: a directory as `save_pretrained` leaves it, or a hub id. Code in it is never run.
        revision: branch, tag or commit of a hub id.

    Raise OSError or ValueError in one sentence when there is no such target or its files lack these tensors.
    """
    files = open_target(path_or_id, revision)
    embedding = files.matrix(TARGET_EMBEDDINGS).clone()  # the file is not needed any more
    head = embedding if files.config.tie_word_embeddings else files.matrix(TARGET_LM_HEADS).clone()
    return TargetEnds(embedding, head, files.config, _identity(files.config, embedding, head, None))


def identify(model: PreTrainedModel) -> TargetIdentity:
    """Return the identity of a loaded target."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, Tensor) and isinstance(head, Tensor)
    return _identity(model.config, embedding, head, _fingerprint(model.config, model.parameters()))


def _identity(config: Any, embedding: Tensor, head: Tensor, weights: str | None) -> TargetIdentity:
    name, revision = getattr(config, "_name_or_path", "") or "unnamed", getattr(config, "_commit_hash", None)
    return TargetIdentity(name, revision, embedding.shape[1], _fingerprint(config, (embedding, head)), weights)


def _fingerprint(config: Any, tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the layers, the rope and the signs of sampled weights: casts between floats keep signs."""
    config = config.get_text_config()
    theta, scaling = rope_of(config)
    rope = [theta, *((scaling or {}).get(name) for name in ("rope_type", "factor"))]
    digest = hashlib.sha256(json.dumps([config.num_hidden_layers, rope]).encode())
    for tensor in tensors:
        flat = _whole(tensor).flatten()
        samples = flat[:: max(1, len(flat) // NUM_SAMPLES)]
        digest.update(json.dumps(list(tensor.shape)).encode())
        digest.update(np.packbits(torch.signbit(samples).cpu().numpy()).tobytes())
    return digest.hexdigest()
