"""How deep and how large trees are: the stop rule changes none, min_score and budgets keep exactly what they say."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from literal_drafter import Text, Together, V, assert_same_bits, make_drafter, new_target
from small_models import prompts, trained_drafters, trained_target
from tree_cases import assert_same_tree, random_tree, token_paths

import taps_ext as taps
from taps_ext import ops
from taps_ext.composition import make_composition, share_budget
from taps_ext.decode import step as device_half
from taps_ext.drafters import EagleDrafter, growth
from taps_ext.drafters.coupling import Calibration
from taps_ext.tree import DraftTree, TreeShape

# ---- the stop rule


class Case:
    """Drafters, sharp and flat, a batch and a tree shape of any kind."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.batch_size = rng.randint(1, 4)
        sharpness = rng.choice([0.3, 1.0, 3.0, 60.0])  # at 60 a drafter is often sure: its score is exactly 0
        known = Calibration((0.7,), ((sharpness, 1.5 * sharpness),), ((rng.choice([0.0, 0.8, 2.0]), 1.0),))
        self.drafters = [make_drafter(new_target(), seed + d, known) for d in range(rng.choice([1, 1, 2]))]
        for drafter in self.drafters:
            drafter.network.fc.weight.mul_(rng.choice([0.2, 1.0, 4.0]))  # nearly the same everywhere, or far apart
        self.shape = TreeShape(
            depth=rng.randint(1, 7),
            branching=rng.choice([1, 2, 3, 5, 2 * V]),
            max_nodes=rng.choice([1, 2, 5, 12, 30, 60]),
            min_score=rng.choice([None, None, -0.0, -1.0, -4.0, -30.0]),
        )
        temperatures = [rng.choice([0.0, 0.3, 0.7, 1.0, 1.5]) for _ in range(self.batch_size)]
        sampling = taps.SamplingParams(temperatures, seed=seed)
        self.sampling = None if rng.random() < 0.3 else sampling.rows(self.batch_size)
        self.counts = [rng.randint(1, 9) for _ in range(self.batch_size)]
        self.active = torch.tensor([rng.random() < 0.9 for _ in range(self.batch_size)])
        self.choice = [rng.randrange(len(self.drafters)) for _ in range(self.batch_size)]
        self.has_choice = rng.random() < 0.3

    def trees(self, patch: pytest.MonkeyPatch, has_stop_rule: bool) -> tuple[list[DraftTree], int]:
        """What is proposed, and in how many forwards."""
        num_forwards = 0
        forward = growth._Frontier.forward

        def counted(*args: Any) -> Any:
            nonlocal num_forwards
            num_forwards += 1
            return forward(*args)

        grouped, text = Together(self.drafters), Text(new_target(), self.batch_size, 12)
        with patch.context() as inside:
            inside.setattr(growth, "can_read", lambda device: has_stop_rule)
            inside.setattr(growth._Frontier, "forward", counted)
            states = grouped.reset(self.batch_size, self.sampling)
            grouped.observe(states, *text.block(self.counts))
            choice = self.choice if self.has_choice else None
            trees = grouped.propose(states, text.roots(), self.shape, self.active, choice)
        return trees, num_forwards


def test_the_stop_rule_leaves_every_tree_as_it_is_and_saves_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    saved, possible = [], []
    for seed in range(100):
        case = Case(seed)
        (trees, num_forwards), (whole, num_levels) = (case.trees(monkeypatch, rule) for rule in (True, False))
        for tree, expected in zip(trees, whole, strict=True):
            tree.validate()
            assert_same_tree(tree, expected, f"seed {seed}")
        if not case.has_choice:
            assert num_levels == case.shape.depth - 1, "without the rule every level is grown"
        saved.append(num_levels - num_forwards)
        possible.append(num_levels)
    assert min(saved) == 0 and 0 < sum(saved) < sum(possible)
    assert sum(count > 0 for count in saved) > 20
    assert sum(count == 0 and levels > 0 for count, levels in zip(saved, possible, strict=True)) > 20


