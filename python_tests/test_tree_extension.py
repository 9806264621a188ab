"""extend_tree: leaves are continued with what followed their paths earlier in the row's own text."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from tree_cases import assert_same_tree, batch, random_tree, row, strided, token_path, token_paths

from taps_ext import ops, reference
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")


class ExtensionCase(NamedTuple):
    """The arguments of extend_tree."""

    tree: DraftTree
    text: Tensor
    lengths: Tensor
    log_probs: list[float]
    max_extension: int
    window: int
    proposer: int


def extension_case(seed: int) -> ExtensionCase:
    """Few tokens, so that contexts recur; texts repeat themselves or hold paths of the tree; some rows have none."""
    rng = random.Random(seed)
    vocabulary = rng.choice([2, 3, 5, 50])
    tree = random_tree(seed, vocabulary)
    extra = torch.Generator().manual_seed(seed)
    tree = replace(tree, entropies=torch.rand(tree.tokens.shape, generator=extra))
    if rng.random() < 0.5:
        tree = replace(tree, proposers=torch.randint(8, tree.tokens.shape, generator=extra))
    texts = [text_of_row(rng, tree, b, vocabulary) for b in range(tree.batch_size)]
    longest = max(len(text) for text in texts) + rng.choice([0, 0, 3])
    padded = [[*one, *[rng.choice([-1, 0, 2**40])] * (longest - len(one))] for one in texts]
    text = torch.tensor(padded, dtype=torch.int64)
    lengths = torch.tensor([len(one) for one in texts])
    text = strided(text) if seed % 5 == 0 else text
    drops = [-rng.choice([0.0, 0.25, 1.0, rng.expovariate(1.0), math.inf]) for _ in range(rng.choice([1, 2, 4, 9, 32]))]
    window = rng.choice([1, 2, 5, 20, 10_000])
    return ExtensionCase(tree, text, lengths, sorted(drops), rng.choice([1, 2, 3, 8]), window, rng.choice([0, 4]))


def text_of_row(rng: random.Random, tree: DraftTree, b: int, vocabulary: int) -> list[int]:
    """The row's committed tokens, of which the last one is its root."""
    if rng.random() < 0.1:
        return []
    period = [rng.randrange(vocabulary) for _ in range(rng.choice([1, 2, 3, 7]))]
    paths = token_paths(tree, b)
    parts = {
        "noise": lambda: [rng.randrange(vocabulary) for _ in range(rng.randint(0, 30))],
        "repeats": lambda: period * rng.randint(1, 5),
        "path": lambda: list(rng.choice(paths)),
    }
    text = [token for _ in range(rng.randint(0, 5)) for token in parts[rng.choice(list(parts))]()]
    return [*text, int(tree.tokens[b, 0])]


def one_row(
    parents: list[int], tokens: list[int], text: list[int], log_probs: list[float], extension: int, window: int = 1000
) -> DraftTree:
    """What one tree of scores 0 becomes."""
    tree = batch([row(parents, tokens, [0.0] * len(parents))])
    return ops.extend_tree(tree, torch.tensor([text]), torch.tensor([len(text)]), log_probs, extension, window)


def test_extension_equals_the_reference(num_cases: int) -> None:
    """Exact in every case: the scores too are sums in one order."""
    for seed in range(num_cases):
        case = extension_case(seed)
        where = f"seed {seed}, {list(case.tree.tokens.shape)}, {list(case.text.shape)}"
        assert_same_tree(ops.extend_tree(*case), reference.extend_tree(*case), where)


def test_the_cases_are_not_hollow() -> None:
    """Trees grow, roots and leaves; matches are short, long and cut by the window."""
    grown = roots = beyond_text = windowed = 0
    for seed in range(300):
        case = extension_case(seed)
        extended = reference.extend_tree(*case)
        grown += bool((extended.num_nodes > case.tree.num_nodes).any())
        roots += bool(((case.tree.num_nodes == 1) & (extended.num_nodes > 1)).any())
        whole = reference.extend_tree(*case._replace(window=10_000))
        windowed += not torch.equal(whole.num_nodes, extended.num_nodes)
        beyond_text += case.max_extension == 8 and bool((extended.num_nodes > case.tree.num_nodes + 7).any())
    assert min(grown, roots * 10, windowed * 2, beyond_text * 2) > 60


