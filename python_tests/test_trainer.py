"""Claims about the trainer: what an update is, on how many processes ever; what is written; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import (
    FSDP,
    Watcher,
    curve,
    files,
    small_dataset,
    small_target,
    small_trainer,
    tiny_recipe,
    torchrun,
    weights,
)

from taps_ext import tiny
from taps_ext.checkpoints import load_drafter, load_network
from taps_ext.drafters import EagleConfig, EagleNetwork
from taps_ext.training.features import FrozenTarget
from taps_ext.training.objectives import ObjectivePass, first_stream, next_stream
from taps_ext.training.recipe import ObjectiveConfig, SourceConfig, TrainingConfig
from taps_ext.training.run import dry_run, new_network, train
from taps_ext.training.trainer import BatchOrder, held_out_batches, learning_rate, micro_batch_size, noise_seed

# --- what an update is -----------------------------------------------------------------------------------------------


def trained_literally(objective: ObjectiveConfig, config: TrainingConfig) -> dict[str, Tensor]:
    """The weights after a run, by the definition: every row alone, one backward for the whole sum, plain AdamW."""
    target, dataset = small_target(), small_dataset()
    source, network = FrozenTarget(target), new_network(EagleConfig.for_target(target.config), config.seed)
    model = ObjectivePass(network, source.logits, objective)
    optimizer = torch.optim.AdamW(network.parameters(), betas=config.betas, weight_decay=config.weight_decay)
    order = BatchOrder(dataset, config.batch_size, config.seed)
    assert config.steps is not None
    for step in range(1, config.steps + 1):
        loss, num_learned = torch.zeros(()), 0
        for row in order[step - 1]:
            batch = source.draft_batch(dataset.batch([row]))
            streams = [first_stream(batch, objective, noise_seed(config.seed, step))]
            for _ in range(objective.num_passes):
                out = model(batch, streams)
                loss = loss + out.loss
                streams.append(next_stream(streams[-1], out.guesses))
            num_learned += int(batch.loss_mask.sum())
        optimizer.zero_grad()
        (loss / num_learned).backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        if config.clip_value is not None:
            torch.nn.utils.clip_grad_value_(network.parameters(), config.clip_value)
        optimizer.param_groups[0]["lr"] = learning_rate(step, config, config.steps)
        optimizer.step()
    return {name: value.detach() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("clip", [{"clip_norm": 0.2, "clip_value": None}, {"clip_norm": 0.3, "clip_value": 0.02}])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
@pytest.mark.parametrize("objective", ["eagle2", "hass"])
def test_an_update_is_adamw_on_the_mean_over_the_learned_slots_however_it_is_split(
    objective: str, micro_batch_size: int | None, clip: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"steps": 4, "warmup_steps": 2, "micro_batch_size": micro_batch_size, "seed": 3, **clip}
    settings["weight_decay"] = 0.5  # enough to be seen
    trainer = small_trainer(tmp_path, objective=objective, held_out=0, **settings)
    trainer.train()
    literal = trained_literally(trainer.updater.objective, trainer.config)
    for name, value in trainer.updater.model.network.state_dict().items():
        # float32 sums in another order, and AdamW divides by the root of tiny squares
        torch.testing.assert_close(value, literal[name], rtol=1e-3, atol=2e-5)


def test_training_lowers_the_loss_and_leaves_the_target_alone(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in small_target().state_dict().items()}
    for objective in ("eagle2", "hass"):
        watcher = Watcher()
        small_trainer(tmp_path / objective, watcher, objective, steps=40).train()
        losses = [record.loss for record in watcher.steps]
        assert sum(losses[-6:]) < 0.97 * sum(losses[:6])  # of hass, most is the entropy of an untrained target
    assert all(torch.equal(before[name], value) for name, value in small_target().state_dict().items())
    assert all(parameter.grad is None for parameter in small_target().parameters())


def test_bf16_computes_about_the_same_and_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    exact, rounded = Watcher(), Watcher()
    first = small_trainer(tmp_path / "fp32", exact, "hass", steps=6, validate_every=3)
    start = [parameter.detach().clone() for parameter in first.updater.model.parameters()]
    first.train()
    second = small_trainer(tmp_path / "bf16", rounded, "hass", steps=6, validate_every=3, precision="bf16")
    second.train()
    records = [[record.loss for record in (*watcher.steps, *watcher.validations)] for watcher in (exact, rounded)]
    assert records[1] == pytest.approx(records[0], rel=5e-3)
    assert not any(one == two for one, two in zip(*records, strict=True))
    weights_of_both = (trainer.updater.model.parameters() for trainer in (first, second))
    for before, one, two in zip(start, *weights_of_both, strict=True):
        assert two.dtype == torch.float32 and not torch.equal(two, two.bfloat16().float())
        assert (one - two).norm() < 0.3 * (one - before).norm()
    moments = [value for state in second.updater.optimizer.state.values() for value in state.values()]
    assert moments and all(value.dtype == torch.float32 for value in moments)


@pytest.mark.parametrize("objective", ["eagle2", "hass"])
def test_gradient_checkpointing_computes_again_and_gives_the_same_weights(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_trainer(tmp_path / "whole", objective=objective, steps=5)
    whole.train()
    again = small_trainer(tmp_path / "again", objective=objective, steps=5, gradient_checkpointing=True)
    num_finishes, finish = 0, EagleNetwork.finish

    def counted(self: EagleNetwork, *tensors: Tensor) -> Tensor:
        nonlocal num_finishes
        num_finishes += torch.is_grad_enabled()
        return finish(self, *tensors)

    monkeypatch.setattr(EagleNetwork, "finish", counted)
    again.train()
    assert num_finishes == 5 * again.updater.objective.num_passes * 2, "one forward, and one more in backward"
    for one, two in zip(whole.updater.model.parameters(), again.updater.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    def trained(name: str, seed: int) -> dict[str, Tensor]:
        torch.rand(1)  # the global generator's state is not an input
        small_trainer(tmp_path / name, steps=3, seed=seed).train()
        return weights(tmp_path / name / "final")

    first, again, other = trained("a", 4), trained("b", 4), trained("c", 5)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    matrices = [name for name in first if name.endswith("proj.weight")]
    assert matrices and all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    config = TrainingConfig(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, config, 100) for step in range(1, 102)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert max(rates) == rates[9] == rates[10] == 2.0 and rates[100] == 0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] == pytest.approx(2.0 / 90)
    longer = replace(config, decay_steps=800)  # the schedule of a longer run
    assert [learning_rate(step, longer, 100) for step in (10, 406, 801, 900)] == pytest.approx(
        [2.0, 2 * 395 / 790, 0, 0]
    )


def test_epochs_are_whole_batches_of_the_data(tmp_path: Path) -> None:
    result = small_trainer(tmp_path, steps=None, epochs=1.5, batch_size=5).train()
    assert result.num_steps == 6  # 24 sequences: 4 batches of 5 an epoch
    assert curve(tmp_path)[-2]["epoch"] == 1.5


def test_a_micro_batch_is_the_largest_allowed_that_splits_the_share_of_a_process_evenly() -> None:
    for batch_size, asked, num_processes in product(range(1, 13), (None, *range(1, 14)), range(1, 6)):
        config = TrainingConfig(steps=1, batch_size=batch_size, micro_batch_size=asked)
        if batch_size % num_processes:
            with pytest.raises(
                ValueError, match=f"batch_size {batch_size} cannot be split evenly over {num_processes}"
            ):
                micro_batch_size(config, num_processes)
        else:
            share = batch_size // num_processes
            fitting = [size for size in range(1, share + 1) if share % size == 0 and size <= (asked or share)]
            assert micro_batch_size(config, num_processes) == fitting[-1]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_the_held_out_texts_and_run_equally_many_batches(num_processes: int) -> None:
    dataset = small_dataset(9)
    shares = [list(held_out_batches(dataset, 2, index, num_processes)) for index in range(num_processes)]
    assert len({len(share) for share in shares}) == 1
    real = [batch for share in shares for batch in share if batch.loss_mask.any()]
    assert sorted(row for batch in real for row in batch.ids) == sorted(dataset.ids)


# --- processes -------------------------------------------------------------------------------------------------------


def assert_same_curve(one: Path, two: Path) -> None:
    """Equal up to the order of float32 sums."""
    for a, b in zip(curve(one), curve(two), strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a.get("gradient_norm", 0) == pytest.approx(b.get("gradient_norm", 0), rel=1e-2)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.06), "one slot of 18 may be on an edge"
        assert {k: a[k] for k in ("kind", "step")} == {k: b[k] for k in ("kind", "step")}


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    """A real torchrun with gloo, without omegaconf and datasets. A run goes on with as many processes."""
    cases = [("eagle2", None), ("hass", 1)]
    recipes = []
    for number, (objective, size) in enumerate(cases):
        one = tiny_recipe(tmp_path, f"one-{number}", objective, calibrate=number == 0)
        train(one)
        training = replace(one.training, micro_batch_size=size)
        recipes.append(replace(one, output=str(tmp_path / f"two-{number}"), training=training))
    torchrun(recipes, tmp_path)
    for number, recipe in enumerate(recipes):
        two = Path(recipe.output)
        assert_same_curve(tmp_path / f"one-{number}", two)
        assert (two / "final" / "calibration.json").exists() == (number == 0)
        shutil.rmtree(two / "final")
        with pytest.raises(ValueError, match=r"saved on 2 process.*, and this launch is on 1 .*; resume it as"):
            train(recipe)


@pytest.mark.long
def test_processes_that_share_the_weights_give_the_curve_of_one_and_resume_to_the_same_weights(tmp_path: Path) -> None:
    """FSDP2 on CPUs, as `accelerate launch --use_fsdp` sets it up."""
    recipes = []
    for objective in ("eagle2", "hass"):
        one = tiny_recipe(tmp_path, f"one-{objective}", objective, clip_norm=0.5, clip_value=0.01)
        train(one)
        training = replace(one.training, micro_batch_size=1)
        recipes.append(replace(one, output=str(tmp_path / f"two-{objective}"), training=training))
    torchrun(recipes, tmp_path, **FSDP)
    before = {recipe: files(Path(recipe.output)) for recipe in recipes}
    for recipe in recipes:
        two = Path(recipe.output)
        assert_same_curve(tmp_path / two.name.replace("two", "one"), two)
        shutil.rmtree(two / "final")
        shutil.rmtree(two / "checkpoints" / "step-00000006")
        with pytest.raises(ValueError, match=r"saved on 2 process.* that share the weights, and this launch is on 1"):
            train(recipe)
    torchrun(recipes, tmp_path, **FSDP)
    assert before == {recipe: files(Path(recipe.output)) for recipe in recipes}


# --- what is written -------------------------------------------------------------------------------------------------


def test_a_finished_run_leaves_its_layout_and_says_that_it_is_finished(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, save_every=2, keep_checkpoints=2)
    result = train(recipe, Watcher())
    output = Path(recipe.output)
    assert result.is_finished and result.final == output / "final" and result.best == output / "best"
    names = {path.name for path in output.iterdir()}
    assert names == {"recipe.yaml", "data.json", "log.jsonl", "checkpoints", "best", "final"}
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert json.loads((output / "data.json").read_text())["num_training"] == 18
    watcher, before = Watcher(), files(output)
    assert train(recipe, watcher) == result
    assert watcher.notes == [f"the run in {output} is finished already; its drafter is {output / 'final'}"]
    assert files(output) == before


def test_a_saved_drafter_is_the_trained_one_and_says_how_it_was_made(tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(tmp_path, objective="hass"), drafter_dtype="float32")
    result = train(recipe)
    target, _ = tiny.load_target()
    load_drafter(tmp_path / "run" / "final", target)
    loaded = load_network(tmp_path / "run" / "final").state_dict()
    assert "fc.bias" not in loaded and loaded["fc.weight"].dtype == torch.float32
    told = json.loads((tmp_path / "run" / "final" / "config.json").read_text())["taps"]
    assert told["algorithm"] == "hass" and told["target"]["name"] == "target"
    assert (told["step"], told["num_steps"], told["seed"], told["trained_length"]) == (6, 6, 0, 72)
    assert told["data"][0]["path"] == "conversations.jsonl" and len(told["data"][0]["sha256"]) == 64
    assert told["dataset"]["num_sequences"] == 18 and len(told["dataset"]["sha256"]) == 64
    assert told["objective"]["alignment_passes"] == 3 and told["training"]["learning_rate"] == 2e-3
    assert result.validation is not None
    assert told["estimate"]["acceptance_length"] == result.validation.acceptance_length
    assert str(tmp_path) not in json.dumps(told)


def test_the_best_drafter_is_that_of_the_longest_acceptance(tmp_path: Path) -> None:
    watcher = Watcher()
    result = train(tiny_recipe(tmp_path, validate_every=1, learning_rate=5e-3, steps=8), watcher)
    longest = max(record.acceptance_length for record in watcher.validations)
    first = next(record for record in watcher.validations if record.acceptance_length == longest)
    assert [record for record in watcher.validations if record.is_best][-1] == first
    assert result.best is not None
    told = json.loads((result.best / "config.json").read_text())["taps"]
    assert (told["step"], told["estimate"]["acceptance_length"]) == (first.step, longest)
    assert watcher.validations[-1].step == 8 and all(length == length for length in watcher.validations[-1].accuracy)


def test_of_equally_long_acceptances_the_earlier_drafter_stays_the_best(tmp_path: Path) -> None:
    watcher = Watcher()
    result = small_trainer(tmp_path, watcher, learning_rate=1e-30).train()
    assert len({record.acceptance_length for record in watcher.validations}) == 1, "no tie"
    assert [record.is_best for record in watcher.validations] == [True, False, False]
    assert result.best is not None
    assert json.loads((result.best / "config.json").read_text())["taps"]["step"] == 4


def test_a_drafter_can_be_trained_further_and_names_its_parent(tmp_path: Path) -> None:
    first = tiny_recipe(tmp_path, "first")
    train(first)
    network = load_network(tmp_path / "first" / "final")
    train(replace(tiny_recipe(tmp_path, "second", learning_rate=1e-12), start=str(tmp_path / "first" / "final")))
    further = load_network(tmp_path / "second" / "final")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), further.parameters(), strict=True))
    told = json.loads((tmp_path / "second" / "final" / "config.json").read_text())["taps"]
    assert told["parent"]["name"] == "final" and told["parent"]["step"] == 6


def test_tensorboard_gets_the_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_trainer(tmp_path, tracker="tensorboard").train()
    (folder,) = {path.parent for path in (tmp_path / "tracker" / "taps_ext").glob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    records = [record for record in curve(tmp_path) if record["kind"] == "step"]
    assert losses == pytest.approx({record["step"]: record["loss"] for record in records})
    assert [event.step for event in events.Scalars("validation/acceptance_length")] == [4, 8, 12]


def test_a_dry_run_leaves_nothing_and_knows_what_the_run_will_take(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    facts = dry_run(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert facts.num_steps == 6 and facts.num_sequences == 18
    assert facts.hours == pytest.approx(6 * facts.seconds_per_step / 3600) and facts.seconds_per_step > 0
    assert facts.peak_memory_bytes > 50e6
    train(recipe)
    checkpoint = Path(recipe.output) / "checkpoints" / "step-00000006"
    num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert facts.checkpoint_bytes == pytest.approx(num_bytes, rel=0.02)
    assert facts.feature_bytes is None


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_output_of_another_recipe_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, keep_checkpoints=1)
    train(recipe)
    before = {path: path.read_bytes() for path in Path(recipe.output).rglob("*") if path.is_file()}
    other = replace(recipe, training=replace(recipe.training, seed=1, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"another run: training.learning_rate is 0.002 there and 0.5 here; train"):
        train(other)
    source = SourceConfig(recipe.data.sources[0].path, count=9)
    with pytest.raises(ValueError, match=r"data.sources.0.count is None there and 9 here"):
        train(replace(recipe, data=replace(recipe.data, sources=(source,))))
    assert before == {path: path.read_bytes() for path in Path(recipe.output).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 25}, r"training.batch_size 25 is more than the 18 training conversations"),
        ({"tracker": "clouds"}, r"training.tracker must be none, .*tensorboard.* got 'clouds'"),
        ({"tracker": "comet_ml"}, r"training.tracker is comet_ml, which is not installed here: pip install comet_ml"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny_recipe(tmp_path, **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_a_missing_target_and_a_foreign_start_are_refused_in_a_sentence(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no target at .*nowhere: it is neither a directory .* nor a hub id"):
        train(replace(recipe, target=str(tmp_path / "nowhere")))
    small_trainer(tmp_path / "other").train()
    with pytest.raises(ValueError, match=r"drafter vocabulary 23 differs from target vocabulary 1024"):
        train(replace(recipe, start=str(tmp_path / "other" / "final")))
    assert not Path(recipe.output).exists()


def test_an_output_that_would_not_fit_on_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"the run needs 0.0 GiB in .* and 0.0 GiB are free"):
        train(tiny_recipe(tmp_path))
    assert not (tmp_path / "run").exists()


def test_only_the_network_is_trained_and_saved_states_hold_nothing_else(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    names = set(dict(trainer.updater.model.named_parameters()))
    network = EagleNetwork(trainer.updater.model.network.config)
    assert names == {f"network.{name}" for name, _ in network.named_parameters()}
    trainer.train()
    assert set(weights(tmp_path / "checkpoints" / "step-00000012")) == names
