"""The run of a trainer: updates, validations, checkpoints, the best and the final drafter, and where to go on.

What is written when is such that a process may be killed at any moment: a checkpoint of step S gets its name only when
everything up to S is written, and a run that goes on from it repeats what came after. (This file is longer than others:
an update, what is kept of it and how a run goes on are one thing, read together.)
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from random import Random
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.files import sync, write_text, written
from ..checkpoints.load import save_drafter
from ..drafters import DraftVocabulary
from ..drafters.network import EagleConfig, EagleNetwork
from ..native import code_version
from .calibrate import calibrate_run, dataset_facts
from .features import DraftBatch, FeatureSource, Head
from .masks import TokenBatch, TokenDataset
from .objectives import Judge, ObjectivePass, PassOutput, estimate, first_stream, next_stream
from .recipe import ObjectiveConfig, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

BEST, FINAL, CHECKPOINTS, LOG, STATE = "best", "final", "checkpoints", "log.jsonl", "state.json"
NAME = re.compile(r"step-\d{8,}")  # of a checkpoint
POOL_BATCHES = 16  # batches that are sorted by length together: little padding, and still a fresh mixture each time
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 1.0  # a launcher repeats the signal that the terminal has sent to everybody
# What may differ when a run goes on: how it is computed and watched, not the weights that come out.
FREE = (
    *("log_every", "save_every", "keep_checkpoints", "tracker", "calibrate"),
    *("micro_batch_size", "gradient_checkpointing"),
)


# ---- what a run says


@dataclass(frozen=True)
class UpdateRecord:
    """The updates since the last record in log.jsonl, over all processes."""

    step: int  # the latest of them, from 1
    epoch: float  # data read so far, in epochs
    loss: float  # mean over the learned slots, summed over the passes
    accuracy: tuple[float, ...]  # by pass: share of learned slots whose likeliest token is the target's likeliest
    learning_rate: float  # of the latest
    gradient_norm: float  # before clipping
    tokens_per_second: float
    seconds_left: float  # of the whole run, at the speed of the current epoch


@dataclass(frozen=True)
class ValidationRecord:
    """The held-out conversations, after an update. See `objectives.estimate` for what is estimated."""

    step: int
    loss: float
    accuracy: tuple[float, ...]  # by depth (from 1): share of drafts that are accepted when all before them were
    acceptance_length: float  # 1 + the mean number of accepted drafts of a chain without branches
    is_best: bool


Record = UpdateRecord | ValidationRecord


class Observer:
    """Follows a run on the main process; this one says nothing."""

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Receive how much of some work besides updates is done (total None: of an unknown amount)."""

    def start(self, first_step: int, num_steps: int) -> None:
        """Receive after which update the run begins (0, or where it resumed) and with which it ends."""

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        """Receive an update; `is_logged`: log.jsonl has the record, and the next one begins anew."""

    def validated(self, record: ValidationRecord) -> None:
        """Receive a validation."""

    def note(self, sentence: str) -> None:
        """Receive a sentence for people."""

    def stop(self) -> None:
        """Receive the end of the run, whatever the reason."""


