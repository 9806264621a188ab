"""verify_tree: the target's own draws, walked down the tree.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from tree_cases import LOGIT_DTYPES, assert_same, batch, chain, random_row, row, star, strided, with_garbage_padding

from taps_ext import ops, reference
from taps_ext.reference import Filters
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")

PLAIN = Filters()


class Verification(NamedTuple):
    """The arguments of verify_tree."""

    logits: Tensor  # [B, N, V]
    tree: DraftTree
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor

    def rows(self, chosen: list[int]) -> Verification:
        """The chosen rows of the batch, in that order."""
        tree = self.tree
        fields = (field[chosen] for field in (tree.tokens, tree.parents, tree.scores, tree.num_nodes))
        return Verification(self.logits[chosen], DraftTree(*fields), *(field[chosen] for field in self[2:]))


def verification(
    logits: Tensor, tree: DraftTree, filters: Filters | list[Filters] = PLAIN, seed: int = 0, position: int = 0
) -> Verification:
    """Arguments for a batch: filters for all rows or one a row, seeds counting up from `seed`."""
    size = tree.batch_size
    each = filters if isinstance(filters, list) else [filters] * size
    return Verification(
        logits,
        tree,
        torch.tensor([f.temperature for f in each], dtype=torch.float32),
        torch.tensor([f.top_k for f in each], dtype=torch.int64),
        torch.tensor([f.top_p for f in each], dtype=torch.float32),
        torch.tensor([f.min_p for f in each], dtype=torch.float32),
        seed + torch.arange(size),
        torch.full((size,), position),
    )


def roots(size: int) -> DraftTree:
    """Trees without a draft: the bonus token is the draw at the root."""
    return batch([row([-1])] * size)


def draws(logits: Tensor, filters: Filters | list[Filters] = PLAIN, seed: int = 0, position: int = 0) -> list[int]:
    """One draw for each row of logits [B, V]."""
    arguments = verification(logits[:, None], roots(len(logits)), filters, seed, position)
    return ops.verify_tree(*arguments).bonus_tokens.tolist()


# ---- generated cases


def random_filters(rng: random.Random, vocabulary: int) -> Filters:
    return Filters(
        rng.choice([0.0, 1e-6, 0.3, 0.7, 1.0, 1.0, 1.5, 30.0]),
        rng.choice([0, 0, 0, 1, 2, rng.randint(1, vocabulary), 50, vocabulary + 1, 2**30]),
        _float32(rng.choice([1.0, 1.0, 0.95, 0.8, rng.random(), 1e-9, 0.0])),
        _float32(rng.choice([0.0, 0.0, 0.05, rng.random(), 1.0])),
    )


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def random_case(seed: int) -> Verification:
    """A ragged batch whose trees carry, along one path, mostly the tokens that the target will draw."""
    rng = random.Random(seed)
    low, high = rng.choices([(2, 2), (3, 64), (65, 2_000), (2_001, 33_000)], [5, 60, 27, 8])[0]
    vocabulary = 262_144 if seed % 50 == 7 else rng.randint(low, high)
    capacity = rng.choice([1, 9, 30, 70]) if vocabulary <= 2_000 else rng.randint(1, 8)
    capacity = 1024 if seed % 50 == 8 and vocabulary <= 200 else capacity
    size = rng.randint(1, 4) if vocabulary <= 2_000 else rng.randint(1, 2)
    trees = [random_row(rng, rng.randint(1, capacity), vocabulary) for _ in range(size)]
    filters = [random_filters(rng, vocabulary) for _ in range(size)]
    logits = _random_logits(rng, size, capacity, vocabulary)
    start = rng.choice([0, 5, 2**31 - 3, 2**32 - 2, 2**40])
    case = verification(logits, batch(trees, capacity), filters, rng.randint(-(2**63), 2**62), start)
    for b in range(size):
        _plant_draws(rng, case, b)
    tree = with_garbage_padding(case.tree, rng) if rng.random() < 0.5 else case.tree
    return case._replace(tree=tree, logits=strided(logits) if seed % 5 == 0 else logits)


def _random_logits(rng: random.Random, size: int, capacity: int, vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(size, capacity, vocabulary, generator=generator) * rng.choice([0.1, 1.0, 4.0, 20.0])
    if rng.random() < 0.2:
        logits = logits.round()  # ties
    if rng.random() < 0.2 and vocabulary > 2:
        logits[..., -rng.randint(1, vocabulary // 2) :] = -math.inf  # a padded vocabulary
    if rng.random() < 0.1:
        logits[rng.randrange(size), rng.randrange(capacity)] = rng.choice([math.nan, math.inf, -math.inf])
    if rng.random() < 0.1:
        logits[rng.randrange(size), rng.randrange(capacity), rng.randrange(vocabulary)] = math.nan
    return logits.to(rng.choice(LOGIT_DTYPES))


def _plant_draws(rng: random.Random, case: Verification, b: int) -> None:
    """Walk down a random path and give each child on it the drawn token, as a good drafter would."""
    parents, tokens = case.tree.parents[b].tolist(), case.tree.tokens[b]
    filters = Filters(float(case.temperature[b]), int(case.top_k[b]), float(case.top_p[b]), float(case.min_p[b]))
    node, position = 0, int(case.positions[b])
    while rng.random() < 0.95 and position - int(case.positions[b]) < 12:
        children = [i for i in range(node + 1, int(case.tree.num_nodes[b])) if parents[i] == node]
        token = reference.draw_token(case.logits[b, node], filters, int(case.seeds[b]), position)
        if not children or token is None:
            return
        child = next((i for i in children if tokens[i] == token), rng.choice(children))
        tokens[child] = token
        node, position = child, position + 1


def test_verification_equals_the_reference(num_cases: int) -> None:
    """Checklist: NaN, Inf and all -Inf rows; top_k 0, > V, 2^30; top_p 0, 1, tiny; T = 0, 1e-6; N = 1, N = 1024, ragged
    N with 0-draft rows; V not a multiple of 8 and unaligned rows; garbage padding; seeds and positions past 32 bits."""
    undecided, accepted, has_gaps = 0, [], []
    for seed in range(num_cases):
        case = random_case(seed)
        actual, expected = ops.verify_tree(*case), reference.verify_tree(*case)
        margins = reference.verification_margin(*case) if not _all_equal(actual, expected) else None
        for b in range(case.tree.batch_size):
            accepted.append(int(expected.num_accepted[b]))
            has_gaps.append(int(expected.path[b].max()) > accepted[-1])
            if margins is not None and margins[b] < 1e-5:
                undecided += 1
                continue
            for field in actual._fields:
                where = f"seed {seed}, row {b}, {field}, {list(case.logits.shape)} {case.logits.dtype}"
                assert_same(getattr(actual, field)[b], getattr(expected, field)[b], where)
    assert undecided <= 0.005 * num_cases
    assert sum(count >= 2 for count in accepted) > 0.2 * len(accepted), "hollow: the trees hold too few of the draws"
    assert sum(has_gaps) > 0.2 * len(has_gaps), "hollow: paths are contiguous"


def _all_equal(actual: ops.VerifiedPaths, expected: ops.VerifiedPaths) -> bool:
    return all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.backends("cpu")
def test_cases_without_a_margin_are_rare(num_cases: int) -> None:
    """The comparison above skips nothing to speak of."""
    margins = [reference.verification_margin(*random_case(seed)).min() for seed in range(0, num_cases, 6)]
    assert sum(float(margin) < 1e-5 for margin in margins) <= max(1, 0.005 * len(margins))


def test_the_path_is_a_root_path_and_its_tokens_are_the_draws(num_cases: int) -> None:
    """Each emitted token is what a tree without any draft draws from that node's row at that position."""
    for seed in range(num_cases // 3):
        case = random_case(seed)
        tree, result = case.tree, ops.verify_tree(*case)
        for b in range(tree.batch_size):
            length = int(result.num_accepted[b]) + 1
            path = result.path[b, :length].tolist()
            assert path[0] == 0 and (result.path[b, length:] == -1).all(), f"seed {seed}"
            assert [int(tree.parents[b, node]) for node in path[1:]] == path[:-1], f"seed {seed}"
            emitted = [int(tree.tokens[b, node]) for node in path[1:]] + [int(result.bonus_tokens[b])]
            assert emitted == _lone_draws(case, b, path), f"seed {seed}"
            assert emitted[-1] not in _children_tokens(tree, b, path[-1]), f"seed {seed}: stopped too early"


def _lone_draws(case: Verification, b: int, path: list[int]) -> list[int]:
    size = len(path)
    lone = case.rows([b] * size)
    logits = case.logits[b, path][:, None]
    steps = torch.arange(size)
    arguments = lone._replace(logits=logits, tree=roots(size), positions=lone.positions + steps)
    return ops.verify_tree(*arguments).bonus_tokens.tolist()


def _children_tokens(tree: DraftTree, b: int, node: int) -> list[int]:
    count = int(tree.num_nodes[b])
    return [int(tree.tokens[b, i]) for i in range(node + 1, count) if tree.parents[b, i] == node]


def test_rows_do_not_depend_on_their_neighbours(num_cases: int) -> None:
    """Checklist: batch permutation invariance."""
    for seed in range(num_cases // 3):
        case = random_case(seed)
        order = random.Random(seed).sample(range(case.tree.batch_size), case.tree.batch_size)
        whole, permuted = ops.verify_tree(*case), ops.verify_tree(*case.rows(order))
        for field in whole._fields:
            assert_same(getattr(permuted, field), getattr(whole, field)[order], f"seed {seed}, {field}")


def test_rows_that_the_walk_does_not_visit_are_not_read(num_cases: int) -> None:
    """Checklist: NaN rows never touch a visited row, nor another request."""
    for seed in range(num_cases // 3):
        case = random_case(seed)
        result = ops.verify_tree(*case)
        logits = torch.full_like(case.logits, math.nan)
        for b in range(case.tree.batch_size):
            visited = result.path[b][result.path[b] >= 0]
            logits[b, visited] = case.logits[b, visited]
        for actual, expected in zip(ops.verify_tree(*case._replace(logits=logits)), result, strict=True):
            assert_same(actual, expected, f"seed {seed}")


def test_a_row_of_nan_beside_changes_nothing() -> None:
    """Checklist: NaN rows (vLLM #53029, SGLang #32396)."""
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(0))
    case = verification(logits, batch([row([-1, 0, 0, 1])] * 3))
    clean = ops.verify_tree(*case)
    logits[1] = math.nan
    dirty = ops.verify_tree(*case)
    assert dirty.status.tolist() == [0, 1, 0]
    for actual, expected in zip(dirty, clean, strict=True):
        assert torch.equal(actual[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", ["nan", "one nan", "all -inf", "inf"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_invalid_row_stops_the_walk_and_keeps_what_was_accepted(depth: int, bad: str, temperature: float) -> None:
    """Checklist: NaN, +Inf, all -Inf rows: flag, never emit an id of V or more."""
    logits = torch.full((1, 4, 20), -50.0)
    for node in range(4):
        logits[0, node, node + 1] = 50.0
    fill = {"nan": math.nan, "all -inf": -math.inf}
    if bad in fill:
        logits[0, depth] = fill[bad]
    else:
        logits[0, depth, 7] = math.nan if bad == "one nan" else math.inf
    result = ops.verify_tree(*verification(logits, chain(4), Filters(temperature)))
    assert result.status.tolist() == [ops.INVALID_LOGITS]
    assert result.bonus_tokens.tolist() == [-1] and result.num_accepted.tolist() == [depth]
    assert result.path.tolist() == [[*range(depth + 1), *[-1] * (3 - depth)]]


def test_the_text_does_not_depend_on_the_tree(num_cases: int) -> None:
    """Whatever the tree, the emitted tokens begin the text that the target writes alone."""
    vocabulary, length = 6, 8
    for seed in range(num_cases // 6):
        rng = random.Random(seed)
        table = torch.randn(vocabulary**2, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2
        filters = random_filters(rng, vocabulary)
        plain = _plain_text(table, filters, seed, length)
        for _ in range(3):
            assert _speculative_text(table, filters, seed, length, rng) == plain, f"seed {seed}"


def _plain_text(table: Tensor, filters: Filters, seed: int, length: int) -> list[int]:
    """A target whose logits follow from the last two tokens."""
    text = [0, 0]
    while len(text) < length + 2:
        logits = table[text[-2] * table.shape[1] + text[-1]][None]
        text += draws(logits, filters, seed, position=len(text))
    return text[2:]


def _speculative_text(table: Tensor, filters: Filters, seed: int, length: int, rng: random.Random) -> list[int]:
    vocabulary = table.shape[1]
    text = [0, 0]
    while len(text) < length + 2:
        tree = batch([random_row(rng, rng.randint(1, 40), vocabulary, root=text[-1])])
        before = [text[-2]]  # the token before each node's own
        for parent in tree.parents[0, 1:].tolist():
            before.append(int(tree.tokens[0, parent]))
        logits = table[torch.tensor(before) * vocabulary + tree.tokens[0]][None]
        result = ops.verify_tree(*verification(logits, tree, filters, seed, position=len(text)))
        accepted = result.path[0, 1 : int(result.num_accepted[0]) + 1]
        text += tree.tokens[0, accepted].tolist() + result.bonus_tokens.tolist()
    return text[2 : length + 2]


@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit() -> None:
    """Checklist: ranks (here: thread counts) must agree bit-exactly."""
    for seed in range(10):
        case = random_case(seed)
        one = ops.verify_tree(*case)
        torch.set_num_threads(2)
        for actual, expected in zip(ops.verify_tree(*case), one, strict=True):
            assert_same(actual, expected, f"seed {seed}")
        torch.set_num_threads(1)


@pytest.mark.backends("cpu", "cuda")  # the stand-in runs one call at a time
def test_calls_from_several_python_threads_do_not_meet() -> None:
    """The ops keep no state and release the GIL."""
    cases = [random_case(seed) for seed in range(24)]
    alone = [ops.verify_tree(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: [ops.verify_tree(*case) for case in cases], range(4)):
            assert all(_all_equal(*pair) for pair in zip(together, alone, strict=True))


# ---- trees


def test_a_chain_of_1024_is_walked_to_its_end() -> None:
    """Checklist: depth = N - 1 chain at N = 1024."""
    tree = chain(1024)
    logits = torch.zeros(1, 1024, 1025)
    logits[0, torch.arange(1024), torch.arange(1024) + 1] = 100.0
    result = ops.verify_tree(*verification(logits, tree))
    assert result.num_accepted.tolist() == [1023] and result.bonus_tokens.tolist() == [1024]
    assert result.path[0].tolist() == list(range(1024))


def test_the_last_leaf_of_a_star_of_1024_is_found() -> None:
    """Checklist: star tree."""
    logits = torch.zeros(1, 1024, 1030)
    logits[0, 0, 1023], logits[0, 1023, 1029] = 100.0, 100.0
    result = ops.verify_tree(*verification(logits, star(1024)))
    assert result.path[0, :3].tolist() == [0, 1023, -1] and result.bonus_tokens.tolist() == [1029]


def test_padding_is_never_descended_into() -> None:
    """Checklist: ragged N, dummy slots: a padding slot that carries the drawn token is not there."""
    tree = batch([row([-1])], capacity=3)
    tree = replace(tree, tokens=torch.tensor([[4, 5, 5]]))
    logits = torch.zeros(1, 3, 8)
    logits[0, :, 5] = 100.0
    result = ops.verify_tree(*verification(logits, tree))
    assert result.num_accepted.tolist() == [0] and result.bonus_tokens.tolist() == [5]


def test_duplicate_siblings_change_no_text() -> None:
    """Checklist: duplicate siblings (SGLang's rule counts their probability twice)."""
    logits = torch.randn(500, 3, 6, generator=torch.Generator().manual_seed(0))
    logits[:, 2] = logits[:, 1]
    twice = ops.verify_tree(*verification(logits, batch([row([-1, 0, 0], tokens=[0, 2, 2])] * 500)))
    once = ops.verify_tree(*verification(logits[:, :2], batch([row([-1, 0], tokens=[0, 2])] * 500)))
    assert torch.equal(twice.num_accepted, once.num_accepted) and torch.equal(twice.bonus_tokens, once.bonus_tokens)


@pytest.mark.backends("cpu", "simt")  # virtual memory: to copy it would fill it
def test_offsets_beyond_32_bits_work() -> None:
    """Checklist: more than 2^31 elements (TRT-LLM's `int row * V`). The logits are virtual: three rows are touched."""
    nodes, vocabulary = 8_300, 262_144
    try:
        logits = torch.empty(1, nodes, vocabulary, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no room for virtual logits of 4.4 GB: {error}")
    assert logits.numel() > 2**31
    tree = star(nodes)
    logits[0, 0], logits[0, -1] = 0.0, 0.0
    logits[0, 0, nodes - 1], logits[0, -1, vocabulary - 1] = 100.0, 100.0
    result = ops.verify_tree(*verification(logits, tree))
    assert result.path[0, :3].tolist() == [0, nodes - 1, -1] and result.bonus_tokens.tolist() == [vocabulary - 1]


def test_an_empty_batch_gives_empty_results() -> None:
    empty = torch.empty(0, 3, dtype=torch.int64)
    tree = DraftTree(empty, empty, empty.float(), torch.empty(0, dtype=torch.int64))
    result = ops.verify_tree(*verification(torch.empty(0, 3, 9), tree))
    assert result.path.shape == (0, 3) and result.status.shape == (0,)
