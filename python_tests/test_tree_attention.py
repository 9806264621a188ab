"""tree_depths, ancestor_bits, tree_attention_mask: one relation, written three ways.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor
from tree_cases import assert_same, batch, chain, random_trees, row, star

from taps_ext import ops, reference
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")

MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


def ancestors_by_walking(tree: DraftTree, b: int, node: int) -> list[int]:
    """The path from the root to a node; padding hangs off the root."""
    if node >= int(tree.num_nodes[b]):
        return [0, node]
    path = [node]
    while path[-1]:
        path.append(int(tree.parents[b, path[-1]]))
    return path[::-1]


def some_nodes(tree: DraftTree, rng: random.Random, count: int = 8) -> list[tuple[int, int]]:
    """A few (row, slot) pairs, padding included."""
    return [(rng.randrange(tree.batch_size), rng.randrange(tree.capacity)) for _ in range(count)]


def bits_as_bools(bits: Tensor, capacity: int) -> Tensor:
    words = bits[..., torch.arange(capacity) // 64]
    return (words >> (torch.arange(capacity) % 64) & 1).bool()


def random_prefix(tree: DraftTree, rng: random.Random) -> tuple[Tensor, int]:
    kv_length = rng.choice([0, 1, 7, 64, 200])
    return torch.tensor([rng.randint(0, kv_length) for _ in range(tree.batch_size)]), kv_length


def test_depths_and_bits_equal_the_reference(num_cases: int) -> None:
    """Checklist: N = 1, N = 1024, depth = N - 1 chain, star tree, ragged N in a batch, garbage in padding slots."""
    for name, tree in random_trees(num_cases):
        expected = reference.tree_depths(tree.parents, tree.num_nodes)
        assert_same(ops.tree_depths(tree.parents, tree.num_nodes), expected, name)
        bits = reference.ancestor_bits(tree.parents, tree.num_nodes)
        assert_same(ops.ancestor_bits(tree.parents, tree.num_nodes), bits, name)


def test_masks_equal_the_reference(num_cases: int) -> None:
    """Checklist: prefix length 0, dummy rows, nodes past one 64-bit word (`1 << j` in an int breaks at 32)."""
    rng = random.Random(0)
    for i, (name, tree) in enumerate(random_trees(num_cases)):
        prefix_lengths, kv_length = random_prefix(tree, rng)
        arguments = (tree.parents, tree.num_nodes, prefix_lengths, kv_length, MASK_DTYPES[i % 4])
        assert_same(ops.tree_attention_mask(*arguments), reference.tree_attention_mask(*arguments), name)


def test_the_mask_is_the_ancestor_relation(num_cases: int) -> None:
    rng = random.Random(1)
    for name, tree in random_trees(num_cases // 3):
        prefix_lengths, kv_length = random_prefix(tree, rng)
        mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, prefix_lengths, kv_length)
        for b, node in some_nodes(tree, rng):
            seen = mask[b, 0, node].nonzero().flatten().tolist()
            prefix = list(range(int(prefix_lengths[b])))
            assert seen == prefix + [kv_length + a for a in ancestors_by_walking(tree, b, node)], name


def test_bits_equal_the_mask(num_cases: int) -> None:
    for name, tree in random_trees(num_cases // 3):
        no_prefix = torch.zeros(tree.batch_size, dtype=torch.int64)
        mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, no_prefix, 0)[:, 0]
        bits = ops.ancestor_bits(tree.parents, tree.num_nodes)
        assert torch.equal(bits_as_bools(bits, tree.capacity), mask), name
        spare = 64 * bits.shape[-1] - tree.capacity
        assert not spare or not (bits[..., -1] >> (64 - spare) & ((1 << spare) - 1)).any(), f"{name}: bits past N"


def test_depth_is_the_length_of_the_path(num_cases: int) -> None:
    rng = random.Random(2)
    for name, tree in random_trees(num_cases // 3):
        depths = ops.tree_depths(tree.parents, tree.num_nodes)
        for b, node in some_nodes(tree, rng):
            assert depths[b, node] == len(ancestors_by_walking(tree, b, node)) - 1, name


def test_additive_masks_are_zero_where_the_bool_mask_is_true_and_leave_no_row_empty(num_cases: int) -> None:
    """Checklist: an attention row of -inf alone would be NaN, in padding slots too."""
    for name, tree in random_trees(num_cases // 12):
        no_prefix = torch.zeros(tree.batch_size, dtype=torch.int64)
        visible = ops.tree_attention_mask(tree.parents, tree.num_nodes, no_prefix, 3)
        assert visible.any(-1).all(), name
        for dtype in MASK_DTYPES[1:]:
            mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, no_prefix, 3, dtype)
            assert mask.dtype == dtype and (mask[visible] == 0).all() and (mask[~visible] == -torch.inf).all(), name


def test_the_parents_of_a_chain_of_1024_are_all_seen_by_its_last_node() -> None:
    """Checklist: depth = N - 1 chain at N = 1024."""
    tree = chain(1024)
    assert ops.tree_depths(tree.parents, tree.num_nodes)[0].tolist() == list(range(1024))
    assert (ops.ancestor_bits(tree.parents, tree.num_nodes)[0, -1] == -1).all()


def test_the_leaves_of_a_star_see_the_root_and_themselves() -> None:
    """Checklist: star tree."""
    tree = star(1024)
    bits = bits_as_bools(ops.ancestor_bits(tree.parents, tree.num_nodes), 1024)[0]
    assert torch.equal(bits.sum(-1), torch.tensor([1] + [2] * 1023)) and bits[:, 0].all()


def test_trees_of_4096_nodes_work() -> None:
    """Checklist: N beyond what shared memory or a block of threads would hold."""
    parents = torch.tensor([[-1, *((i - 1) // 2 for i in range(1, 4096))]])
    num_nodes = torch.tensor([4096])
    depths = ops.tree_depths(parents, num_nodes)
    assert depths[0].tolist() == [(i + 1).bit_length() - 1 for i in range(4096)]
    assert torch.equal(bits_as_bools(ops.ancestor_bits(parents, num_nodes), 4096).sum(-1) - 1, depths)


@pytest.mark.long
@pytest.mark.backends("cpu")
def test_masks_of_more_than_2_to_the_31_elements_are_right_at_their_end() -> None:
    """Checklist: more than 2^31 element offsets (SGLang's `int` offset of the full mask)."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 5 * 2**30:
        pytest.skip("the mask takes 2.2 GB of memory")
    tree, kv_length = chain(1024), 2**21 + 7
    mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.tensor([kv_length - 5]), kv_length)
    assert mask.numel() > 2**31
    assert mask[0, 0, -1, -1030:].tolist() == [True] + [False] * 5 + [True] * 1024
    assert mask[0, 0, 1000, : kv_length - 5].all()


