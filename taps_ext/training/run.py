"""A recipe as a run: checked before any work, loaded, tried out, trained or gone on with.

(All that a recipe names is loaded here and nowhere else, which makes the file long.)
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.files import check_drafter_output, check_writable, read_drafter_files, write_text, written
from ..checkpoints.formats import check_fits
from ..checkpoints.load import TargetIdentity, identify, load_network, load_target_ends, loading, open_target
from ..drafters import DraftVocabulary
from ..drafters.network import EagleConfig, EagleNetwork
from ..tiny import resolve
from .calibrate import calibrate_run, dataset_facts, not_calibrated, target_facts, uncalibrated
from .data import PreparedData, prepare
from .features import FeatureSource, FrozenTarget, StoredFeatures, open_store
from .masks import TokenDataset
from .recipe import Recipe, TrainingConfig, VocabularyConfig, as_tree, dump_recipe
from .trainer import (
    BEST,
    CHECKPOINTS,
    FINAL,
    FREE,
    LOG,
    DrafterFacts,
    Observer,
    Trainer,
    TrainingResult,
    Updater,
    ValidationRecord,
    check_same,
    flat,
    micro_batch_size,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DATA, RECIPE = "data.json", "recipe.yaml"
FREE_KEYS = ("output", *(f"training.{name}" for name in FREE))
STATE_BYTES = 12  # of a parameter in a checkpoint: the weight and AdamW's two moments, float32
NUM_DRAFTERS = 3  # the best, the final one, and one that is being written
DEFAULT_COVERAGE = 0.99
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
FSDP_LOADING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


# ---- the run


def train(recipe: Recipe, observer: Observer | None = None) -> TrainingResult:
    """Run a recipe, from its beginning or from where it was stopped or killed.

    A finished run is left as it is, but for calibrations that it lacks. Raise ValueError or OSError, in a sentence,
    before any work where that can be known before.
    """
    output, accelerator, watching = _begin(recipe, observer)
    if (output / FINAL).exists():
        watching.note(f"the run in {output} is finished already; its drafter is {output / FINAL}")
        if accelerator.is_main_process and recipe.training.calibrate:
            _calibrate(recipe, output, accelerator.device, watching)
        return _finished(output)
    materials = _materials(recipe, output, accelerator, watching)
    dtype, metadata = getattr(torch, recipe.drafter_dtype), _metadata(recipe, materials)
    data, target = materials.data, materials.target
    facts = DrafterFacts(target.config, dtype, metadata, materials.vocabulary)
    inputs = (target.source, materials.network, data.training, data.validation, recipe.objective, recipe.training)
    trainer = Trainer(*inputs, output, facts, accelerator, watching)
    watching.note(f"{materials.num_trained:,} parameters, {trainer.updater.num_steps:,} steps")
    if accelerator.is_main_process:  # only now: a recipe that was refused leaves nothing that refuses the mended one
        output.mkdir(parents=True, exist_ok=True)
        with written("the run's description", output):
            write_text(output / DATA, json.dumps(data.report.to_dict(), indent=1) + "\n")
            write_text(output / RECIPE, dump_recipe(recipe))
    return trainer.train()


def _begin(recipe: Recipe, observer: Observer | None) -> tuple[Path, Accelerator, Observer]:
    """Check what needs no data, and return the output directory, this launch and who watches this process."""
    output = Path(recipe.output).expanduser()
    accelerator = make_accelerator(recipe.training, output)
    micro_batch_size(recipe.training, accelerator.num_processes)
    _check_output(recipe, output)
    return output, accelerator, observer if observer and accelerator.is_main_process else Observer()


def _materials(recipe: Recipe, output: Path, accelerator: Accelerator, watching: Observer) -> Materials:
    materials = load_materials(recipe, accelerator.device, watching)
    for line in materials.lines():
        watching.note(line)
    _check_disk(recipe, materials, output)
    return materials


def _metadata(recipe: Recipe, materials: Materials) -> dict[str, Any]:
    """Return what the drafter says about where it comes from, without the directories of this machine."""
    target = target_facts(recipe.target, materials.target.identity)
    facts = {"target": target, "data": materials.data.report.provenance()}
    return facts if materials.parent is None else {**facts, "parent": materials.parent}


def _calibrate(recipe: Recipe, output: Path, device: torch.device, observer: Observer) -> None:
    """Make the calibrations that a finished run lacks, as it was killed or something failed; note what fails now."""
    folders = [output / name for name in (FINAL, BEST) if (output / name).exists()]
    if not uncalibrated(folders):
        return
    try:
        materials = load_materials(recipe, device, observer)
        data, target = materials.data, _metadata(recipe, materials)["target"]
        saved = json.loads((output / FINAL / "config.json").read_text(encoding="utf-8"))["taps"]
        here = {"dataset": dataset_facts(data.training), "target": target}
        check_same(flat({name: saved[name] for name in here}), flat(here), output)
    except (ValueError, RuntimeError, OSError) as error:
        for folder in uncalibrated(folders):
            observer.note(not_calibrated(folder.name, error))
        return
    source, seed = materials.target.source, recipe.training.seed
    calibrate_run(folders, source, data.training, data.validation, seed, target, observer)


def _finished(output: Path) -> TrainingResult:
    """Return what a finished run had come to, as its drafter tells."""
    saved = json.loads((output / FINAL / "config.json").read_text(encoding="utf-8"))["taps"]
    record, best = None, output / BEST if (output / BEST).exists() else None
    if (estimate := saved["estimate"]) is not None:
        accuracy, is_best = tuple(estimate.pop("accuracy")), False
        if best is not None:
            is_best = json.loads((best / "config.json").read_text(encoding="utf-8"))["taps"]["step"] == saved["step"]
        record = ValidationRecord(step=saved["step"], accuracy=accuracy, is_best=is_best, **estimate)
    return TrainingResult(output / FINAL, best, saved["step"], saved["num_steps"], record)


# ---- a run tried out


@dataclass(frozen=True)
class DryRun:
    """What a run will take."""

    num_parameters: int  # that are trained
    num_sequences: int  # for training
    num_tokens: int  # of these
    num_steps: int
    seconds_per_step: float
    hours: float  # of all steps, without validations
    peak_memory_bytes: int  # of a GPU, or of the main process
    checkpoint_bytes: int  # of each
    feature_bytes: int | None  # on disk; None: features are computed as they are needed


def dry_run(recipe: Recipe, observer: Observer | None = None) -> DryRun:
    """Return what the recipe's run will take, by two updates, one of the longest sequences; nothing stays on disk.

    Raise what `train` would raise before its first update.
    """
    output, accelerator, watching = _begin(recipe, observer)
    materials = _materials(recipe, output, accelerator, watching)
    data, num_parameters = materials.data.training, materials.num_trained  # before FSDP takes its share
    source, network, vocabulary = materials.target.source, materials.network, materials.vocabulary
    updater = Updater(accelerator, source, network, data, recipe.objective, recipe.training, vocabulary)
    _timed(updater, _longest_step(updater))  # first: the first update is slow, and this one needs the most memory
    seconds_per_token = _timed(updater, 1)
    seconds_per_step = seconds_per_token * data.num_tokens * recipe.training.batch_size / len(data)
    num_tokens = sum(dataset.num_tokens for dataset in datasets(materials.data))
    store_bytes = num_tokens * materials.network.config.hidden_size * getattr(torch, recipe.features.dtype).itemsize
    return DryRun(
        num_parameters=num_parameters,
        num_sequences=len(data),
        num_tokens=data.num_tokens,
        num_steps=updater.num_steps,
        seconds_per_step=seconds_per_step,
        hours=seconds_per_step * updater.num_steps / 3600,
        peak_memory_bytes=_peak_memory(accelerator.device),
        checkpoint_bytes=STATE_BYTES * num_parameters,
        feature_bytes=None if recipe.features.mode == "online" else store_bytes,
    )


def _longest_step(updater: Updater) -> int:
    """Return the update of the first epoch that reads the longest sequence."""
    steps = range(1, updater.order.batches_per_epoch + 1)
    return max(steps, key=lambda step: max(map(updater.dataset.length, updater.order[step - 1])))


def _timed(updater: Updater, step: int) -> float:
    """Return the seconds a token of an update takes."""
    started = time.perf_counter()
    facts = updater.run(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / facts.num_tokens


def _peak_memory(device: torch.device) -> int:
    """Return bytes: of a GPU what torch had allocated at once, of the CPU what the process had."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- what is checked before any work


