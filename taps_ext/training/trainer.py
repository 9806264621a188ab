"""The training loop of a drafter: AdamW, linear warm-up and decay, clipped gradients, one seed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..drafters.checkpoint import save_drafter
from ..drafters.eagle_network import EagleConfig, EagleNetwork
from .config import TrainingConfig
from .dataset import TokenBatch, TokenDataset
from .features import FrozenTarget
from .objectives import OBJECTIVES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[int, float], None]  # step (from 1), smoothed loss


@dataclass(frozen=True)
class TrainingResult:
    """The trained network (float32, in evaluation mode) and the smoothed loss after each step."""

    network: EagleNetwork
    losses: tuple[float, ...]


class Trainer:
    """Trains one drafter against a target that stays as it is."""

    def __init__(self, target: PreTrainedModel, config: TrainingConfig, network: EagleNetwork | None = None) -> None:
        """`network` is trained on in place; by default a new one of the target's shape, initialised from the seed."""
        self.target = FrozenTarget(target)
        self.config = config
        self.network = network or new_network(EagleConfig.for_target(target.config.get_text_config()), config.seed)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def train(self, dataset: TokenDataset, report: Report | None = None) -> TrainingResult:
        """Run all steps. `report(step, loss)` is called after each; by default a terminal gets a progress bar."""
        losses: list[float] = []
        self.network.train()
        with _progress(self.config.steps) if report is None else _given(report) as report:
            batches = dataset.batches(self.config.batch_size, self.config.seed)
            for step, batch in zip(range(self.config.steps), batches, strict=False):
                loss = self.step(batch, step)
                losses.append(loss if not losses else 0.95 * losses[-1] + 0.05 * loss)
                report(step + 1, losses[-1])
        self.network.eval()
        return TrainingResult(self.network, tuple(losses))

    def step(self, batch: TokenBatch, step: int) -> float:
        """One update; the sum of the objective's losses before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(step, self.config)
        draft_batch = self.target.draft_batch(batch)
        if not bool(draft_batch.loss_mask.any()):
            return 0.0
        self._optimizer.zero_grad(set_to_none=True)
        objective, total = OBJECTIVES[self.config.objective], 0.0
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=self.config.bf16_autocast):
            for loss in objective(self.network, self.target.logits, draft_batch, self.config, self._generator):
                loss.backward()
                total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        self._optimizer.step()
        return total


def train_drafter(
    target: PreTrainedModel,
    dataset: TokenDataset,
    config: TrainingConfig,
    output: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    metadata: dict[str, Any] | None = None,
    report: Report | None = None,
) -> TrainingResult:
    """Train a drafter and save it in the published format at `output`, weights in `dtype`; returns the float32 one."""
    result = Trainer(target, config).train(dataset, report)
    saved = EagleNetwork(result.network.config)
    saved.load_state_dict(result.network.state_dict())
    facts = {"training": asdict(config), "final_loss": round(result.losses[-1], 4), **(metadata or {})}
    embedding = target.get_input_embeddings()
    save_drafter(saved.to(dtype), output, embedding=embedding, target_config=target.config, metadata=facts)
    return result


def new_network(config: EagleConfig, seed: int) -> EagleNetwork:
    """An untrained network, initialised from the seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EagleNetwork(config)


def schedule(step: int, config: TrainingConfig) -> float:
    """The learning rate's factor at a step (from 0): linear up over the warm-up, then linear down to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return (config.steps - step) / max(1, config.steps - config.warmup_steps)


@contextmanager
def _given(report: Report) -> Iterator[Report]:
    yield report


@contextmanager
def _progress(steps: int) -> Iterator[Report]:
    """A progress bar when somebody is watching, silence otherwise."""
    if not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=steps)
        yield lambda step, loss: bar.update(task, completed=step, description=f"loss {loss:.4f}")
