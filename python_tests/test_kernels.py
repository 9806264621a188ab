"""What holds for every op alike: rows that do not meet, results that do not depend on how threads run, bad values.

On a device nobody checks values: that would take a synchronisation. A kernel stays within its tensors and comes to an
end whatever it is given, and a row of nonsense changes nothing for its neighbours.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import backends
import pytest
import torch
from op_cases import CALLS, Arguments, batch_size, batches, call, is_batched, rows
from torch import Tensor
from tree_cases import assert_same

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.parametrize("name", CALLS)]


def assert_all_same(actual: list[Tensor], expected: list[Tensor], where: str) -> None:
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, f"{where}, result {i}")


def test_a_row_depends_on_nothing_but_itself(name: str, backend: Any, num_cases: int) -> None:
    """Checklist: batch permutation invariance, bit by bit; some rows twice, some not at all."""
    for seed, op, arguments in batches(name, num_cases // 4):
        size = batch_size(arguments)
        order = random.Random(seed).choices(range(size), k=size + 1)
        whole, chosen = call(backend, op, arguments), call(backend, op, rows(arguments, order))
        assert_all_same(chosen, [result[order] for result in whole], f"seed {seed}")


@pytest.mark.backends("cpu", "simt")
def test_inputs_are_read_only(name: str, backend: Any, num_cases: int) -> None:
    for seed, op, arguments in batches(name, num_cases // 12, at_least=1):
        before = rows(arguments, range(batch_size(arguments)))
        call(backend, op, arguments)
        for key, value in arguments.items():
            if torch.is_tensor(value):
                assert_same(value, before[key], f"seed {seed}, {key}")


@pytest.mark.backends("simt")
def test_the_op_is_its_kernel_and_one_launch(name: str, backend: Any) -> None:
    """The loop of the CPU does not take the kernel's place."""
    _, op, arguments = batches(name, 30)[0]
    backend.module.reset()
    call(backend, op, arguments)
    assert backend.module.counters()["launches"] == 1


@pytest.mark.backends("simt")
def test_neither_the_order_of_threads_nor_the_number_of_multiprocessors_changes_a_bit(
    name: str, backend: Any, num_cases: int
) -> None:
    """Checklist: ranks must agree bit-exactly. What the stand-in can see of a missing barrier shows here."""
    for seed, op, arguments in batches(name, num_cases // 12, at_least=1):
        results = []
        for order, multiprocessors in itertools.product(backends.ORDERS, backends.MULTIPROCESSORS):
            backend.arrange(order, seed, multiprocessors)
            results.append(call(backend.module, op, arguments))
        for one in results[1:]:
            assert_all_same(one, results[0], f"seed {seed}")


# ---- bad values on a device

INTEGERS = (0, -1, -2, 1, 63, 2**31, -(2**31), 2**62, -(2**62), 2**63 - 1, -(2**63))
FLOATS = (math.nan, math.inf, -math.inf, -0.0, -1.0, 5.0, 1e30, 1e-45)
Ranges = list[tuple[float, float] | None]  # of each result, both ends allowed; None: any value

# Whatever the input, an index that a kernel returns is an index. (`a`: the arguments.)
RANGES: dict[str, Callable[[Arguments], Ranges]] = {
    "extend_tree": lambda a: [None, (-1, extended(a) - 1), None, (1, extended(a)), None, None],
    "tree_depths": lambda a: [(0, a["parents"].shape[1] - 1)],
    "ancestor_bits": lambda a: [None],
    "tree_attention_mask": lambda a: [None],
    "expand_frontier": lambda a: [
        (0, a["logits"].shape[2] - 1 if a["token_ids"] is None else int(a["token_ids"][-1])), None,
        (0, a["scores"].shape[1] * a["branching"] - 1), None
    ],
    "prune_tree": lambda a: [None, (-1, a["max_nodes"] - 1), None, (1, a["max_nodes"]), None, None],
    "merge_trees": lambda a: [None, (-1, union(a) - 1), None, (1, union(a)), None, (-1, union(a) - 1)],
    "verify_tree": lambda a: [
        (-1, a["tokens"].shape[1] - 1), (0, a["tokens"].shape[1] - 1), (-1, a["logits"].shape[2] - 1), (0, 1)
    ],
    "compact_kv": lambda a: [None],
}  # fmt: skip


def union(arguments: Arguments) -> int:
    _, drafters, nodes = arguments["tokens"].shape
    full: int = drafters * (nodes - 1) + 1
    return full if arguments["max_nodes"] is None else min(full, arguments["max_nodes"])


def extended(arguments: Arguments) -> int:
    slots: int = arguments["tokens"].shape[1] * (1 + arguments["max_extension"])
    return slots


@pytest.mark.backends("simt", "cuda")
def test_a_row_of_nonsense_leaves_the_others_alone(name: str, backend: Any, num_cases: int) -> None:
    """Checklist: cyclic parents, parent >= child, missing parents, top_k < 0, tokens past V, NaN parameters."""
    for seed, op, arguments in batches(name, num_cases // 3):
        rng = random.Random(seed)
        size = batch_size(arguments)
        victim = rng.randrange(size)
        others = [b for b in range(size) if b != victim]
        clean = call(backend, op, arguments)
        dirty = call(backend, op, with_nonsense(arguments, victim, rng))
        where = f"seed {seed}, nonsense in row {victim}"
        assert_all_same([one[others] for one in dirty], [one[others] for one in clean], where)
        for i, (result, limits) in enumerate(zip(dirty, RANGES[op](arguments), strict=True)):
            if limits is not None:
                assert result.min() >= limits[0] and result.max() <= limits[1], f"{where}, result {i}"


def with_nonsense(arguments: Arguments, victim: int, rng: random.Random) -> Arguments:
    """The arguments with some of the row's values replaced, but for logits and cache, which may hold anything."""
    spoilt = {**arguments}
    for name, value in arguments.items():
        if is_batched(name, value) and name not in ("logits", "kv") and rng.random() < 0.7:
            spoilt[name] = value.clone()
            spoilt[name][victim] = nonsense(value[victim], rng)
    return spoilt


def nonsense(row: Tensor, rng: random.Random) -> Tensor:
    """Like the row: wild values throughout, or near misses, or the row with one wild value."""
    wild = FLOATS if row.is_floating_point() else INTEGERS
    kind = rng.randrange(3)
    if kind == 1 and not row.is_floating_point():
        near = [rng.randint(-2, max(row.numel(), 4) + 1) for _ in range(row.numel())]
        return torch.tensor(near).reshape(row.shape)
    values = [rng.choice(wild) for _ in range(row.numel())]
    new = torch.tensor(values, dtype=row.dtype).reshape(row.shape)
    if kind == 2:
        keep = torch.tensor([rng.random() < 0.9 for _ in values]).reshape(row.shape)
        new = torch.where(keep, row, new)
    return new
