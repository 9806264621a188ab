"""A recipe as a run: checked before any work, loaded, trained or gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.files import write_text, written
from .calibrate import calibrate_run, not_calibrated, uncalibrated
from .checks import RECIPE, check_disk, check_output
from .dry_run import DryRun, dry_run
from .launch import make_accelerator
from .materials import Materials, load_materials
from .progress import Observer, ValidationRecord
from .provenance import check_same, dataset_facts, flat, target_facts
from .recipe import Recipe, dump_recipe
from .trainer import BEST, FINAL, DrafterFacts, Trainer, TrainingResult
from .update import micro_batch_size

__all__ = ["DryRun", "TrainingResult", "dry_run", "train"]

DATA = "data.json"


def train(recipe: Recipe, observer: Observer | None = None) -> TrainingResult:
    """The recipe's run, from its beginning or from where it was stopped or killed.

    A finished one is left as it is, but for calibrations that it lacks.

    Raises ValueError or OSError, in a sentence, before any work where that can be known before.
    """
    output = Path(recipe.output).expanduser()
    accelerator = make_accelerator(recipe.training, output)
    micro_batch_size(recipe.training, accelerator.num_processes)
    check_output(recipe, output)
    watching = observer if accelerator.is_main_process else None
    if (output / FINAL).exists():
        if watching:
            watching.note(f"the run in {output} is finished already; its drafter is {output / FINAL}")
        if accelerator.is_main_process and recipe.training.calibrate:
            _calibrate(recipe, output, accelerator.device, watching)
        return _finished(output)
    materials = load_materials(recipe, accelerator.device, watching.preparing if watching else None)
    if watching:
        for line in materials.lines():
            watching.note(line)
    check_disk(recipe, materials, output)
    dtype, metadata = getattr(torch, recipe.drafter_dtype), _metadata(recipe, materials)
    facts = DrafterFacts(materials.target.config, dtype, metadata, materials.vocabulary)
    trainer = Trainer(
        materials.target.source,
        materials.network,
        materials.data.training,
        materials.data.validation,
        recipe.objective,
        recipe.training,
        output,
        facts,
        observer,
        accelerator,
    )
    if watching:
        watching.note(f"{materials.num_trained:,} parameters, {trainer.updater.num_steps:,} steps")
    if accelerator.is_main_process:  # only now: a recipe that was refused leaves no folder that refuses the mended one
        output.mkdir(parents=True, exist_ok=True)
        with written("the run's description", output):
            write_text(output / DATA, json.dumps(materials.data.report.to_dict(), indent=1) + "\n")
            write_text(output / RECIPE, dump_recipe(recipe))
    return trainer.train()


def _metadata(recipe: Recipe, materials: Materials) -> dict[str, Any]:
    """What the drafter says about where it comes from, without the folders of this machine."""
    target = target_facts(recipe.target, materials.target.identity)
    facts = {"target": target, "data": materials.data.report.provenance()}
    return facts if materials.parent is None else {**facts, "parent": materials.parent}


def _calibrate(recipe: Recipe, output: Path, device: torch.device, observer: Observer | None) -> None:
    """The calibrations that a finished run lacks, as it was killed or something failed; what fails now is a note."""
    folders = [output / name for name in (FINAL, BEST) if (output / name).exists()]
    if not uncalibrated(folders):
        return
    note = observer.note if observer else lambda sentence: None
    try:
        materials = load_materials(recipe, device, observer.preparing if observer else None)
        data, target = materials.data, _metadata(recipe, materials)["target"]
        told = json.loads((output / FINAL / "config.json").read_text(encoding="utf-8"))["taps"]
        here = {"dataset": dataset_facts(data.training), "target": target}
        check_same(flat({name: told[name] for name in here}), flat(here), output)
    except (ValueError, RuntimeError, OSError) as error:
        for folder in uncalibrated(folders):
            note(not_calibrated(folder.name, error))
        return
    source, seed = materials.target.source, recipe.training.seed
    calibrate_run(folders, source, data.training, data.validation, seed, target, note)


def _finished(output: Path) -> TrainingResult:
    """What a finished run had come to, as its drafter tells."""
    told = json.loads((output / FINAL / "config.json").read_text(encoding="utf-8"))["taps"]
    record, best = None, output / BEST if (output / BEST).exists() else None
    if (estimate := told["estimate"]) is not None:
        accuracy, is_best = tuple(estimate.pop("accuracy")), False
        if best is not None:
            is_best = json.loads((best / "config.json").read_text(encoding="utf-8"))["taps"]["step"] == told["step"]
        record = ValidationRecord(step=told["step"], accuracy=accuracy, is_best=is_best, **estimate)
    return TrainingResult(output / FINAL, best, told["step"], told["num_steps"], record)