class Journal:
    """log.jsonl, which reads as if the run had never been interrupted, and accelerate's trackers."""

    def __init__(self, path: Path, after_step: int, accelerator: Accelerator) -> None:
        """Open the file without what a killed run wrote after `after_step`, its last checkpoint's step."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        with written(path.name, path.parent):
            write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= after_step))
        self._path, self._file, self._accelerator = path, path.open("a", encoding="utf-8"), accelerator

    def write(self, record: Record) -> None:
        """Add a record; `kind` is "step" or "validation"."""
        kind = "step" if isinstance(record, UpdateRecord) else "validation"
        with written(self._path.name, self._path.parent):
            self._file.write(json.dumps({"kind": kind, **asdict(record)}) + "\n")
            self._file.flush()
        if self._accelerator.trackers:
            self._accelerator.log(figures(record), record.step)

    def sync(self) -> None:
        """Wait until all records are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a line that did not fit on the disk is given up."""
        with suppress(OSError):
            self._file.close()


def figures(record: Record) -> dict[str, float]:
    """Return the numbers of a record under the names that trackers show."""
    room, place = ("train", "pass") if isinstance(record, UpdateRecord) else ("validation", "depth")
    values: dict[str, Any] = asdict(record)
    accuracy: tuple[float, ...] = values.pop("accuracy")
    found = {f"{room}/{name}": float(value) for name, value in values.items() if name not in ("step", "is_best")}
    return found | {f"{room}/accuracy_{place}_{n}": value for n, value in enumerate(accuracy, 1)}


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for the torn one that a kill leaves at the end."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Interruption:
    """While entered (in the main thread), the first SIGINT or SIGTERM is a request; a later one acts at once."""

    def __init__(self) -> None:
        self.is_requested = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_requested:
            self.is_requested, self._since = True, now
        elif now - self._since > SAME_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


# ---- what must be the same when a run goes on


def settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the fields of a training configuration that the result depends on."""
    return {name: value for name, value in asdict(config).items() if name not in FREE}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested JSON values by dotted name; lists of plain values stay whole."""
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
    """Raise ValueError that names what differs; `there` is what the output directory was made with."""
    if differing := [name for name in {**there, **here} if there.get(name) != here.get(name)]:
        how = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing)
        raise ValueError(f"{output} holds another run: {how}; give another output, or what that run was started with")


# ---- an update


class BatchOrder:
    """Which sequences the update of each step reads: a function of the seed, open at any step, so a run can resume.

    Rows of a batch have similar lengths. An epoch visits every sequence once, but for a few that fill no batch: others
    each time.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, seed: int) -> None:
        self.batch_size = min(batch_size, len(dataset))
        self.seed = seed
        self._dataset = dataset
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of updates in an epoch."""
        return len(self._dataset) // self.batch_size

    def __getitem__(self, step: int) -> list[int]:
        """Return the `batch_size` sequences of a step (from 0)."""
        epoch, number = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[number]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self.seed}/{epoch}")
        order = rng.sample(range(len(self._dataset)), self.batches_per_epoch * self.batch_size)
        size, pool_size = self.batch_size, self.batch_size * POOL_BATCHES
        batches = []
        for start in range(0, len(order), pool_size):
            pool = sorted(order[start : start + pool_size], key=self._dataset.length)
            groups = [pool[i : i + size] for i in range(0, len(pool), size)]
            batches += rng.sample(groups, len(groups))
        return batches


@dataclass(frozen=True)
class UpdateFacts:
    """What an update was like, over all processes and before the weights moved."""

    loss: float  # mean over the learned slots, summed over the passes
    accuracy: tuple[float, ...]  # by pass
    learning_rate: float
    gradient_norm: float  # before clipping
    num_tokens: int
    is_stop_requested: bool  # of any process


class Updater:
    """The drafter that is trained, its optimizer and the order of its data. An update is a function of its step."""

    def __init__(
        self,
        accelerator: Accelerator,
        source: FeatureSource,
        network: EagleNetwork,
        dataset: TokenDataset,
        objective: ObjectiveConfig,
        config: TrainingConfig,
        vocabulary: DraftVocabulary | None = None,
    ) -> None:
        """Train `network`, float32, in place; raise ValueError if the batch cannot be split."""
        self.micro_batch_size = micro_batch_size(config, accelerator.num_processes)
        if config.batch_size > len(dataset):
            raise ValueError(
                f"training.batch_size {config.batch_size} is more than the {len(dataset)} training conversations; "
                f"lower it, or give more data"
            )
        self.accelerator, self.source, self.dataset = accelerator, source, dataset
        self.objective, self.config = objective, config
        self.order = BatchOrder(dataset, config.batch_size, config.seed)
        self.num_steps = config.steps or max(1, round((config.epochs or 0) * self.order.batches_per_epoch))
        head: Head = source.logits if vocabulary is None else source.draft_head(vocabulary)
        judge = None if vocabulary is None else judge_of(source, vocabulary)
        model = ObjectivePass(network.train(), head, objective, config.gradient_checkpointing, judge)
        optimizer = torch.optim.AdamW(
            model.parameters(), config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def run(self, step: int, is_stop_requested: bool = False) -> UpdateFacts:
        """Make update number `step` (from 1). Raise ValueError, before the weights move, if the loss is not finite."""
        rows = self.order[step - 1]
        num_learned = sum(self.dataset.num_learned[row] for row in rows)
        rate = learning_rate(step, self.config, self.num_steps)
        self.optimizer.zero_grad()
        sums = self._accumulate(self._own_parts(rows), step, num_learned)
        norm = self._clip()
        sums = torch.cat((sums, sums.new_tensor([is_stop_requested])))
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        loss, *correct, stop, norm_value = torch.cat((sums, norm.to(sums)[None])).tolist()  # one host read
        facts = UpdateFacts(
            loss=loss / num_learned,
            accuracy=tuple(number / num_learned for number in correct),
            learning_rate=rate,
            gradient_norm=norm_value,
            num_tokens=sum(self.dataset.length(row) for row in rows),
            is_stop_requested=stop > 0,
        )
        _check_finite(step, facts)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return facts

    def forward(self, batch: DraftBatch, streams: list[Tensor]) -> PassOutput:
        """Return one pass of the model, in the run's precision."""
        with self.accelerator.autocast():
            out: PassOutput = self.model(batch, streams)
        return out

    def _own_parts(self, rows: list[int]) -> list[list[int]]:
        """Return this process's micro-batches. Rows are sorted by length, so those of one moment are alike on all."""
        size = self.micro_batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return parts[self.accelerator.process_index :: self.accelerator.num_processes]

    def _accumulate(self, parts: list[list[int]], step: int, num_learned: int) -> Tensor:
        """Return float64 [1 + passes], this process's loss and correct slots as sums, and leave the gradients."""
        num_passes = self.objective.num_passes
        sums = torch.zeros(1 + num_passes, dtype=torch.float64, device=self.accelerator.device)
        share = self.accelerator.num_processes / num_learned  # processes average their gradients
        for number, part in enumerate(parts, 1):
            batch = self.source.draft_batch(self.dataset.batch(part))
            streams = [first_stream(batch, self.objective, noise_seed(self.config.seed, step))]
            for n in range(num_passes):
                is_last = number == len(parts) and n == num_passes - 1
                with self._syncing(is_last):
                    out = self.forward(batch, streams)
                    self.accelerator.backward(out.loss * share)
                sums[0] += out.loss.detach()
                sums[1 + n] += out.num_correct
                streams.append(next_stream(streams[-1], out.guesses))
        return sums

    def _syncing(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context: gradients are exchanged in the last backward of an update only."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def _clip(self) -> Tensor:
        """Clip the gradient as the config says: the whole to its norm, each element to its value; return its norm."""
        parameters = list(self.model.parameters())
        norm: Any = self.accelerator.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
        if self.config.clip_value is not None:
            for gradient in _local_gradients(parameters):
                gradient.clamp_(-self.config.clip_value, self.config.clip_value)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole


def judge_of(source: FeatureSource, vocabulary: DraftVocabulary) -> Judge:
    """Return what finds the target's likeliest tokens in a draft vocabulary: -1 for those outside."""
    draft_ids = vocabulary.draft_ids.to(source.embedding.device)
    return lambda features: draft_ids[source.logits(features).max(-1).indices]


def micro_batch_size(config: TrainingConfig, num_processes: int) -> int:
    """Return the sequences of one forward on one process: as many as the config allows that split its share evenly.

    Raise ValueError if the batch of an update cannot be split evenly over the processes.
    """
    share, left = divmod(config.batch_size, num_processes)
    if left or not share:
        raise ValueError(
            f"training.batch_size {config.batch_size} cannot be split evenly over {num_processes} processes; "
            f"make it a multiple of {num_processes}"
        )
    return max(size for size in range(1, min(config.micro_batch_size or share, share) + 1) if share % size == 0)


def learning_rate(step: int, config: TrainingConfig, num_steps: int) -> float:
    """Return the rate of update `step` (from 1): linear up to `warmup_steps`, then linear to 0 after the last one."""
    done, end = step - 1, config.decay_steps or num_steps
    if done < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    return config.learning_rate * max(0.0, (end - done) / max(1, end - config.warmup_steps))


def noise_seed(seed: int, step: int) -> int:
    """Return the seed of an update's noise."""
    return (seed << 32) + step


def held_out_batches(dataset: TokenDataset, size: int, index: int, num_processes: int) -> Iterable[TokenBatch]:
    """Yield a process's share of a dataset; some have a last one that masks everything.

    Processes that hold shards of the weights must all run equally many forwards.
    """
    rows = sorted(range(len(dataset)), key=dataset.length)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number in range(index, math.ceil(len(parts) / num_processes) * num_processes, num_processes):
        batch = dataset.batch(parts[number] if number < len(parts) else parts[0])
        is_spare = number >= len(parts)
        yield TokenBatch(batch.tokens, batch.loss_mask & (not is_spare), batch.lengths, batch.ids)


def _local_gradients(parameters: Iterable[Tensor]) -> Iterable[Any]:
    """Yield the gradients, of sharded parameters the part that this process holds."""
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            yield gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _check_finite(step: int, facts: UpdateFacts) -> None:
    for name, value in (("loss", facts.loss), ("gradient", facts.gradient_norm)):
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} of step {step} is {value} at a learning rate of {facts.learning_rate:.3g}; "
                f"lower training.learning_rate or raise training.warmup_steps, and start in a new output directory"
            )


