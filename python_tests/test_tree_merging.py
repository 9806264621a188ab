"""merge_trees: the union of several drafters' trees by shared prefix.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from tree_cases import (
    TREES,
    assert_same,
    assert_same_tree,
    batch,
    chain,
    random_capacity,
    random_row,
    row,
    strided,
    token_paths,
    with_garbage_padding,
)

from taps_ext import ops, reference
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")


class Proposals(NamedTuple):
    """D trees a row, as merge_trees takes them."""

    tokens: Tensor  # [B, D, N]
    parents: Tensor  # [B, D, N]
    scores: Tensor  # [B, D, N]
    num_nodes: Tensor  # [B, D]

    def drafter(self, d: int) -> DraftTree:
        return DraftTree(self.tokens[:, d], self.parents[:, d], self.scores[:, d], self.num_nodes[:, d])


def proposals(trees: list[DraftTree]) -> Proposals:
    """The trees of D drafters (each a batch) side by side."""
    fields = ((tree.tokens, tree.parents, tree.scores, tree.num_nodes) for tree in trees)
    return Proposals(*(torch.stack(column, dim=1) for column in zip(*fields, strict=True)))


def random_proposals(seed: int) -> Proposals:
    """Few tokens, so that trees overlap; ragged, some drafters without a draft, often one copying another's branch."""
    rng = random.Random(seed)
    capacity = random_capacity(rng)
    num_drafters = 2 if capacity > 256 else rng.choices([1, 2, 3, 4, 63], [10, 50, 20, 15, 5])[0]
    batch_size = 1 if capacity > 70 else rng.randint(1, 3)
    vocabulary = rng.choice([2, 5, 50, 100_000])
    roots = [rng.randrange(vocabulary) for _ in range(batch_size)]
    trees = []
    for _ in range(num_drafters):
        counts = [rng.choice([1, capacity, rng.randint(1, capacity)]) for _ in range(batch_size)]
        tree = batch([random_row(rng, n, vocabulary, root) for n, root in zip(counts, roots, strict=True)], capacity)
        trees.append(with_garbage_padding(tree, rng) if rng.random() < 0.5 else tree)
    if num_drafters > 1 and rng.random() < 0.3:
        trees[-1] = trees[0]
    merged = proposals(trees)
    return Proposals(*(strided(field) for field in merged)) if seed % 5 == 0 else merged


def union_of(trees: Proposals, b: int) -> dict[tuple[int, ...], tuple[float, int]]:
    """Token path -> (largest score, bit mask of the drafters that hold it)."""
    union: dict[tuple[int, ...], tuple[float, int]] = {}
    for d in range(trees.tokens.shape[1]):
        tree = trees.drafter(d)
        for path, score in zip(token_paths(tree, b), tree.scores[b].tolist(), strict=False):
            known, mask = union.get(path, (-math.inf, 0))
            union[path] = (max(known, score), mask | 1 << d)
    return union


def test_merging_equals_the_reference(num_cases: int) -> None:
    """Checklist: N = 1, 0-draft slots, ragged N, duplicate siblings, garbage padding, D to 63; exact in every case."""
    for seed in range(num_cases):
        trees = random_proposals(seed)
        full = trees.tokens.shape[1] * (trees.tokens.shape[2] - 1) + 1
        for max_nodes in (None, random.Random(seed).randint(1, full), full + 3):
            actual = ops.merge_trees(*trees, max_nodes)
            expected = reference.merge_trees(*trees, max_nodes)
            where = f"seed {seed}, {list(trees.tokens.shape)}, max_nodes {max_nodes}"
            assert_same_tree(actual.tree, expected.tree, where)
            assert_same(actual.node_map, expected.node_map, f"{where}, node_map")


