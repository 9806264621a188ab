"""Claims about training with a draft vocabulary: which tokens it has, what is learned over them, what a run leaves."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from training_cases import (
    VOCAB,
    Watcher,
    curve,
    files,
    small_dataset,
    small_target,
    tiny_recipe,
    train_in_fork,
    weights,
)

from taps_ext import tiny
from taps_ext.checkpoints import load_drafter
from taps_ext.checkpoints.formats import read_calibration
from taps_ext.drafters import DraftVocabulary, EagleConfig, EagleDrafter
from taps_ext.training import Example, TokenDataset, calibrate
from taps_ext.training.calibrate import CalibrationSettings
from taps_ext.training.features import FrozenTarget
from taps_ext.training.objectives import ObjectivePass
from taps_ext.training.recipe import ObjectiveConfig, Recipe, VocabularyConfig
from taps_ext.training.run import choose_vocabulary, dry_run, ids_of, new_network, train
from taps_ext.training.trainer import judge_of

OBJECTIVES = ("eagle2", "hass")
SOME = VocabularyConfig(coverage=0.8)

# ---- which tokens


def generated(seed: int) -> tuple[TokenDataset, Counter[int]]:
    """Texts over 40 tokens, and how often each of these is learned."""
    rng = Random(seed)
    rows, counts = [], Counter[int]()
    for _ in range(rng.randint(1, 12)):
        tokens = [min(39, int(rng.expovariate(0.2))) for _ in range(rng.randint(3, 30))]
        mask = [rng.random() < 0.5 for _ in tokens[:-1]] + [True]
        rows.append(Example(tuple(tokens), tuple(mask)))
        counts.update(token for token, learned in zip(tokens, mask, strict=True) if learned)
    return TokenDataset(rows), counts


@pytest.mark.parametrize("seed", range(40))
def test_the_fewest_most_frequent_tokens_reach_the_coverage_and_ends_are_always_in(seed: int) -> None:
    dataset, counts = generated(seed)
    rng = Random(seed)
    coverage, size = rng.choice((0.3, 0.7, 0.9, 0.99, 1.0)), rng.randint(4, 40)
    ends = {rng.randrange(40) for _ in range(rng.randint(0, 3))}
    chosen = choose_vocabulary(VocabularyConfig(coverage=coverage, max_size=size), dataset, 40, ends)
    assert chosen is not None
    tokens = set(chosen.tokens.tolist())
    assert ends <= tokens and len(tokens) <= size and tokens - ends <= counts.keys()
    outside = [(-counts[token], token) for token in counts.keys() - tokens]
    inside = sorted((-counts[token], token) for token in tokens - ends)
    assert not outside or not inside or max(inside) < min(outside)  # of equally frequent tokens the lower ids
    total, covered = counts.total(), sum(counts[token] for token in tokens)
    assert covered >= coverage * total or len(tokens) == size
    if inside:  # one fewer would not do
        assert covered + inside[-1][0] < coverage * total


@pytest.mark.parametrize(
    ("config", "vocab_size", "size"),
    [
        (VocabularyConfig(), 8192, None),
        (VocabularyConfig(), 8193, 8192),
        (VocabularyConfig(), 65_535, 8192),
        (VocabularyConfig(), 65_536, 32_000),
        (VocabularyConfig("all"), 65_536, None),
        (VocabularyConfig(max_size=500), 8192, 500),
        (VocabularyConfig(coverage=0.9), 1000, 8192),
    ],
)
def test_without_a_wish_only_large_vocabularies_are_cut(
    config: VocabularyConfig, vocab_size: int, size: int | None
) -> None:
    assert config.max_size_of(vocab_size) == size


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"coverage": 0.0}, r"coverage must be positive, got 0.0"),
        ({"coverage": 1.1}, r"coverage must be at most 1, got 1.1"),
        ({"max_size": 0}, r"max_size must be at least 1, got 0"),
        ({"tokens": "all", "coverage": 0.9}, r"tokens is all, and coverage and max_size choose some; leave them out"),
    ],
)
def test_a_wish_without_sense_is_refused_in_a_sentence(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VocabularyConfig(**wrong)  # type: ignore[arg-type]


# ---- what is learned


def vocabulary(seed: int) -> DraftVocabulary:
    rng = Random(seed)
    return DraftVocabulary(torch.tensor(sorted(rng.sample(range(VOCAB), rng.randint(1, VOCAB)))), VOCAB)


def literal(guesses: Tensor, truth: Tensor, tokens: Tensor, config: ObjectiveConfig) -> Tensor:
    """The loss of guesses [S, H], slot by slot and token by token, over some tokens."""
    head = small_target().lm_head.weight.detach()[tokens]
    loss = config.feature_weight * torch.nn.functional.smooth_l1_loss(guesses, truth, reduction="none").mean(-1).sum()
    for guess, true in zip(guesses, truth, strict=True):
        wanted, given = (head @ true).softmax(0), (head @ guess).log_softmax(0)
        terms = -wanted * given
        loss = loss + config.distribution_weight * terms.sum()
        if config.name == "hass":
            best = wanted.argsort(descending=True)[: config.num_top_tokens]
            loss = loss + config.top_weight * terms[best].sum()
    return loss


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_over_the_draft_vocabulary_alone(name: str, seed: int) -> None:
    config, chosen = ObjectiveConfig(name=name, num_top_tokens=4), vocabulary(seed)  # type: ignore[arg-type]
    source = FrozenTarget(small_target())
    network = new_network(EagleConfig.for_target(small_target().config), seed)
    batch = source.draft_batch(small_dataset(seed=seed).batch(range(6)))
    model = ObjectivePass(network, source.draft_head(chosen), config, judge=judge_of(source, chosen))
    output = model(batch, [batch.features])
    made = torch.autograd.grad(output.loss, list(network.parameters()))
    guesses, learned = model._guesses(batch.next_embeddings, [batch.features]), batch.loss_mask
    loss = literal(guesses[learned], batch.next_features[learned], chosen.tokens, config)
    torch.testing.assert_close(output.loss, loss)
    for one, other in zip(made, torch.autograd.grad(loss, list(network.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_a_validation_counts_tokens_outside_as_not_accepted(seed: int) -> None:
    chosen, source = vocabulary(seed), FrozenTarget(small_target())
    network = new_network(EagleConfig.for_target(small_target().config), seed)
    model = ObjectivePass(network, source.draft_head(chosen), ObjectiveConfig(), judge=judge_of(source, chosen))
    batch = source.draft_batch(small_dataset(seed=seed).batch(range(12)))
    with torch.no_grad():
        output = model(batch, [batch.features])
        truth = source.logits(batch.next_features).argmax(-1)
        drafted = chosen.tokens[source.logits(output.guesses)[..., chosen.tokens].argmax(-1)]
    assert torch.equal(output.is_correct, batch.loss_mask & (drafted == truth))


# ---- runs


def recipe(folder: Path, output: str = "run", **more: object) -> Recipe:
    made = tiny_recipe(folder, output, **more)  # type: ignore[arg-type]
    return replace(made, vocabulary=SOME)


def test_a_killed_run_resumes_to_the_same_drafter_with_its_vocabulary(tmp_path: Path) -> None:
    whole, killed = (recipe(tmp_path, name) for name in ("whole", "killed"))
    train(whole)
    train_in_fork(killed, kill_at=40)
    train(killed)
    assert files(Path(whole.output)) == files(Path(killed.output))
    assert curve(Path(whole.output)) == curve(Path(killed.output))


def test_a_run_leaves_a_calibrated_drafter_that_holds_nothing_of_the_target(tmp_path: Path) -> None:
    watcher, made = Watcher(), recipe(tmp_path, calibrate=True)
    train(made, watcher)
    final = Path(made.output) / "final"
    held = weights(final)
    assert {"d2t", "t2d"} <= held.keys() and not held.keys() & {"embed_tokens.weight", "lm_head.weight"}
    target, _ = tiny.load_target()
    drafter = load_drafter(final, target)
    assert isinstance(drafter, EagleDrafter) and drafter.ends.vocabulary is not None
    size, ends = len(drafter.ends.vocabulary), ids_of(target.config.eos_token_id)
    assert size == len(held["d2t"]) < drafter.vocab_size and ends and held["t2d"][ends].all()
    [said] = [note for note in watcher.notes if note.startswith("draft vocabulary")]
    assert said.startswith(f"draft vocabulary: {size:,} of the target's {drafter.vocab_size:,} tokens, 8")
    assert drafter.calibration is not None and drafter.calibration == read_calibration(final, None)


def test_a_run_with_another_vocabulary_is_refused_and_a_dry_run_says_its_size(tmp_path: Path) -> None:
    watcher, made = Watcher(), recipe(tmp_path)
    dry_run(made, watcher)
    assert any(note.startswith("draft vocabulary: ") for note in watcher.notes)
    train(made)
    with pytest.raises(ValueError, match=r"holds another run: vocabulary.coverage is 0.8 there and 0.5 here"):
        train(replace(made, vocabulary=VocabularyConfig(coverage=0.5)))


# ---- calibration


def test_calibration_counts_the_draws_that_can_be_proposed() -> None:
    """Of a vocabulary with every token it is that of a drafter without one; fewer tokens have fewer draws."""
    source, dataset = FrozenTarget(small_target()), small_dataset(60)
    network = new_network(EagleConfig.for_target(small_target().config), 0).eval()
    settings = CalibrationSettings(temperatures=(0.5, 1.0), depth=2, positions=400)
    every, last = (DraftVocabulary(torch.arange(first, VOCAB), VOCAB) for first in (0, 11))
    plain, whole, half = (
        calibrate.calibrate(network, source, dataset, settings, None, chosen) for chosen in (None, every, last)
    )
    assert plain.calibration == whole.calibration
    share = [few.num_draws / all_.num_draws for few, all_ in zip(half.cells, plain.cells, strict=True)]
    assert all(0.2 < part < 0.8 for part in share)
    weights = torch.tensor(half.calibration.beta) / torch.tensor(plain.calibration.beta)
    assert weights.min() > 0.5, "the noise is that of the draft vocabulary's own tokens"
