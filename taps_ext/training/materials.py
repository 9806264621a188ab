"""What a recipe names, loaded: the tokenizer, the target or what is stored of it, and the network to train."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.files import read_drafter_files
from ..checkpoints.formats import check_fits
from ..checkpoints.load import TargetIdentity, identify, load_network, load_target_ends, loading, open_target
from ..drafters import DraftVocabulary
from ..drafters.network import EagleConfig, EagleNetwork
from ..tiny import resolve
from .data import PreparedData, prepare
from .dataset import TokenDataset
from .features import FeatureSource, FrozenTarget, StoredFeatures, open_store
from .recipe import Recipe, VocabularyConfig
from .survey import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_COVERAGE = 0.99
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@dataclass(frozen=True)
class TargetPart:
    """What a run has of its target."""

    source: FeatureSource
    config: Any  # transformers', of the text model
    identity: TargetIdentity


@dataclass(frozen=True)
class Materials:
    """All that a recipe names, loaded."""

    data: PreparedData
    target: TargetPart
    network: EagleNetwork
    parent: dict[str, Any] | None  # what the drafter that the run starts from says about itself
    vocabulary: DraftVocabulary | None  # what the drafter can propose; None: every token of the target

    @property
    def coverage(self) -> float:
        """Share of the learned tokens that the drafter can propose."""
        if self.vocabulary is None:
            return 1.0
        counts = self.data.training.learned_counts(self.vocabulary.vocab_size)
        return float(counts[self.vocabulary.tokens].sum() / counts.sum())

    def lines(self) -> list[str]:
        """Return sentences for people: what became of the data, and what the drafter can propose of it."""
        sentences = self.data.report.lines()
        if (chosen := self.vocabulary) is not None:
            sentences.append(
                f"draft vocabulary: {len(chosen):,} of the target's {chosen.vocab_size:,} tokens, "
                f"{self.coverage:.2%} of the learned ones"
            )
        return sentences

    @property
    def num_trained(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return sum(dataset.num_tokens for dataset in datasets(self.data))


def load_materials(recipe: Recipe, device: torch.device, report_progress: Progress | None = None) -> Materials:
    """What the recipe names, the cheap things first. ValueError or OSError, in a sentence, if something is missing."""
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe.data, tokenizer, report_progress)
    target = load_target_part(recipe, data, device)
    _check_lengths(data, target.config)
    network, parent = load_start(recipe, target)
    ends = {*ids_of(tokenizer.eos_token_id), *ids_of(getattr(target.config, "eos_token_id", None))}
    vocabulary = choose_vocabulary(recipe.vocabulary, data.training, network.config.vocab_size, ends)
    return Materials(data, target, network, parent, vocabulary)


def choose_vocabulary(
    config: VocabularyConfig, training: TokenDataset, vocab_size: int, ends: Iterable[int]
) -> DraftVocabulary | None:
    """Return the most frequent of the learned tokens, and those that end a text; None for all of the target's tokens.

    The fewest tokens are taken that reach the coverage; equally frequent ones in the order of their ids.
    """
    size = config.max_size_of(vocab_size)
    if size is None:
        return None
    counts = training.learned_counts(vocab_size)
    ranks = counts.clone()
    ranks[[end for end in ends if 0 <= end < vocab_size]] = counts.sum() + 1
    order = ranks.sort(descending=True, stable=True).indices
    missing = counts[order].cumsum(0) < (config.coverage or DEFAULT_COVERAGE) * counts.sum()
    num_tokens = min(size, int(missing.sum()) + 1, int((ranks > 0).sum()))
    return DraftVocabulary(order[:num_tokens].sort().values, vocab_size)


def ids_of(value: int | Sequence[int] | None) -> list[int]:
    """Return a config's token ids as a list: it may have one, several or none."""
    return [] if value is None else [value] if isinstance(value, int) else [*value]