def test_the_stop_rule_looks_at_min_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is grown below a frontier that is not worth verifying; one that just is has children that may be."""
    drafter = make_drafter(new_target())
    text, state = Text(new_target(), 1, 12), drafter.reset(1)
    text.feed(drafter, state, [5])
    best = float(text.propose(drafter, state, TreeShape(1, 3, 4)).scores[0, 1])

    def forward(*arguments: Any) -> None:
        raise RuntimeError("a further level is grown")

    monkeypatch.setattr(growth._Frontier, "forward", forward)
    text.propose(drafter, state, TreeShape(4, 3, 10_000, best + 1e-3))
    with pytest.raises(RuntimeError, match="a further level is grown"):
        text.propose(drafter, state, TreeShape(4, 3, 10_000, best))


def test_the_stop_rule_waits_for_the_last_row_and_the_last_drafter() -> None:
    """A level saved for one row would be missing for another: all are asked."""
    shape, target = TreeShape(6, 2, 5), new_target()
    sharp = Calibration((1.0,), ((60.0,),), ((0.0,),))
    flat = Calibration((1.0,), ((60.0, 0.001),), ((0.0, 0.0),))  # sure of the first token, then of nothing
    one = make_drafter(target, 1)
    pair = [EagleDrafter(one.network, one.embedding, one.lm_head, "one", known) for known in (sharp, flat)]
    for drafters in (pair, pair[::-1]):
        grouped, text = Together(drafters), Text(target, 1, 12)
        states = grouped.reset(1, taps.SamplingParams(1.0).rows(1))
        grouped.observe(states, *text.block([5]))
        trees = grouped.propose(states, text.roots(), shape, torch.tensor([True]))
        depths = [int(ops.tree_depths(tree.parents, tree.num_nodes)[0].max()) for tree in trees]
        assert depths[drafters.index(pair[0])] >= 4 > depths[drafters.index(pair[1])]


# ---- min_score


def test_min_score_keeps_exactly_the_nodes_of_the_whole_tree_that_score_as_much() -> None:
    """Of those the budget keeps the best; the nodes that remain are to the bit what they were."""
    target = new_target()
    drafters = [make_drafter(target, seed, Calibration((1.0,), ((1.2,),), ((0.9,),))) for seed in range(3)]
    text = Text(target, 3, 20)
    sampling = taps.SamplingParams([0.0, 0.7, 1.2], seed=3).rows(3)
    num_dropped = 0
    for drafter in drafters:
        state = drafter.reset(3, sampling)
        text.fed = [0] * 3
        text.feed(drafter, state, [9, 4, 13])
        everything = text.propose(drafter, state, TreeShape(4, 4, 10_000))
        for max_nodes in (10_000, 9):
            scores = everything.scores[everything.is_node()]
            for least in (-0.0, -0.5, -2.0, float(scores[7]), float(scores.min()), -1000.0):
                found = text.propose(drafter, state, TreeShape(4, 4, max_nodes, least))
                kept = replace(everything, scores=everything.scores.masked_fill(everything.scores < least, -torch.inf))
                expected = ops.prune_tree(kept, max_nodes)
                for row in range(3):
                    count = int(found.num_nodes[row])
                    assert count == min(max_nodes, int((everything.scores[row] >= least).sum()))
                    assert_same_bits(found.trimmed(count), expected.trimmed(count), row)
                    num_dropped += int(everything.num_nodes[row]) - count
    assert num_dropped > 100


@pytest.mark.parametrize("bad", [0.1, math.nan, math.inf])
def test_a_min_score_above_0_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"min_score must be at most 0, a log-probability, got"):
        TreeShape(min_score=bad)


# ---- one budget for a batch


def composed_tree(seed: int) -> DraftTree:
    """A tree as a composition makes it: clean padding, proposers, entropies; scores with ties in many cases."""
    tree = random_tree(seed)
    rng = torch.Generator().manual_seed(seed)
    marks = torch.randint(1, 8, tree.tokens.shape, generator=rng)
    told = torch.rand(tree.tokens.shape, generator=rng)
    return ops.prune_tree(replace(tree, proposers=marks, entropies=told), tree.capacity)


def test_a_joint_budget_keeps_exactly_the_best_nodes_of_the_batch(num_cases: int) -> None:
    """By sorting in Python; parents before their children, proposers and entropies carried along."""
    num_ragged = 0
    for seed in range(num_cases // 3):
        tree, rng = composed_tree(seed), random.Random(seed)
        batch, total = tree.batch_size, int(tree.num_nodes.sum())
        budget = rng.choice([batch, batch + 1, rng.randint(batch, total + 3), rng.randint(batch, total + 3)])
        found = share_budget(tree, budget)
        found.validate()
        drafted = [(row, node) for row in range(batch) for node in range(1, int(tree.num_nodes[row]))]
        drafted.sort(key=lambda place: (-float(tree.scores[place]), *place))
        kept = sorted([(row, 0) for row in range(batch)] + drafted[: budget - batch])
        where = f"seed {seed}"
        assert int(found.num_nodes.sum()) == len(kept) <= budget, where
        assert found.capacity == min(tree.capacity, budget - tree.batch_size + 1), where
        for row in range(batch):
            nodes = [node for other, node in kept if other == row]
            count = int(found.num_nodes[row])
            paths = token_paths(tree, row)
            assert token_paths(found, row) == [paths[node] for node in nodes], where
            for name in ("scores", "proposers", "entropies"):
                assert getattr(found, name)[row, :count].equal(getattr(tree, name)[row, nodes]), (where, name)
        num_ragged += len(set(found.num_nodes.tolist())) > 1
    assert num_ragged > num_cases / 12


def test_a_joint_budget_of_one_row_is_a_plain_budget() -> None:
    for seed in range(60):
        tree = composed_tree(seed)
        for row in range(tree.batch_size):
            one = DraftTree(*(getattr(tree, name)[row : row + 1] for name in DraftTree.__dataclass_fields__))
            for budget in (1, 2, 7, 30, 2000):
                plain = ops.prune_tree(one, budget)
                assert_same_tree(share_budget(one, budget).trimmed(plain.capacity), plain, f"seed {seed}")


@pytest.mark.parametrize("composition", ["merged", "evidence"])
def test_a_batch_never_verifies_more_nodes_than_its_joint_budget(
    composition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spends all of it while the trees hold as much, and rows that have ended leave theirs to the others."""
    ids, mask = prompts(4)
    before: list[DraftTree] = []
    monkeypatch.setattr(
        device_half, "share_budget", lambda tree, budget: before.append(tree) or share_budget(tree, budget)
    )
    decoder = taps.SpeculativeDecoder(
        trained_target(), trained_drafters(), composition, shape=TreeShape(4, 4, 16), joint_budget=29
    )
    sampling = taps.SamplingParams([0.0, 1.0, 0.7, 1.0], seed=2)
    stats = decoder.generate(ids, mask, sampling=sampling, max_new_tokens=[40, 8, 40, 21], eos_token_id=()).stats
    uneven, most_of_one = 0, 0
    for step, tree in enumerate(before):
        counts = [row[step] for row in stats.num_nodes if step < len(row)]
        num_ended = 4 - len(counts)
        assert sum(counts) + num_ended == min(29, int(tree.num_nodes.sum()))
        uneven += len(set(counts)) > 1
        most_of_one = max(most_of_one, *counts)
    assert uneven > len(before) / 2
    assert most_of_one > 29 / 4 * 1.5