def _check_output(recipe: Recipe, output: Path) -> None:
    """Raise ValueError unless the output directory is new, or that of a run of this recipe."""
    check_writable(output)
    for name in (BEST, FINAL):
        check_drafter_output(output / name)
    path = output / RECIPE
    if path.exists():
        import yaml

        there, here = flat(yaml.safe_load(path.read_text(encoding="utf-8"))), flat(as_tree(recipe))
        for key in FREE_KEYS:
            there[key] = here[key]
        check_same(there, here, output)
    elif strangers := [name for name in (BEST, FINAL, CHECKPOINTS, LOG) if (output / name).exists()]:
        raise ValueError(
            f"output {output} holds {', '.join(strangers)} of a run without {RECIPE}; give another directory"
        )


def _check_disk(recipe: Recipe, materials: Materials, output: Path) -> None:
    """Raise OSError unless the checkpoints and drafters of the run, with those that are there, fit on the disk."""
    config = materials.network.config
    trained = materials.num_trained
    num_checkpoints = recipe.training.keep_checkpoints + 1  # one is written before one is removed
    embedded = config.vocab_size * config.hidden_size if materials.vocabulary is None else 0
    drafter_bytes = (trained + embedded) * getattr(torch, recipe.drafter_dtype).itemsize
    needed = num_checkpoints * STATE_BYTES * trained + NUM_DRAFTERS * drafter_bytes
    present = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) if output.exists() else 0
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free + present:
        raise OSError(
            f"the run needs {needed / 2**30:.1f} GiB in {output} ({num_checkpoints} checkpoints of "
            f"{STATE_BYTES * trained / 2**30:.1f} GiB, {NUM_DRAFTERS} drafters), and {free / 2**30:.1f} GiB are free; "
            f"give an output on a larger disk, or a smaller training.keep_checkpoints"
        )


