"""The check of losslessness: it passes what is lossless, notices what is not, and tells rounding from faults."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import new_target, prompts, trained_drafters, trained_target
from torch import Tensor
from typer.testing import CliRunner, Result

import taps_ext as taps
from taps_ext import tiny
from taps_ext.cli import evaluate as evaluation_lossless
from taps_ext.cli.evaluate import check_lossless as command
from taps_ext.decode import plain as plain_generation
from taps_ext.decode import step as device_half
from taps_ext.decode.state import Acceptance
from taps_ext.decode.step import verify
from taps_ext.drafters.eagle import EagleDrafter
from taps_ext.evaluation.divergence import (
    ROUNDINGS,
    Batch,
    Divergence,
    ListeningTarget,
    _rounding,
    find_divergences,
)
from taps_ext.evaluation.frequencies import LEAST_COUNT, ChiSquare, chi_square, common_beginnings, last_logits
from taps_ext.evaluation.lossless import check_lossless, count_units, make_ways
from taps_ext.evaluation.lossless_report import (
    SIGNIFICANCE,
    FrequencyCheck,
    LosslessReport,
    LosslessSettings,
    TextCheck,
)
from taps_ext.evaluation.tasks import Question
from taps_ext.target.model import ScoredTree, TargetModel

SETTINGS = LosslessSettings(max_new_tokens=24, num_draws=0, shape=taps.TreeShape(4, 4, 16))
FREQUENCIES = replace(SETTINGS, temperatures=(1.0,), max_new_tokens=2, num_draws=1500, draws_together=500)
MERGED = make_ways(["math", "chat"], ["merged"])


def small_prompts(count: int = 8) -> list[list[int]]:
    """Token ids, of different lengths."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(*prompts(count), strict=True)]


@cache
def reduced(dtype: torch.dtype) -> tuple[Any, dict[str, EagleDrafter]]:
    """The small target and its drafters in another precision."""
    target = copy.deepcopy(trained_target()).to(dtype)
    drafters = {}
    for name, one in trained_drafters().items():
        network = copy.deepcopy(one.network).to(dtype)
        drafters[name] = EagleDrafter(
            network, target.get_input_embeddings(), target.get_output_embeddings(), name, one.calibration
        )
    return target, drafters


def check(settings: LosslessSettings, ways: Any = MERGED, dtype: torch.dtype = torch.float32) -> LosslessReport:
    target, drafters = (trained_target(), trained_drafters()) if dtype == torch.float32 else reduced(dtype)
    return check_lossless(target, drafters, ways, small_prompts(), settings)


def test_every_way_of_decoding_passes() -> None:
    ways, settings, done = make_ways(["math", "chat"]), replace(SETTINGS, num_draws=200), []
    report = check_lossless(trained_target(), trained_drafters(), ways, small_prompts(), settings, done.append)
    assert (report.verdict, report.passed, report.notes) == ("lossless", True, [])
    labels = ["single:math", "single:chat", "confidence", "entropy", "evidence", "merged"]
    assert [(one.temperature, one.way) for one in report.texts] == list(itertools.product((0.0, 0.5, 1.0), labels))
    assert {(one.num_texts, one.verdict) for one in report.texts} == {(8, "equal")}
    assert [one.way for one in report.frequencies] == ["plain", *labels]
    assert len(done) == count_units(ways, 8, settings) == 3 * 7 + 7


