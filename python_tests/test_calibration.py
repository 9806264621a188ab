"""Claims about calibration: the fit, where its draws come from, its file, its command, and what training does of it."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import small_models
import torch
from torch import Tensor
from training_cases import (
    Watcher,
    files,
    small_dataset,
    small_target,
    small_trainer,
    tiny_recipe,
    weights,
    write_conversations,
)

from taps_ext import cli, tiny
from taps_ext.checkpoints import average_drafters, export_drafter, load_drafter, validate_drafter
from taps_ext.checkpoints.files import CALIBRATION_FILE, check_drafter_output, read_drafter_files
from taps_ext.checkpoints.formats import CalibrationRecord, read_calibration, write_calibration
from taps_ext.cli import terminal
from taps_ext.drafters import EagleDrafter
from taps_ext.drafters.coupling import Calibration
from taps_ext.training import Example, TokenDataset, trainer
from taps_ext.training import calibrate as calibrating
from taps_ext.training.calibrate import (
    CANDIDATES,
    LEAST_ALPHA,
    CalibrationReport,
    CalibrationSettings,
    DraftSlots,
    Draws,
    Heads,
    Sample,
    calibrate,
    calibrate_drafter,
    collect,
    draw,
    fit,
    measure,
)
from taps_ext.training.data import prepare
from taps_ext.training.features import FrozenTarget
from taps_ext.training.objectives import ObjectivePass, next_stream
from taps_ext.training.recipe import ObjectiveConfig, Recipe
from taps_ext.training.run import load_tokenizer, train
from taps_ext.training.trainer import ValidationRecord

ONE = Calibration((0.5, 1.0), ((0.6, 0.5), (1.2, 1.1)), ((0.4, 0.3), (0.8, 0.7)))

# --- the fit ---------------------------------------------------------------------------------------------------------


def gumbel(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.empty(*shape).exponential_(generator=generator).log()


def sample_of(logits: Tensor, noise: Tensor, drawn: Tensor, temperature: float) -> Sample:
    """Draws with every token as a candidate."""
    reach = torch.ones(len(drawn), dtype=torch.int64)
    draws = Draws(logits[None], noise, torch.zeros_like(noise), drawn[None], reach, repeats=1)
    return draws.sample(temperature, 0, 0)


@pytest.mark.parametrize(
    ("temperature", "alpha", "beta"), [(1.0, 1.5, 1.3), (1.0, 1.0, 0.4), (0.3, 0.4, 0.35), (1.5, 1.2, 0.0), (0.7, 2, 3)]
)
def test_the_fit_finds_the_coefficients_that_made_the_draws(temperature: float, alpha: float, beta: float) -> None:
    logits, noise = 2 * torch.randn(4000, 50, generator=torch.Generator().manual_seed(1)), gumbel(4000, 50)
    drawn = (alpha * logits / temperature + beta * noise + gumbel(4000, 50, seed=2)).argmax(-1)
    _, *found = fit(sample_of(logits, noise, drawn, temperature), temperature)
    assert found[0] == pytest.approx(alpha, rel=0.06, abs=0.02)  # the standard error is 1 to 2%
    assert found[1] == pytest.approx(beta, rel=0.06, abs=0.04)


@pytest.mark.parametrize("seed", [*range(40), 133, 181, 304, 476])  # in the last ones whole Newton steps diverge
def test_the_fit_ends_at_the_optimum_and_noise_never_makes_the_draws_less_likely(seed: int) -> None:
    """Also where the noise misleads (beta would be negative), the drafter knows nothing, or is wrong throughout."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    num_draws, size = random.choice((8, 40)), random.choice((2, 9))
    logits = random.choice((0, 0.1, 5, 20)) * torch.randn(num_draws, size, generator=generator)
    noise, temperature = gumbel(num_draws, size, seed=seed), random.choice((0.1, 0.7, 1.0, 10.0))
    drawn = (random.uniform(-1, 1) * logits + random.uniform(-5, 5) * noise).argmax(-1)

    def objective(coefficients: Tensor) -> Tensor:
        """The mean cross-entropy, with the pull of one place towards EAGLE-2."""
        scores = coefficients[0] * logits.double() / temperature + coefficients[1] * noise.double()
        pull = (coefficients - torch.tensor([temperature, 0.0])).square().sum() / 2
        return torch.nn.functional.cross_entropy(scores, drawn) + pull / num_draws

    sample = sample_of(logits, noise, drawn, temperature)
    loss, *found = fit(sample, temperature)
    coefficients = torch.tensor(found, dtype=torch.float64)
    gradient, hessian = (derive(objective)(coefficients) for derive in (torch.func.grad, torch.func.hessian))
    allowed = 2e-3 + 2e-4 * hessian.abs().sum(-1)  # float32, and coefficients of four digits
    for value, least, slope, error in zip(found, (LEAST_ALPHA, 0.0), gradient, allowed, strict=True):
        assert value >= least
        assert abs(slope) < error or (value == pytest.approx(least, abs=1e-4) and slope > 0)
    assert loss == pytest.approx(float(objective(coefficients)), abs=1e-4)
    _, uncoupled, zero = fit(sample, temperature, with_noise=False)
    without = float(objective(torch.tensor([uncoupled, 0.0], dtype=torch.float64)))
    assert zero == 0 and loss <= without + 1e-4


