"""A recipe: all that a drafter's training depends on, besides the code. `recipe_files.py` reads it from YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ObjectiveName = Literal["eagle2", "hass"]
VocabularyTokens = Literal["frequent", "all"]
FeatureMode = Literal["online", "cached", "stored"]
DtypeName = Literal["bfloat16", "float16", "float32"]
TargetDtypeName = Literal["auto", "bfloat16", "float16", "float32"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class SourceConfig:
    """One place that conversations come from: a JSON lines file, a folder, or a Hugging Face data set by its name."""

    path: str
    split: str = "train"  # of a data set
    name: str | None = None  # the configuration of a data set that has several
    count: int | None = None  # take so many conversations; None: all, or what `weight` says
    weight: float | None = None  # share of the mixture, relative to the other sources' weights

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path is empty; give a file, a folder, or a data set of the hub as owner/name")
        if self.count is not None and self.weight is not None:
            raise ValueError(f"source {self.path} has a count and a weight; give one of them")
        if self.count is not None:
            _at_least(self, 1, "count")
        if self.weight is not None:
            _positive(self, "weight")


@dataclass(frozen=True)
class DataConfig:
    """The conversations, and how they become token sequences."""

    sources: tuple[SourceConfig, ...]
    max_length: int = 2048  # tokens; a longer conversation is cut there
    validation: int = 128  # conversations that are held out, at most a tenth of all
    system_prompt: str | None = None  # put before conversations that bring none
    chat_template: str | None = None  # a jinja file; None: the tokenizer's own
    deduplicate: bool = True
    seed: int = 0  # of the choice and order of the conversations

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources is empty; give at least one, such as {path: conversations.jsonl}")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                "either every source has a weight or none has; use count to take a number of conversations"
            )
        _at_least(self, 3, "max_length")
        _at_least(self, 0, "validation")


@dataclass(frozen=True)
class FeatureConfig:
    """Where the target's features come from: computed as needed, kept after the first epoch, or made ahead."""

    mode: FeatureMode = "online"
    path: str | None = None  # the feature store of "cached" and "stored"
    dtype: DtypeName = "bfloat16"  # of features on disk

    def __post_init__(self) -> None:
        _one_of(self, FeatureMode, "mode")
        _one_of(self, DtypeName, "dtype")
        if self.mode != "online" and self.path is None:
            raise ValueError(f"features.mode {self.mode} needs features.path, the folder of the stored features")


@dataclass(frozen=True)
class VocabularyConfig:
    """Choose the tokens that the drafter can propose: the most frequent ones among the learned tokens, or all."""

    tokens: VocabularyTokens = "frequent"
    coverage: float | None = None  # share of the learned tokens; None: 0.99
    max_size: int | None = None  # most tokens; None: 8,192 of a target with fewer than 65,536 tokens, else 32,000

    def __post_init__(self) -> None:
        _one_of(self, VocabularyTokens, "tokens")
        _at_least(self, 1, "max_size")
        _positive(self, "coverage")
        if self.coverage is not None and self.coverage > 1:
            raise ValueError(f"coverage must be at most 1, got {self.coverage}")
        if self.tokens == "all" and (self.coverage is not None or self.max_size is not None):
            raise ValueError("vocabulary.tokens is all, and coverage and max_size choose some; leave them out")

    def max_size_of(self, vocab_size: int) -> int | None:
        """Return the most tokens of a draft vocabulary for a target with V tokens; None: it has all of them."""
        usual = 8192 if vocab_size < 65536 else 32000
        is_usual = self.coverage is None and self.max_size is None
        return None if self.tokens == "all" or (is_usual and vocab_size <= usual) else self.max_size or usual


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss. The published weights are 1.0 (feature) and 0.1 (distribution); HASS adds 1.0 (top tokens)."""

    name: ObjectiveName = "eagle2"
    feature_weight: float = 1.0  # smooth L1 between the drafter's output and the target's next feature
    distribution_weight: float = 0.1  # cross-entropy against the target's whole distribution
    noise: float = 0.1  # eagle2: half the width of the uniform noise on features, at 512 tokens (times 512 / length)
    alignment_passes: int = 3  # hass: the deepest pass sees two of its own features in a row
    top_weight: float = 1.0  # hass: cross-entropy against the target's likeliest tokens
    num_top_tokens: int = 10  # hass

    def __post_init__(self) -> None:
        _one_of(self, ObjectiveName, "name")
        _at_least(self, 1, "alignment_passes", "num_top_tokens")
        _at_least(self, 0, "feature_weight", "distribution_weight", "noise", "top_weight")

    @property
    def num_passes(self) -> int:
        """Forward and backward passes of the drafter a batch."""
        return self.alignment_passes if self.name == "hass" else 1


@dataclass(frozen=True)
class TrainingConfig:
    """The run: how long, how fast, on what, and what is written when. Batch sizes count sequences."""

    steps: int | None = None  # updates; exactly one of steps and epochs is given
    epochs: float | None = None
    batch_size: int = 16  # of an update, over all processes
    micro_batch_size: int | None = None  # of one forward on one process, at most; None: batch_size over the processes
    learning_rate: float = 3e-5  # at its peak
    warmup_steps: int = 0  # linear from 0
    decay_steps: int | None = None  # linear to 0 at this step; None: at the last one
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = None  # of the whole gradient
    clip_value: float | None = 0.5  # of each of its elements
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False  # less memory for a second forward of the MLP and its norm
    seed: int = 0  # of the initial weights, the order of the data and the noise
    log_every: int = 10  # steps
    validate_every: int = 500
    save_every: int = 500
    keep_checkpoints: int = 2  # the latest ones, besides the best drafter
    calibrate: bool = True  # the best and the final drafter at the end, so that they can draft with the target's noise
    tracker: str = "none"  # or what accelerate knows: tensorboard, wandb, trackio, mlflow, ...

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"exactly one of training.steps and training.epochs must be given, got {self.steps} and {self.epochs}"
            )
        _at_least(self, 1, "steps", "batch_size", "micro_batch_size", "decay_steps")
        _at_least(self, 1, "log_every", "validate_every", "save_every", "keep_checkpoints")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        _positive(self, "epochs", "learning_rate", "clip_norm", "clip_value")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        _one_of(self, Precision, "precision")


@dataclass(frozen=True)
class Recipe:
    """A whole training run: a target, conversations, an objective, and the folder that everything is written to."""

    target: str  # folder or hub id
    output: str  # folder
    data: DataConfig
    training: TrainingConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    target_revision: str | None = None  # branch, tag or commit of a hub id
    target_dtype: TargetDtypeName = "auto"
    start: str | None = None  # a drafter to train further, folder or hub id; None: from nothing
    drafter_dtype: DtypeName = "bfloat16"  # of the saved drafter

    def __post_init__(self) -> None:
        _one_of(self, TargetDtypeName, "target_dtype")
        _one_of(self, DtypeName, "drafter_dtype")
        for name in ("target", "output"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; give a folder" + (" or a hub id" if name == "target" else ""))


def _at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and (not value >= least or value == float("inf")):
            raise ValueError(f"{name} must be {'finite' if value > least else f'at least {least:g}'}, got {value}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value}")


def _one_of(config: Any, literal: Any, name: str) -> None:
    allowed: Sequence[str] = literal.__args__
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")
