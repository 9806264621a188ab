"""expand_frontier and prune_tree: the best children, and the best nodes.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from tree_cases import (
    LOGIT_DTYPES,
    TREES,
    assert_same,
    assert_same_tree,
    batch,
    random_row,
    random_tree,
    random_trees,
    row,
    strided,
)

from taps_ext import ops, reference
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")

# Log-probabilities are promised to about 1e-6; two units in the last place of a float32 score come on top.
SCORE_TOLERANCE = {"atol": 2e-6, "rtol": 2.5e-7}


def random_logits(rng: random.Random, *shape: int) -> Tensor:
    """Flat or peaked, in any dtype, sometimes on a coarse grid (ties), padded with -inf, or holding NaN."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(shape, generator=generator) * rng.choice([0.3, 2.0, 6.0])
    if rng.random() < 0.2:
        logits = logits.round()
    if rng.random() < 0.2 and shape[-1] > 2:
        logits[..., -rng.randint(1, shape[-1] // 2) :] = -math.inf  # a padded vocabulary
    if rng.random() < 0.1:
        logits[torch.rand(shape, generator=generator) < 0.05] = math.nan
    return logits.to(rng.choice(LOGIT_DTYPES))


def random_vocabulary(rng: random.Random, seed: int, largest: int = 262_144) -> int:
    if seed % 50 == 7:
        return largest
    low, high = rng.choices([(2, 2), (3, 64), (65, 2_000), (2_001, 33_000)], [5, 50, 35, 10])[0]
    return rng.randint(low, high)


def expansion_case(seed: int) -> tuple[Tensor, Tensor, int]:
    rng = random.Random(seed)
    vocabulary = random_vocabulary(rng, seed)
    batch_size, frontier = (1, 2) if vocabulary > 33_000 else (rng.randint(1, 3), rng.randint(1, 6))
    logits = random_logits(rng, batch_size, frontier, vocabulary)
    scores = torch.tensor([[-rng.expovariate(0.5) for _ in range(frontier)] for _ in range(batch_size)])
    if rng.random() < 0.1:
        scores[0, -1] = -math.inf
    branching = rng.randint(1, min(vocabulary, 10)) if seed % 9 else min(vocabulary, 64)
    return (strided(logits) if seed % 5 == 0 else logits), scores, branching


# ---- expand_frontier


def test_expansion_equals_the_reference(num_cases: int) -> None:
    """Checklist: NaN and -inf entries, padded vocabulary, V = 2 to 262,144, rows that are not aligned or contiguous."""
    undecided = 0
    for seed in range(num_cases):
        logits, scores, branching = expansion_case(seed)
        actual = ops.expand_frontier(logits, scores, branching)
        expected = reference.expand_frontier(logits, scores, branching)
        where = f"seed {seed}, {list(logits.shape)} {logits.dtype}, branching {branching}"
        assert_same(actual.tokens, expected.tokens, f"{where}, tokens")
        torch.testing.assert_close(actual.scores, expected.scores, **SCORE_TOLERANCE, msg=f"{where}, scores")
        torch.testing.assert_close(actual.entropies, expected.entropies, atol=1e-5, rtol=1e-5)
        for b, margin in enumerate(reference.expansion_margin(logits, scores, branching).tolist()):
            undecided += margin < 1e-5
            if margin >= 1e-5:
                assert_same(actual.frontier[b], expected.frontier[b], f"{where}, frontier of row {b}")
    assert undecided <= 0.005 * 2 * num_cases, "rows, two a case on average"


@pytest.mark.parametrize("dtype", LOGIT_DTYPES)
def test_equal_logits_go_to_the_lowest_token_and_equal_scores_to_the_lowest_index(dtype: torch.dtype) -> None:
    """Checklist: exact ties, -0.0 against 0.0."""
    logits = torch.tensor([[[0.0, 1.0, -0.0, 1.0, 1.0], [0.0, 1.0, -0.0, 1.0, 1.0]]], dtype=dtype)
    expanded = ops.expand_frontier(logits, torch.zeros(1, 2), 5)
    assert expanded.tokens.tolist() == [[[1, 3, 4, 0, 2]] * 2][0:1]
    assert expanded.frontier.tolist() == [[0, 1, 2, 5, 6]]


def test_no_log_probability_is_above_zero_even_when_one_token_has_all_the_mass() -> None:
    """Checklist: saturated drafter (scores 0.0 and -0.0)."""
    logits = torch.full((1, 3, 100), -80.0)
    logits[:, :, 17] = 80.0
    expanded = ops.expand_frontier(logits, torch.zeros(1, 3), 4)
    assert (expanded.tokens[..., 0] == 17).all() and (expanded.scores <= 0).all()
    assert (expanded.scores[..., 0] == 0).all() and expanded.frontier[0, :3].tolist() == [0, 4, 8]
    assert (expanded.entropies.abs() < 1e-6).all()


@pytest.mark.parametrize("fill", [-math.inf, math.nan])
def test_a_row_without_a_finite_logit_gives_children_that_are_not_there(fill: float) -> None:
    """Checklist: NaN and all -inf rows; never an id of V or more, never a touch on another row."""
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    clean = ops.expand_frontier(logits, torch.zeros(2, 3), 4)
    logits[0, 1] = fill
    expanded = ops.expand_frontier(logits, torch.zeros(2, 3), 4)
    assert (expanded.scores[0, 1] == -math.inf).all() and expanded.entropies[0, 1] == 0
    assert ((expanded.tokens >= 0) & (expanded.tokens < 40)).all()
    assert not ((expanded.frontier[0] >= 4) & (expanded.frontier[0] < 8)).any()
    assert torch.equal(expanded.scores[0, [0, 2]], clean.scores[0, [0, 2]])
    for actual, expected in zip(expanded, clean, strict=True):
        assert torch.equal(actual[1], expected[1])


def test_an_infinite_logit_gives_children_that_are_not_there() -> None:
    """Checklist: +inf rows."""
    logits = torch.zeros(1, 1, 8)
    logits[0, 0, 3] = math.inf
    expanded = ops.expand_frontier(logits, torch.zeros(1, 1), 2)
    assert (expanded.scores == -math.inf).all() and (expanded.entropies == 0).all()


def test_the_children_of_an_absent_frontier_node_are_absent() -> None:
    scores = torch.tensor([[0.0, -math.inf]])
    expanded = ops.expand_frontier(torch.zeros(1, 2, 5), scores, 3)
    assert (expanded.scores[0, 1] == -math.inf).all()
    assert expanded.frontier.tolist() == [[0, 1, 2]]


def test_a_row_does_not_depend_on_its_neighbours_or_on_its_strides(num_cases: int) -> None:
    """Checklist: batch permutation invariance; unaligned row pointers and V not a multiple of 8."""
    for seed in range(num_cases // 12):
        logits, scores, branching = expansion_case(seed)
        whole = ops.expand_frontier(logits, scores, branching)
        flipped = ops.expand_frontier(strided(logits.flip(0)), scores.flip(0), branching)
        for actual, expected in zip(flipped, whole, strict=True):
            assert_same(actual.flip(0), expected, f"seed {seed}")


@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit() -> None:
    """Checklist: ranks (here: thread counts) must agree bit-exactly."""
    logits, scores = torch.randn(4, 10, 5_000), torch.zeros(4, 10)
    one = ops.expand_frontier(logits, scores, 10)
    torch.set_num_threads(2)
    for actual, expected in zip(ops.expand_frontier(logits, scores, 10), one, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.backends("simt")
def test_a_block_may_read_several_parts_of_a_row(backend: Any) -> None:
    """So it is where rows are many for the device: the sums must not notice."""
    logits, scores = random_logits(random.Random(0), 4, 16, 9000), torch.zeros(4, 16)
    results = []
    for multiprocessors in (1, 132):
        backend.arrange("forward", 0, multiprocessors)
        results.append(backend.module.expand_frontier(logits, scores, 10, *[None] * len(ops.Coupling._fields), None))
    for i, (one, other) in enumerate(zip(*results, strict=True)):
        assert_same(one, other, f"result {i}")


def test_branching_may_be_the_whole_vocabulary() -> None:
    """Checklist: top-k at V."""
    logits = torch.randn(1, 2, 33, generator=torch.Generator().manual_seed(0))
    expanded = ops.expand_frontier(logits, torch.zeros(1, 2), 33)
    assert torch.equal(expanded.tokens, logits.argsort(-1, descending=True))
    torch.testing.assert_close(expanded.scores.exp().sum(-1), torch.ones(1, 2))


@pytest.mark.backends("cpu", "simt")  # virtual memory: to copy it would fill it
@pytest.mark.long
def test_offsets_beyond_32_bits_work() -> None:
    """Checklist: more than 2^31 elements. The logits are virtual: only the last row is ever written."""
    try:
        logits = torch.empty(1, 8_200, 262_144, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no room for virtual logits of 4.3 GB: {error}")
    assert logits.numel() > 2**31
    logits[0, -1] = 0.0
    logits[0, -1, -1] = 5.0
    expanded = ops.expand_frontier(logits, torch.zeros(1, 8_200), 2)
    assert expanded.tokens[0, -1].tolist() == [262_143, 0]


# ---- prune_tree


def with_entropies(tree: DraftTree) -> DraftTree:
    return replace(tree, entropies=torch.rand(tree.scores.shape, generator=torch.Generator().manual_seed(3)))


def with_proposers(tree: DraftTree) -> DraftTree:
    masks = torch.randint(1, 2**62, tree.tokens.shape, generator=torch.Generator().manual_seed(4))
    return replace(tree, proposers=masks)


def shuffled_scores(tree: DraftTree, seed: int) -> DraftTree:
    """Scores that do not fall along paths, NaN and -inf among them: what a drafter with a bug would hand over."""
    generator = torch.Generator().manual_seed(seed)
    scores = -torch.rand(tree.scores.shape, generator=generator).mul(8).floor()
    noise = torch.rand(tree.scores.shape, generator=generator)
    scores[noise < 0.03] = math.nan
    scores[noise > 0.97] = -math.inf
    scores[:, 0] = 0
    return replace(tree, scores=scores)


def budgets(tree: DraftTree, seed: int) -> tuple[int, ...]:
    return (1, random.Random(seed).randint(1, tree.capacity), tree.capacity, tree.capacity + 5)


def test_pruning_equals_the_reference(num_cases: int) -> None:
    """Checklist: exact ties at the cut, NaN scores (SGLang #7477), N = 1, budget beyond the pool, garbage padding.

    Scores are compared as the float32 numbers they are, so there is no margin: every case is exact.
    """
    for i, (name, tree) in enumerate(random_trees(num_cases)):
        tree = with_entropies(tree) if i % 2 else tree
        tree = with_proposers(tree) if i % 3 == 0 else tree
        tree = shuffled_scores(tree, i) if i % 4 == 3 else tree
        for max_nodes in budgets(tree, i):
            actual, expected = ops.prune_tree(tree, max_nodes), reference.prune_tree(tree, max_nodes)
            assert_same_tree(actual, expected, f"{name}, max_nodes {max_nodes}")


def test_a_pruned_tree_is_a_tree_within_its_budget(num_cases: int) -> None:
    """Checklist: missing parent (the official code links nodes to wrong parents when scores tie)."""
    for i, (name, tree) in enumerate(random_trees(num_cases // 3)):
        for max_nodes in budgets(tree, i):
            pruned = ops.prune_tree(tree, max_nodes)
            pruned.validate()
            assert pruned.capacity == min(max_nodes, tree.capacity), name
            assert (pruned.num_nodes <= max_nodes).all(), name


def test_a_pruned_tree_is_closed_under_ancestors(num_cases: int) -> None:
    """Every kept path is a path of the input: no node was hung onto another parent."""
    for seed in range(num_cases // 3):
        tree = random_tree(seed, vocabulary=10**9)  # distinct tokens, so that a path names its node
        pruned = ops.prune_tree(tree, max(1, tree.capacity // 2))
        for b in range(tree.batch_size):
            assert paths(pruned, b).items() <= paths(tree, b).items(), f"seed {seed}"


def paths(tree: DraftTree, b: int) -> dict[tuple[int, ...], float]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens[b].tolist(), tree.parents[b].tolist(), strict=True):
        if len(found) < tree.num_nodes[b]:
            found.append((*(found[parent] if parent >= 0 else ()), token))
    return dict(zip(found, tree.scores[b].tolist(), strict=False))


def test_no_dropped_node_outscores_a_kept_one(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        tree = random_tree(seed)
        pruned = ops.prune_tree(tree, max(1, tree.capacity // 2))
        for b in range(tree.batch_size):
            scores = tree.scores[b, : tree.num_nodes[b]]
            kept = pruned.scores[b, : pruned.num_nodes[b]]
            ranked = scores[scores > -math.inf].sort(descending=True).values
            assert torch.equal(kept.sort(descending=True).values, ranked[: len(kept)]), f"seed {seed}"
            assert len(kept) == min(pruned.capacity, len(ranked)), f"seed {seed}"


@pytest.mark.parametrize("name", ["saturated scores", "equal log-probabilities"])
def test_exact_ties_are_kept_in_index_order(name: str) -> None:
    """Checklist: exact ties; an ancestor ranks before its descendants."""
    tree = TREES[name]()
    for max_nodes in range(1, tree.capacity + 1):
        pruned = ops.prune_tree(tree, max_nodes)
        assert torch.equal(pruned.tokens, tree.tokens[:, :max_nodes])
        assert torch.equal(pruned.parents, tree.parents[:, :max_nodes])


def test_a_child_that_outscores_its_parent_counts_as_its_parent() -> None:
    tree = batch([row([-1, 0, 1, 0], scores=[0.0, -3.0, -1.0, -2.0])])
    assert ops.prune_tree(tree, 2).tokens.tolist() == [[0, 3]]
    assert ops.prune_tree(tree, 3).tokens.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("absent", [math.nan, -math.inf])
def test_absent_nodes_take_their_descendants_with_them(absent: float) -> None:
    """Checklist: NaN drafter (SGLang #7477 then reports an invalid tree)."""
    pruned = ops.prune_tree(batch([row([-1, 0, 1, 0], scores=[0.0, absent, -1.0, -2.0])]), 4)
    assert pruned.tokens.tolist() == [[0, 3, 0, 0]] and pruned.num_nodes.tolist() == [2]
    pruned.validate()


def test_entropies_and_proposers_travel_with_their_nodes() -> None:
    tree = with_proposers(with_entropies(batch([row([-1, 0, 0, 2], scores=[0.0, -3.0, -1.0, -2.0])])))
    pruned = ops.prune_tree(tree, 3)
    assert tree.entropies is not None and pruned.entropies is not None
    assert tree.proposers is not None and pruned.proposers is not None
    assert torch.equal(pruned.entropies, tree.entropies[:, [0, 2, 3]])
    assert torch.equal(pruned.proposers, tree.proposers[:, [0, 2, 3]])


def test_pruning_to_the_tree_itself_changes_nothing() -> None:
    tree = TREES["complete ternary"]()
    assert_same_tree(ops.prune_tree(tree, 500), tree, "budget beyond the pool")


def test_trees_of_2500_nodes_are_pruned_alike() -> None:
    """Checklist: N beyond what shared memory holds."""
    rng = random.Random(0)
    tree = batch([random_row(rng, 2500, 10**6), random_row(rng, 2100, 10**6)], capacity=2500)
    for max_nodes in (300, 2499):
        assert_same_tree(ops.prune_tree(tree, max_nodes), reference.prune_tree(tree, max_nodes), f"{max_nodes}")


def test_a_merged_tree_is_pruned_as_if_it_had_been_pruned_while_merging(num_cases: int) -> None:
    for seed in range(num_cases // 12):
        trees = [random_tree(seed + d, vocabulary=6) for d in (0, 1)]
        capacity = max(tree.capacity for tree in trees)
        fields = [
            torch.stack([torch.nn.functional.pad(getattr(t, name)[:1], (0, capacity - t.capacity)) for t in trees], 1)
            for name in ("tokens", "parents", "scores")
        ]
        fields[0][..., 0] = 0
        counts = torch.stack([tree.num_nodes[:1] for tree in trees], 1)
        whole = ops.merge_trees(*fields, counts).tree
        for max_nodes in budgets(whole, seed):
            expected = ops.merge_trees(*fields, counts, max_nodes).tree
            assert_same_tree(ops.prune_tree(whole, max_nodes), expected, f"seed {seed}, max_nodes {max_nodes}")
