"""What only a GPU can show: graphs, streams, devices, synchronisation, and offsets past 32 bits in its memory.

Here tensors live on the device and the native module is called as it is. That the kernels compute the right numbers
is in the tests of the ops, which run on the GPU too (`--backend cuda`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import moved
from op_cases import CALLS, Arguments, batch_size, batches, call, rows
from torch import Tensor
from tree_cases import assert_same, chain, star

from taps_ext import native, ops
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.gpu

EVERY_OP = pytest.mark.parametrize("name", CALLS)
SLEEP_CYCLES = 200_000_000  # of the GPU: about a tenth of a second, in which the host can do much


def on_device(arguments: Arguments, device: str = "cuda") -> Arguments:
    return {name: moved(value, torch.device(device)) for name, value in arguments.items()}


def device_batches(name: str, num_cases: int) -> list[tuple[int, str, Arguments]]:
    return [(seed, op, on_device(arguments)) for seed, op, arguments in batches(name, num_cases)]


def assert_all_same(actual: list[Tensor], expected: list[Tensor], where: str) -> None:
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, f"{where}, result {i}")


def write_into(arguments: Arguments, values: Arguments) -> None:
    for name, value in values.items():
        if torch.is_tensor(value):
            arguments[name].copy_(value)


def spoil(results: list[Tensor]) -> None:
    """What a replay forgets to write shall show."""
    for result in results:
        result.fill_(True if result.dtype == torch.bool else 77)


def captured(op: str, arguments: Arguments) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(native.load(), op, arguments)  # loads the kernel, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(native.load(), op, arguments)
    return graph, results


@EVERY_OP
def test_a_captured_op_follows_its_inputs(name: str, num_cases: int) -> None:
    """Checklist: graph replay without the host, stale buffers. (A capture also refuses to synchronise.)"""
    for seed, op, arguments in device_batches(name, num_cases // 20):
        graph, results = captured(op, arguments)
        rng = random.Random(seed)
        for _ in range(4):
            order = rng.choices(range(batch_size(arguments)), k=batch_size(arguments))
            others = rows(arguments, order)
            expected = call(native.load(), op, others)
            write_into(arguments, others)
            spoil(results)
            graph.replay()
            assert_all_same(results, expected, f"seed {seed}, rows {order}")


@EVERY_OP
def test_graphs_replayed_on_two_streams_at_once_do_not_meet(name: str, num_cases: int) -> None:
    for seed, op, arguments in device_batches(name, num_cases // 30):
        other = rows(arguments, range(batch_size(arguments))[::-1])
        expected = [call(native.load(), op, one) for one in (arguments, other)]
        graphs = [captured(op, one) for one in (arguments, other)]
        streams = [torch.cuda.Stream() for _ in graphs]
        torch.cuda.synchronize()
        for _ in range(20):
            for stream, (graph, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, results), right in zip(graphs, expected, strict=True):
            assert_all_same(results, right, f"seed {seed}")


@EVERY_OP
def test_two_streams_at_once_do_not_meet(name: str, num_cases: int) -> None:
    for seed, op, arguments in device_batches(name, num_cases // 30):
        other = rows(arguments, range(batch_size(arguments))[::-1])
        expected = [call(native.load(), op, one) for one in (arguments, other)]
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        found: list[list[list[Tensor]]] = [[], []]
        for _ in range(10):
            for one, stream, results in zip((arguments, other), streams, found, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call(native.load(), op, one))
        torch.cuda.synchronize()
        for results, right in zip(found, expected, strict=True):
            for run in results:
                assert_all_same(run, right, f"seed {seed}")


@EVERY_OP
def test_an_op_runs_on_the_current_stream_and_the_host_does_not_wait(name: str) -> None:
    """The stream sleeps, then its inputs change, then the op: on another stream it would see the old ones."""
    for seed, op, arguments in device_batches(name, 30)[:3]:
        before, others = (rows(arguments, range(batch_size(arguments))[::step]) for step in (1, -1))
        expected = call(native.load(), op, others)
        torch.cuda.synchronize()
        stream, slept = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1)
            write_into(arguments, others)  # once before: loading a kernel or taking new memory does wait
            call(native.load(), op, arguments)
            write_into(arguments, before)
            stream.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES)
            slept.record()
            write_into(arguments, others)
            results = call(native.load(), op, arguments)
            assert not slept.query(), "the host has waited for the device"
        stream.synchronize()
        assert_all_same(results, expected, f"seed {seed}")


@EVERY_OP
def test_torch_sees_no_synchronisation(name: str) -> None:
    cases = device_batches(name, 30)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _, op, arguments in cases:
            call(native.load(), op, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_OP
def test_a_hundred_runs_are_one(name: str) -> None:
    """No float atomics, no order that the scheduler decides."""
    for seed, op, arguments in device_batches(name, 40)[:4]:
        first = call(native.load(), op, arguments)
        for _ in range(99):
            assert_all_same(call(native.load(), op, arguments), first, f"seed {seed}")


@EVERY_OP
def test_host_and_device_agree(name: str, num_cases: int) -> None:
    """The CPU's own numbers, but for expand_frontier, whose sums have another order there."""
    for seed, op, arguments in batches(name, num_cases // 4, at_least=1):
        if op != "expand_frontier":
            results = call(native.load(), op, on_device(arguments))
            assert_all_same([one.cpu() for one in results], call(native.load(), op, arguments), f"seed {seed}")


@EVERY_OP
def test_any_device_index_will_do(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    for seed, op, arguments in batches(name, 20):
        results = call(native.load(), op, on_device(arguments, "cuda:1"))
        assert torch.cuda.current_device() == 0
        assert all(one.device.index == 1 for one in results)
        expected = call(native.load(), op, on_device(arguments))
        assert_all_same([one.cpu() for one in results], [one.cpu() for one in expected], f"seed {seed}")


@EVERY_OP
def test_the_dispatcher_knows_the_op_on_the_device(name: str) -> None:
    for seed, op, arguments in device_batches(name, 20)[:2]:
        native.load()
        expected = call(native.load(), op, arguments)
        assert_all_same(call(torch.ops.taps_ext, op, arguments), expected, f"seed {seed}")


def test_tensors_of_host_and_device_do_not_mix() -> None:
    tree = star(4)
    with pytest.raises(ValueError, match="num_nodes must be on cuda:0, like parents, got cpu"):
        ops.tree_depths(tree.parents.cuda(), tree.num_nodes)


def test_a_tree_on_the_device_validates() -> None:
    """The way to check what the kernels do not."""
    tree = DraftTree(*(field.cuda() for field in (star(4).tokens, star(4).parents, star(4).scores, star(4).num_nodes)))
    tree.validate()


# ---- more than 2^31 elements


def needs(num_bytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < num_bytes:
        pytest.skip(f"needs {num_bytes >> 30} GiB of GPU memory")


def columns(size: int, *values: float) -> list[Tensor]:
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    return [torch.full((size,), v, dtype=d, device="cuda") for v, d in zip(values, dtypes, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_verification_reaches_beyond_32_bits(temperature: float) -> None:
    """Checklist: more than 2^31 element offsets (`int row * V`)."""
    needs(6 << 30)
    nodes, vocabulary = 8_300, 262_144
    logits = torch.empty(1, nodes, vocabulary, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[0, 0], logits[0, -1] = 0.0, 0.0
    logits[0, 0, nodes - 1], logits[0, -1, vocabulary - 1] = 100.0, 100.0
    tree = star(nodes)
    tree = DraftTree(*(field.cuda() for field in (tree.tokens, tree.parents, tree.scores, tree.num_nodes)))
    result = ops.verify_tree(logits, tree, *columns(1, temperature, 0, 1.0, 0.0, 0, 0))
    assert result.path[0, :3].tolist() == [0, nodes - 1, -1]
    assert result.bonus_tokens.tolist() == [vocabulary - 1]


def test_many_rows_of_verification_reach_beyond_32_bits() -> None:
    """A batch of 264 requests of 64 nodes: the last request lies past 2^31 elements."""
    needs(6 << 30)
    size, nodes, vocabulary = 264, 64, 128_256
    logits = torch.zeros(size, nodes, vocabulary, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[:, torch.arange(nodes), torch.arange(nodes) + 1] = 100.0
    tree = chain(nodes)
    fields = (field.cuda().expand(size, *field.shape[1:]) for field in (tree.tokens, tree.parents, tree.scores))
    batch = DraftTree(*fields, tree.num_nodes.cuda().expand(size))
    result = ops.verify_tree(logits, batch, *columns(size, 0.0, 0, 1.0, 0.0, 0, 0))
    assert (result.num_accepted == nodes - 1).all()
    assert (result.bonus_tokens == nodes).all()


def test_expansion_reaches_beyond_32_bits() -> None:
    needs(6 << 30)
    logits = torch.zeros(1, 8_200, 262_144, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[0, -1, -1] = 50.0
    expanded = ops.expand_frontier(logits, torch.zeros(1, 8_200, device="cuda"), 2)
    assert expanded.tokens[0, -1].tolist() == [262_143, 0]
    assert expanded.tokens[0, 0].tolist() == [0, 1]
    assert expanded.frontier[0, 0].item() == 8_199 * 2


def test_masks_reach_beyond_32_bits() -> None:
    needs(4 << 30)
    tree, kv_length = chain(1024), 2**21 + 7
    prefix_lengths = torch.tensor([kv_length - 5], device="cuda")
    mask = ops.tree_attention_mask(tree.parents.cuda(), tree.num_nodes.cuda(), prefix_lengths, kv_length)
    assert mask.numel() > 2**31
    assert mask[0, 0, -1, -1030:].tolist() == [True] + [False] * 5 + [True] * 1024
    assert bool(mask[0, 0, 1000, : kv_length - 5].all())
    assert not bool(mask[0, 0, 3, kv_length + 4 :].any())


def test_compaction_reaches_beyond_32_bits() -> None:
    needs(4 << 30)
    kv = torch.zeros(2, 2, 1, 2**23, 66, dtype=torch.int8, device="cuda")
    assert kv.numel() > 2**31
    kv_length = 2**23 - 10
    kv[1, 1, 0, kv_length + 3] = 42
    path, accepted = torch.tensor([[-1] * 4, [0, 3, -1, -1]]).cuda(), torch.tensor([-1, 1]).cuda()
    ops.compact_kv(kv, path, accepted, torch.tensor([0, kv_length - 7]).cuda(), kv_length)
    assert bool((kv[1, 1, 0, kv_length - 6] == 42).all())
    assert int(kv.count_nonzero()) == 2 * 66


# ---- torch.compile


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_a_step_on_the_device_compiles_into_one_graph() -> None:
    tree = star(6)
    fields = [field.cuda() for field in (tree.tokens, tree.parents, tree.scores, tree.num_nodes)]
    logits = torch.randn(1, 6, 40, device="cuda")

    def step(logits: Tensor, tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: Tensor) -> tuple[Tensor, ...]:
        draft = DraftTree(tokens, parents, scores, num_nodes)
        depths = ops.tree_depths(parents, num_nodes)
        return (*ops.verify_tree(logits, draft, *columns(1, 1.0, 0, 1.0, 0.0, 7, 3)), depths)

    assert_all_same(list(compiled(step)(logits, *fields)), list(step(logits, *fields)), "compiled")
