"""What several commands share: their options' words, the embedded models by name, bars, and who speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import tiny
from ..checkpoints.load import open_target

JSON_HELP = "Print one JSON object and nothing else."
DEVICE_HELP = "cpu, cuda or cuda:1; default: a GPU where there is one and ops for it."


def progress(is_shown: bool = True) -> Progress:
    """A bar on stderr, so that stdout holds the result alone; terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not (is_shown and sys.stderr.isatty())
    )


def keep_logs_clean() -> None:
    """Leave transformers' own progress bars to terminals."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def target_config(target: str) -> Any:
    """The config of a target's language model, by folder, hub id or `tiny`; FileNotFoundError if there is none."""
    return open_target(tiny.resolve(target)).config


def load_target(target: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """A target, by folder, hub id or `tiny`, in evaluation mode on a device, and its tokenizer."""
    import torch
    import transformers

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    model: Any
    chosen = None if dtype == "auto" else getattr(torch, dtype)
    if target == tiny.TINY:
        model, tokenizer = tiny.load_target()
    else:
        open_target(target)  # says in a sentence that there is none
        model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=chosen or "auto")
        tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    return model.to(device=device, dtype=chosen).eval(), tokenizer


def drafter_folders(target: str, drafters: Sequence[str]) -> dict[str, str]:
    """Name to folder or hub id; the embedded target brings its own drafters when none is given."""
    if not drafters and target != tiny.TINY:
        raise ValueError("give at least one drafter: --drafter NAME=FOLDER-OR-HUB-ID")
    paths: dict[str, str] = {}
    for entry in drafters or [f"{name}={tiny.TINY}/{name}" for name in tiny.drafter_paths()]:
        name, path = entry.split("=", 1) if "=" in entry else (Path(entry).name, entry)
        if not (name and path):
            raise ValueError(f"a drafter is given as NAME=FOLDER-OR-HUB-ID, got {entry!r}")
        if name in paths:
            raise ValueError(f"the drafter name {name!r} is given twice; names must differ")
        paths[name] = tiny.resolve(path)
    return paths


def process_index() -> int:
    """Which process of a launch (torchrun, accelerate launch) this one is; 0 is the main one, which speaks."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process speaks."""
    return process_index() == 0
