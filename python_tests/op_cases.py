"""Every op of the native module's table in one form: its name, and generated arguments for a call, batch first."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from test_coupled_expansion import Case, coupled_case, draft_vocabulary_case
from test_kv_compaction import random_compaction
from test_tree_attention import MASK_DTYPES, random_prefix
from test_tree_expansion import expansion_case, with_entropies, with_proposers
from test_tree_extension import extension_case
from test_tree_merging import random_proposals
from test_tree_verification import random_case
from torch import Tensor
from tree_cases import random_tree

from taps_ext import native
from taps_ext.ops import Coupling
from taps_ext.tree import DraftTree

Arguments = dict[str, Any]  # by name, in the order of the native function
BATCH_AXIS = {"kv": 1}  # of every other tensor: 0
NOT_BATCHED = {"token_ids"}


def _trees(tree: DraftTree) -> Arguments:
    return {"parents": tree.parents, "num_nodes": tree.num_nodes}


def _mask(seed: int) -> Arguments:
    tree = random_tree(seed)
    prefix_lengths, kv_length = random_prefix(tree, random.Random(seed))
    return {
        **_trees(tree),
        "prefix_lengths": prefix_lengths,
        "kv_length": kv_length,
        "dtype": MASK_DTYPES[seed % len(MASK_DTYPES)],
    }


def _expansion(seed: int) -> Arguments:
    names = ("logits", "scores", "branching")
    return {**dict(zip(names, expansion_case(seed), strict=True)), **dict.fromkeys((*Coupling._fields, "token_ids"))}


def _coupled_expansion(seed: int) -> Arguments:
    return _in_order(coupled_case(seed))


def _vocabulary_expansion(seed: int) -> Arguments:
    return _in_order(draft_vocabulary_case(seed))


def _in_order(case: Case) -> Arguments:
    fields = case._asdict()
    ids, coupling = fields.pop("token_ids"), fields.pop("coupling") or Coupling(*[None] * 5)
    return {**fields, **coupling._asdict(), "token_ids": ids}


def _pruning(seed: int) -> Arguments:
    tree = with_entropies(random_tree(seed))
    tree = with_proposers(tree) if seed % 2 else tree
    names = ("tokens", "parents", "scores", "num_nodes", "entropies", "proposers")
    return {**{name: getattr(tree, name) for name in names}, "max_nodes": max(1, tree.capacity * 2 // 3)}


def _extension(seed: int) -> Arguments:
    tree, *others = extension_case(seed)
    names = ("tokens", "parents", "scores", "num_nodes", "entropies", "proposers")
    further = ("text", "lengths", "log_probs", "max_extension", "window", "proposer")
    return {**{name: getattr(tree, name) for name in names}, **dict(zip(further, others, strict=True))}


def _merging(seed: int) -> Arguments:
    trees = random_proposals(seed)
    return {**trees._asdict(), "max_nodes": None if seed % 2 else trees.tokens.shape[2]}


def _verification(seed: int) -> Arguments:
    case = random_case(seed)
    tree = {"tokens": case.tree.tokens, **_trees(case.tree)}
    return {"logits": case.logits, **tree, **dict(zip(case._fields[2:], case[2:], strict=True))}


def _compaction(seed: int) -> Arguments:
    return random_compaction(seed)._asdict()


# The kinds of cases of each op, by what their names add to the op's.
CASES: dict[str, dict[str, Callable[[int], Arguments]]] = {
    "expand_frontier": {"": _expansion, ", coupled": _coupled_expansion, ", draft vocabulary": _vocabulary_expansion},
    "prune_tree": {"": _pruning},
    "merge_trees": {"": _merging},
    "extend_tree": {"": _extension},
    "tree_depths": {"": lambda seed: _trees(random_tree(seed))},
    "ancestor_bits": {"": lambda seed: _trees(random_tree(seed))},
    "tree_attention_mask": {"": _mask},
    "verify_tree": {"": _verification},
    "compact_kv": {"": _compaction},
}
CALLS = {f"{op}{kind}": (op, build) for op in native.load().schemas for kind, build in CASES[op].items()}


def is_batched(name: str, value: Any) -> bool:
    """Whether a tensor of arguments has a batch axis."""
    return torch.is_tensor(value) and name not in NOT_BATCHED


def batch_size(arguments: Arguments) -> int:
    name, tensor = next((name, value) for name, value in arguments.items() if torch.is_tensor(value))
    return tensor.shape[BATCH_AXIS.get(name, 0)]


def rows(arguments: Arguments, order: Sequence[int]) -> Arguments:
    """The chosen rows of the batch, in that order, as new tensors."""
    index = torch.tensor(order)
    return {
        name: value.index_select(BATCH_AXIS.get(name, 0), index.to(value.device)) if is_batched(name, value) else value
        for name, value in arguments.items()
    }


def call(module: Any, op: str, arguments: Arguments) -> list[Tensor]:
    """All that the op gives, what it writes in place included (into a copy); every result is batch first."""
    arguments = {**arguments}
    if op == "compact_kv":
        arguments["kv"] = arguments["kv"].clone()
    results = getattr(module, op)(*arguments.values())
    if op == "compact_kv":
        return [arguments["kv"].transpose(0, 1)]
    return [results] if torch.is_tensor(results) else list(results)


def batches(name: str, num_cases: int, at_least: int = 2) -> list[tuple[int, str, Arguments]]:
    """(seed, op, arguments) of generated cases with at least so many rows."""
    op, build = CALLS[name]
    cases = ((seed, op, build(seed)) for seed in range(num_cases))
    return [case for case in cases if batch_size(case[2]) >= at_least]
