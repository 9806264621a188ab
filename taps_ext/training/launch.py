"""The processes of a run, as `accelerate launch` or `torchrun` started them: devices, precision, sharding, trackers."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .journal import check_tracker
from .recipe import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def make_accelerator(config: TrainingConfig, output: Path) -> Accelerator:
    """The accelerator of this launch, in the config's precision; ValueError, in a sentence, if it cannot be had."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
    except ModuleNotFoundError as missing:
        raise ValueError(f"training needs {missing.name}: pip install 'taps_ext[train]'") from missing
    check_tracker(config.tracker)
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
    else:
        accelerator.register_save_state_pre_hook(_drop_wrapper_names)
        accelerator.register_load_state_pre_hook(lambda models, _: _unwrap(accelerator, models))
    return accelerator


def broadcast(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every process."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _forget_precision(precision: str) -> None:
    """Let a second run of this Python process have another precision: accelerate would keep the first one's.

    (Under FSDP it keeps more than that, and says so itself.)
    """
    state = sys.modules["accelerate"].state.AcceleratorState
    if state._shared_state and state().mixed_precision != precision and state().distributed_type.value != "FSDP":
        state._reset_state()


def _shard_as_one(accelerator: Accelerator) -> None:
    """A drafter is one layer whose parts are called one by one: shards of parts of it would never be gathered."""
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = None
    plugin.cpu_ram_efficient_loading = False  # it passes through the meta device, which plain attributes do not survive
    if (policy := plugin.mixed_precision_policy) is not None:  # sums in bfloat16 are none
        exact = {"reduce_dtype": torch.float32, "output_dtype": None}
        names = {field.name for field in fields(policy)}
        plugin.mixed_precision_policy = replace(policy, **{k: v for k, v in exact.items() if k in names})


def _drop_wrapper_names(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
    """Save DDP's weights under their own names, so that any number of processes can go on with them."""
    weights[:] = [{name.removeprefix("module."): value for name, value in one.items()} for one in weights]


def _unwrap(accelerator: Accelerator, models: list[Any]) -> None:
    models[:] = [accelerator.unwrap_model(model) for model in models]
