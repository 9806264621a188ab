"""What is checked before a run does any work: whose its output folder is, and whether the disk has room."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..checkpoints.files import check_drafter_output, check_writable
from .materials import DTYPE_BYTES, Materials
from .provenance import FREE, check_same, flat
from .recipe import Recipe, as_tree, load_recipe
from .trainer import BEST, CHECKPOINTS, FINAL, LOG

RECIPE = "recipe.yaml"
FREE_KEYS = ("output", *(f"training.{name}" for name in FREE))
STATE_BYTES = 12  # of a parameter in a checkpoint: the weight and AdamW's two moments, float32
NUM_DRAFTERS = 3  # the best, the final one, and one that is being written


def check_output(recipe: Recipe, output: Path) -> None:
    """ValueError unless the output folder is new, or that of a run of this recipe."""
    check_writable(output)
    for name in (BEST, FINAL):
        check_drafter_output(output / name)
    path = output / RECIPE
    if path.exists():
        there, here = flat(as_tree(load_recipe([path]))), flat(as_tree(recipe))
        for key in FREE_KEYS:
            there[key] = here[key]
        check_same(there, here, output)
    elif strangers := [name for name in (BEST, FINAL, CHECKPOINTS, LOG) if (output / name).exists()]:
        raise ValueError(f"output {output} holds {', '.join(strangers)} of a run without {RECIPE}; give another folder")


def check_disk(recipe: Recipe, materials: Materials, output: Path) -> None:
    """OSError unless the checkpoints and drafters of the run fit on the disk, those that are there already included."""
    config = materials.network.config
    trained = materials.num_trained
    num_checkpoints = recipe.training.keep_checkpoints + 1  # one is written before one is removed
    embedded = config.vocab_size * config.hidden_size if materials.vocabulary is None else 0
    drafter_bytes = (trained + embedded) * DTYPE_BYTES[recipe.drafter_dtype]
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