def misled() -> Sample:
    """Draws of a target that picks what has little noise."""
    logits, noise = 2 * torch.randn(400, 30, generator=torch.Generator().manual_seed(1)), gumbel(400, 30)
    return sample_of(logits, noise, (logits - noise).argmax(-1), 1.0)


@pytest.mark.parametrize("ends_badly", [False, True])
def test_noise_that_does_not_gain_is_not_used(ends_badly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fit without noise stands then, so that the drafter drafts no worse than without a calibration."""

    def wrong(sample: Sample, temperature: float, with_noise: bool = True) -> tuple[float, float, float]:
        loss, alpha, beta = fit(sample, temperature, with_noise)
        return (loss + 0.001, alpha + 1, beta + 1) if with_noise else (loss, alpha, beta)

    if ends_badly:
        monkeypatch.setattr(calibrating, "fit", wrong)
    cell = calibrating._cell(misled(), misled(), 1.0, 1)
    assert cell.beta == 0 and cell.alpha == cell.uncoupled_alpha and cell.coupled == cell.uncoupled
    assert cell.coupled.nats <= cell.topk.nats


def slots_of(*features: Tensor) -> DraftSlots:
    """Slots of the target's features and of the drafter's by depth, all reached, each in a text of its own."""
    count = len(features[0])
    return DraftSlots(torch.stack(features), torch.full((count,), len(features) - 1), torch.arange(count))


def draws_of(slots: DraftSlots, *temperatures: float, wanted: int = 0, seed: str = "0") -> Draws:
    """Features are logits."""
    heads = Heads(lambda features: features, lambda features: features, slice(None), None)
    return draw(slots, heads, temperatures, wanted, seed, lambda *_: None)


def test_a_perfect_drafter_is_trusted_with_all_the_noise_and_a_blind_one_with_all_but_its_own_word() -> None:
    truth = 2 * torch.randn(1500, 40, generator=torch.Generator().manual_seed(0))
    temperatures = (0.5, 1.0)
    draws = draws_of(slots_of(truth, truth, 0 * truth), *temperatures)
    for t, temperature in enumerate(temperatures):
        (_, alpha, beta), blind = (fit(draws.sample(temperature, t, d), temperature) for d in range(2))
        assert alpha == pytest.approx(beta, rel=0.02), "what it ranks first is what the target draws"
        assert 5 < beta < 30, "the likelihood alone would have no end"
        assert 0 < blind[2] < 1.5 and blind[1] == pytest.approx(temperature, abs=1e-3), "nothing is known of it"


def test_several_draws_at_a_place_count_as_one_place() -> None:
    """Against the pull towards EAGLE-2, which decides where a perfect drafter ends."""
    truth = 2 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    draws = [draws_of(slots_of(truth, truth), 1.0, wanted=n * 200) for n in (1, 4)]
    assert [len(one.noise) for one in draws] == [200, 800]
    once, often = (fit(one.sample(1.0, 0, 0), 1.0)[2] for one in draws)
    assert often == pytest.approx(once, rel=0.2)


def test_the_draws_are_the_targets_own_and_their_noise_is_gumbel_noise() -> None:
    truth = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(12_000, 4).contiguous()
    draws = draws_of(slots_of(truth, truth), 0.5, 1.0)
    for temperature, tokens in zip((0.5, 1.0), draws.drawn, strict=True):
        shares = torch.bincount(tokens, minlength=4) / 12_000
        torch.testing.assert_close(shares, (truth[0] / temperature).softmax(-1), rtol=0, atol=0.015)  # 3 sigma
    assert float(draws.noise.mean()) == pytest.approx(0.5772, abs=0.02) and draws.noise.isfinite().all()
    assert float(draws.noise.var()) == pytest.approx(torch.pi**2 / 6, abs=0.05)


@pytest.mark.parametrize(("sharpness", "beta"), [(1.0, 0.4), (3.0, 0.9)])
def test_of_a_large_vocabulary_the_candidates_give_the_fit_that_all_tokens_give(
    sharpness: float, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, count = 6 * CANDIDATES, 120
    truth = sharpness * torch.randn(count, size, generator=torch.Generator().manual_seed(0))
    slots = slots_of(truth, truth + torch.randn(count, size, generator=torch.Generator().manual_seed(1)) / beta)
    few, genuine = draws_of(slots, 0.7, 1.0), calibrating._candidates

    def take_all(logits: Tensor, noise: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        genuine(logits, noise, *others)  # for the same random numbers afterwards
        return torch.arange(size).expand_as(noise), torch.zeros_like(noise)

    monkeypatch.setattr(calibrating, "_candidates", take_all)
    everything = draws_of(slots, 0.7, 1.0)
    assert few.noise.shape == (count, CANDIDATES) and everything.noise.shape == (count, size)
    for t, temperature in enumerate((0.7, 1.0)):
        own, other = few.sample(temperature, t, 0), everything.sample(temperature, t, 0)
        (_, *found), (_, *expected) = fit(own, temperature), fit(other, temperature)
        assert found == pytest.approx(expected, rel=0.01, abs=0.005)  # the standard error of 120 draws is 10 to 20%
        figures, exact = measure(own, *expected), measure(other, *expected)
        assert figures.nats == pytest.approx(exact.nats, abs=0.02) and figures.hit_rate == exact.hit_rate


def test_candidates_stand_for_all_tokens_and_the_drawn_ones_for_themselves() -> None:
    size, generator = 5 * CANDIDATES, torch.Generator().manual_seed(0)
    logits, noise = torch.randn(2, 20, size, generator=generator).log_softmax(-1), gumbel(20, size)
    drawn = torch.randint(size, (3, 20), generator=generator)
    tokens, log_counts = calibrating._candidates(logits, noise, drawn, generator)
    assert all(len(set(row)) == CANDIDATES for row in tokens.tolist())
    assert ((tokens == drawn[..., None]) & (log_counts == 0)).any(-1).all()
    assert log_counts.exp().sum(-1).mean() == pytest.approx(size, rel=0.1)
    for logs in logits:
        assert (logs.gather(1, tokens) + log_counts).exp().sum(-1).mean() == pytest.approx(1, rel=0.02)


def test_the_head_is_computed_once_per_place_and_noise_once_per_draw() -> None:
    """However many temperatures and evaluations the fit takes."""
    source, rows, noises = FrozenTarget(small_target()), [], []
    genuine, exponential = source.logits, Tensor.exponential_

    def counted(features: Tensor) -> Tensor:
        rows.append(features[..., 0].numel())
        return genuine(features)

    def noted(values: Tensor, **options: Any) -> Tensor:
        noises.append(len(values))
        return exponential(values, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "logits", counted)
        patch.setattr(Tensor, "exponential_", noted)
        found = calibrate(new_drafter(), source, small_dataset(60), CalibrationSettings((0.5, 1.0, 1.5), depth=2))
    num_places = found.num_fitted + found.num_held_out
    assert sum(rows) == num_places * 3, "the target's features and those of two depths"
    assert sum(noises) == num_places * found.repeats and found.repeats > 1


# --- where drafts are made -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_slots_are_those_where_a_step_can_have_drafted_at_each_depth(seed: int) -> None:
    """Each draft of every step that a decoder could begin: root and all that is drafted behind it in one answer."""
    random = Random(seed)
    mask = [random.random() < 0.8 for _ in range(24)] + [True]
    dataset = TokenDataset([Example(tuple(1 + i % 22 for i in range(25)), tuple(mask))])
    expected: dict[int, int] = {}
    for root in range(2, len(mask)):  # tokens 0 and 1 are never learned
        for depth in range(1, 5):
            if all(mask[root : root + depth + 1]) and root + depth < len(mask):
                expected[root + depth] = max(depth, expected.get(root + depth, 0))
    if not expected:
        with pytest.raises(ValueError, match="no place where something could be drafted"):
            slots_from(FrozenTarget(small_target()), dataset, 4, 1000, seed)
        return
    found = slots_from(FrozenTarget(small_target()), dataset, 4, 1000, seed)
    assert found.reach.tolist() == [expected[token] for token in sorted(expected)]


def slots_from(source: FrozenTarget, dataset: TokenDataset, depth: int, count: int, seed: int = 0) -> DraftSlots:
    return collect(new_drafter(), source, dataset, depth, count, seed, lambda *_: None)


@cache
def new_drafter() -> Any:
    from taps_ext.drafters import EagleConfig
    from taps_ext.training.run import new_network

    return new_network(EagleConfig.for_target(small_target().config), 0)


@torch.no_grad()
def test_drafts_and_truth_are_those_of_the_aligned_passes() -> None:
    source, dataset = FrozenTarget(small_target()), small_dataset(6)
    batch, network = source.draft_batch(dataset.batch(range(6))), new_drafter()
    model, streams, guesses = ObjectivePass(network, source.logits, ObjectiveConfig()), [batch.features], []
    for _ in range(3):
        guesses.append(model(batch, streams).guesses)
        streams.append(next_stream(streams[-1], guesses[-1]))
    slots = slots_from(source, dataset, 3, 1000)
    for slot in range(len(slots)):
        same = (batch.next_features - slots.features[0, slot]).abs().amax(-1) < 1e-6
        (row, place), *_ = same.nonzero().tolist()
        for d in range(int(slots.reach[slot])):
            torch.testing.assert_close(slots.features[d + 1, slot], guesses[d][row, place], rtol=1e-5, atol=1e-5)


def test_texts_that_measure_are_not_texts_that_were_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[DraftSlots, Draws]] = []

    def noted(slots: DraftSlots, *given: Any) -> Draws:
        taken.append((slots, draw(slots, *given)))
        return taken[-1][1]

    monkeypatch.setattr(calibrating, "draw", noted)
    source, dataset = FrozenTarget(small_target()), small_dataset(60)
    found = calibrate(new_drafter(), source, dataset, CalibrationSettings((1.0,), depth=2, positions=200))
    fitted_on, measured_on = ({*slots.sequence.tolist()} for slots, _ in taken)
    assert not fitted_on & measured_on and len(fitted_on) > 2 * len(measured_on) > 10
    assert (found.num_fitted, found.num_held_out) == tuple(len(slots) for slots, _ in taken)
    assert not torch.equal(*(draws.noise[:9] for _, draws in taken)), "nor is their noise"


def test_of_much_text_a_random_part_is_taken() -> None:
    source, dataset = FrozenTarget(small_target()), small_dataset(80)
    taken, again = (slots_from(source, dataset, 2, 100, seed) for seed in (0, 1))
    assert len(taken) == 100 and len(set(taken.sequence.tolist())) > 40
    assert not torch.equal(taken.features[:, :3], again.features[:, :3])


# --- a real drafter --------------------------------------------------------------------------------------------------


@cache
def world() -> tuple[EagleDrafter, FrozenTarget, TokenDataset]:
    """A drafter that accepts some of its domain, and texts of it."""
    text = small_models.sentences("math", 60, 40, seed=900)
    mask = (False, False, *[True] * 38)
    dataset = TokenDataset(Example(tuple(row), mask) for row in text.tolist())
    return small_models.trained_drafters()["math"], FrozenTarget(small_models.trained_target()), dataset


@cache
def report(seed: int = 0) -> CalibrationReport:
    drafter, source, dataset = world()
    return calibrate(
        drafter.network, source, dataset, CalibrationSettings((0.7, 1.0), depth=4, seed=seed << 70)
    )  # any number


def test_on_texts_that_were_left_out_the_noise_gains_nats_at_every_depth() -> None:
    for cell in report().cells:
        assert cell.coupled.nats < min(cell.uncoupled.nats, cell.topk.nats) - 0.1, cell
    places = [(cell.temperature, cell.depth) for cell in report().cells]
    assert places == [(temperature, depth) for temperature in (0.7, 1.0) for depth in (1, 2, 3, 4)]


def test_more_temperature_means_more_noise() -> None:
    cold, warm = report().calibration.beta
    assert all(c < w for c, w in zip(cold, warm, strict=True))


def test_the_same_settings_give_the_same_calibration_and_another_seed_nearly() -> None:
    drafter, source, dataset = world()
    again = calibrate(drafter.network, source, dataset, CalibrationSettings((0.7, 1.0), depth=4))
    assert again == report()
    for one, other in zip(report().cells, report(seed=1).cells, strict=True):
        assert one != other
        assert one.alpha == pytest.approx(other.alpha, rel=0.25) and one.beta == pytest.approx(other.beta, rel=0.25)


def test_measures_count_what_they_say() -> None:
    scores = torch.tensor([[0.54, 0.25, 0.21, 0, 0, 0, 0, 0, 0, 0, 0], [0.91, 0.05, 0.04, 0, 0, 0, 0, 0, 0, 0, 0]])
    scores = torch.cat([scores, scores.roll(1, dims=1)]).clamp(min=1e-9)
    scores[3, 0] = 1e-10
    scores.log_()
    found = measure(sample_of(scores, torch.zeros_like(scores), torch.tensor([0, 1, 3, 0]), 1.0), 1.0, 0.0)
    assert found.nats == pytest.approx(-float(torch.tensor([0.54, 0.05, 0.21, 1e-10]).log().mean()), rel=1e-5)
    assert found.hit_rate == 0.75, "the last one is not among the ten best of eleven"
    # Bins of the probabilities 0 to 0.1, 0.2 to 0.3, 0.5 to 0.6 and 0.9 to 1; what is drawn is in the first three.
    surplus = (2 * (0.05 + 0.04) - 1, 2 * (0.25 + 0.21) - 1, 2 * 0.54 - 1, 2 * 0.91)
    assert found.calibration_error == pytest.approx(sum(map(abs, surplus)) / 4, rel=1e-4)


def test_texts_with_too_little_to_draft_are_refused_or_fitted_less_deep() -> None:
    drafter, source, dataset = world()

    def texts(count: int, learned: int) -> TokenDataset:
        mask = (False, False, *[True] * learned, *[False] * (38 - learned))
        return TokenDataset(Example(dataset[i].tokens, mask) for i in range(count))

    settings = CalibrationSettings((1.0,), depth=4)
    assert calibrate(drafter.network, source, texts(50, 3), settings).calibration.depth == 2
    with pytest.raises(ValueError, match=r"have 8 places .* too few to calibrate; give more conversations, or some"):
        calibrate(drafter.network, source, texts(4, 3), settings)
    with pytest.raises(ValueError, match="no place where something could be drafted"):
        calibrate(drafter.network, source, texts(4, 1), settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperatures": ()}, "temperatures must ascend"),
        ({"temperatures": (1.0, 0.7)}, r"temperatures must ascend within 0.001 and 100, got \[1.0, 0.7\]"),
        ({"temperatures": (0.0, 1.0)}, "within 0.001 and 100"),
        ({"temperatures": (float("nan"),)}, "must ascend"),
        ({"temperatures": (1.0, 200.0)}, "must ascend"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"positions": 3}, "positions must be at least 64, got 3"),
    ],
)
def test_settings_without_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CalibrationSettings(**given)


# --- between and beyond temperatures ---------------------------------------------------------------------------------


def test_coefficients_are_linear_between_temperatures_and_fade_to_nothing_below() -> None:
    alpha, beta = ONE.coefficients(torch.tensor([0.5, 0.75, 1.0, 7.0, 0.25, 1e-6]))
    torch.testing.assert_close(alpha[0], torch.tensor([0.6, 0.9, 1.2, 1.2, 0.3, 1.2e-6]))
    torch.testing.assert_close(beta[1], torch.tensor([0.3, 0.5, 0.7, 0.7, 0.15, 6e-7]))
    of_greedy_rows = ONE.coefficients(torch.tensor([0.0]))
    assert bool((of_greedy_rows[0] > 0).all()) and bool((of_greedy_rows[1] == 0).all())


@pytest.mark.parametrize("seed", range(10))
def test_a_row_has_the_coefficients_that_it_has_alone(seed: int) -> None:
    temperatures = torch.rand(7, generator=torch.Generator().manual_seed(seed)) * 2
    together = ONE.coefficients(temperatures)
    for row, temperature in enumerate(temperatures):
        for own, other in zip(together, ONE.coefficients(temperature[None]), strict=True):
            assert torch.equal(own[:, row], other[:, 0])


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a shipped drafter, with its calibration."""
    return Path(shutil.copytree(tiny.drafter_paths()["math"], tmp_path / "drafter"))


def test_a_calibration_is_written_and_read_whole(folder: Path) -> None:
    digest = read_drafter_files(folder).digest
    path = write_calibration(folder, CalibrationRecord(ONE, {"data": {"num_sequences": 3}}), digest)
    assert read_calibration(folder, digest) == ONE
    assert json.loads(path.read_text())["data"] == {"num_sequences": 3}
    assert {entry.name for entry in folder.iterdir()} == {"config.json", "model.safetensors", CALIBRATION_FILE}
    assert load_drafter(folder, tiny.load_target()[0]).calibration == ONE


def change(told: dict[str, Any], **values: Any) -> str:
    return json.dumps({**told, **values})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda told: "", "cannot be read"),
        (lambda told: json.dumps(told)[:200], "cannot be read"),
        (lambda told: "[1]", "its format is not 1"),
        (lambda told: change(told, format=2), "its format is not 1"),
        (lambda told: change(told, alpha=None), "lists of temperatures, alpha and beta"),
        (lambda told: change(told, beta=[[1.0]]), "beta must be"),
        (lambda told: change(told, temperatures=[1.0, 0.7, 0.3, 0.1]), "temperatures must ascend"),
        (lambda told: change(told, temperatures=[0.0, 0.7, 1.0, 1.5]), "temperatures must be from"),
        (lambda told: change(told, alpha=[[float("nan")] * 6] * 4), "alpha must be above 0"),
        (lambda told: change(told, alpha=[[0.0] * 6] * 4), "alpha must be above 0"),
        (lambda told: change(told, beta=[[-1.0] * 6] * 4), "beta must be at least 0"),
        (lambda told: change(told, drafter="0" * 64), "belongs to other weights"),
    ],
)
def test_a_damaged_or_foreign_calibration_is_refused_in_a_sentence(
    damage: Callable[[dict[str, Any]], str], said: str, folder: Path
) -> None:
    path = folder / CALIBRATION_FILE
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=said) as caught:
        load_drafter(folder, tiny.load_target()[0])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and "delete the file" in str(caught.value)
    checks = {check.name: check for check in validate_drafter(folder).checks}
    assert checks["calibration"].status == "failed" and said in checks["calibration"].message