def test_an_extended_tree_validates_and_holds_the_given_one_unchanged(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        case = extension_case(seed)
        extended = ops.extend_tree(*case)
        ops.prune_tree(extended, extended.capacity).validate()
        for b in range(case.tree.batch_size):
            count = int(case.tree.num_nodes[b])
            for name in ("tokens", "parents", "scores", "entropies", "proposers"):
                given = getattr(case.tree, name)
                if given is not None:
                    assert torch.equal(getattr(extended, name)[b, :count], given[b, :count]), f"seed {seed}, {name}"
            new = slice(count, int(extended.num_nodes[b]))
            assert extended.proposers is None or (extended.proposers[b, new] == case.proposer).all()
            parents = extended.parents[b, new]
            assert len(set(parents.tolist())) == len(parents), f"seed {seed}: a leaf has two continuations"


def test_the_longest_match_wins_and_the_latest_among_equals() -> None:
    #          match of 2 -> 30   match of 1 -> 31   match of 2 -> 32
    text = [1, 2, 30, 9, 9, 2, 31, 1, 2, 32, 9, 2, 33, 7]
    extended = one_row([-1, 0, 1], [7, 1, 2], text, [-3.0, -1.0], 2)
    assert extended.tokens[0, :5].tolist() == [7, 1, 2, 32, 9]
    assert extended.scores[0, 3:5].tolist() == [-1.0, -2.0]
    shorter = one_row([-1, 0, 1], [7, 1, 2], text, [-3.0], 2)
    assert shorter.tokens[0, 3:5].tolist() == [33, 7], "with one token of context the latest place wins"


def test_a_match_reaches_through_the_root_into_the_text() -> None:
    """The context of a leaf is the text up to the root and then its path."""
    extended = one_row([-1, 0], [6, 7], [4, 5, 6, 7, 8, 1, 5, 6], [-9.0, -8.0, -1.0, -0.5], 1)
    assert extended.tokens[0, :3].tolist() == [6, 7, 8]
    assert extended.scores[0, 2].item() == -1.0, "5, 6, 7 matches, and 4 does not"


def test_a_score_takes_the_length_that_the_match_has_grown_to() -> None:
    extended = one_row([-1], [1], [1, 2, 3, 4, 5, 1], [-4.0, -2.0, -1.0], 4)
    assert extended.tokens[0].tolist() == [1, 2, 3, 4, 5]
    assert extended.scores[0].tolist() == [0.0, -4.0, -6.0, -7.0, -8.0]


def test_a_text_that_repeats_itself_is_continued_beyond_its_end() -> None:
    assert one_row([-1], [2], [1, 2, 1, 2], [-1.0], 5).tokens[0].tolist() == [2, 1, 2, 1, 2, 1]
    assert one_row([-1], [3], [3, 3], [-1.0], 4).tokens[0].tolist() == [3] * 5
    through_a_path = one_row([-1, 0, 1], [1, 2, 3], [1, 2, 3, 1], [-1.0], 4)
    assert token_path(through_a_path, 0, 6) == (1, 2, 3, 1, 2, 3, 1)


def test_match_lengths_of_minus_infinity_are_not_extended() -> None:
    """So a caller sets the least length of a match."""
    text = [1, 2, 3, 9, 1, 2, 5, 2]
    assert one_row([-1], [2], text, [-math.inf, -1.0], 3).num_nodes.item() == 1
    assert one_row([-1], [2], [*text, 1, 2], [-math.inf, -1.0], 3).num_nodes.item() == 4


def test_leaves_without_a_score_and_rows_without_a_text_stay() -> None:
    tree = batch([row([-1, 0, 0], [5, 6, 6], [0.0, -math.inf, math.nan])] * 2)
    text = torch.tensor([[5, 6, 7, 5], [5, 6, 7, 5]])
    extended = ops.extend_tree(tree, text, torch.tensor([4, 0]), [-1.0], 3, 100)
    assert extended.num_nodes.tolist() == [3, 3]
    one = batch([row([-1], [5])] * 2)
    assert ops.extend_tree(one, text, torch.tensor([4, 0]), [-1.0], 3, 100).num_nodes.tolist() == [4, 1]


def test_only_the_window_is_looked_at() -> None:
    """Whatever stands before it: a long text costs what a short one does."""
    for seed in range(60):
        case = extension_case(seed)
        if case.window < 10_000:
            older = torch.randint(3, (case.tree.batch_size, 50), generator=torch.Generator().manual_seed(seed))
            text = torch.zeros(case.tree.batch_size, case.text.shape[1] + 50, dtype=torch.int64)
            lengths = case.lengths.clone()
            for b, length in enumerate(case.lengths.tolist()):
                if length >= case.window:
                    text[b, : 50 + length] = torch.cat([older[b], case.text[b, :length]])
                    lengths[b] += 50
                else:
                    text[b, :length] = case.text[b, :length]
            longer = ops.extend_tree(*case._replace(text=text, lengths=lengths))
            assert_same_tree(longer, ops.extend_tree(*case), f"seed {seed}")


def test_trees_beyond_shared_memory_are_extended() -> None:
    """A star of 3,000 leaves, every other one in the text."""
    tokens = list(range(3001))
    text = [token for leaf in range(1, 3001, 2) for token in (leaf, 5000)] + [0]
    tree = batch([row([-1] + [0] * 3000, tokens)])
    arguments = (tree, torch.tensor([text]), torch.tensor([len(text)]), [-1.0], 1, 10_000)
    extended = ops.extend_tree(*arguments)
    assert extended.num_nodes.item() == 4501
    assert_same_tree(extended, reference.extend_tree(*arguments), "star")
