"""A run tried out: everything loaded, two updates made, and what the whole would take."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .checks import STATE_BYTES, check_disk, check_output
from .launch import make_accelerator
from .materials import DTYPE_BYTES, load_materials
from .progress import Observer
from .recipe import Recipe
from .update import Updater, micro_batch_size


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
    """What the recipe's run will take, by two updates, one of them of the longest sequences; nothing stays on disk.

    Raises what `train` would raise before its first update.
    """
    output = Path(recipe.output).expanduser()
    accelerator = make_accelerator(recipe.training, output)
    micro_batch_size(recipe.training, accelerator.num_processes)
    check_output(recipe, output)
    watching = observer if accelerator.is_main_process else None
    materials = load_materials(recipe, accelerator.device, watching.preparing if watching else None)
    if watching:
        for line in materials.lines():
            watching.note(line)
    check_disk(recipe, materials, output)
    data, num_parameters = materials.data.training, materials.num_trained  # before FSDP takes its share
    source, network, vocabulary = materials.target.source, materials.network, materials.vocabulary
    updater = Updater(accelerator, source, network, data, recipe.objective, recipe.training, vocabulary)
    _timed(updater, _longest_step(updater))  # first: the first update is slow, and this one needs the most memory
    seconds_per_token = _timed(updater, 1)
    seconds_per_step = seconds_per_token * data.num_tokens * recipe.training.batch_size / len(data)
    store_bytes = materials.num_tokens * materials.network.config.hidden_size * DTYPE_BYTES[recipe.features.dtype]
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
    """The update of the first epoch that reads the longest sequence."""
    steps = range(1, updater.order.batches_per_epoch + 1)
    return max(steps, key=lambda step: max(map(updater.dataset.length, updater.order[step - 1])))


def _timed(updater: Updater, step: int) -> float:
    """Seconds a token of an update."""
    started = time.perf_counter()
    facts = updater.run(step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / facts.num_tokens


def _peak_memory(device: torch.device) -> int:
    """Bytes: of a GPU what torch had allocated at once, of the CPU what the process had."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
