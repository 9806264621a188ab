"""The run of a trainer: updates, validations, checkpoints, the best and the final drafter, and where to go on.

What is written when is such that a process may be killed at any moment: a checkpoint of step S is there only after
everything that the run wrote up to S, and a run that goes on from it repeats, bit for bit, what came after.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.files import written
from ..checkpoints.load import save_drafter
from ..drafters import DraftVocabulary
from ..drafters.network import EagleNetwork
from ..native import code_version
from .acceptance_estimate import estimate
from .calibrate import calibrate_run
from .checkpoints import Checkpoints, RunState, layout
from .dataset import TokenDataset
from .features import FeatureSource
from .interruption import Interruption
from .journal import Journal
from .launch import broadcast, make_accelerator
from .progress import Observer, StepRecord, ValidationRecord
from .provenance import check_same, dataset_facts, identity, settings
from .recipe import ObjectiveConfig, TrainingConfig
from .update import UpdateFacts, Updater, held_out_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

BEST, FINAL, CHECKPOINTS, LOG = "best", "final", "checkpoints", "log.jsonl"


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
        """Nothing is left to do."""
        return self.final is not None


@dataclass(frozen=True)
class DrafterFacts:
    """What a saved drafter needs besides its weights."""

    target_config: Any
    dtype: torch.dtype = torch.bfloat16
    metadata: Mapping[str, Any] | None = None  # JSON values: target, data, parent
    vocabulary: DraftVocabulary | None = None  # what the drafter can propose; None: every token of the target


class _Silent:
    """The observer of a run that nobody watches."""

    def preparing(self, done: int, total: int | None) -> None: ...
    def start(self, first_step: int, num_steps: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def validated(self, record: ValidationRecord) -> None: ...
    def note(self, sentence: str) -> None: ...
    def stop(self) -> None: ...


class Trainer:
    """Trains one drafter, or goes on with it, in an output folder."""

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
        observer: Observer | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """`network`, float32, is trained in place. `accelerator` is by default what the launch asks for."""
        self.accelerator = accelerator or make_accelerator(config, output)
        self.updater = Updater(self.accelerator, source, network, training, objective, config, facts.vocabulary)
        self.source, self.config, self.validation, self.output, self.facts = source, config, validation, output, facts
        self.observer: Observer = observer if observer and self.accelerator.is_main_process else _Silent()
        self.checkpoints = Checkpoints(output / CHECKPOINTS, config.keep_checkpoints)
        self._network_config = network.config
        target = (facts.metadata or {}).get("target", {})
        self._identity = identity(
            training, validation, objective, config, network.config, target.get("fingerprint"), facts.vocabulary
        )
        self._journal: Journal | None = None  # of the main process, while it trains
        self._best: ValidationRecord | None = None
        self._last: ValidationRecord | None = None

    def train(self) -> TrainingResult:
        """Run what is left of the updates; the same call again goes on from the newest whole checkpoint.

        A signal (SIGINT, SIGTERM) ends it after a checkpoint of the step. ValueError and OSError are sentences.
        """
        first = self._resume()
        with self._journal_after(first), Interruption() as interruption:
            self.observer.start(first, self.updater.num_steps)
            try:
                return self._finish(self._run(first, interruption))
            finally:
                self.observer.stop()

    def _run(self, step: int, interruption: Interruption) -> int:
        """The step reached."""
        is_stopping = False
        while step < self.updater.num_steps and not is_stopping:
            started = time.perf_counter()
            facts = self.updater.run(step + 1, interruption.is_requested)
            step, is_stopping = step + 1, facts.is_stop_requested
            self._record(step, facts, time.perf_counter() - started)
            if self._is_due(step, self.config.validate_every):
                self._validate(step)
            if is_stopping or self._is_due(step, self.config.save_every):
                self._save(step)
        return step

    def _finish(self, step: int) -> TrainingResult:
        """The drafter of the last step, written; or a word on where the run stands."""
        is_last = step == self.updater.num_steps
        if is_last:
            self._write_drafter(FINAL, step, self._last)
            if self.config.calibrate and self.accelerator.is_main_process:  # for which the others need not wait
                self._calibrate()
        else:
            self.observer.note(
                f"stopped after step {step} of {self.updater.num_steps}; run it again to go on from there"
            )
        return TrainingResult(
            final=self.output / FINAL if is_last else None,
            best=self.output / BEST if self._best else None,
            step=step,
            num_steps=self.updater.num_steps,
            validation=self._last,
        )

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.updater.num_steps

    def _record(self, step: int, facts: UpdateFacts, seconds: float) -> None:
        record = StepRecord(
            step=step,
            epoch=step / self.updater.order.batches_per_epoch,
            loss=facts.loss,
            accuracy=facts.accuracy,
            learning_rate=facts.learning_rate,
            gradient_norm=facts.gradient_norm,
            tokens_per_second=facts.num_tokens / seconds,
        )
        self.observer.step(record)
        if self._journal is not None and self._is_due(step, self.config.log_every):
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

    def _save(self, step: int) -> None:
        """A checkpoint; what it refers to is on disk before it."""
        if self._journal is not None:
            self._journal.sync()
        state = RunState(step, self._identity, layout(self.accelerator), self._best, self._last)
        self.checkpoints.save(self.accelerator, state)

    def _write_drafter(self, name: str, step: int, record: ValidationRecord | None) -> None:
        """The weights of now as a drafter's folder; every process takes part in gathering them."""
        weights = self.accelerator.get_state_dict(self.updater.model)
        if self.accelerator.is_main_process:
            with torch.device("meta"):
                network = EagleNetwork(self._network_config)
            network.load_state_dict({k.removeprefix("network."): v for k, v in weights.items()}, assign=True)
            network, metadata = network.to(self.facts.dtype), self._metadata(step, record)
            with written(f"the drafter {name}", self.output):
                save_drafter(
                    network,
                    self.output / name,
                    embedding=self.source.embedding,
                    target_config=self.facts.target_config,
                    metadata=metadata,
                    vocabulary=self.facts.vocabulary,
                )
        self.accelerator.wait_for_everyone()

    def _calibrate(self) -> None:
        """Of the final drafter and the best one: a run that is killed here does it when it is started again."""
        folders = [self.output / FINAL, *([self.output / BEST] if self._best else ())]
        target = (self.facts.metadata or {}).get("target")
        texts = self.updater.dataset, self.validation
        calibrate_run(folders, self.source, *texts, self.config.seed, target, self.observer.note)

    def _metadata(self, step: int, record: ValidationRecord | None) -> dict[str, Any]:
        """How the drafter was made, in an order for readers; a function of the run alone, without times."""
        dataset = self.updater.dataset
        names = ("acceptance_length", "accuracy", "loss")
        estimated = None if record is None else {name: getattr(record, name) for name in names}
        return {
            "algorithm": self.updater.objective.name,
            **(self.facts.metadata or {}),
            "step": step,
            "num_steps": self.updater.num_steps,
            "seed": self.config.seed,
            "trained_length": max(map(dataset.length, range(len(dataset)))),
            "dataset": dataset_facts(dataset),
            "estimate": estimated,
            "objective": asdict(self.updater.objective),
            "training": settings(self.config),
            "code": code_version(),
        }

    def _resume(self) -> int:
        """The step that the run goes on after; weights, optimizer and records are those of that step."""
        found = None
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
            found = (self._identity, *self.checkpoints.newest())
        wanted, folder, state, complaints = broadcast(self.accelerator, found)
        if wanted != self._identity:
            raise ValueError("this process has other data or settings than the main one; give both the same files")
        for complaint in complaints:
            self.observer.note(complaint)
        if complaints and state is None:
            self.observer.note("no whole checkpoint is left: the run begins anew")
        if state is None:
            return 0
        check_same(state.identity, self._identity, self.output)
        self.checkpoints.load(self.accelerator, folder, state)
        self._best, self._last = state.best, state.last
        return int(state.step)

    def _clear_leftovers(self) -> None:
        self.checkpoints.clear_leftovers()
        for name in (BEST, FINAL):
            for path in self.output.glob(f".{name}.*"):
                shutil.rmtree(path)
        for path in self.output.glob(".*.tmp"):
            path.unlink()

    @contextmanager
    def _journal_after(self, step: int) -> Iterator[None]:
        """`self._journal` is open, and so are the trackers."""
        accelerator = self.accelerator
        config = {name: str(value) if isinstance(value, list) else value for name, value in self._identity.items()}
        accelerator.init_trackers("taps_ext", config=config)
        track = accelerator.log if accelerator.trackers else None
        self._journal = Journal(self.output / LOG, step, track) if accelerator.is_main_process else None
        try:
            yield
        finally:
            if self._journal is not None:
                self._journal.close()
            for tracker in accelerator.trackers:
                tracker.finish()