def test_an_empty_batch_gives_empty_results() -> None:
    parents, num_nodes = torch.empty(0, 5, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert ops.tree_depths(parents, num_nodes).shape == (0, 5)
    assert ops.ancestor_bits(parents, num_nodes).shape == (0, 5, 1)
    assert ops.tree_attention_mask(parents, num_nodes, num_nodes, 2).shape == (0, 1, 5, 7)


def test_a_second_mask_does_not_remember_the_first() -> None:
    """Checklist: mask switched between calls (stale buffers)."""
    wide, deep = star(64), chain(64)
    no_prefix = torch.zeros(1, dtype=torch.int64)
    for tree in (deep, wide, deep):
        arguments = (tree.parents, tree.num_nodes, no_prefix, 5)
        assert_same(
            ops.tree_attention_mask(*arguments), reference.tree_attention_mask(*arguments), "after another tree"
        )


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_rows_do_not_see_each_others_prefix(dtype: torch.dtype) -> None:
    """Checklist: mixed prefix lengths, 0 among them."""
    tree = batch([row([-1, 0, 1])] * 3)
    mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, torch.tensor([0, 2, 4]), 4, dtype)
    visible = mask[:, 0, :, :4] if dtype == torch.bool else mask[:, 0, :, :4] == 0
    assert visible.sum(-1).tolist() == [[0] * 3, [2] * 3, [4] * 3]