# ---- what a recipe names, loaded


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
        """Return the share of the learned tokens that the drafter can propose."""
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
        """Return the number of parameters of the network."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def load_materials(recipe: Recipe, device: torch.device, observer: Observer) -> Materials:
    """Return what the recipe names, the cheap things first; raise ValueError or OSError if something is missing."""
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe.data, tokenizer, partial(observer.progress, "conversations"))
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
    """Return the target's tokenizer; raise OSError or ValueError, in a sentence, if there is none."""
    from transformers import AutoTokenizer

    open_target(resolve(recipe.target), recipe.target_revision)
    with loading(f"the tokenizer of the target {recipe.target}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            resolve(recipe.target), revision=recipe.target_revision
        )
    return tokenizer


def load_frozen_target(recipe: Recipe, device: torch.device) -> FrozenTarget:
    """Return the target on a device, in evaluation mode; raise ValueError, in a sentence, if there is none."""
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
    """Return the features' source that the recipe wants; raise ValueError or OSError if it cannot be had."""
    if recipe.features.mode == "stored":
        store = open_store(recipe.features_path)
        store.require(datasets(data))
        ends = load_target_ends(resolve(recipe.target), recipe.target_revision)
        if recipe.target_dtype != "auto":
            ends = ends.to(getattr(torch, recipe.target_dtype))
        return TargetPart(StoredFeatures(store, ends, device), ends.config.get_text_config(), store.target)
    target = load_frozen_target(recipe, device)
    return TargetPart(target, target.model.config.get_text_config(), identify(target.model))


def datasets(data: PreparedData) -> list[TokenDataset]:
    """Return the one or two datasets of a run."""
    return [data.training, *([data.validation] if data.validation else [])]


def new_network(config: EagleConfig, seed: int) -> EagleNetwork:
    """Return an untrained network, initialised from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagleNetwork(config)


def load_start(recipe: Recipe, target: TargetPart) -> tuple[EagleNetwork, dict[str, Any] | None]:
    """Return the float32 network to begin with, and what the drafter that it was says of itself (None: it is new)."""
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
    saved = files.provenance
    return network, {"name": Path(start).resolve().name if Path(start).exists() else start, **saved}


@contextmanager
def _loading_everywhere() -> Iterator[None]:
    """Let every process load weights: under FSDP, transformers does it on the first one only, for what is sharded."""
    before = os.environ.get(FSDP_LOADING)
    os.environ[FSDP_LOADING] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FSDP_LOADING]
        else:
            os.environ[FSDP_LOADING] = before


# ---- the processes of a run, as `accelerate launch` or `torchrun` started them


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """Return the accelerator of this launch, in the config's precision; raise ValueError if it cannot be had."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
    except ModuleNotFoundError as missing:
        raise ValueError(f"training needs {missing.name}: pip install 'taps_ext[train]'") from missing
    _check_tracker(config.tracker)
    precision = PRECISIONS[config.precision]
    _forget_precision(precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),  # without this, processes on CPUs would not know of each other
        # accelerate launch may set another number, by which backward() would divide
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.tracker == "none" else config.tracker,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tracker")),
    )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        raise ValueError(f"training runs on one process, with DDP or with FSDP, and this launch asks for {kind}")
    if kind == "FSDP":
        _shard_as_one(accelerator)
    return accelerator


def _forget_precision(precision: str) -> None:
    """Let a second run of this Python process have another precision: accelerate would keep the first one's.

    (Under FSDP it keeps more than that, and says so itself.)
    """
    state = sys.modules["accelerate"].state.AcceleratorState
    if state._shared_state and state().mixed_precision != precision and state().distributed_type.value != "FSDP":
        state._reset_state()


def _shard_as_one(accelerator: Accelerator) -> None:
    """Keep the drafter in one shard: its parts are called one by one, and shards of them would never be gathered."""
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = None
    plugin.cpu_ram_efficient_loading = False  # it passes through the meta device, which plain attributes do not survive
    if (policy := plugin.mixed_precision_policy) is not None:  # sums in bfloat16 are none
        exact = {"reduce_dtype": torch.float32, "output_dtype": None}
        names = {field.name for field in fields(policy)}
        plugin.mixed_precision_policy = replace(policy, **{k: v for k, v in exact.items() if k in names})


def _check_tracker(name: str) -> None:
    """Raise ValueError, in a sentence, unless a run can log to this tracker here."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(LOGGER_TYPE_TO_CLASS)
    if name not in ("none", *known):
        raise ValueError(f"training.tracker must be none, {', '.join(known[:-1])} or {known[-1]}, got {name!r}")
    if name != "none" and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise ValueError(f"training.tracker is {name}, which is not installed here: pip install {name}, or take none")
