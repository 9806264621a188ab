"""What the tests of training share: small data and targets, and runs of them in this process and in others.

As a script under torchrun (`training_cases.py RECIPES...`) it trains pickled recipes, one after the other.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # what only the reading of recipes and of hub data sets may need
    sys.modules.update(dict.fromkeys(("omegaconf", "datasets")))

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from worlds import corpus

from taps_ext import tiny
from taps_ext.drafters import EagleConfig
from taps_ext.training import Example, TokenDataset, trainer
from taps_ext.training.features import FrozenTarget
from taps_ext.training.recipe import DataConfig, ObjectiveConfig, Recipe, SourceConfig, TrainingConfig
from taps_ext.training.run import make_accelerator, new_network, train
from taps_ext.training.trainer import DrafterFacts, Observer, Trainer, UpdateRecord, ValidationRecord

VOCAB = 23
ROOT = Path(__file__).parent.parent


class Watcher(Observer):
    """An observer that remembers."""

    def __init__(self) -> None:
        self.first_step = self.num_steps = -1
        self.steps: list[UpdateRecord] = []
        self.validations: list[ValidationRecord] = []
        self.notes: list[str] = []
        self.work: list[str] = []
        self.is_stopped = False

    def progress(self, what: str, done: int, total: int | None) -> None:
        self.work.append(what)

    def start(self, first_step: int, num_steps: int) -> None:
        self.first_step, self.num_steps = first_step, num_steps

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        if is_logged:
            self.steps.append(record)

    def validated(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def stop(self) -> None:
        self.is_stopped = True


@cache
def small_target() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def small_dataset(count: int = 24, seed: int = 0) -> TokenDataset:
    """Sequences of 6 to 17 tokens, of which each is learned with probability 0.7."""
    rng = Random(seed)
    examples = []
    for _ in range(count):
        length = rng.randrange(6, 18)
        mask = [rng.random() < 0.7 for _ in range(length - 1)] + [True]
        examples.append(Example(tuple(rng.randrange(1, VOCAB) for _ in range(length)), tuple(mask)))
    return TokenDataset(examples)


def small_trainer(
    output: Path, watcher: Watcher | None = None, objective: str = "eagle2", held_out: int = 6, **training: Any
) -> Trainer:
    """A trainer on the small target: 12 steps of 4 sequences, a checkpoint every 4, a validation every 4."""
    settings = {"steps": 12, "batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 3, "log_every": 1}
    settings |= {"save_every": 4, "validate_every": 4, "calibrate": False, **training}
    target = small_target()
    config = TrainingConfig(**settings)
    return Trainer(
        FrozenTarget(target),
        new_network(EagleConfig.for_target(target.config), config.seed),
        small_dataset(),
        small_dataset(held_out, seed=1) if held_out else None,
        ObjectiveConfig(name=objective),  # type: ignore[arg-type]
        config,
        output,
        DrafterFacts(target.config),
        make_accelerator(config, output),
        watcher,
    )


def tiny_recipe(folder: Path, output: str = "run", objective: str = "eagle2", **training: Any) -> Recipe:
    """A recipe for the embedded target: 6 steps of 4 short conversations, everything as often as it can happen.

    Not calibrated unless asked for: that takes longer than all the rest.
    """
    source = folder / "conversations.jsonl"
    if not source.exists():
        write_conversations(source, 24)
    settings = {"steps": 6, "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, "log_every": 1}
    settings |= {"save_every": 1, "validate_every": 3, "calibrate": False, **training}
    return Recipe(
        target=str(tiny.assets() / "target"),
        target_dtype="float32",
        output=str(folder / output),
        data=DataConfig((SourceConfig(str(source)),), max_length=72, validation=3),
        training=TrainingConfig(**settings),
        objective=ObjectiveConfig(name=objective),  # type: ignore[arg-type]
    )


def write_conversations(path: Path, count: int, domain: str = "math", seed: int = 5) -> None:
    lines = [json.dumps({"messages": messages}) for messages in corpus.conversations(domain, count, seed)]
    path.write_text("\n".join(lines) + "\n")


def weights(drafter: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(drafter / "model.safetensors")
    return found


def files(output: Path) -> dict[str, bytes]:
    """What a run leaves for its user: the drafters, byte for byte."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for name in ("best", "final")
        for path in (output / name).iterdir()
    }