# ---- the run


@dataclass(frozen=True)
class TrainingResult:
    """Where a run stands and what it has written."""

    final: Path | None  # the drafter of the last step; None: the run was asked to stop before
    best: Path | None  # the drafter with the longest estimated acceptance length; None: nothing was held out
    step: int
    num_steps: int
    validation: ValidationRecord | None  # the latest one

    @property
    def is_finished(self) -> bool:
        """Return whether nothing is left to do."""
        return self.final is not None


@dataclass(frozen=True)
class DrafterFacts:
    """What a saved drafter needs besides its weights."""

    target_config: Any
    dtype: torch.dtype = torch.bfloat16
    metadata: Mapping[str, Any] | None = None  # JSON values: target, data, parent
    vocabulary: DraftVocabulary | None = None  # what the drafter can propose; None: every token of the target


class Trainer:
    """Trains one drafter, or goes on with it, in an output directory."""

    def __init__(
        self,
        source: FeatureSource,
        network: EagleNetwork,
        training: TokenDataset,
        validation: TokenDataset | None,
        objective: ObjectiveConfig,
        config: TrainingConfig,
        output: Path,
        facts: DrafterFacts,
        accelerator: Accelerator,
        observer: Observer | None = None,
    ) -> None:
        """Train `network`, float32, in place."""
        self.accelerator = accelerator
        self.updater = Updater(self.accelerator, source, network, training, objective, config, facts.vocabulary)
        self.source, self.config, self.validation, self.output, self.facts = source, config, validation, output, facts
        self.observer = observer if observer and self.accelerator.is_main_process else Observer()
        self.checkpoints = output / CHECKPOINTS
        self._network_config = network.config
        self._identity = self._make_identity(network.config)
        self._journal: Journal | None = None  # of the main process, while it trains
        self._best: ValidationRecord | None = None
        self._last: ValidationRecord | None = None
        self._recent: list[UpdateRecord] = []  # since the last one in the log
        self._pace = Pace()

    def train(self) -> TrainingResult:
        """Run what is left of the updates; the same call again goes on from the newest checkpoint.

        A signal (SIGINT, SIGTERM) ends it after a checkpoint of the step. Errors are ValueError or OSError, sentences.
        """
        first = self._resume()
        with self._journal_after(first), Interruption() as interruption:
            self.observer.start(first, self.updater.num_steps)
            try:
                return self._finish(self._run(first, interruption))
            finally:
                self.observer.stop()

    def _run(self, step: int, interruption: Interruption) -> int:
        """Make the updates after `step`, and return the step reached."""
        is_stopping = False
        self._pace.start(step)
        while step < self.updater.num_steps and not is_stopping:
            started = time.perf_counter()
            update = self.updater.run(step + 1, interruption.is_requested)
            step, is_stopping = step + 1, update.is_stop_requested
            self._record(step, update, time.perf_counter() - started)
            if self._is_due(step, self.config.validate_every):
                self._validate(step)
            if is_stopping or self._is_due(step, self.config.save_every):
                self._save(step)
        return step

    def _finish(self, step: int) -> TrainingResult:
        """Write the drafter of the last step, or say where the run stands."""
        is_last = step == self.updater.num_steps
        if is_last:
            self._write_drafter(FINAL, step, self._last)
            if self.config.calibrate and self.accelerator.is_main_process:  # for which the others need not wait
                folders = [self.output / FINAL, *([self.output / BEST] if self._best else ())]
                target, data = (self.facts.metadata or {}).get("target"), (self.updater.dataset, self.validation)
                calibrate_run(folders, self.source, *data, self.config.seed, target, self.observer)
        else:
            self.observer.note(
                f"stopped after step {step} of {self.updater.num_steps}; run it again to go on from there"
            )
        final, best = (self.output / FINAL if is_last else None), (self.output / BEST if self._best else None)
        return TrainingResult(final, best, step, self.updater.num_steps, self._last)

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.updater.num_steps

    def _record(self, step: int, update: UpdateFacts, seconds: float) -> None:
        per_epoch, num_steps = self.updater.order.batches_per_epoch, self.updater.num_steps
        epoch, speed = step / per_epoch, update.num_tokens / seconds
        left = self._pace.seconds_left(step, num_steps, is_new_epoch=step % per_epoch == 0)
        numbers = (update.loss, update.accuracy, update.learning_rate, update.gradient_norm)
        self._recent.append(UpdateRecord(step, epoch, *numbers, speed, left))
        record, is_logged = mean_record(self._recent), self._is_due(step, self.config.log_every)
        self.observer.step(record, is_logged)
        if is_logged:
            self._recent = []
            if self._journal is not None:
                self._journal.write(record)

    def _validate(self, step: int) -> None:
        if self.validation is None:
            return
        accelerator, updater = self.accelerator, self.updater
        place = accelerator.process_index, accelerator.num_processes
        found = estimate(
            updater.forward,
            self.source,
            held_out_batches(self.validation, updater.micro_batch_size, *place),
            updater.objective,
            reduce=(lambda sums: accelerator.reduce(sums, "sum")) if accelerator.num_processes > 1 else None,
        )
        measured = tuple(takewhile(math.isfinite, found.accuracy))  # nothing is known of depths that no draft reached
        length = found.acceptance_length if math.isfinite(found.acceptance_length) else 1.0  # nothing could be drafted
        is_best = self._best is None or length > self._best.acceptance_length
        self._last = record = ValidationRecord(step, found.loss, measured, length, is_best)
        if is_best:
            self._best = record
            self._write_drafter(BEST, step, record)
        self.observer.validated(record)
        if self._journal is not None:
            self._journal.write(record)

    def _write_drafter(self, name: str, step: int, record: ValidationRecord | None) -> None:
        """Write the weights of now as a drafter's directory; every process takes part in gathering them."""
        weights = self.accelerator.get_state_dict(self.updater.model)
        if self.accelerator.is_main_process:
            with torch.device("meta"):
                network = EagleNetwork(self._network_config)
            weights = {k.removeprefix("module.").removeprefix("network."): v for k, v in weights.items()}
            network.load_state_dict(weights, assign=True)
            with written(f"the drafter {name}", self.output):
                save_drafter(
                    network.to(self.facts.dtype),
                    self.output / name,
                    embedding=self.source.embedding,
                    target_config=self.facts.target_config,
                    metadata=self._metadata(step, record),
                    vocabulary=self.facts.vocabulary,
                )
        self.accelerator.wait_for_everyone()

    def _metadata(self, step: int, record: ValidationRecord | None) -> dict[str, Any]:
        """Return how the drafter was made, in an order for readers; a function of the run alone, without times."""
        dataset = self.updater.dataset
        names = ("acceptance_length", "accuracy", "loss")
        return {
            "algorithm": self.updater.objective.name,
            **(self.facts.metadata or {}),
            "step": step,
            "num_steps": self.updater.num_steps,
            "seed": self.config.seed,
            "trained_length": max(map(dataset.length, range(len(dataset)))),
            "dataset": dataset_facts(dataset),
            "estimate": None if record is None else {name: getattr(record, name) for name in names},
            "objective": asdict(self.updater.objective),
            "training": settings(self.config),
            "code": code_version(),
        }

    def _make_identity(self, network: EagleConfig) -> dict[str, Any]:
        """Return what must be the same when the run goes on, by dotted name."""
        parts = {"training": settings(self.config), "objective": asdict(self.updater.objective)}
        validation, vocabulary = self.validation, self.facts.vocabulary
        data = {"training": self.updater.dataset.checksum, "validation": validation.checksum if validation else None}
        target = (self.facts.metadata or {}).get("target", {})
        chosen = {} if vocabulary is None else {"vocabulary": vocabulary.checksum}
        others = {"network": asdict(network), "data": data, "target": {"fingerprint": target.get("fingerprint")}}
        return flat({**parts, **others, **chosen})

    def _save(self, step: int) -> None:
        """Write a checkpoint beside, then give it its name: it is whole or not there."""
        folder, partial = (self.checkpoints / f"{dot}step-{step:08d}" for dot in ("", "."))
        state = {"step": step, "identity": self._identity, "launch": launch_of(self.accelerator)}
        state |= {"best": self._best and asdict(self._best), "last": self._last and asdict(self._last)}
        state["recent"] = [asdict(record) for record in self._recent]
        older = _checkpoints(self.checkpoints) if self.accelerator.is_main_process else []
        way_out = f"{older[-1].name} is whole, and the run goes on from there" if older else "there is none before it"
        try:
            with written(f"checkpoint {folder.name}", self.checkpoints, way_out):
                if self._journal is not None:
                    self._journal.sync()
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                self.accelerator.save_state(str(partial))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    write_text(partial / STATE, json.dumps(state, indent=1) + "\n")
                    for path in (*partial.rglob("*"), partial):
                        sync(path)
                    partial.rename(folder)
                    sync(self.checkpoints)
                    for old in older[: max(0, len(older) + 1 - self.config.keep_checkpoints)]:
                        shutil.rmtree(old.rename(old.with_name(f".{old.name}")))
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the step that the run goes on after."""
        found: Any = None
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            folder = next(reversed(_checkpoints(self.checkpoints)), None)
            found = self._identity, folder, folder and _read_state(folder)
        wanted, folder, state = broadcast(self.accelerator, found)
        if wanted != self._identity:
            raise ValueError("this process has other data or settings than the main one; give both the same files")
        if folder is None:
            return 0
        check_same(state["identity"], self._identity, self.output)
        if state["launch"] != (here := launch_of(self.accelerator)):
            raise ValueError(
                f"checkpoint {folder.name} was saved on {state['launch']}, and this launch is on {here}; "
                "resume it as it was started"
            )
        self.accelerator.load_state(str(folder))
        self._best, self._last = (state[name] and ValidationRecord(**_tuples(state[name])) for name in ("best", "last"))
        self._recent = [UpdateRecord(**_tuples(record)) for record in state["recent"]]
        return int(state["step"])

    def _clear_leftovers(self) -> None:
        """Remove what a killed process was writing or removing."""
        for path in (*self.checkpoints.glob(".step-*"), *self.output.glob(".best.*"), *self.output.glob(".final.*")):
            shutil.rmtree(path)
        for path in self.output.glob(".*.tmp"):
            path.unlink()

    @contextmanager
    def _journal_after(self, step: int) -> Iterator[None]:
        """Open `self._journal` and the trackers."""
        accelerator = self.accelerator
        config = {name: str(value) if isinstance(value, list) else value for name, value in self._identity.items()}
        accelerator.init_trackers("taps_ext", config=config)
        self._journal = Journal(self.output / LOG, step, accelerator) if accelerator.is_main_process else None
        try:
            yield
        finally:
            if self._journal is not None:
                self._journal.close()
            for tracker in accelerator.trackers:
                tracker.finish()


class Pace:
    """The time left at the speed of the current epoch; right after its beginning, at that of the one before."""

    def __init__(self) -> None:
        self._first, self._since, self._seconds = 0, 0.0, 0.0

    def start(self, step: int) -> None:
        """Begin to count after an update."""
        self._first, self._since = step, time.monotonic()

    def seconds_left(self, step: int, num_steps: int, is_new_epoch: bool) -> float:
        """Return the seconds for the updates after `step`, which is done."""
        self._seconds = (time.monotonic() - self._since) / (step - self._first)
        if is_new_epoch:
            self.start(step)
        return self._seconds * (num_steps - step)


def mean_record(records: Sequence[UpdateRecord]) -> UpdateRecord:
    """Return the latest record with the means of all."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(records)

    return replace(
        records[-1],
        loss=mean(record.loss for record in records),
        accuracy=tuple(map(mean, zip(*(record.accuracy for record in records), strict=True))),
        gradient_norm=mean(record.gradient_norm for record in records),
        tokens_per_second=mean(record.tokens_per_second for record in records),
    )


def broadcast(accelerator: Accelerator, value: Any) -> Any:
    """Return the main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def launch_of(accelerator: Accelerator) -> str:
    """Return how the processes hold the weights, for people."""
    sharing = " that share the weights" if accelerator.distributed_type.value == "FSDP" else ""
    return f"{accelerator.num_processes} process(es){sharing}"


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints by step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return {name: state[name] for name in ("step", "identity", "launch", "best", "last", "recent")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"checkpoint {folder} is damaged ({STATE} cannot be read); delete it to go on from the one before"
        ) from error


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON's lists as the tuples that records hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