def test_bytes_that_are_no_text_are_refused_too(folder: Path) -> None:
    (folder / CALIBRATION_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_drafter(folder, tiny.load_target()[0])


def test_validation_says_whether_there_is_a_calibration(folder: Path) -> None:
    def found() -> tuple[str, str]:
        (check,) = [check for check in validate_drafter(folder).checks if check.name == "calibration"]
        return check.status, check.message

    assert found() == ("ok", "of these weights, at the temperatures 0.3, 0.7, 1, 1.5, 6 deep")
    (folder / CALIBRATION_FILE).unlink()
    status, message = found()
    assert status == "warning" and f"taps-ext calibrate {folder} --target" in message
    assert load_drafter(folder, tiny.load_target()[0]).calibration is None


def test_other_weights_have_no_calibration(folder: Path, tmp_path: Path) -> None:
    average = average_drafters([folder, tiny.drafter_paths()["chat"]], None, tmp_path / "average")
    exported = export_drafter(folder, "vllm", tmp_path / "exported")
    for place in (average, exported):
        assert not (place / CALIBRATION_FILE).exists()
    check_drafter_output(folder)
    assert average_drafters([average, folder], None, folder) == folder, "a calibrated drafter can be replaced"
    assert not (folder / CALIBRATION_FILE).exists()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "math.jsonl"
    write_conversations(path, 30, seed=1)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return run


SMALL = ("--target=tiny", "--temperature=1", "--temperature=0.5", "--depth=2", "--positions=400")


def test_the_command_writes_the_same_file_each_time_and_shows_what_it_is_worth(
    run, folder: Path, data: Path, tmp_path: Path
) -> None:
    path = folder / CALIBRATION_FILE
    path.write_text("damaged")
    code, out, err = run("calibrate", str(folder), *SMALL, f"--data={data}")
    assert code == 0, err
    assert f"wrote {path}" in out and "nats: gained per drawn token" in out
    before = path.read_bytes()
    code, out, err = run("calibrate", str(folder), *SMALL, f"--data={data}", "--json")
    told = json.loads(out)
    assert code == 0 and path.read_bytes() == before
    assert told["temperatures"] == [0.5, 1.0] and len(told["alpha"][0]) == 2 and len(told["cells"]) == 4
    assert told["cells"][3]["coupled"]["nats"] < told["cells"][3]["topk"]["nats"]
    written = json.loads(before)
    assert written["drafter"] == read_drafter_files(folder).digest and written["target"]["name"] == "target"
    assert "texts" not in written["data"], "what they were to the drafter's training is not known"
    assert str(tmp_path) not in before.decode() and str(data.parent) not in before.decode()
    assert load_drafter(folder, tiny.load_target()[0]).calibration == Calibration.from_dict(written)


def test_without_a_terminal_a_line_tells_now_and_then_how_far_it_is(
    run, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command and the end of a run; standard output stays JSON."""
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    code, out, err = run("calibrate", str(folder), *SMALL, f"--data={data}", "--json")
    assert code == 0 and json.loads(out)["files"] == [str(folder / CALIBRATION_FILE)]
    for line in ("conversations: 30 of 30", r"texts: 8 of \d+", r"draws: 32 of \d+", "fits: 3 of 4"):
        assert re.search(f"^{line}(, .+ left)?$", err, re.MULTILINE), line
    watcher = Watcher()
    small_trainer(tmp_path / "run", watcher, steps=1, calibrate=True).train()
    assert {"texts", "draws", "fits"} <= set(watcher.work)


def test_the_file_names_neither_time_nor_place(folder: Path, data: Path) -> None:
    told = json.loads((folder / CALIBRATION_FILE).read_text())
    assert set(told) == {"format", "temperatures", "alpha", "beta", "drafter", "target", "data", "code", "seed"} | {
        "positions",
        "held_out",
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["owner/name"], "owner/name is no directory here.*`hf download OWNER/NAME --local-dir DIRECTORY"),
        (["nowhere"], "nowhere is no directory here"),
        (["tiny/other"], "there is no embedded drafter tiny/other"),
        (["{folder}", "--temperature=0"], "temperatures must ascend within 0.001 and 100"),
        (["{folder}", "--depth=0"], "depth must be at least 1"),
        (["{folder}", "--data=nowhere.jsonl"], "there is no nowhere.jsonl"),
        (["{empty}"], "no weights in .*empty"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_sentence(
    arguments: list[str], said: str, run, folder: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"folder": folder, "empty": tmp_path / "empty"}
    before = (folder / CALIBRATION_FILE).read_bytes()
    code, out, err = run("calibrate", *(a.format(**names) for a in arguments), "--target=tiny", f"--data={data}")
    sentences = [line for line in err.splitlines() if line.startswith("taps-ext: ")]
    assert (code, out, len(sentences)) == (2, "", 1), err
    assert re.search(said, sentences[0])
    assert (folder / CALIBRATION_FILE).read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:  # also where root may write anywhere
        assert dir == folder
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"cannot be written to") as caught:
        calibrate_drafter(folder, None, None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# --- training --------------------------------------------------------------------------------------------------------


def calibrations(output: Path) -> dict[str, Calibration | None]:
    folders = {name: output / name for name in ("best", "final")}
    return {name: read_calibration(folder, read_drafter_files(folder).digest) for name, folder in folders.items()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> CalibrationSettings:
    """What runs are calibrated with."""
    settings = CalibrationSettings((1.0,), depth=2, positions=128)
    monkeypatch.setattr(calibrating, "CalibrationSettings", lambda seed: settings)
    return settings


def own_recipe(folder: Path, output: str = "run", **training: Any) -> Recipe:
    """Its best drafter is not the final one."""
    return tiny_recipe(folder, output, **{"calibrate": True, "validate_every": 2, "learning_rate": 2e-2, **training})


def test_a_run_ends_with_calibrated_drafters_as_the_command_would_calibrate_them(
    quick: CalibrationSettings, tmp_path: Path
) -> None:
    recipe = own_recipe(tmp_path)
    result = train(recipe)
    assert all(calibrations(Path(recipe.output)).values())
    target, _ = tiny.load_target()
    training = prepare(recipe.data, load_tokenizer(recipe)).training
    for place in (result.best, result.final):
        assert place is not None
        before = (place / CALIBRATION_FILE).read_bytes()
        calibrate_drafter(place, target, training, quick, target_name=recipe.target, texts="training")
        assert (place / CALIBRATION_FILE).read_bytes() == before


class KilledError(Exception):
    pass


@pytest.mark.parametrize("num_written", range(3))
def test_a_run_killed_while_it_calibrates_is_calibrated_by_the_same_command_and_only_once(
    num_written: int, quick: CalibrationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, recipe = (own_recipe(tmp_path, name) for name in ("whole", "killed"))
    train(whole)
    output, writes = Path(recipe.output), iter(range(3))

    def kill(path: Path, text: str) -> None:
        if next(writes) == num_written:
            path.with_name(f".{path.name}.0.tmp").write_text(text[:100])
            raise KilledError
        path.write_text(text)

    with monkeypatch.context() as patch:
        patch.setattr("taps_ext.checkpoints.formats.write_text", kill)
        if num_written < 2:
            with pytest.raises(KilledError):
                train(recipe)
        else:
            train(recipe)
    is_there = [(output / name / CALIBRATION_FILE).exists() for name in ("final", "best")]
    assert is_there == [True] * num_written + [False] * (2 - num_written)
    for name in ("final", "best"):
        assert weights(output / name).keys() == weights(Path(whole.output) / name).keys(), "both are whole"
    watcher = Watcher()
    assert train(recipe, watcher).is_finished and watcher.steps == []
    calibrated = [note.rpartition(" ")[2] for note in watcher.notes if note.startswith("calibrating the drafter")]
    final, best = ((output / name / "model.safetensors").read_bytes() for name in ("final", "best"))
    expected = ["final", "best"][num_written:]
    assert calibrated == (expected[:1] if final == best else expected), "equal weights share one"
    assert files(output) == files(Path(whole.output))
    monkeypatch.setattr("taps_ext.training.run.load_materials", lambda *_: pytest.fail("it is done"))
    assert train(recipe, again := Watcher()).is_finished and len(again.notes) == 1


def test_a_run_killed_while_it_saves_its_last_drafter_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_trainer(tmp_path / "whole", calibrate=True).train()
    killed, genuine = tmp_path / "killed", trainer.save_drafter

    def kill(*arguments: Any, **options: Any) -> Any:
        if arguments[1] == killed / "final":
            raise KilledError
        return genuine(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_drafter", kill)
        with pytest.raises(KilledError):
            small_trainer(killed, calibrate=True).train()
    assert not (killed / "final").exists() and not (killed / "best" / CALIBRATION_FILE).exists()
    watcher = Watcher()
    assert small_trainer(killed, watcher, calibrate=True).train().is_finished and watcher.steps == []
    assert files(killed) == files(tmp_path / "whole")


def test_drafters_are_saved_and_nobody_waits_any_more_when_the_main_process_calibrates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, events = small_trainer(tmp_path, calibrate=True), []

    def calibrate_noted(*arguments: Any) -> CalibrationReport:
        events.append({path.name for path in tmp_path.iterdir()} >= {"best", "final"})
        return calibrate(*arguments)

    monkeypatch.setattr(run.accelerator, "wait_for_everyone", lambda: events.append("wait"))
    monkeypatch.setattr(calibrating, "calibrate", calibrate_noted)
    run.train()
    first = events.index(True)
    assert set(events[:first]) == {"wait"} and set(events[first:]) == {True}


def refused(*names: str) -> Callable[[Path, str], None]:
    def write(path: Path, text: str) -> None:
        if path.parent.name in names:
            raise PermissionError(13, "Permission denied", str(path))
        path.write_text(text)

    return write


class Remover(Watcher):
    """Removes the best drafter when the last step is done."""

    def __init__(self, output: Path) -> None:
        super().__init__()
        self.output = output

    def validated(self, record: ValidationRecord) -> None:
        super().validated(record)
        if record.step == 12:
            shutil.rmtree(self.output / "best")


@pytest.mark.parametrize("failing", [("gone",), ("best",), ("final", "best")])
def test_a_calibration_that_fails_costs_no_drafter(
    failing: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_trainer(tmp_path / "whole", calibrate=False).train()
    run, is_gone = tmp_path / "run", failing == ("gone",)
    watcher = Remover(run) if is_gone else Watcher()
    with monkeypatch.context() as patch:
        patch.setattr("taps_ext.checkpoints.formats.write_text", refused(*failing))
        assert small_trainer(run, watcher, calibrate=True).train().is_finished
    told = [note for note in watcher.notes if "is not calibrated" in note]
    expected = "no drafter at" if is_gone else r"\[Errno 13\] Permission denied"
    for name, note in zip(["best"] if is_gone else failing, told, strict=True):
        assert re.match(f"the drafter {name} is not calibrated: {expected}", note) and "\n" not in note
    assert (run / "final" / CALIBRATION_FILE).exists() == ("final" not in failing)
    for path in (tmp_path / "whole" / "final").iterdir():
        assert (run / "final" / path.name).read_bytes() == path.read_bytes()
    if not is_gone:
        assert small_trainer(run, calibrate=True).train().is_finished
        assert all(calibrations(run).values())


def test_a_finished_run_is_calibrated_later_on_its_own_texts_alone(quick: CalibrationSettings, tmp_path: Path) -> None:
    train(own_recipe(tmp_path, calibrate=False))
    recipe = own_recipe(tmp_path)
    data, output = Path(recipe.data.sources[0].path), Path(recipe.output)
    content, before = data.read_text(), files(output)
    for said in (r"holds another run: dataset\.", r"there is no \S+\.jsonl"):
        if "another" in said:
            write_conversations(data, 24, seed=6)
        else:
            data.unlink()
        watcher = Watcher()
        assert train(recipe, watcher).is_finished and files(output) == before
        for name, note in zip(("final", "best"), watcher.notes[-2:], strict=True):
            assert re.match(f"the drafter {name} is not calibrated: .*{said}", note), note
    data.write_text(content)
    assert train(recipe).is_finished and all(calibrations(output).values())


def test_a_best_drafter_of_an_earlier_step_has_a_calibration_of_its_own(tmp_path: Path) -> None:
    small_trainer(tmp_path, learning_rate=1e-30, calibrate=True).train()  # the first of equal ones is the best
    step = json.loads((tmp_path / "best" / "config.json").read_text())["taps"]["step"]
    found = calibrations(tmp_path)
    assert step == 4 and found["best"] == found["final"] is not None, "equal weights"
    small_trainer(tmp_path / "other", held_out=0, calibrate=True).train()
    assert (tmp_path / "other" / "final" / CALIBRATION_FILE).exists()


def test_a_best_drafter_of_the_last_step_is_calibrated_with_the_final_one(tmp_path: Path) -> None:
    watcher = Watcher()
    small_trainer(tmp_path, watcher, steps=4, calibrate=True).train()
    assert [note for note in watcher.notes if note.startswith("calibrating")] == ["calibrating the drafter final"]
    best, final = ((tmp_path / name / CALIBRATION_FILE).read_bytes() for name in ("best", "final"))
    assert best == final


def test_a_run_with_too_little_text_says_that_it_is_not_calibrated(
    quick: CalibrationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "MIN_PLACES", 10_000)
    watcher = Watcher()
    assert small_trainer(tmp_path, watcher, calibrate=True).train().is_finished
    assert any(note.startswith("the drafter final is not calibrated: the texts have") for note in watcher.notes)
    assert calibrations(tmp_path) == {"best": None, "final": None}


@pytest.mark.parametrize(("held_out", "calibrated_on"), [(0, 24), (6, 24), (120, 120)])
def test_a_run_is_calibrated_on_what_it_held_out_where_that_is_enough_and_says_where_it_is_not(
    held_out: int, calibrated_on: int, tmp_path: Path
) -> None:
    watcher = Watcher()
    small_trainer(tmp_path, watcher, held_out=held_out, steps=2, calibrate=True).train()
    told = json.loads((tmp_path / "final" / CALIBRATION_FILE).read_text())
    assert told["data"]["num_sequences"] == calibrated_on
    assert told["data"]["texts"] == ("training" if calibrated_on == 24 else "held-out")
    said = "the drafter final is calibrated on the texts that it was trained on: fewer than 512 tokens"
    assert any(note.startswith(said) for note in watcher.notes) == (calibrated_on == 24)


def test_calibration_can_be_left_to_later_also_by_a_run_that_goes_on(tmp_path: Path) -> None:
    small_trainer(tmp_path, calibrate=False).train()
    assert calibrations(tmp_path) == {"best": None, "final": None}
    shutil.rmtree(tmp_path / "final")
    small_trainer(tmp_path, calibrate=True).train()
    assert all(calibrations(tmp_path).values())
