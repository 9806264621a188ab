"""Claims about runs that end before their time: killed, stopped, out of disk, with a damaged checkpoint or no data."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from training_cases import (
    Watcher,
    count_touches,
    curve,
    files,
    small_trainer,
    tiny_recipe,
    train_in_fork,
    weights,
    write_conversations,
)

from taps_ext.training.recipe import Recipe
from taps_ext.training.run import train
from taps_ext.training.trainer import Interruption, UpdateRecord

OBJECTIVES = ["eagle2", "hass"]


# --- killed ----------------------------------------------------------------------------------------------------------


def kill_again_and_again(folder: Path, objective: str, num_kills: int, seed: int) -> None:
    """A run that is killed at random touches of its files ends like one that is not: drafters and curve."""
    settings = {"keep_checkpoints": 1, "calibrate": seed == 1}  # which takes as long as all the rest
    whole, killed = (tiny_recipe(folder, name, objective, **settings) for name in ("whole", "killed"))
    num_touches = count_touches(whole)
    rng = Random(f"{objective}/{seed}")
    ends = [train_in_fork(killed, kill_at=rng.randrange(1, num_touches // 2)) for _ in range(num_kills)]
    assert -signal.SIGKILL in ends, "no kill came in time"
    assert_ends_like(whole, killed)


def assert_ends_like(whole: Recipe, killed: Recipe) -> None:
    assert train_in_fork(killed) == 0
    assert curve(Path(killed.output)) == curve(Path(whole.output))
    assert files(Path(killed.output)) == files(Path(whole.output))
    assert not list(Path(killed.output).rglob(".*")), "leftovers"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_resumes_to_the_same_weights(objective: str, tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, objective, num_kills=1, seed=0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_is_killed_many_times_resumes_to_the_same_weights(objective: str, seed: int, tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, objective, num_kills=12, seed=seed)


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_is_killed_at_random_times_resumes_to_the_same_weights(objective: str, tmp_path: Path) -> None:
    """Also in the middle of what torch and safetensors write."""
    whole = tiny_recipe(tmp_path, "whole", objective)
    started = time.monotonic()
    assert train_in_fork(whole) == 0
    seconds, rng = time.monotonic() - started, Random(objective)
    for number in range(4):
        killed = tiny_recipe(tmp_path, f"killed-{number}", objective)
        for _ in range(3):
            train_in_fork(killed, kill_after_s=rng.uniform(0.3, 1.0) * seconds)
        assert_ends_like(whole, killed)


# --- asked to stop ---------------------------------------------------------------------------------------------------


class Signaller(Watcher):
    """Sends this process a signal while a step is recorded."""

    def __init__(self, at_step: int, number: int) -> None:
        super().__init__()
        self.at_step, self.number = at_step, number

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        super().step(record, is_logged)
        if record.step == self.at_step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("objective", ["eagle2", "hass"])
def test_a_signal_ends_a_run_after_a_checkpoint_and_it_goes_on_from_there(
    number: int, objective: str, tmp_path: Path
) -> None:
    small_trainer(tmp_path / "whole", objective=objective).train()
    before = signal.getsignal(number)
    watcher = Signaller(5, number)
    stopped = small_trainer(tmp_path / "stopped", watcher, objective).train()
    assert not stopped.is_finished and stopped.step == 6 and stopped.final is None
    assert watcher.notes == ["stopped after step 6 of 12; run it again to go on from there"] and watcher.is_stopped
    assert signal.getsignal(number) is before
    again = Watcher()
    assert small_trainer(tmp_path / "stopped", again, objective).train().is_finished
    assert again.first_step == 6 and [record.step for record in again.steps] == list(range(7, 13))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_record_of_the_log_may_span_a_stop(tmp_path: Path) -> None:
    small_trainer(tmp_path / "whole", log_every=5).train()
    assert small_trainer(tmp_path / "stopped", Signaller(6, signal.SIGTERM), log_every=5).train().step == 7
    assert small_trainer(tmp_path / "stopped", log_every=5).train().is_finished
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once_but_its_echo_does_not() -> None:
    """A terminal signals the launcher and its processes, and the launcher then signals them too."""
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.is_requested
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_run_goes_on_with_other_settings_of_how_it_is_computed_and_watched(tmp_path: Path) -> None:
    whole, stopped = (replace(tiny_recipe(tmp_path, name), drafter_dtype="float32") for name in ("whole", "stopped"))
    train(whole)
    assert train(stopped, Signaller(2, signal.SIGTERM)).step == 3
    changes: dict[str, Any] = {"log_every": 4, "save_every": 4, "keep_checkpoints": 3, "tracker": "tensorboard"}
    changes |= {"micro_batch_size": 1, "gradient_checkpointing": True}
    watcher, output = Watcher(), Path(stopped.output)
    assert train(replace(stopped, training=replace(stopped.training, **changes)), watcher).is_finished
    assert watcher.first_step == 3 and [record.step for record in watcher.steps] == [4, 6]
    expected = weights(Path(whole.output) / "final")
    for name, value in weights(output / "final").items():  # float32 sums in another order
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=5e-5)
    assert [record["step"] for record in curve(output) if record["kind"] == "step"] == [1, 2, 3, 4, 6]
    assert [path.name[-1] for path in sorted((output / "checkpoints").iterdir())] == ["3", "4", "6"]
    assert (output / "tracker").exists()


# --- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 4 and 8 that has not come to its end."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    small_trainer(folder, Signaller(7, signal.SIGTERM)).train()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    small_trainer(folder).train()
    return folder


def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(
    stopped_run: Path, whole_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped_run, tmp_path / "run")
    newest = run / "checkpoints" / "step-00000008"
    os.truncate(newest / "state.json", 20)
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000008 is damaged \(state.json .*; delete it to go on"):
        small_trainer(run).train()
    shutil.rmtree(newest)
    small_trainer(run, watcher := Watcher()).train()
    assert watcher.first_step == 4 and watcher.notes == []
    assert files(run) == files(whole_run) and curve(run) == curve(whole_run)


def test_a_torn_line_of_the_log_is_dropped(stopped_run: Path, whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(stopped_run, tmp_path / "run")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 9, "loss": 1.0}\n{"kind": "step", "st')
    small_trainer(run).train()
    assert curve(run) == curve(whole_run)


# --- no room, no data ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Every write beyond fails, like on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Filler(Watcher):
    """Fills the disk at a step."""

    def __init__(self, at_step: int, num_bytes: int) -> None:
        super().__init__()
        self.at_step, self.num_bytes = at_step, num_bytes
        self.full = contextlib.ExitStack()

    def step(self, record: UpdateRecord, is_logged: bool) -> None:
        super().step(record, is_logged)
        if record.step == self.at_step:
            self.full.enter_context(files_no_larger_than(self.num_bytes))


@pytest.mark.parametrize(
    ("at_step", "num_bytes"), [(3, 0), (3, 12_000), (5, 0), (5, 5_000), (5, 20_000), (12, 5_000), (12, 12_000)]
)
def test_a_full_disk_leaves_the_last_checkpoint_usable(
    at_step: int, num_bytes: int, whole_run: Path, tmp_path: Path
) -> None:
    run, filler = tmp_path / "run", Filler(at_step, num_bytes)
    with filler.full, pytest.raises(OSError, match=r"could not be written to .* GiB are free there\)") as caught:
        small_trainer(run, filler).train()
    assert "\n" not in str(caught.value)
    watcher = Watcher()
    small_trainer(run, watcher).train()
    assert watcher.notes == [] and watcher.first_step in (at_step // 4 * 4, max(0, at_step - 1) // 4 * 4)
    assert files(run) == files(whole_run) and curve(run) == curve(whole_run)
    assert not list(run.rglob(".*"))


def test_missing_data_stops_a_run_before_any_work_and_leaves_its_checkpoints(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    source = Path(recipe.data.sources[0].path)
    source.unlink()
    with pytest.raises((ValueError, OSError), match=r"conversations\.jsonl") as caught:
        train(recipe)
    assert "\n" not in str(caught.value) and not Path(recipe.output).exists()
    write_conversations(source, 24)
    train(recipe, Signaller(3, signal.SIGINT))
    before = {path: path.read_bytes() for path in Path(recipe.output).rglob("*") if path.is_file()}
    source.unlink()
    with pytest.raises((ValueError, OSError), match=r"conversations\.jsonl"):
        train(recipe)
    assert before == {path: path.read_bytes() for path in Path(recipe.output).rglob("*") if path.is_file()}
    write_conversations(source, 24, seed=6)
    with pytest.raises(ValueError, match=r"holds another run: data.training is \w+ there and \w+ here"):
        train(recipe)
    write_conversations(source, 24)
    watcher = Watcher()
    assert train(recipe, watcher).is_finished and watcher.first_step == 4


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    class Poisoner(Watcher):
        def step(self, record: UpdateRecord, is_logged: bool) -> None:
            if record.step == 6:
                with_nan = next(iter(trainer.updater.model.parameters()))
                with_nan.data.view(-1)[0] = float("nan")

    trainer = small_trainer(tmp_path, Poisoner())
    with pytest.raises(ValueError, match=r"the loss of step 7 is nan at a learning rate of 0.00\d+; lower"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["step"] == 4
    assert small_trainer(tmp_path).train().is_finished