def curve(output: Path) -> list[dict[str, Any]]:
    """The records of log.jsonl, without how fast they were."""
    times = ("tokens_per_second", "seconds_left")
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in times} for record in records]


# --- other processes -------------------------------------------------------------------------------------------------


@cache
def forks() -> Any:
    """Processes that start at once, from one that has imported everything and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_cases"])
    with pytest.MonkeyPatch.context() as patch:  # where it finds this file: it ignores this process's sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
        forkserver.ensure_running()
    return context


def train_in_fork(recipe: Recipe, kill_at: int | None = None, kill_after_s: float | None = None) -> int:
    """How the run ended: 0, or -9 when it was killed, at the `kill_at`-th touch of its files or after a time.

    Either way, what was its newest checkpoint at any moment is there and whole, or a newer one is.
    """
    published = forks().Value("i", 0, lock=False)  # a killed process would keep the lock
    process = forks().Process(target=_train, args=(recipe, kill_at, published))
    process.start()
    process.join(kill_after_s or 120)
    if kill_after_s is not None:
        process.kill()
        process.join()
    assert process.exitcode is not None, "the run hangs"
    assert newest_step(recipe) >= published.value
    return int(process.exitcode)


def count_touches(recipe: Recipe) -> int:
    """How often a whole run touches its files. At none of these moments it could lose its newest checkpoint."""
    published, counter, fell = (forks().Value("i", 0) for _ in range(3))
    process = forks().Process(target=_train, args=(recipe, None, published, counter, fell))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and published.value == recipe.training.steps
    assert not fell.value, f"a kill at touch {fell.value} would have lost the newest checkpoint"
    return int(counter.value)


def newest_step(recipe: Recipe) -> int:
    """The step of the newest checkpoint, 0 without one; a damaged one fails the test."""
    folders = trainer._checkpoints(Path(recipe.output) / "checkpoints")
    if not folders:
        return 0
    load_file(folders[-1] / "model.safetensors")
    torch.load(folders[-1] / "optimizer.bin")
    return int(trainer._read_state(folders[-1])["step"])


def _train(recipe: Recipe, kill_at: int | None, published: Any, counter: Any = None, fell: Any = None) -> None:
    """Trains; `published` gets the newest step that has had a name. With a counter, every touch is looked at."""
    torch.set_num_threads(1)
    touches, is_looking = 0, False

    def touched(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touches, is_looking
        if is_looking or event.partition(".")[0] not in ("open", "os", "shutil"):
            return
        if arguments and _is_within(arguments[0], recipe):
            touches += 1
            is_looking = True  # looking touches files too
            names = (path.name for path in Path(recipe.output).glob("checkpoints/step-*"))
            published.value = max([published.value, *(int(name[5:]) for name in names)])
            if counter is not None:
                counter.value = touches
                if not fell.value and newest_step(recipe) < published.value:
                    fell.value = touches
            is_looking = False
            if touches == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(touched)
    train(recipe)


def _is_within(path: Any, recipe: Recipe) -> bool:
    return isinstance(path, (str, os.PathLike)) and str(path).startswith(recipe.output)


def torchrun(recipes: Sequence[Recipe], folder: Path, **environment: str) -> None:
    """Trains the recipes under a real torchrun, on two processes."""
    path = folder / "recipes.pickle"
    path.write_bytes(pickle.dumps(list(recipes)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, __file__, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
FSDP |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "ACCELERATE_TORCH_DEVICE": "cpu"}


def _shard_on_cpus() -> None:
    """Torch shards over processes on CPUs; accelerate offers it only where it sees GPUs."""
    from accelerate.state import DistributedType, PartialState

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *arguments: ("gloo", DistributedType.MULTI_GPU)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ:
        _shard_on_cpus()
    for one in pickle.loads(Path(sys.argv[1]).read_bytes()):
        train(one)