def _check_lengths(data: PreparedData, target_config: Any) -> None:
    positions = getattr(target_config, "max_position_embeddings", None)
    longest = max(dataset.length(index) for dataset in datasets(data) for index in range(len(dataset)))
    if positions is not None and longest > positions:
        raise ValueError(
            f"the longest conversation has {longest:,} tokens and the target {positions:,} positions; "
            f"give data.max_length={positions}"
        )


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The target's tokenizer; OSError or ValueError, in a sentence, if there is none."""
    from transformers import AutoTokenizer

    open_target(resolve(recipe.target), recipe.target_revision)
    with loading(f"the tokenizer of the target {recipe.target}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(recipe.target), revision=recipe.target_revision
        )
    return tokenizer


def load_target(recipe: Recipe, device: torch.device) -> FrozenTarget:
    """The target on a device, in evaluation mode; ValueError, in a sentence, if there is none."""
    from transformers import AutoModelForCausalLM

    dtype = recipe.target_dtype if recipe.target_dtype == "auto" else getattr(torch, recipe.target_dtype)
    place = {} if device.type == "cpu" else {"device_map": {"": device}}  # straight there, not through all of the RAM
    with loading(f"the target {recipe.target}"), _loading_everywhere():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            resolve(recipe.target), revision=recipe.target_revision, dtype=dtype, **place
        )
    model.eval().requires_grad_(False)
    return FrozenTarget(model)


def load_target_part(recipe: Recipe, data: PreparedData, device: torch.device) -> TargetPart:
    """The features' source as the recipe wants it. ValueError or OSError, in a sentence, if it cannot be had."""
    if recipe.features.mode == "stored":
        store = open_store(recipe.features_path)
        store.require(datasets(data))
        ends = load_target_ends(resolve(recipe.target), recipe.target_revision)
        if recipe.target_dtype != "auto":
            ends = ends.to(getattr(torch, recipe.target_dtype))
        return TargetPart(StoredFeatures(store, ends, device), ends.config.get_text_config(), store.target)
    target = load_target(recipe, device)
    return TargetPart(target, target.model.config.get_text_config(), identify(target.model))


def datasets(data: PreparedData) -> list[TokenDataset]:
    """The one or two datasets of a run."""
    return [data.training, *([data.validation] if data.validation else [])]


def new_network(config: EagleConfig, seed: int) -> EagleNetwork:
    """An untrained network, initialised from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagleNetwork(config)


def load_start(recipe: Recipe, target: TargetPart) -> tuple[EagleNetwork, dict[str, Any] | None]:
    """The float32 network to begin with, and what the drafter that it was says about itself (None: it is new)."""
    config = EagleConfig.for_target(target.config)
    if recipe.start is None:
        return new_network(config, recipe.training.seed), None
    start = resolve(recipe.start)
    found = load_network(start)
    files = read_drafter_files(start)
    check_fits(files, found.config, target.config)
    if files.target.get("fingerprint", target.identity.fingerprint) != target.identity.fingerprint:
        raise ValueError(
            f"start {recipe.start} was trained for a target with other weights; give a drafter of this one"
        )
    for name in ("fc_bias", "qkv_bias"):
        there, wanted = getattr(found.config, name), getattr(config, name)
        if there != wanted:
            raise ValueError(
                f"start {recipe.start} has {name} {there}, and a drafter of this target {wanted}; "
                f"give another drafter, or none to begin with a new one"
            )
    network = EagleNetwork(found.config)
    network.load_state_dict(found.state_dict())
    told = files.provenance
    return network, {"name": Path(start).resolve().name if Path(start).exists() else start, **told}


@contextmanager
def _loading_everywhere() -> Iterator[None]:
    """Under FSDP, transformers loads weights on the first process only: right for what is sharded, not for this."""
    before = os.environ.get(FSDP_LOADING)
    os.environ[FSDP_LOADING] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FSDP_LOADING]
        else:
            os.environ[FSDP_LOADING] = before
