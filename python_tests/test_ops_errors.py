"""Bad input raises one sentence (name, expectation, fact), before any work.

Bug checklist: parent >= child, cyclic and missing parents, top_k < 0, tokens past the vocabulary, wrong dtypes,
shapes that disagree, devices that differ, custom mask sizes that are never checked (FlashInfer #3176).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from taps_ext import native, ops
from taps_ext.ops import Coupling
from taps_ext.tree import DraftTree

pytestmark = pytest.mark.usefixtures("backend")

Arguments = dict[str, Any]


def ints(*values: Any) -> Tensor:
    return torch.tensor(values)


def tree_arguments() -> Arguments:
    """Two trees of four slots, the second with three nodes."""
    return {"parents": ints([-1, 0, 0, 1], [-1, 0, 1, 0]), "num_nodes": ints(4, 3)}


def mask_arguments() -> Arguments:
    return {**tree_arguments(), "prefix_lengths": ints(0, 5), "kv_length": 5, "dtype": torch.bool}


def expansion_arguments() -> Arguments:
    return {"logits": torch.randn(2, 3, 10), "scores": torch.zeros(2, 3), "branching": 4}


def coupled_arguments() -> Arguments:
    return {
        **expansion_arguments(),
        "seeds": ints(1, 2),
        "positions": ints(0, 9),
        "temperature": ints(0.0, 1.0),
        "alpha": torch.ones(2),
        "beta": torch.ones(2),
        "token_ids": 3 * torch.arange(10),
    }


def pruning_arguments() -> Arguments:
    return {
        "tokens": ints([1, 2, 3, 4], [5, 6, 7, 0]),
        **tree_arguments(),
        "scores": torch.zeros(2, 4),
        "entropies": torch.zeros(2, 4),
        "proposers": ints([3, 1, 2, 3], [3, 1, 1, 0]),
        "max_nodes": 3,
    }


def merging_arguments() -> Arguments:
    return {
        "tokens": ints([[1, 2, 3], [1, 4, 5]]),
        "parents": ints([[-1, 0, 1], [-1, 0, 0]]),
        "scores": torch.zeros(1, 2, 3),
        "num_nodes": ints([3, 2]),
        "max_nodes": 4,
    }


def extension_arguments() -> Arguments:
    return {
        **{name: value for name, value in pruning_arguments().items() if name != "max_nodes"},
        "text": ints([9, 8, 1, 0], [7, 6, 8, 5]),
        "lengths": ints(3, 4),
        "log_probs": [-2.0, -1.0],
        "max_extension": 2,
        "window": 3,
        "proposer": 4,
    }


def verification_arguments() -> Arguments:
    return {
        "logits": torch.randn(2, 4, 10),
        "tokens": ints([1, 2, 3, 4], [5, 6, 7, 0]),
        **tree_arguments(),
        "temperature": torch.ones(2),
        "top_k": ints(0, 3),
        "top_p": torch.ones(2),
        "min_p": torch.zeros(2),
        "seeds": ints(1, 2),
        "positions": ints(0, 9),
    }


def compaction_arguments() -> Arguments:
    return {
        "kv": torch.arange(2 * 2 * 3 * 9 * 2.0).reshape(2, 2, 3, 9, 2),
        "path": ints([0, 1, 3, -1], [0, -1, -1, -1]),
        "num_accepted": ints(2, 0),
        "prefix_lengths": ints(1, 4),
        "kv_length": 5,
    }


def expand(logits: Tensor, scores: Tensor, branching: int, token_ids: Tensor, **coupling: Any) -> None:
    ops.expand_frontier(logits, scores, branching, Coupling(**coupling), token_ids)


def prune(
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    scores: Tensor,
    entropies: Tensor,
    proposers: Tensor,
    max_nodes: int,
) -> None:
    ops.prune_tree(DraftTree(tokens, parents, scores, num_nodes, proposers, entropies), max_nodes)


def extend(
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    scores: Tensor,
    entropies: Tensor,
    proposers: Tensor,
    **others: Any,
) -> None:
    ops.extend_tree(DraftTree(tokens, parents, scores, num_nodes, proposers, entropies), **others)


def verify(logits: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor, **sampling: Tensor) -> None:
    ops.verify_tree(logits, DraftTree(tokens, parents, torch.zeros(2, 4), num_nodes), **sampling)


OPS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "tree_depths": (ops.tree_depths, tree_arguments),
    "ancestor_bits": (ops.ancestor_bits, tree_arguments),
    "tree_attention_mask": (ops.tree_attention_mask, mask_arguments),
    "expand_frontier": (ops.expand_frontier, expansion_arguments),
    "coupled expand_frontier": (expand, coupled_arguments),
    "prune_tree": (prune, pruning_arguments),
    "merge_trees": (ops.merge_trees, merging_arguments),
    "extend_tree": (extend, extension_arguments),
    "verify_tree": (verify, verification_arguments),
    "compact_kv": (ops.compact_kv, compaction_arguments),
}
CASES = (*native.load().schemas, "coupled expand_frontier")

# What is wrong with a tree, whatever the op. The value goes to the argument named first.
BROKEN_TREES: list[tuple[str, Any]] = [
    ("num_nodes", ints(4, 0)),
    ("num_nodes", ints(-1, 3)),
    ("num_nodes", ints(5, 3)),
    ("num_nodes", ints(4)),
    ("num_nodes", ints(4, 3).int()),
    ("num_nodes", ints(4, 3).double()),
    ("parents", ints([-1, 0, 0, 1], [0, 0, 1, 0])),  # a root with a parent
    ("parents", ints([-1, 0, 0, 1], [-2, 0, 1, 0])),
    ("parents", ints([-1, 0, 3, 1], [-1, 0, 1, 0])),  # a parent after its child
    ("parents", ints([-1, 1, 0, 1], [-1, 0, 1, 0])),  # a cycle of one
    ("parents", ints([-1, 2, 1, 1], [-1, 0, 1, 0])),  # a cycle of two
    ("parents", ints([-1, 0, -1, 1], [-1, 0, 1, 0])),  # a second root
    ("parents", ints([-1, 0, 0, 2**40], [-1, 0, 1, 0])),  # a missing parent
    ("parents", ints([-1, 0, 0, -(2**40)], [-1, 0, 1, 0])),
    ("parents", ints([-1, 0, 0, 1], [-1, 0, 1, 0]).int()),
    ("parents", ints([-1, 0, 0, 1], [-1, 0, 1, 0]).float()),
    ("parents", ints(-1, 0, 0, 1)),
    ("parents", torch.empty(2, 0, dtype=torch.int64)),
]

BROKEN: list[tuple[str, str, Any]] = [
    *((op, name, value) for op in ("tree_depths", "ancestor_bits", "tree_attention_mask", "prune_tree",
                                   "extend_tree", "verify_tree") for name, value in BROKEN_TREES),
    # tree_attention_mask
    ("tree_attention_mask", "prefix_lengths", ints(0, 6)),
    ("tree_attention_mask", "prefix_lengths", ints(-1, 5)),
    ("tree_attention_mask", "prefix_lengths", ints(0, 5, 5)),
    ("tree_attention_mask", "prefix_lengths", ints(0, 5).int()),
    ("tree_attention_mask", "kv_length", -1),
    ("tree_attention_mask", "dtype", torch.int64),
    ("tree_attention_mask", "dtype", torch.float64),
    # expand_frontier
    ("expand_frontier", "logits", torch.randn(2, 10)),
    ("expand_frontier", "logits", torch.randn(2, 3, 10).double()),
    ("expand_frontier", "logits", torch.zeros(2, 3, 10, dtype=torch.int64)),
    ("expand_frontier", "logits", torch.randn(2, 10, 3).mT),
    ("expand_frontier", "logits", torch.randn(2, 3, 20)[..., ::2]),
    ("expand_frontier", "logits", torch.randn(2, 3, 0)),
    ("expand_frontier", "scores", torch.zeros(2, 4)),
    ("expand_frontier", "scores", torch.zeros(6)),
    ("expand_frontier", "scores", torch.zeros(2, 3).bfloat16()),
    ("expand_frontier", "branching", 0),
    ("expand_frontier", "branching", -1),
    ("expand_frontier", "branching", 11),
    ("coupled expand_frontier", "seeds", ints(1, 2).int()),
    ("coupled expand_frontier", "seeds", ints(1)),
    ("coupled expand_frontier", "seeds", None),
    ("coupled expand_frontier", "positions", ints(0, -1)),
    ("coupled expand_frontier", "positions", ints(0, 2**62 + 1)),
    ("coupled expand_frontier", "positions", ints(0, 9).int()),
    ("coupled expand_frontier", "positions", None),
    ("coupled expand_frontier", "temperature", ints(1.0, math.inf)),
    ("coupled expand_frontier", "temperature", ints(math.nan, 1.0)),
    ("coupled expand_frontier", "temperature", ints(1.0, -0.5)),
    ("coupled expand_frontier", "temperature", torch.ones(2).double()),
    ("coupled expand_frontier", "temperature", torch.ones(2, 3)),
    ("coupled expand_frontier", "temperature", None),
    ("coupled expand_frontier", "alpha", ints(1.0, 0.0)),
    ("coupled expand_frontier", "alpha", ints(1.0, -1.0)),
    ("coupled expand_frontier", "alpha", ints(math.nan, 1.0)),
    ("coupled expand_frontier", "alpha", ints(math.inf, 1.0)),
    ("coupled expand_frontier", "alpha", torch.ones(3)),
    ("coupled expand_frontier", "alpha", torch.ones(2).half()),
    ("coupled expand_frontier", "alpha", None),
    ("coupled expand_frontier", "beta", ints(1.0, -0.1)),
    ("coupled expand_frontier", "beta", ints(math.inf, 1.0)),
    ("coupled expand_frontier", "beta", ints(1.0, math.nan)),
    ("coupled expand_frontier", "beta", torch.ones(2, 1)),
    ("coupled expand_frontier", "beta", torch.ones(2).double()),
    ("coupled expand_frontier", "beta", None),
    ("coupled expand_frontier", "token_ids", torch.arange(9)),
    ("coupled expand_frontier", "token_ids", torch.arange(10)[None]),
    ("coupled expand_frontier", "token_ids", torch.arange(10).int()),
    ("coupled expand_frontier", "token_ids", torch.arange(10) - 1),
    ("coupled expand_frontier", "token_ids", torch.arange(10).flip(0)),
    ("coupled expand_frontier", "token_ids", torch.arange(10).clamp(max=8)),
    ("coupled expand_frontier", "token_ids", torch.arange(10) + 2**31 - 9),
    # prune_tree
    ("prune_tree", "max_nodes", 0),
    ("prune_tree", "max_nodes", -5),
    ("prune_tree", "tokens", ints([1, 2, 3], [5, 6, 7])),
    ("prune_tree", "tokens", ints([1, 2, 3, 4], [5, 6, 7, 0]).int()),
    ("prune_tree", "tokens", ints([1, 2, -3, 4], [5, 6, 7, 0])),
    ("prune_tree", "scores", torch.zeros(2, 3)),
    ("prune_tree", "scores", torch.zeros(2, 4).double()),
    ("prune_tree", "entropies", torch.zeros(2, 5)),
    ("prune_tree", "entropies", torch.zeros(2, 4).half()),
    ("prune_tree", "proposers", ints([3, 1, 2], [3, 1, 1])),
    ("prune_tree", "proposers", ints([3, 1, 2, 3], [3, 1, 1, 0]).int()),
    # merge_trees
    ("merge_trees", "tokens", ints([[1, 2, 3], [2, 4, 5]])),  # roots that differ
    ("merge_trees", "tokens", ints([[1, 2, 3], [1, -4, 5]])),
    ("merge_trees", "tokens", ints([[1, 2, 3], [1, 4, 5]]).int()),
    ("merge_trees", "tokens", ints([1, 2, 3])),
    ("merge_trees", "parents", ints([[-1, 0, 1], [-1, 1, 0]])),
    ("merge_trees", "parents", ints([[-1, 0, 2], [-1, 0, 0]])),
    ("merge_trees", "parents", ints([[-1, 0, 1], [0, 0, 0]])),
    ("merge_trees", "parents", ints([[-1, 0, 1, 0], [-1, 0, 0, 0]])),
    ("merge_trees", "scores", torch.zeros(1, 2, 4)),
    ("merge_trees", "scores", torch.zeros(1, 2, 3).double()),
    ("merge_trees", "num_nodes", ints([3, 0])),
    ("merge_trees", "num_nodes", ints([4, 3])),
    ("merge_trees", "num_nodes", ints(3, 3)),
    ("merge_trees", "num_nodes", ints([3, 3]).int()),
    ("merge_trees", "max_nodes", 0),
    # extend_tree
    ("extend_tree", "tokens", ints([1, 2, 3], [5, 6, 7])),
    ("extend_tree", "tokens", ints([1, 2, -3, 4], [5, 6, 7, 0])),
    ("extend_tree", "scores", torch.zeros(2, 4).double()),
    ("extend_tree", "entropies", torch.zeros(2, 5)),
    ("extend_tree", "proposers", ints([3, 1, 2, 3], [3, 1, 1, 0]).int()),
    ("extend_tree", "text", ints([9, 8, 1, 0], [7, 6, 8, 5]).int()),
    ("extend_tree", "text", ints(9, 8, 1, 0)),
    ("extend_tree", "text", ints([9, 8, 1, 0])),
    ("extend_tree", "text", ints([9, 8, 2, 0], [7, 6, 8, 5])),  # ends with another token than the root
    ("extend_tree", "text", ints([9, 8, 1, 0], [7, -6, 8, 5])),
    ("extend_tree", "lengths", ints(3, 5)),
    ("extend_tree", "lengths", ints(-1, 4)),
    ("extend_tree", "lengths", ints(3)),
    ("extend_tree", "lengths", ints(3, 4).int()),
    ("extend_tree", "log_probs", []),
    ("extend_tree", "log_probs", [-1.0] * 33),
    ("extend_tree", "log_probs", [-1.0, 0.5]),
    ("extend_tree", "log_probs", [math.nan]),
    ("extend_tree", "max_extension", 0),
    ("extend_tree", "window", 0),
    ("extend_tree", "proposer", -1),
    # verify_tree
    ("verify_tree", "logits", torch.randn(4, 10)),
    ("verify_tree", "logits", torch.randn(2, 3, 10)),
    ("verify_tree", "logits", torch.randn(1, 4, 10)),
    ("verify_tree", "logits", torch.randn(2, 4, 0)),
    ("verify_tree", "logits", torch.randn(2, 4, 10).double()),
    ("verify_tree", "logits", torch.randn(2, 10, 4).mT),
    ("verify_tree", "tokens", ints([1, 2, 3, 10], [5, 6, 7, 0])),
    ("verify_tree", "tokens", ints([1, 2, 3, -1], [5, 6, 7, 0])),
    ("verify_tree", "tokens", ints([1, 2, 3, 4], [5, 6, 7, 0]).int()),
    ("verify_tree", "tokens", ints([1, 2, 3], [5, 6, 7])),
    ("verify_tree", "temperature", ints(1.0, math.inf)),
    ("verify_tree", "temperature", ints(math.nan, 1.0)),
    ("verify_tree", "temperature", ints(1.0, -0.5)),
    ("verify_tree", "temperature", torch.ones(3)),
    ("verify_tree", "temperature", torch.ones(2).double()),
    ("verify_tree", "temperature", torch.ones(2, 1)),
    ("verify_tree", "top_k", ints(0, -1)),
    ("verify_tree", "top_k", ints(0, 3).int()),
    ("verify_tree", "top_k", ints(0)),
    ("verify_tree", "top_p", ints(1.0, 1.5)),
    ("verify_tree", "top_p", ints(1.0, -0.1)),
    ("verify_tree", "top_p", ints(math.nan, 1.0)),
    ("verify_tree", "min_p", ints(0.0, 1.5)),
    ("verify_tree", "min_p", ints(0.0, math.nan)),
    ("verify_tree", "min_p", ints(-0.1, 0.0)),
    ("verify_tree", "seeds", ints(1, 2).int()),
    ("verify_tree", "seeds", ints(1, 2, 3)),
    ("verify_tree", "positions", ints(0, -1)),
    ("verify_tree", "positions", ints(0, 9).int()),
    # compact_kv
    ("compact_kv", "kv", torch.zeros(2, 3, 9, 2)),
    ("compact_kv", "kv", torch.zeros(2, 1, 3, 9, 2)),
    ("compact_kv", "kv", torch.zeros(2, 2, 9, 3, 2).transpose(2, 3)),
    ("compact_kv", "path", ints([0, 1, 4, -1], [0, -1, -1, -1])),  # past the capacity of kv
    ("compact_kv", "path", ints([0, -1, 3, -1], [0, -1, -1, -1])),
    ("compact_kv", "path", ints([0, 3, 1, -1], [0, -1, -1, -1])),  # would overwrite what is still to move
    ("compact_kv", "path", ints([0, 0, 1, -1], [0, -1, -1, -1])),
    ("compact_kv", "path", ints([0, 1, 3, -1])),
    ("compact_kv", "path", ints([0, 1, 3, -1], [0, -1, -1, -1]).int()),
    ("compact_kv", "num_accepted", ints(4, 0)),
    ("compact_kv", "num_accepted", ints(2, -2)),
    ("compact_kv", "num_accepted", ints(2)),
    ("compact_kv", "num_accepted", ints(2, 0).int()),
    ("compact_kv", "prefix_lengths", ints(1, 6)),
    ("compact_kv", "prefix_lengths", ints(-1, 4)),
    ("compact_kv", "prefix_lengths", ints(1)),
    ("compact_kv", "kv_length", -1),
    ("compact_kv", "kv_length", 9),
]  # fmt: skip


def names(case: tuple[str, str, Any]) -> str:
    op, name, value = case
    said = (
        f"{value.dtype} {value.tolist() if value.numel() < 20 else list(value.shape)}"
        if torch.is_tensor(value)
        else value
    )
    return f"{op}({name}={said})".replace("torch.", "")


@pytest.mark.parametrize("op", CASES)
def test_the_arguments_that_the_table_breaks_are_good(op: str) -> None:
    call, arguments = OPS[op]
    call(**arguments())
    assert any(case[0] == op for case in BROKEN), "the table breaks none of them"


def is_about_values(op: str, name: str, value: Any) -> bool:
    """Whether only the values of a tensor are bad, which an op on a device cannot see without waiting for it."""
    if not torch.is_tensor(value):
        return (op, name) == ("compact_kv", "kv_length") and value >= 0
    good = OPS[op][1]()[name]
    return value.dtype == good.dtype and value.shape == good.shape and value.stride(-1) == 1


BAD_VALUES = [case[:3] for case in BROKEN if is_about_values(*case[:3])]
BAD_FORMS = [case[:3] for case in BROKEN if not is_about_values(*case[:3])]


@pytest.mark.parametrize(("op", "name", "value"), BAD_FORMS, ids=map(names, BAD_FORMS))
def test_bad_input_raises_one_sentence_that_names_it_before_any_work(op: str, name: str, value: Any) -> None:
    call, build = OPS[op]
    arguments = {**build(), name: value}
    before = {key: given.clone() for key, given in arguments.items() if torch.is_tensor(given)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the sentence is judged below
        call(**arguments)
    assert_is_one_sentence(str(caught.value))
    assert name.rstrip("s") in str(caught.value)
    assert all(torch.equal(arguments[key], copy) or (copy.is_floating_point() and copy.isnan().any())
               for key, copy in before.items())  # fmt: skip


@pytest.mark.backends("cpu")  # what bad values do on a device: test_kernels.py
@pytest.mark.parametrize(("op", "name", "value"), BAD_VALUES, ids=map(names, BAD_VALUES))
def test_bad_values_on_the_host_raise_likewise(op: str, name: str, value: Any) -> None:
    test_bad_input_raises_one_sentence_that_names_it_before_any_work(op, name, value)


def assert_is_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert 15 < len(message) < 240
    assert "Exception raised from" not in message, "a C++ stack"
    assert not message.endswith(".")


SAYS: list[tuple[str, str, Any, str]] = [
    ("tree_depths", "parents", ints(-1, 0, 0, 1), r"parents must be \[B, N\], got \[4\]"),
    ("tree_depths", "parents", ints([-1, 0, 3, 1], [-1, 0, 1, 0]), "row 0, node 2 has parent 3"),
    ("tree_depths", "num_nodes", ints(4, 0), r"num_nodes must lie in 1\.\.4.*0"),
    ("expand_frontier", "branching", 11, r"branching .*10.* got 11"),
    ("expand_frontier", "logits", torch.randn(2, 10, 3).mT, "contiguous"),
    (
        "expand_frontier",
        "logits",
        torch.randn(2, 3, 10).double(),
        "logits must be float32, bfloat16 or float16, got float64",
    ),
    (
        "coupled expand_frontier",
        "alpha",
        None,
        "alpha must be given with the seeds, positions, temperature, alpha and beta of a coupling, got none",
    ),
    ("coupled expand_frontier", "alpha", ints(1.0, 0.0), "alpha must be finite and above 0, row 1 has 0"),
    ("coupled expand_frontier", "token_ids", torch.arange(9), r"token_ids must be \[10\] \(one a logit\), got \[9\]"),
    ("coupled expand_frontier", "token_ids", torch.arange(10).clamp(max=8), "entry 9 is 8 after 8"),
    (
        "coupled expand_frontier",
        "token_ids",
        torch.arange(10) - 1,
        r"must ascend within 0\.\.2147483647, entry 0 is -1$",
    ),
    ("coupled expand_frontier", "beta", ints(-1.0, 0.0), "beta must be finite and at least 0, row 0 has -1"),
    ("prune_tree", "max_nodes", 0, "max_nodes must be at least 1, got 0"),
    ("merge_trees", "tokens", ints([[1, 2, 3], [2, 4, 5]]), "root"),
    (
        "extend_tree",
        "text",
        ints([9, 8, 2, 0], [7, 6, 8, 5]),
        "text must end with the root of its tree, row 0 ends with 2, and its root is 1",
    ),
    ("extend_tree", "text", ints([9, 8, 1, 0], [7, -6, 8, 5]), "text must not hold negative .*row 1 has -6 at 1"),
    ("extend_tree", "log_probs", [-1.0, 0.5], "log_probs must be at most 0, got 0.5"),
    ("verify_tree", "tokens", ints([1, 2, 3, 10], [5, 6, 7, 0]), r"tokens .*0\.\.9.*10"),
    ("verify_tree", "temperature", ints(1.0, math.inf), "temperature .*inf"),
    ("verify_tree", "top_p", ints(1.0, 1.5), "top_p .*1.5"),
    ("verify_tree", "logits", torch.randn(2, 10, 4).mT, "contiguous"),
    ("compact_kv", "kv", torch.zeros(2, 2, 9, 3, 2).transpose(2, 3), "contiguous"),
]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(("op", "name", "value", "sentence"), SAYS)
def test_the_sentence_says_name_expectation_and_fact(op: str, name: str, value: Any, sentence: str) -> None:
    call, build = OPS[op]
    with pytest.raises(ValueError, match=sentence):
        call(**{**build(), name: value})


def test_too_many_drafters_are_refused_and_63_are_not() -> None:
    """A proposer is a bit of an int64, the sign bit left out."""
    tokens, parents = torch.ones(1, 64, 2, dtype=torch.int64), ints([-1, 0]).expand(1, 64, 2)
    scores, num_nodes = torch.zeros(1, 64, 2), torch.full((1, 64), 2)
    ops.merge_trees(tokens[:, :63], parents[:, :63], scores[:, :63], num_nodes[:, :63])
    with pytest.raises(ValueError, match="63"):
        ops.merge_trees(tokens, parents, scores, num_nodes)
    with pytest.raises(ValueError, match="63"):
        ops.merge_trees(tokens[:, :0], parents[:, :0], scores[:, :0], num_nodes[:, :0])


@pytest.mark.backends("simt", "cuda")
def test_what_the_kernels_are_not_made_for_is_said() -> None:
    with pytest.raises(ValueError, match=r"branching must .*256.* got 257"):
        ops.expand_frontier(torch.zeros(1, 1, 300), torch.zeros(1, 1), 257)
    tokens, num_nodes = torch.zeros(1, 63, 1041, dtype=torch.int64), torch.ones(1, 63, dtype=torch.int64)
    with pytest.raises(ValueError, match="at most 65536 nodes a row on a device, got 63 trees of 1041"):
        ops.merge_trees(tokens, tokens - 1, tokens.float(), num_nodes)


@pytest.mark.parametrize("op", CASES)
def test_tensors_of_another_device_are_refused(op: str) -> None:
    """Mixed devices, here with the device that every build of torch has."""
    call, build = OPS[op]
    for name, value in build().items():
        if torch.is_tensor(value):
            with pytest.raises((ValueError, NotImplementedError)):
                call(**{**build(), name: value.to("meta")})


@pytest.mark.parametrize(
    "op", ["tree_depths", "ancestor_bits", "prune_tree", "merge_trees", "extend_tree", "verify_tree"]
)
def test_garbage_in_padding_slots_is_not_bad_input(op: str) -> None:
    call, build = OPS[op]
    arguments = build()
    padding = (1, 3) if arguments["parents"].ndim == 2 else (0, 1, 2)
    for name, fill in (("parents", 2**50), ("tokens", -9), ("scores", math.nan)):
        if name in arguments:
            arguments[name][padding] = fill
    call(**arguments)
