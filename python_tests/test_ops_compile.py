"""The ops under the dispatcher: their schemas and fakes hold, and torch.compile takes them whole."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops_errors import (
    OPS,
    compaction_arguments,
    coupled_arguments,
    extension_arguments,
    pruning_arguments,
    tree_arguments,
    verification_arguments,
)
from torch import Tensor

from taps_ext import native, ops
from taps_ext.tree import DraftTree

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def loaded() -> None:
    ops.load_for_tracing()


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "tree_attention_mask": [{"dtype": torch.bfloat16}, {"kv_length": 7}],
    "expand_frontier": [
        {"logits": torch.randn(2, 3, 10).bfloat16()},
        {"branching": 10},
        {name: coupled_arguments()[name] for name in ops.Coupling._fields},
        {"token_ids": coupled_arguments()["token_ids"]},
    ],
    "prune_tree": [{"max_nodes": 50}, {"proposers": None}],
    "merge_trees": [{"max_nodes": None}, {"max_nodes": 500}],
    "extend_tree": [{"max_extension": 1, "proposers": None}, {"log_probs": [-0.5] * 32}],
    "verify_tree": [{"logits": torch.randn(2, 4, 10).half()}],
}
SCHEMAS: dict[str, str] = native.load().schemas
CASES = [(op, change) for op in SCHEMAS for change in [{}, *VARIANTS.get(op, [])]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("op", "change"), CASES, ids=[f"{op}-{'-'.join(change)}" for op, change in CASES])
def test_opcheck_finds_nothing(op: str, change: dict[str, Any], device: str) -> None:
    """Schema (what is mutated, what aliases), fake shapes and dtypes, and tracing with dynamic shapes."""
    _, build = OPS[op]
    called = getattr(torch.ops.taps_ext, op).default
    arguments = {**dict.fromkeys(names_of(called)), **build(), **change}
    given = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    torch.library.opcheck(called, (), given)


def names_of(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


@pytest.mark.parametrize("op", SCHEMAS)
def test_both_ways_in_have_the_name_and_the_arguments_of_the_table_and_no_defaults(op: str) -> None:
    """Only the typed function in `ops` has defaults, so that there is one place to read them."""
    called, bound = getattr(torch.ops.taps_ext, op).default, getattr(native.load(), op)
    assert str(called._schema) == f"taps_ext::{SCHEMAS[op]}"
    assert not any(argument.has_default_value() for argument in called._schema.arguments)
    signature = bound.__doc__.splitlines()[0]
    assert re.findall(r"(\w+): ", signature) == names_of(called)
    assert "=" not in signature
    assert callable(getattr(ops, op))


def test_the_dispatcher_refuses_bad_input_with_the_same_sentence() -> None:
    bad = {**tree_arguments(), "num_nodes": torch.tensor([4, 0])}
    with pytest.raises(ValueError, match=r"num_nodes must lie in 1\.\.4"):
        torch.ops.taps_ext.tree_depths(**bad)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, DraftTree):
        fields = ("tokens", "parents", "scores", "num_nodes", "proposers", "entropies")
        return all(equal(getattr(actual, field), getattr(expected, field)) for field in fields)
    if isinstance(expected, tuple):
        return len(actual) == len(expected) and all(map(equal, actual, expected))
    return torch.equal(actual, expected) if torch.is_tensor(expected) else actual == expected


def attention(parents: Tensor, num_nodes: Tensor, prefix_lengths: Tensor) -> tuple[Tensor, ...]:
    return (
        ops.tree_depths(parents, num_nodes),
        ops.ancestor_bits(parents, num_nodes),
        ops.tree_attention_mask(parents, num_nodes, prefix_lengths, 5, torch.float32),
    )


def proposing(
    logits: Tensor, tree: DraftTree, coupling: ops.Coupling
) -> tuple[ops.ExpandedFrontier | DraftTree | ops.MergedTrees, ...]:
    pruned = ops.prune_tree(tree, 3)
    fields = (tree.tokens, tree.parents, tree.scores, tree.num_nodes)
    merged = ops.merge_trees(*(torch.stack([field, field], dim=1) for field in fields))
    expanded = ops.expand_frontier(logits, torch.zeros(2, 4), 3)
    given = extension_arguments()
    extended = ops.extend_tree(tree, given["text"], given["lengths"], [-2.0, -1.0], 3, 100)
    return expanded, ops.expand_frontier(logits, expanded.scores[:, :, 0], 3, coupling), pruned, merged, extended


def committing(
    logits: Tensor, tree: DraftTree, sampling: list[Tensor], kv: Tensor, prefix_lengths: Tensor
) -> tuple[ops.VerifiedPaths, Tensor]:
    verified = ops.verify_tree(logits, tree, *sampling)
    ops.compact_kv(kv, verified.path, verified.num_accepted, prefix_lengths, 5)
    return verified, kv + 0


def some_tree() -> DraftTree:
    given = pruning_arguments()
    return DraftTree(given["tokens"], given["parents"], given["scores"], given["num_nodes"])


def test_tree_attention_compiles_into_one_graph() -> None:
    given = [*tree_arguments().values(), torch.tensor([1, 5])]
    assert equal(compiled(attention)(*given), attention(*given))


def test_proposing_compiles_into_one_graph() -> None:
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    coupling = ops.Coupling(*(coupled_arguments()[name] for name in ops.Coupling._fields))
    assert equal(compiled(proposing)(logits, some_tree(), coupling), proposing(logits, some_tree(), coupling))


def test_verifying_and_committing_compile_into_one_graph() -> None:
    given = verification_arguments()
    sampling = [given[name] for name in ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")]
    kv, prefix_lengths = compaction_arguments()["kv"], torch.tensor([1, 4])
    eager_kv, compiled_kv = kv.clone(), kv.clone()
    expected = committing(given["logits"], some_tree(), sampling, eager_kv, prefix_lengths)
    actual = compiled(committing)(given["logits"], some_tree(), sampling, compiled_kv, prefix_lengths)
    assert equal(actual, expected)
    assert torch.equal(compiled_kv, eager_kv)
    assert not torch.equal(compiled_kv, kv)


def test_a_compiled_function_may_be_the_first_caller() -> None:
    """In a process of its own, where nothing has loaded the native module yet."""
    script = (
        "import torch; from taps_ext import ops\n"
        "run = torch.compile(lambda p, n: ops.tree_depths(p, n) + 1, fullgraph=True, backend='eager')\n"
        "print(run(torch.tensor([[-1, 0, 1]]), torch.tensor([3])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.stdout.strip() == "[[1, 2, 3]]", done.stderr


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(ops)
    assert result.attempted > 15
    assert result.failed == 0


def test_ops_can_be_traced_after_an_eager_call_and_nothing_else() -> None:
    code = (
        "import torch; from taps_ext import ops; parents, count = torch.tensor([[-1, 0]]), torch.tensor([2]); "
        "ops.tree_depths(parents, count); "
        "torch.library.opcheck(torch.ops.taps_ext.tree_depths.default, (parents, count), test_utils='test_faketensor')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
