"""Trees that adapt: what pays by a table of costs, one text whatever the table says, and bad tables."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import new_target, prompts, trained_drafters, trained_target
from transformers import GPT2Config, GPT2LMHeadModel
from tree_cases import random_tree

import taps_ext as taps
from taps_ext.decode import budget, costs
from taps_ext.decode.budget import CostTable, TreeBudget
from taps_ext.decode.state import Observation
from taps_ext.drafters import LookupDrafter
from taps_ext.tree import DraftTree, Lengths, TreeShape

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "single": {"drafter": "math"},
    "confidence": {},
    "evidence": {},
    "merged": {},
    "merged, budget": {"max_nodes": 12},
    "merged, joint": {"joint_budget": 20},
}


def any_table(rng: random.Random, names: Any = ("math", "chat", "lookup")) -> CostTable:
    """Costs of any kind: nothing pays, everything does, or larger trees cost less than smaller ones."""
    slope = rng.choice([0.0, 0.02, 0.2, 1.0])
    step_ms = [1.0, *(max(0.5, 1 + slope * size * rng.uniform(0.2, 1.8)) for size in SIZES[1:])]
    drafting = {name: (rng.choice([0.0, 0.1, 1.0]), rng.choice([0.0, 0.1, 1.0])) for name in names}
    return CostTable(SIZES, tuple(step_ms), drafting, rng.choice([2, 4, 10]))


def all_drafters() -> dict[str, Any]:
    return {**trained_drafters(), "lookup": LookupDrafter(trained_target().config.vocab_size)}


def decoder_of(composition: str, table: CostTable | None = None, **options: Any) -> taps.SpeculativeDecoder:
    name = composition.partition(",")[0]
    options = {**COMPOSITIONS[composition], **options}
    return taps.SpeculativeDecoder(trained_target(), all_drafters(), name, costs=table, **options)


# ---- the text


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("seed", range(4))
def test_no_table_of_costs_changes_the_text(composition: str, seed: int) -> None:
    rng = random.Random(f"{composition} {seed}")
    ids, mask = prompts(rng.choice([1, 3]))
    temperatures = [rng.choice([0.0, 0.7, 1.0]) for _ in ids]
    options: Any = {"sampling": taps.SamplingParams(temperatures, seed=seed), "max_new_tokens": 32}
    expected = taps.plain_generate(trained_target(), ids, mask, **options).new_tokens
    for _ in range(3):
        assert decoder_of(composition, any_table(rng)).generate(ids, mask, **options).new_tokens == expected


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_one_table_gives_the_same_trees_twice(composition: str) -> None:
    ids, mask = prompts(3)
    decoder = decoder_of(composition, any_table(random.Random(composition)))
    first, second = (decoder.generate(ids, mask, max_new_tokens=32).stats.to_dict() for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


# ---- what pays


def uniform_table(slope: float, first: float = 0.0, more: float = 0.0) -> CostTable:
    names = ("math", "chat", "lookup")
    return CostTable(SIZES, tuple(1 + slope * (size - 1) for size in SIZES), dict.fromkeys(names, (first, more)), 10)


@pytest.mark.parametrize("seed", range(20))
def test_the_number_of_nodes_is_the_one_whose_step_is_worth_most(seed: int) -> None:
    """Against every size in turn, from the probabilities themselves."""
    rng, tree = random.Random(seed), random_tree(seed)
    tree = replace(tree, proposers=tree.is_node().long())
    budget = TreeBudget(table := any_table(rng, ["one"]), TreeShape.auto(depth=300), ["one"], tree.batch_size)
    budget.tokens = rng.uniform(1, 4) * tree.batch_size
    active = torch.tensor([rng.random() < 0.8 for _ in range(tree.batch_size)])
    kept, _ = budget.cut(tree, active)

    def worth(size: int, ms: float) -> float:
        rows = zip(tree.scores.tolist(), tree.num_nodes.tolist(), active.tolist(), strict=True)
        chances = [sorted(map(math.exp, row[1:count]), reverse=True) for row, count, is_active in rows if is_active]
        return sum(sum(row[: size - 1]) for row in chances) - budget.rate * ms

    worths = [worth(size, ms) for size, ms in zip(table.sizes, table.step_ms, strict=True)]
    best = table.sizes[max(range(len(worths)), key=worths.__getitem__)]
    possible = (tree.is_node() & (tree.scores > -math.inf)).sum(dim=1)  # prune_tree drops the others
    assert kept.num_nodes.tolist() == possible.clamp(max=best).tolist()


def test_free_nodes_are_all_taken_and_dear_ones_never() -> None:
    ids, mask = prompts(1)

    def nodes(table: CostTable) -> list[int]:
        stats = decoder_of("merged", table).generate(ids, mask, max_new_tokens=40, eos_token_id=()).stats
        return stats.num_nodes[0]

    assert min(nodes(uniform_table(0.0))) > 24
    assert max(nodes(uniform_table(100.0))) == 1


@pytest.mark.parametrize("batch_size", [2, 8, 1000])
def test_rows_of_a_batch_whose_steps_cost_so_many_times_as_much_draft_what_one_row_drafts(batch_size: int) -> None:
    table = uniform_table(0.05, first=0.02, more=0.01)
    dearer = CostTable(
        table.sizes,
        tuple(batch_size * ms for ms in table.step_ms),
        {name: (batch_size * first, batch_size * more) for name, (first, more) in table.draft_ms.items()},
        table.branching,
    )
    alone, together = (
        TreeBudget(costs, TreeShape.auto(), ["math"], size).plan() for costs, size in ((table, 1), (dearer, batch_size))
    )
    assert together.drafts == alone.drafts
    assert together.shape.min_score == pytest.approx(alone.shape.min_score)
    assert together.shape.min_mass == pytest.approx(alone.shape.min_mass)


@pytest.mark.parametrize(("loss_share", "fewest", "most"), [(0.02, 0, 0), (2.0, 1, 6)])
def test_a_drafter_that_does_not_pay_is_asked_so_rarely_that_it_costs_a_share_of_the_tokens(
    monkeypatch: pytest.MonkeyPatch, loss_share: float, fewest: int, most: int
) -> None:
    """A question to a drafter that costs 50 steps is 2% of the tokens after 2,500 of them, 200% after 25."""
    monkeypatch.setattr(budget, "LOSS_SHARE", loss_share)
    ids, mask = prompts(1)
    asked: dict[str, int] = {"math": 0, "chat": 0}
    for name, drafter in trained_drafters().items():

        def counted(*args: Any, name: str = name, original: Any = drafter.propose_together, **kwargs: Any) -> Any:
            asked[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(drafter, "propose_together", counted)
    stats = (
        decoder_of("merged", uniform_table(0.0, first=50.0))
        .generate(ids, mask, max_new_tokens=100, eos_token_id=())
        .stats
    )
    assert stats.num_steps > 60
    assert fewest <= sum(asked.values()) <= most


def test_what_is_observed_late_is_what_would_have_been_observed_at_once() -> None:
    """Rows of different counts, some of none."""
    torch.manual_seed(0)
    drafter, rng = trained_drafters()["math"], random.Random(0)
    for _ in range(20):
        batch_size = rng.randint(1, 3)
        parts = []
        for index in range(rng.randint(2, 4)):
            counts = [rng.randint(1 if index == 0 else 0, 4) for _ in range(batch_size)]
            counts[0] = max(counts[0], 1)
            slots = max(counts)
            tokens = torch.randint(drafter.vocab_size, (batch_size, slots))
            parts.append(Observation(torch.randn(batch_size, slots, drafter.hidden_size), tokens, Lengths.of(counts)))
        late, at_once = (drafter.reset(batch_size, decay=0.9) for _ in range(2))
        drafter.observe(late, parts[0].features, parts[0].next_tokens, parts[0].num_tokens)
        joined = Observation.join(parts[1:])
        drafter.observe(late, joined.features, joined.next_tokens, joined.num_tokens)
        for part in parts:
            drafter.observe(at_once, part.features, part.next_tokens, part.num_tokens)
        assert late.lengths.host == at_once.lengths.host
        torch.testing.assert_close(late.evidence, at_once.evidence, rtol=1e-4, atol=1e-4)
        roots, active = torch.zeros(batch_size, dtype=torch.int64), torch.ones(batch_size, dtype=torch.bool)
        trees = [drafter.propose(state, roots, TreeShape(2, 2, 5), active) for state in (late, at_once)]
        assert torch.equal(trees[0].tokens, trees[1].tokens)
        torch.testing.assert_close(trees[0].scores, trees[1].scores, rtol=1e-4, atol=1e-4)


# ---- tables


def test_a_table_is_measured_once_and_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = decoder_of("merged").cost_table(2)
    assert table.sizes[0] == 1
    assert set(table.draft_ms) == {"math", "chat", "lookup"}
    (path,) = tmp_path.rglob("*.json")
    assert CostTable.from_dict(json.loads(path.read_text())) == table
    with monkeypatch.context() as patch:
        patch.setattr(costs, "measure_costs", lambda *args: pytest.fail("measured again"))
        assert decoder_of("merged").cost_table(2) == table
    path.write_text(path.read_text()[:-20])  # torn: measured again
    decoder_of("merged").cost_table(2)
    assert CostTable.from_dict(json.loads(path.read_text()))


@pytest.mark.parametrize("late", costs.SIZES[1:-1])
def test_a_size_that_was_measured_while_something_else_ran_costs_no_more_than_the_next(
    monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    now = 0.0

    def start(prompts: object, num_tokens: object, forced: costs.ForcedBudget) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += 1e-3 * (50 + forced.size + 20 * (forced.size == late) + any(forced.forced.drafts))

        return run

    monkeypatch.setattr(costs.time, "process_time", lambda: now)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now)
    decoder = taps.SpeculativeDecoder(trained_target(), {"lookup": all_drafters()["lookup"]}, "single")
    table = costs.measure_costs(decoder._device_half, ["lookup"], start, 1)
    next_size = costs.SIZES[costs.SIZES.index(late) + 1]
    assert table.sizes == costs.SIZES
    assert table.step_ms == pytest.approx([50 + (next_size if size == late else size) for size in costs.SIZES])
    assert table.draft_ms["lookup"] == pytest.approx((1, 0), abs=1e-6)


def test_a_home_that_cannot_be_written_costs_a_measurement_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ids, mask = prompts(1)
    assert decoder_of("merged").generate(ids, mask, max_new_tokens=4).new_tokens


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sizes": [2, 3]}, "ascend from 1"),
        ({"sizes": [1, 3, 2]}, "ascend from 1"),
        ({"step_ms": [1.0]}, "for each size"),
        ({"step_ms": [1.0, 0.0, 2.0]}, "finite cost above 0"),
        ({"step_ms": [1.0, math.nan, 2.0]}, "finite cost above 0"),
        ({"draft_ms": {"math": [1.0, -1.0]}}, "at least 0"),
        ({"draft_ms": {"math": 1.0}}, "needs sizes"),
        ({"branching": 0}, "branching"),
        ({"step_ms": None}, "needs sizes"),
    ],
)
def test_a_bad_table_gets_one_sentence(change: dict[str, Any], sentence: str) -> None:
    good = {"sizes": [1, 2, 4], "step_ms": [1.0, 1.5, 2.0], "draft_ms": {"math": [1.0, 0.5]}, "branching": 4}
    assert CostTable.from_dict(good).to_dict() == good
    with pytest.raises(ValueError, match=sentence):
        CostTable.from_dict({**good, **change})


def test_a_table_of_other_drafters_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no cost of drafter 'lookup'"):
        decoder_of("merged", any_table(random.Random(0), ("math", "chat")))


def test_a_tree_that_adapts_stays_within_its_limits() -> None:
    ids, mask = prompts(2)
    shape = TreeShape.auto(depth=3, max_nodes=10)
    decoder = decoder_of("merged", uniform_table(0.0), shape=shape)
    for event in decoder.stream(ids, mask, max_new_tokens=20):
        if event.tree is not None:
            assert isinstance(event.tree, DraftTree)
            assert int(event.tree.num_nodes.max()) <= 10
            assert all(count is None or count <= 3 for count in event.num_accepted)


def with_learned_positions() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=20, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(
    "make",
    [with_learned_positions, lambda: new_target("mistral", sliding_window=16), lambda: new_target(vocab_size=7)],
    ids=["learned positions", "a window", "a small vocabulary"],
)
def test_costs_are_measured_within_what_the_target_takes(make: Callable[[], Any]) -> None:
    target = make()
    decoder = taps.SpeculativeDecoder(target, {"lookup": LookupDrafter(target.config.vocab_size)}, "single")
    ids = torch.tensor([[5, 6, 5, 6]])
    expected = target.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
    assert torch.equal(decoder.generate(ids, max_new_tokens=8, eos_token_id=()).sequences, expected)
