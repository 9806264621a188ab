"""One update of a drafter: its global batch split over processes and micro-batches, one backward a pass, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..drafters import DraftVocabulary
from ..drafters.network import EagleNetwork
from .dataset import BatchOrder, TokenBatch, TokenDataset
from .features import DraftBatch, FeatureSource, Head
from .objectives import Judge, ObjectivePass, PassOutput, first_stream, next_stream
from .recipe import ObjectiveConfig, TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        """`network`, float32, is trained in place; ValueError if the batch cannot be split."""
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
        """Update number `step` (from 1). ValueError, before the weights move, if the loss is no finite number."""
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
        """One pass of the model, in the run's precision."""
        with self.accelerator.autocast():
            out: PassOutput = self.model(batch, streams)
        return out

    def _own_parts(self, rows: list[int]) -> list[list[int]]:
        """This process's micro-batches. Rows are sorted by length, so those of one moment are alike on all."""
        size = self.micro_batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return parts[self.accelerator.process_index :: self.accelerator.num_processes]

    def _accumulate(self, parts: list[list[int]], step: int, num_learned: int) -> Tensor:
        """Gradients of all passes, and float64 [1 + passes]: this process's loss and correct slots, as sums."""
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
        """Gradients are exchanged in the last backward of an update only."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def _clip(self) -> Tensor:
        """The gradient's norm, then clipped as the config says: the whole to its norm, each element to its value."""
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
    """Sequences of one forward on one process: as many as the config allows of those that split its share evenly.

    ValueError if the batch of an update cannot be split evenly over the processes.
    """
    share, left = divmod(config.batch_size, num_processes)
    if left or not share:
        raise ValueError(
            f"training.batch_size {config.batch_size} cannot be split evenly over {num_processes} processes; "
            f"make it a multiple of {num_processes}"
        )
    return max(size for size in range(1, min(config.micro_batch_size or share, share) + 1) if share % size == 0)


def learning_rate(step: int, config: TrainingConfig, num_steps: int) -> float:
    """Of update `step` (from 1): linear up to the peak at `warmup_steps`, then linear down to 0 after the last one."""
    done, end = step - 1, config.decay_steps or num_steps
    if done < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    return config.learning_rate * max(0.0, (end - done) / max(1, end - config.warmup_steps))


def noise_seed(seed: int, step: int) -> int:
    """The seed of an update's noise."""
    return (seed << 32) + step


def held_out_batches(dataset: TokenDataset, size: int, index: int, num_processes: int) -> Iterable[TokenBatch]:
    """A process's share of a dataset; some have a last one that masks everything.

    Processes that hold shards of the weights must all run equally many forwards.
    """
    rows = sorted(range(len(dataset)), key=dataset.length)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    for number in range(index, math.ceil(len(parts) / num_processes) * num_processes, num_processes):
        batch = dataset.batch(parts[number] if number < len(parts) else parts[0])
        is_spare = number >= len(parts)
        yield TokenBatch(batch.tokens, batch.loss_mask & (not is_spare), batch.lengths, batch.ids)


def _local_gradients(parameters: Iterable[Tensor]) -> Iterable[Any]:
    """The gradients, of sharded parameters the part that this process holds."""
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is not None:
            yield gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _check_finite(step: int, facts: UpdateFacts) -> None:
    for name, value in (("loss", facts.loss), ("gradient", facts.gradient_norm)):
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} of step {step} is {value} at a learning rate of {facts.learning_rate:.3g}; "
                f"lower training.learning_rate or raise training.warmup_steps, and start in a new output folder"
            )