def test_a_joint_budget_with_a_node_for_each_row_is_the_least() -> None:
    ids, mask = prompts(3)
    text = taps.plain_generate(trained_target(), ids, mask, max_new_tokens=6).sequences
    for budget in (2, 3):
        decoder = taps.SpeculativeDecoder(trained_target(), trained_drafters(), joint_budget=budget)
        if budget == 3:
            assert torch.equal(decoder.generate(ids, mask, max_new_tokens=6).sequences, text)
        else:
            with pytest.raises(ValueError, match=r"^joint_budget 2 is less than a node for each of the 3 rows$"):
                decoder.generate(ids, mask, max_new_tokens=6)


# ---- budgets of merged trees, by evidence


def test_merged_scores_are_weighted_by_each_drafters_share_of_the_evidence() -> None:
    """A node is worth the most that a proposer's score and share make of it; the budget goes by that."""
    num_changed = 0
    for seed in range(30):
        trees = [composed_tree_of(seed + 100 * d) for d in range(3)]
        evidence = torch.randn(3, trees[0].batch_size, generator=torch.Generator().manual_seed(seed)) * 3
        merged = make_composition("merged", evidence_decay=0.9).compose(trees, evidence).tree
        merged.validate()
        budget = 9
        kept = make_composition("merged", budget, 0.9).compose(trees, evidence).tree
        plain = make_composition("merged", budget).compose(trees).tree
        shares = evidence.log_softmax(dim=0)
        for row in range(merged.batch_size):
            worth: dict[tuple[int, ...], float] = {}
            for d, tree in enumerate(trees):
                for node, path in list(enumerate(token_paths(tree, row)))[1:]:
                    value = float(tree.scores[row, node] + shares[d, row])
                    worth[path] = max(value, worth.get(path, -math.inf))
            found = dict(zip(token_paths(merged, row), merged.scores[row].tolist(), strict=False))
            assert found.pop(token_paths(merged, row)[0]) == 0
            assert found == pytest.approx(worth)
            best = sorted(worth.values(), reverse=True)[: budget - 1]
            count = int(kept.num_nodes[row])
            assert sorted(kept.scores[row, 1:count].tolist(), reverse=True) == pytest.approx(best)
            num_changed += set(token_paths(kept, row)) != set(token_paths(plain, row))
    assert num_changed > 10


def composed_tree_of(seed: int) -> DraftTree:
    """Three rows of at most 12 nodes, over few tokens so that drafters agree now and then."""
    rng = random.Random(seed)
    parents, tokens = torch.full((3, 12), -1), torch.zeros(3, 12, dtype=torch.int64)
    scores = torch.zeros(3, 12)
    for row in range(3):
        taken: set[tuple[int, int]] = set()
        for node in range(1, 12):
            child = (rng.randrange(node), rng.randrange(4))
            while child in taken:
                child = (rng.randrange(node), rng.randrange(4))
            taken.add(child)
            parents[row, node], tokens[row, node] = child
            scores[row, node] = scores[row, child[0]] - rng.expovariate(1.0)
    return ops.prune_tree(DraftTree(tokens, parents, scores, torch.tensor([12, 7, 1])), 12)