def test_prompts_and_texts_of_different_lengths_are_decoded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(target: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> taps.PlainResult:
        seen.append((attention_mask.sum(1).tolist(), options["max_new_tokens"], options["sampling"].seed))
        return taps.plain_generate(target, input_ids, attention_mask, **options)

    monkeypatch.setattr("taps_ext.evaluation.lossless.plain_generate", spy)
    check(replace(SETTINGS, batch_size=5, seed=7))
    assert len(seen) == 6  # two batches at three temperatures
    lengths, new_tokens, seeds = zip(*seen[:2], strict=True)
    assert [len(row) for row in lengths] == [5, 3]
    assert [len(set(row)) for row in lengths] == [5, 3]
    assert new_tokens[0] == [24, 21, 18, 15, 24]
    assert list(itertools.chain(*seeds)) == [taps.row_seed(7, prompt) for prompt in range(8)]


def test_checks_with_consecutive_seeds_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in their texts nor in their draws of one prompt, whose frequencies would be the same tokens again."""
    seen: dict[int, list[int]] = {}

    def spy(target: Any, *args: Any, **options: Any) -> taps.PlainResult:
        seen[seed] += options["sampling"].seed
        return taps.plain_generate(target, *args, **options)

    monkeypatch.setattr("taps_ext.evaluation.lossless.plain_generate", spy)
    for seed in (2**63 - 2, 2**63 - 1):
        seen[seed] = []
        check(replace(FREQUENCIES, num_draws=100, draws_together=50, seed=seed))
    one, other = (set(seeds) for seeds in seen.values())
    assert len(one) == len(other) == 100 and not one & other


def test_a_seed_of_more_than_64_bits_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"^seed must be a 64-bit integer, got 9223372036854775808$"):
        replace(SETTINGS, seed=2**63)


# ---- rules that are wrong

Rule = Callable[[Tensor, taps.DraftTree, Any, Tensor], Acceptance]


def trust_the_drafter(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    """The drafter's first child is taken for the draw, whatever is drawn."""
    found = verify(logits, tree, sampling, positions)
    if tree.capacity == 1:
        return found
    take = (found.path[:, 1] != 1) & (tree.num_nodes > 1)
    child = tree.tokens[:, 1]
    at_child = verify(logits[:, 1:2], taps.DraftTree.of_roots(child), sampling, positions + 1)
    bonus = torch.where(take, at_child.bonus_tokens, found.bonus_tokens)
    path, tokens = found.path.clone(), found.tokens.clone()
    path[take, 1:], tokens[take] = -1, -1
    path[take, 1], tokens[take, 0], tokens[take, 1] = 1, child[take], bonus[take]
    return Acceptance(path, torch.where(take, 1, found.num_accepted), tokens, bonus, found.is_invalid)


def draw_with_other_noise(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    return verify(logits, tree, sampling, positions + 1_000_000)


def draw_at_twice_the_temperature(logits: Tensor, tree: taps.DraftTree, sampling: Any, positions: Tensor) -> Acceptance:
    return verify(logits, tree, replace(sampling, temperature=2 * sampling.temperature), positions)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_texts_notice_a_rule_that_trusts_the_drafter(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", trust_the_drafter)
    report = check(replace(SETTINGS, temperatures=(temperature,)))
    assert [one.verdict for one in report.texts] == ["different"]
    assert (report.verdict, report.passed) == ("not lossless", False)
    assert not any(one.is_near_tie for one in report.texts[0].divergences)


def test_frequencies_notice_a_rule_that_trusts_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", trust_the_drafter)
    plain, merged = check(FREQUENCIES).frequencies
    assert (plain.verdict, merged.verdict) == ("as expected", "not as expected")


def test_texts_alone_notice_fresh_noise_which_leaves_the_distribution_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", draw_with_other_noise)
    report = check(replace(SETTINGS, num_draws=1500, draws_together=500))
    assert [one.verdict for one in report.texts] == ["equal", "different", "different"]
    assert [one.verdict for one in report.frequencies] == ["as expected", "as expected"]
    assert not report.passed


def test_frequencies_alone_notice_what_is_wrong_with_plain_decoding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (device_half, plain_generation):
        monkeypatch.setattr(module, "verify", draw_at_twice_the_temperature)
    report = check(replace(SETTINGS, num_draws=1500, draws_together=500))
    assert {one.verdict for one in report.texts} == {"equal"}
    assert [one.verdict for one in report.frequencies] == ["not as expected", "not as expected"]
    assert report.verdict == "not lossless"


# ---- reduced precision


def score_with(change: Callable[[Tensor], Tensor]) -> Any:
    """`TargetModel.score` with other logits."""
    stock = TargetModel.score

    def score(self: TargetModel, *arguments: Any, **options: Any) -> Any:
        scored = stock(self, *arguments, **options)
        return replace(scored, logits=change(scored.logits))

    return score


def last_spacings(logits: Tensor) -> Tensor:
    """Every other token a spacing up or down."""
    signs = 1 - 2 * (torch.arange(logits.shape[-1]) % 2)
    return (logits * (1 + signs * torch.finfo(logits.dtype).eps)).to(logits.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_parts_texts_at_near_ties_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of it than there is by itself, so that texts do part."""
    monkeypatch.setattr(TargetModel, "score", score_with(last_spacings))
    settings = replace(SETTINGS, temperatures=(1.0, 2.0), max_new_tokens=100)
    report = check(settings, dtype=dtype)
    parted = [one for text in report.texts for one in text.divergences]
    assert parted
    assert {text.verdict for text in report.texts} <= {"equal", "near-ties"}
    assert report.passed
    assert report.verdict == f"lossless, up to near-ties of {str(dtype).removeprefix('torch.')}"
    for one in parted:
        assert one.evidence is not None
        assert one.evidence.tree_lead > one.evidence.plain_lead  # the noise is the same: the lead must have moved
        assert 0 < one.evidence.spacing <= one.evidence.difference


def test_a_wrong_rule_is_a_fault_in_reduced_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", trust_the_drafter)
    report = check(SETTINGS, dtype=torch.bfloat16)
    assert {text.verdict for text in report.texts} == {"different"}
    faults = [one.evidence for text in report.texts for one in text.divergences if not one.is_near_tie]
    assert any(evidence is not None and not evidence.is_drawn for evidence in faults)


def test_the_leads_are_read_off_the_two_computations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit that is moved in trees alone moves the lead there by as much."""
    boosted = 9

    def boost(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., boosted] += 40
        return logits

    monkeypatch.setattr(TargetModel, "score", score_with(boost))
    (text,) = check(replace(SETTINGS, temperatures=(0.0,))).texts
    assert len(text.divergences) == 8
    for one in text.divergences:
        assert one.token == boosted
        assert one.evidence is not None
        assert one.evidence.tree_lead - one.evidence.plain_lead == pytest.approx(40, abs=1e-3)
        assert one.evidence.plain_lead < 0
        assert one.evidence.difference == pytest.approx(40, abs=1e-3)
        assert one.evidence.is_drawn
        assert not one.is_near_tie


@pytest.mark.parametrize(("cut", "token_is_there"), [(-1, True), (None, False)])
def test_a_text_that_ends_elsewhere_is_a_fault(cut: int | None, token_is_there: bool) -> None:
    ids, mask = prompts(1)
    target = ListeningTarget(TargetModel(trained_target()))
    decoder = taps.SpeculativeDecoder(target, trained_drafters())
    batch = Batch(ids, mask, 0.0, [0], [9])
    (tokens,) = taps.plain_generate(target, **batch.arguments).new_tokens
    plain = tokens[:cut] if cut else [*tokens, 5]
    ((divergence,), _) = find_divergences(decoder, batch, [plain])
    expected = (8, tokens[8], None) if token_is_there else (9, None, 5)
    assert (divergence.place, divergence.token, divergence.plain_token) == expected
    assert divergence.evidence is None
    assert not divergence.is_near_tie


# ---- frequencies


def test_common_beginnings_are_the_targets_exact_probabilities() -> None:
    torch.manual_seed(3)
    target = new_target(vocab_size=5, pad_token_id=None, eos_token_id=None)
    target.get_output_embeddings().weight.data.mul_(8)
    prompt = [1, 2, 0]
    found = common_beginnings(target, prompt, 0.7, num_tokens=3, least=0.02, batch_size=2)

    def probability(text: tuple[int, ...]) -> float:
        with torch.inference_mode():
            rows = (target(torch.tensor([[*prompt, *text]])).logits[0, 2:-1] / 0.7).softmax(-1)
        return float(rows[range(len(text)), list(text)].prod()) if text else 1.0

    every = [text for length in range(4) for text in itertools.product(range(5), repeat=length)]
    common = {text: probability(text) for text in every if probability(text) >= 0.02}
    assert found == pytest.approx(common, rel=1e-5)
    assert 10 < len(found) < 60


class CountingHead(torch.nn.Module):
    """An LM head that remembers how many rows of logits it made."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head, self.most_rows = head, 0

    def forward(self, features: Tensor) -> Tensor:
        self.most_rows = max(self.most_rows, features.shape[:-1].numel())
        logits: Tensor = self.head(features)
        return logits


def test_logits_are_made_at_the_last_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    target = copy.deepcopy(trained_target())
    target.lm_head = CountingHead(target.lm_head)
    common_beginnings(target, list(range(4, 60)), 1.0, num_tokens=2, least=1e-3, batch_size=4)
    assert 1 < target.lm_head.most_rows <= 4
    scored = TargetModel(target)  # compares whole texts with a tree
    target.lm_head.most_rows = 0
    ids, mask = prompts(1)
    _rounding(scored, Batch(ids, mask, 0.0, [0], [9]), 0, [5, 6], eps=1e-3)
    assert target.lm_head.most_rows == 1 + ROUNDINGS
    monkeypatch.setattr(type(target), "_supports_logits_to_keep", lambda self: False)
    texts = torch.tensor([[4, 5, 6], [7, 8, 9]])
    whole = last_logits(target, input_ids=texts)
    assert target.lm_head.most_rows == 6
    monkeypatch.undo()
    torch.testing.assert_close(last_logits(target, input_ids=texts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_draws", [100, 1000, 20_000])
def test_chance_falls_below_the_significance_as_seldom_as_is_said(num_draws: int) -> None:
    """The exact binomial probability, two cells: the smaller, the further from a chi-square distribution."""
    share = LEAST_COUNT / num_draws
    beginnings = {(): 1.0, (1,): share}
    false_alarms = 0.0
    for count in range(30, 91):
        texts = [[1]] * count + [[0]] * (num_draws - count)
        if chi_square(texts, beginnings).p_value < SIGNIFICANCE:
            ways = math.lgamma(num_draws + 1) - math.lgamma(count + 1) - math.lgamma(num_draws - count + 1)
            false_alarms += math.exp(ways + count * math.log(share) + (num_draws - count) * math.log1p(-share))
    assert 1e-6 < false_alarms < 1 / 80_000


BEGINNINGS = {(): 1.0, (3,): 0.5, (4,): 0.3, (3, 7): 0.25, (3, 8): 0.248}


def test_texts_are_counted_at_their_longest_beginning_and_rare_cells_are_pooled() -> None:
    """Own shares: 0.2 of (), 0.002 of (3,) (pooled, and with fewer than 20 put to the smallest), 0.3, 0.25, 0.248."""
    texts = [[3, 7]] * 60 + [[3, 8]] * 40 + [[3, 9]] * 2 + [[4, 1]] * 58 + [[5, 3]] * 40
    test = chi_square(texts, BEGINNINGS)
    cells = [(60, 50), (40, 49.6), (58, 60), (42, 40.4)]
    assert (test.num_cells, test.num_tokens) == (4, 2)
    assert chi_square([[4, 1]] * 40 + [[5, 3]] * 90, {(): 1.0, (4,): 0.3, (4, 1): 0.01}).num_tokens == 1
    assert test.statistic == pytest.approx(sum((count - mean) ** 2 / mean for count, mean in cells))


def test_p_values_are_those_of_the_tables() -> None:
    """The 5% points of 1 and 3 degrees of freedom are 3.841 and 7.815."""
    halves = {(): 1.0, (0,): 0.5, (1,): 0.5}
    off = (3.841 * 10_000) ** 0.5 / 2
    texts = [[0]] * round(5_000 + off) + [[1]] * round(5_000 - off)
    assert chi_square(texts, halves).p_value == pytest.approx(0.05, abs=1e-3)
    fourths = {(): 1.0, **{(token,): 0.25 for token in range(4)}}
    off = (7.815 * 10_000 / 4 / 2) ** 0.5
    counts = [round(2_500 + off), round(2_500 - off), 2_500, 2_500]
    texts = [[token] for token, count in enumerate(counts) for _ in range(count)]
    assert chi_square(texts, fourths).p_value == pytest.approx(0.05, abs=1e-3)
    assert chi_square([[0]] * 10, {(): 1.0, (0,): 1.0}).p_value == 1.0


# ---- what is said


def text_check(**changes: Any) -> TextCheck:
    return TextCheck(
        **{"way": "merged", "temperature": 0.0, "num_texts": 2, "acceptance_length": 2.0, "divergences": []} | changes
    )


def test_what_takes_weight_from_the_verdict_is_said() -> None:
    report = LosslessReport("float32", SETTINGS, [text_check(acceptance_length=1.0)], [])
    assert report.passed
    assert report.notes == [
        "hardly any draft token was accepted (acceptance length 1.00 of merged at T = 0): equal texts prove little",
        "the frequencies of the first tokens were not checked",
    ]


def test_a_way_that_accepts_hardly_anything_is_named_with_its_lowest_figure() -> None:
    lengths = [("merged", 0.0, 1.19), ("merged", 1.0, 1.01), ("single:a", 0.0, 1.25), ("entropy", 1.0, 1.1)]
    texts = [text_check(way=way, temperature=one, acceptance_length=length) for way, one, length in lengths]
    assert LosslessReport("float32", SETTINGS, texts, []).notes[0] == (
        "hardly any draft token was accepted (acceptance length 1.01 of merged at T = 1, 1.10 of entropy at T = 1): "
        "equal texts prove little"
    )


def test_texts_without_a_decode_step_are_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text_check(acceptance_length=math.nan), text_check(temperature=1.0)]
    report = LosslessReport("float32", SETTINGS, texts, [])
    assert report.passed
    assert report.notes[0] == "no draft was verified at T = 0: every text ended with its first token"
    report = LosslessReport("float32", SETTINGS, texts[:1], [])
    assert not report.passed
    assert report.verdict.startswith("nothing was checked: ")
    target = trained_target()
    first = taps.plain_generate(target, *prompts(8), max_new_tokens=1).new_tokens
    monkeypatch.setattr(target.generation_config, "eos_token_id", [tokens[0] for tokens in first])
    report = check(replace(SETTINGS, temperatures=(0.0,)))
    assert (report.passed, report.verdict[:19]) == (False, "nothing was checked")


def frequency_check(num_cells: int, num_tokens: int) -> FrequencyCheck:
    return FrequencyCheck("merged", 1.0, 300, ChiSquare(0.0, num_cells, num_tokens, 1.0))


def test_frequencies_that_test_no_tree_step_are_said() -> None:
    def notes(num_cells: int, num_tokens: int) -> list[str]:
        frequencies = [frequency_check(num_cells, num_tokens)]
        return LosslessReport("float32", SETTINGS, [text_check()], frequencies).notes

    advice = "try more draws or other prompts"
    assert notes(1, 0) == [
        f"no second beginning of a text is expected 20 times in 300 draws: frequencies prove nothing; {advice}"
    ]
    assert notes(5, 1) == [
        "no beginning of two or more tokens is expected 20 times in 300 draws: frequencies tested no tree step; "
        f"{advice}"
    ]
    assert notes(5, 2) == []


def test_one_fault_among_near_ties_is_a_fault() -> None:
    fault = Divergence(0, 3, 5, None, None)
    report = LosslessReport("bfloat16", SETTINGS, [text_check(divergences=[fault]), text_check()], [])
    assert (report.passed, report.verdict) == (False, "not lossless")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperatures": ()}, "one or more different temperatures"),
        ({"temperatures": (1.0, 1.0)}, "one or more different temperatures"),
        ({"temperatures": (-1.0,)}, "temperature must be finite and at least 0"),
        ({"num_draws": -1}, "num_draws must be at least 0, got -1"),
        ({"num_draws": 99}, "num_draws must be 0 or at least 100, got 99"),
        ({"max_new_tokens": 1}, "max_new_tokens must be at least 2, got 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_that_check_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SETTINGS, **changes)


# ---- the command


def run(*arguments: str) -> Result:
    """`taps-ext check-lossless` on the embedded models, on little."""
    import typer

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    little = ["--composition=merged", "--max-new-tokens=12", "--limit=4", "--draws=100", "--depth=3", "--max-nodes=16"]
    return CliRunner().invoke(app, [*little, *arguments])


def test_the_command_says_lossless_to_people_and_to_programs(tmp_path: Path) -> None:
    result = run()
    assert result.exit_code == 0
    assert "4/4" in result.stdout
    assert "\nlossless\n" in result.stdout
    assert "frequencies tested no tree step" in result.stdout
    assert "the same noise in each row" in result.stdout
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "How many pens are 3 boxes of 4?"}\n{"prompt": "How can I sleep better?"}\n')
    result = run("--json", "--prompts", str(own), "--temperature=1", "--composition=single")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["verdict"], facts["passed"]) == (0, "lossless", True)
    ways = ["merged", "single:math", "single:chat"]
    assert [(one["way"], one["temperature"], one["num_texts"]) for one in facts["texts"]] == [
        (way, 1.0, 2) for way in ways
    ]
    assert [one["way"] for one in facts["frequencies"]] == ["plain", *ways]


def test_the_command_checks_look_ups() -> None:
    result = run("--json", "--drafter=lookup", "--temperature=0", "--temperature=1", "--composition=single")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["verdict"]) == (0, "lossless")
    assert [*dict.fromkeys(one["way"] for one in facts["texts"])] == ["merged", "single:lookup"]


def test_the_command_extends_every_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    extended = []
    extend = device_half.DecodeStep._extended
    monkeypatch.setattr(device_half.DecodeStep, "_extended", lambda *given: extended.append(1) or extend(*given))
    result = run("--json", "--extend", "--drafter=lookup", "--temperature=0", "--temperature=1")
    assert (result.exit_code, json.loads(result.stdout)["verdict"]) == (0, "lossless") and extended


def test_the_command_shows_where_texts_part_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_half, "verify", trust_the_drafter)
    result = run("--draws=0")
    assert result.exit_code == 1
    assert "fault, not what these logits draw" in result.stdout
    assert "not lossless" in result.stdout
    result = run("--draws=0", "--json")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["passed"], facts["verdict"]) == (1, False, "not lossless")
    assert facts["texts"][0]["divergences"][0]["is_near_tie"] is False


def test_near_ties_pass_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetModel, "score", score_with(last_spacings))
    result = run("--dtype=bfloat16", "--draws=0", "--max-new-tokens=32", "--limit=8", "--temperature=2")
    assert result.exit_code == 0
    assert "near-tie: " in result.stdout
    assert "lossless, up to near-ties of bfloat16" in result.stdout


def test_a_tree_a_position_too_far_is_a_fault_and_no_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it draws is the rule's, from logits that are off by a few spacings of bfloat16."""
    stock, score = TargetModel._forward, TargetModel.score

    def score_shifted(self: TargetModel, *arguments: Any) -> ScoredTree:
        def shifted(given: dict[str, Tensor], *rest: Any) -> ScoredTree:
            return stock(self, {**given, "position_ids": given["position_ids"] + 1}, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self, "_forward", shifted)
            return score(self, *arguments)

    monkeypatch.setattr(TargetModel, "score", score_shifted)
    result = run("--dtype=bfloat16", "--draws=0", "--temperature=0", "--max-new-tokens=24")
    assert result.exit_code == 1
    assert "fault, the tree's logits are not the target's" in result.stdout


def test_what_cannot_be_checked_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*arguments: Any) -> Any:
        raise AssertionError("the target is loaded")

    monkeypatch.setattr(evaluation_lossless, "load_target_and_tokenizer", no_work)
    bad, damaged = tmp_path / "bad.jsonl", tmp_path / "damaged"
    bad.write_text('\n{"prompt": 3}\n')
    shutil.copytree(tiny.resolve("tiny/math"), damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for arguments, words in [
        (["--prompts", str(bad)], "bad.jsonl, line 2: "),
        (["--composition=best"], "composition must be one of"),
        (["--drafting=maybe"], "drafting must be coupled or topk"),
        (["--target=elsewhere"], "give at least one drafter"),
        (["--merged-nodes=0"], "the node budget of the merged tree must be at least 1, got 0"),
        (["--max-new-tokens=1"], "max_new_tokens must be at least 2, got 1"),
        (["--draws=3"], "num_draws must be 0 or at least 100, got 3"),
        ([f"--drafter=broken={damaged}"], "drafter 'broken': "),
    ]:
        result = run(*arguments)
        assert isinstance(result.exception, ValueError), arguments
        assert words in str(result.exception)


def test_a_budget_without_a_merged_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="a node budget is for the merged tree, got composition single, entropy"):
        make_ways(["math"], ["single", "entropy"], max_nodes=5)
    assert list(make_ways(["math"], ["single", "merged"], max_nodes=5)) == ["single:math", "merged@5"]


def test_a_prompt_that_leaves_no_room_for_its_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taps_ext.evaluation.lossless.check_lossless", None)  # nothing is decoded
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "How many pens? " * 3000}) + "\n")
    result = run("--prompts", str(own))
    assert isinstance(result.exception, ValueError)
    assert "and the target's context is " in str(result.exception)


def test_a_chat_template_that_refuses_a_prompt_says_so_in_a_sentence() -> None:
    _, tokenizer = tiny.load_target()
    tokenizer.chat_template = "{{ raise_exception('only poems') }}"
    question = Question("7", "own", ("How many pens?",))
    with pytest.raises(ValueError, match="the tokenizer's chat template refuses question 7: only poems"):
        evaluation_lossless._encode(tokenizer, question)
    tokenizer.chat_template = None
    assert evaluation_lossless._encode(tokenizer, question) == tokenizer("How many pens?")["input_ids"]
