"""Compositions over generated trees: routing chooses by its own measure, merging keeps every path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taps_ext.composition import COMPOSITIONS, EVIDENCE_DECAY, make_composition
from taps_ext.ops import prune_tree
from taps_ext.tree import DraftTree


def random_tree(seed: int, batch_size: int = 3, capacity: int = 12) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    parents = torch.full((batch_size, capacity), -1)
    scores = torch.zeros(batch_size, capacity)
    for node in range(1, capacity):
        parents[:, node] = torch.randint(0, node, (batch_size,), generator=generator)
        drop = torch.rand(batch_size, generator=generator)
        scores[:, node] = scores.gather(1, parents[:, node : node + 1])[:, 0] - drop
    tokens = torch.arange(capacity).expand(batch_size, -1) + seed
    tokens = tokens.index_fill(1, torch.tensor([0]), 99)
    pool = DraftTree(
        tokens,
        parents,
        scores,
        torch.randint(1, capacity + 1, (batch_size,), generator=generator),
        entropies=torch.rand(batch_size, capacity, generator=generator),
    )
    return prune_tree(pool, capacity)  # clears the padding


def paths(tree: DraftTree, row: int) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for node in range(int(tree.num_nodes[row])):
        parent = int(tree.parents[row, node])
        found.append((found[parent] if parent >= 0 else ()) + (int(tree.tokens[row, node]),))
    return set(found)


@pytest.mark.parametrize("num_drafters", [1, 2, 3, 5])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_makes_valid_trees_with_proposers(name: str, num_drafters: int) -> None:
    for seed in range(20):
        trees = [random_tree(seed * 10 + index) for index in range(num_drafters)]
        composition, generator = make_composition(name), torch.Generator().manual_seed(seed)
        evidence = torch.randn(num_drafters, 3, generator=generator) if composition.decay is not None else None
        composed = composition.compose(trees, evidence)
        composed.tree.validate()
        assert composed.tree.proposers is not None
        for row in range(3):
            for node in range(1, int(composed.tree.num_nodes[row])):
                mask = int(composed.tree.proposers[row, node])
                assert 0 < mask < 2**num_drafters
        if composed.choice is not None:
            for row, choice in enumerate(composed.choice.tolist()):
                assert paths(composed.tree, row) == paths(trees[choice], row)


def test_the_merged_tree_holds_exactly_the_paths_of_all() -> None:
    for seed in range(20):
        trees = [random_tree(seed), random_tree(seed + 1), random_tree(seed + 2)]
        merged = make_composition("merged").compose(trees).tree
        for row in range(3):
            assert paths(merged, row) == set().union(*(paths(tree, row) for tree in trees))


def test_confidence_takes_the_highest_mean_over_nodes_and_entropy_the_lowest() -> None:
    for seed in range(30):
        trees = [random_tree(seed * 7 + index) for index in range(3)]
        by_confidence = make_composition("confidence").compose(trees).choice
        by_entropy = make_composition("entropy").compose(trees).choice
        assert by_confidence is not None and by_entropy is not None
        for row in range(3):
            counts = [int(tree.num_nodes[row]) for tree in trees]
            confidences = [
                sum(tree.scores[row, 1:n].double().exp().tolist()) / (n - 1) if n > 1 else -1.0
                for tree, n in zip(trees, counts, strict=True)
            ]
            entropies = [
                sum(tree.entropies[row, 1:n].double().tolist()) / (n - 1) if n > 1 else float("inf")
                for tree, n in zip(trees, counts, strict=True)
            ]
            assert confidences[by_confidence[row]] == pytest.approx(max(confidences))
            assert entropies[by_entropy[row]] == pytest.approx(min(entropies))


def test_evidence_takes_the_drafter_of_most_whatever_its_tree() -> None:
    """Before any tree is there, and even where that drafter then proposes nothing."""
    trees = [random_tree(1), random_tree(2), random_tree(3)]
    trees[1] = replace(trees[1], num_nodes=torch.ones_like(trees[1].num_nodes))
    evidence = torch.tensor([[-9.0, -2.0, -5.0], [-1.0, -7.0, -4.0], [-3.0, -2.5, -60.0]])
    composition = make_composition("evidence")
    composed = composition.compose(trees, evidence)
    assert composed.choice is not None and composed.choice.tolist() == [1, 0, 1]
    assert composed.choice.equal(composition.choose(evidence))
    assert composed.tree.num_nodes.tolist() == [1, int(trees[0].num_nodes[1]), 1]


def test_only_evidence_chooses_before_anything_is_drafted() -> None:
    for name in COMPOSITIONS:
        composition = make_composition(name)
        assert (composition.decay is not None) == (name == "evidence")
        if name != "evidence":
            assert composition.choose(None) is None
    weighted = make_composition("merged", evidence_decay=0.8)
    assert weighted.decay == 0.8 and weighted.choose(torch.zeros(2, 3)) is None


@pytest.mark.parametrize("decay", [-0.5, 1.01, float("nan")])
@pytest.mark.parametrize("name", ["evidence", "merged"])
def test_a_decay_that_discounts_nothing_or_all_is_refused(name: str, decay: float) -> None:
    with pytest.raises(
        ValueError, match=rf"evidence_decay must be above 0 and at most 1, or 0 with merged, got {decay}"
    ):
        make_composition(name, evidence_decay=decay)
    assert make_composition(name, evidence_decay=1).decay == 1


def test_merged_trees_are_weighted_by_evidence_where_nodes_are_to_be_shared_out() -> None:
    assert make_composition("merged", max_nodes=60).decay == EVIDENCE_DECAY
    assert make_composition("merged", evidence_decay=0.5).decay == 0.5
    assert make_composition("merged").decay is None
    assert make_composition("merged", max_nodes=60, evidence_decay=0).decay is None
    with pytest.raises(ValueError, match="or 0 with merged, got 0"):
        make_composition("evidence", evidence_decay=0)


def test_ties_go_to_the_first_drafter() -> None:
    tree = random_tree(3)
    for name in ("confidence", "entropy"):
        choice = make_composition(name).compose([tree, tree, tree]).choice
        assert choice is not None and choice.tolist() == [0, 0, 0]


def test_entropy_routing_says_when_trees_have_none() -> None:
    with pytest.raises(ValueError, match="needs trees with entropies"):
        make_composition("entropy").compose([replace(random_tree(1), entropies=None)])
