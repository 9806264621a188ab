"""DraftTree and TreeShape: what is a tree, and which sentence says that something is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import tree_cases
from tree_cases import TREES, batch, row

from taps_ext.tree import DraftTree, TreeShape

CLEAN_TREES = [name for name in TREES if name != "garbage in the padding"]


@pytest.mark.parametrize("name", CLEAN_TREES)
def test_every_tree_of_the_table_is_a_tree(name: str) -> None:
    TREES[name]().validate()


def test_every_generated_tree_is_a_tree(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        tree = tree_cases.random_tree(seed)
        is_node = tree.is_node()
        replace(
            tree,
            tokens=tree.tokens.masked_fill(~is_node, 0),
            parents=tree.parents.masked_fill(~is_node, 0),
        ).validate()


BROKEN: dict[str, tuple[DraftTree, str]] = {
    "root with a parent": (replace(batch([row([-1, 0])]), parents=torch.tensor([[0, 0]])), "parent -1"),
    "child before its parent": (replace(batch([row([-1, 0, 0])]), parents=torch.tensor([[-1, 2, 0]])), "before their"),
    "a cycle of one": (replace(batch([row([-1, 0])]), parents=torch.tensor([[-1, 1]])), "before their children"),
    "two roots": (replace(batch([row([-1, 0])]), parents=torch.tensor([[-1, -1]])), "before their children"),
    "equal siblings": (batch([row([-1, 0, 0], tokens=[0, 4, 4])]), "distinct tokens"),
    "a child outscores its parent": (batch([row([-1, 0, 1], scores=[0.0, -1.0, -0.5])]), "outscore"),
    "a NaN score": (batch([row([-1, 0], scores=[0.0, float("nan")])]), "outscore"),
    "no nodes": (replace(batch([row([-1])]), num_nodes=torch.tensor([0])), "num_nodes must lie in 1..1"),
    "too many nodes": (replace(batch([row([-1])]), num_nodes=torch.tensor([2])), "num_nodes must lie in 1..1"),
    "padding with a parent": (
        replace(batch([row([-1, 0])], capacity=3), parents=torch.tensor([[-1, 0, 1]])),
        "padding must have parent 0",
    ),
    "parents of another shape": (replace(batch([row([-1, 0])]), parents=torch.tensor([[-1]])), "parents must be"),
    "num_nodes of another shape": (replace(batch([row([-1])]), num_nodes=torch.tensor([1, 1])), "num_nodes must be"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validate_names_the_broken_invariant(name: str) -> None:
    tree, sentence = BROKEN[name]
    with pytest.raises(ValueError, match=sentence):
        tree.validate()


def test_trimming_keeps_every_node_and_every_optional_field() -> None:
    tree = tree_cases.ragged()
    tree = replace(tree, proposers=torch.ones_like(tree.tokens), entropies=torch.zeros_like(tree.scores))
    trimmed = tree.trimmed(6)
    assert trimmed.capacity == 6
    assert trimmed.is_node().sum() == tree.is_node().sum()
    assert trimmed.proposers is not None and trimmed.proposers.shape == trimmed.tokens.shape
    assert trimmed.entropies is not None and trimmed.entropies.shape == trimmed.tokens.shape
    trimmed.validate()


@pytest.mark.parametrize("field", ["depth", "branching", "max_nodes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_tree_shape_refuses_what_is_not_a_positive_integer(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"TreeShape.{field} must be an integer of at least 1"):
        TreeShape(**{field: value})  # type: ignore[arg-type]