def test_merged_tree_keeps_every_path_of_every_input_and_adds_none(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        trees = random_proposals(seed)
        merged = ops.merge_trees(*trees).tree
        for b in range(merged.batch_size):
            found = token_paths(merged, b)
            assert len(found) == len(set(found)), f"seed {seed}: an equal (parent, token) appears twice"
            assert set(found) == set(union_of(trees, b)), f"seed {seed}"


def test_scores_are_the_largest_and_proposers_exactly_the_holders(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        trees = random_proposals(seed)
        merged = ops.merge_trees(*trees).tree
        assert merged.proposers is not None
        for b in range(merged.batch_size):
            union = union_of(trees, b)
            for node, path in enumerate(token_paths(merged, b)):
                assert (float(merged.scores[b, node]), int(merged.proposers[b, node])) == union[path], f"seed {seed}"


def test_the_node_map_leads_each_input_node_to_its_own_path(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        trees = random_proposals(seed)
        merged, node_map = ops.merge_trees(*trees)
        for b in range(merged.batch_size):
            found = token_paths(merged, b)
            for d in range(trees.tokens.shape[1]):
                count = int(trees.num_nodes[b, d])
                mapped = [found[node] for node in node_map[b, d, :count]]
                assert mapped == token_paths(trees.drafter(d), b), f"seed {seed}"
                assert (node_map[b, d, count:] == -1).all(), f"seed {seed}"


def test_merged_nodes_come_layer_by_layer_and_validate(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        merged = ops.merge_trees(*random_proposals(seed)).tree
        merged.validate()
        depths = ops.tree_depths(merged.parents, merged.num_nodes)
        for b in range(merged.batch_size):
            layers = depths[b, : merged.num_nodes[b]]
            assert torch.equal(layers, layers.sort().values), f"seed {seed}"


def test_a_budget_keeps_the_best_nodes_closed_under_ancestors(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        trees = random_proposals(seed)
        whole = ops.merge_trees(*trees).tree
        max_nodes = random.Random(seed).randint(1, whole.capacity)
        cut, node_map = ops.merge_trees(*trees, max_nodes)
        cut.validate()
        for b in range(cut.batch_size):
            kept = token_paths(cut, b)
            assert set(kept) <= set(token_paths(whole, b)), f"seed {seed}"
            scores = whole.scores[b, : whole.num_nodes[b]]
            best = scores[scores > -math.inf].sort(descending=True).values[:max_nodes]
            assert torch.equal(cut.scores[b, : len(kept)].sort(descending=True).values, best), f"seed {seed}"
            assert set(node_map[b].flatten().tolist()) - {-1} == set(range(len(kept))), f"seed {seed}"


def test_the_same_tree_twice_is_the_tree_once() -> None:
    for name, build in TREES.items():
        tree = build()
        merged = ops.merge_trees(*proposals([tree, tree])).tree
        for b in range(tree.batch_size):
            assert sorted(token_paths(merged, b)) == sorted(token_paths(tree, b)), name
        assert merged.proposers is not None
        assert (merged.proposers[merged.is_node()] == 3).all(), name


def test_equal_tokens_under_different_parents_stay_apart() -> None:
    """Checklist: a key of (token, depth) merges nodes of different parents (FlexFlow's merge_dfs_trees)."""
    first = batch([row([-1, 0, 1], tokens=[9, 1, 5])])
    second = batch([row([-1, 0, 1], tokens=[9, 2, 5])])
    merged = ops.merge_trees(*proposals([first, second])).tree
    assert sorted(token_paths(merged, 0)) == [(9,), (9, 1), (9, 1, 5), (9, 2), (9, 2, 5)]


def test_duplicate_siblings_within_one_tree_become_one_node() -> None:
    """Checklist: duplicate siblings, with a subtree under each."""
    tree = batch([row([-1, 0, 0, 1, 2], tokens=[9, 1, 1, 3, 4], scores=[0.0, -2.0, -1.0, -3.0, -4.0])])
    merged, node_map = ops.merge_trees(*proposals([tree]))
    assert token_paths(merged, 0) == [(9,), (9, 1), (9, 1, 3), (9, 1, 4)]
    assert merged.scores[0].tolist() == [0.0, -1.0, -3.0, -4.0, -math.inf]
    assert node_map.tolist() == [[[0, 1, 1, 2, 3]]]


def test_the_63rd_drafter_has_its_bit() -> None:
    """Checklist: `1 << j` in an int breaks at 32."""
    tree = batch([row([-1, 0])])
    lone = batch([row([-1, 0], tokens=[0, 5])])
    merged = ops.merge_trees(*proposals([tree] * 62 + [lone])).tree
    assert merged.proposers is not None
    assert merged.proposers[0, :3].tolist() == [2**63 - 1, 2**62 - 1, 2**62]


def test_two_chains_of_1024_that_part_at_their_ends_merge() -> None:
    """Checklist: depth = N - 1 chain at N = 1024."""
    first = chain(1024)
    tokens = first.tokens.clone()
    tokens[0, -1] = 5
    second = DraftTree(tokens, first.parents, first.scores, first.num_nodes)
    merged = ops.merge_trees(*proposals([first, second])).tree
    assert merged.num_nodes.tolist() == [1025] and merged.parents[0, 1023:1025].tolist() == [1022, 1022]


def test_large_tokens_are_compared_whole() -> None:
    """Tokens that agree in their low 32 bits are different tokens."""
    first = batch([row([-1, 0], tokens=[1, 7])])
    second = batch([row([-1, 0], tokens=[1, 7 + 2**32])])
    assert ops.merge_trees(*proposals([first, second])).tree.num_nodes.tolist() == [3]


def test_drafters_without_a_draft_leave_the_root() -> None:
    """Checklist: 0-draft slots."""
    merged = ops.merge_trees(*proposals([batch([row([-1])], capacity=4)] * 3))
    assert merged.tree.num_nodes.tolist() == [1] and merged.tree.capacity == 10
    assert merged.node_map[0, :, 0].tolist() == [0, 0, 0] and (merged.node_map[0, :, 1:] == -1).all()


@pytest.mark.parametrize("max_nodes", [None, 4])
def test_rows_do_not_touch_one_another(max_nodes: int | None) -> None:
    """Checklist: batch permutation invariance."""
    trees = next(t for t in map(random_proposals, range(1, 500)) if t.tokens.shape[0] == 3 and t.tokens.shape[2] > 8)
    whole, node_map = ops.merge_trees(*trees, max_nodes)
    for b in range(3):
        alone, alone_map = ops.merge_trees(*(field[b : b + 1] for field in trees), max_nodes)
        assert torch.equal(alone.tokens[0], whole.tokens[b]) and torch.equal(alone.parents[0], whole.parents[b])
        assert torch.equal(alone_map[0], node_map[b])


def test_an_empty_batch_gives_an_empty_batch() -> None:
    empty = torch.empty(0, 2, 4, dtype=torch.int64)
    merged = ops.merge_trees(empty, empty, empty.float(), torch.empty(0, 2, dtype=torch.int64))
    assert merged.tree.tokens.shape == (0, 7) and merged.node_map.shape == (0, 2, 4)
