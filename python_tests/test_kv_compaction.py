"""compact_kv: the accepted path moves behind the prefix, everything else stays.

Bug checklist items are named in the docstrings ("checklist: ...").
"""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from tree_cases import assert_same

from taps_ext import ops, reference

pytestmark = pytest.mark.usefixtures("backend")

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8)


class Compaction(NamedTuple):
    kv: Tensor  # [2 * layers, B, heads, capacity, head_dim]
    path: Tensor  # [B, N]
    num_accepted: Tensor  # [B]
    prefix_lengths: Tensor  # [B]
    kv_length: int


def random_compaction(seed: int) -> Compaction:
    """Any path that a tree can give: ascending nodes from the root, gaps included; some rows that move nothing."""
    rng = random.Random(seed)
    batch_size, num_nodes, kv_length = rng.randint(1, 4), rng.randint(1, 40), rng.choice([0, 1, 16, 17, 60])
    paths, accepted = [], []
    for _ in range(batch_size):
        depth = rng.choice([-1, 0, rng.randint(0, num_nodes - 1), num_nodes - 1])
        nodes = [0, *sorted(rng.sample(range(1, num_nodes), depth))] if depth >= 0 else []
        paths.append(nodes + [-1] * (num_nodes - len(nodes)))
        accepted.append(depth)
    capacity = kv_length + num_nodes + rng.choice([0, 5])
    shape = (2 * rng.randint(1, 3), batch_size, rng.randint(1, 3), capacity, rng.choice([1, 3, 8, 64]))
    kv = torch.randint(0, 250, shape, generator=torch.Generator().manual_seed(seed)).to(rng.choice(KV_DTYPES))
    prefix_lengths = torch.tensor([rng.randint(0, kv_length) for _ in range(batch_size)])
    return Compaction(kv, torch.tensor(paths), torch.tensor(accepted), prefix_lengths, kv_length)


def test_compaction_equals_the_reference(num_cases: int) -> None:
    """Checklist: non-contiguous accepted paths, prefix length 0 and at block boundaries (16, 17), dummy rows."""
    for seed in range(num_cases):
        case = random_compaction(seed)
        expected = case.kv.clone()
        reference.compact_kv(expected, *case[1:])
        ops.compact_kv(*case)
        assert_same(case.kv, expected, f"seed {seed}, {list(case.kv.shape)} {case.kv.dtype}")


def test_the_path_moves_and_nothing_else_changes(num_cases: int) -> None:
    for seed in range(num_cases // 3):
        case = random_compaction(seed)
        before = case.kv.clone()
        ops.compact_kv(*case)
        for b in range(case.path.shape[0]):
            start, count = int(case.prefix_lengths[b]), int(case.num_accepted[b]) + 1
            sources = case.kv_length + case.path[b, :count]
            assert torch.equal(case.kv[:, b, :, start : start + count], before[:, b, :, sources]), f"seed {seed}"
            assert torch.equal(case.kv[:, b, :, :start], before[:, b, :, :start]), f"seed {seed}"
            assert torch.equal(case.kv[:, b, :, start + count :], before[:, b, :, start + count :]), f"seed {seed}"


def test_a_path_may_overlap_its_destination() -> None:
    """Checklist: in-place moves; each source is read before anything lands on it."""
    kv = torch.arange(10.0).reshape(1, 1, 1, 10, 1)
    ops.compact_kv(kv, torch.tensor([[0, 1, 3, 4, 6, -1, -1]]), torch.tensor([4]), torch.tensor([2]), 3)
    assert kv.flatten().tolist() == [0, 1, 3, 4, 6, 7, 9, 7, 8, 9]


def test_a_row_that_is_finished_moves_nothing() -> None:
    """Checklist: dummy slots."""
    kv = torch.arange(8.0).reshape(1, 1, 1, 8, 1)
    ops.compact_kv(kv, torch.tensor([[-1, -1]]), torch.tensor([-1]), torch.tensor([0]), 5)
    assert kv.flatten().tolist() == list(range(8))


@pytest.mark.backends("cpu")
def test_threads_do_not_change_a_bit() -> None:
    torch.set_num_threads(2)
    for seed in range(10):
        case = random_compaction(seed)
        expected = case.kv.clone()
        reference.compact_kv(expected, *case[1:])
        ops.compact_kv(*case)
        assert_same(case.kv, expected, f"seed {seed}")


@pytest.mark.backends("cpu", "simt")  # virtual memory: to copy it would fill it
def test_offsets_beyond_32_bits_work() -> None:
    """Checklist: more than 2^31 elements. The buffer is virtual: only the pages that move are ever touched."""
    try:
        kv = torch.empty(2, 2, 1, 2**23, 66, dtype=torch.int8)
    except RuntimeError as error:
        pytest.skip(f"no room for a virtual buffer of 2.2 GB: {error}")
    assert kv.numel() > 2**31
    kv_length = 2**23 - 10
    kv[1, 1, 0, kv_length + 3] = 42
    ops.compact_kv(
        kv, torch.tensor([[-1] * 4, [0, 3, -1, -1]]), torch.tensor([-1, 1]), torch.tensor([0, kv_length - 7]), kv_length
    )
    assert (kv[1, 1, 0, kv_length - 6] == 42).all()


def test_an_empty_batch_is_no_work() -> None:
    none = torch.empty(0, dtype=torch.int64)
    ops.compact_kv(torch.empty(2, 0, 1, 4, 8), torch.empty(0, 3, dtype=torch.int64), none, none, 1)
