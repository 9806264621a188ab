"""Fake implementations of every native op: the shapes and dtypes of the results, for torch.compile and opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]


def register(module: Any) -> None:
    """Register the fakes of the ops that the native module holds, each once a process; one caller at a time."""
    for name, fake in _FAKES.items():
        if hasattr(module, name) and name not in _registered:
            torch.library.register_fake(f"taps_ext::{name}", fake)
            _registered.add(name)


_registered: set[str] = set()


def _expand_frontier(
    logits: Tensor,
    scores: Tensor,
    branching: int,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    temperature: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, nodes, _ = logits.shape
    return (
        logits.new_empty((rows, nodes, branching), dtype=torch.int64),
        logits.new_empty((rows, nodes, branching), dtype=torch.float32),
        logits.new_empty((rows, branching), dtype=torch.int64),
        logits.new_empty((rows, nodes), dtype=torch.float32),
    )


def _prune_tree(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    num_nodes: Tensor,
    entropies: Tensor,
    proposers: Tensor | None,
    max_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, nodes = tokens.shape
    size = (rows, torch.sym_min(max_nodes, nodes))
    return (
        tokens.new_empty(size),
        tokens.new_empty(size),
        scores.new_empty(size),
        tokens.new_empty((rows,)),
        scores.new_empty(size),
        tokens.new_empty(size),
    )


def _merge_trees(
    tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: Tensor, max_nodes: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, drafters, nodes = tokens.shape
    union = drafters * (nodes - 1) + 1
    size = (rows, union if max_nodes is None else torch.sym_min(max_nodes, union))
    return (
        tokens.new_empty(size),
        tokens.new_empty(size),
        scores.new_empty(size),
        tokens.new_empty((rows,)),
        tokens.new_empty(size),
        tokens.new_empty((rows, drafters, nodes)),
    )


def _tree_depths(parents: Tensor, num_nodes: Tensor) -> Tensor:
    return parents.new_empty(parents.shape)


def _tree_paths(parents: Tensor, num_nodes: Tensor, nodes: Tensor | None, max_depth: int) -> Tensor:
    ends = parents if nodes is None else nodes
    return parents.new_empty((*ends.shape, max_depth + 1))


def _ancestor_bits(parents: Tensor, num_nodes: Tensor) -> Tensor:
    return parents.new_empty((*parents.shape, (parents.shape[1] + 63) // 64))


def _tree_attention_mask(
    parents: Tensor, num_nodes: Tensor, prefix_lengths: Tensor, kv_length: int, dtype: torch.dtype
) -> Tensor:
    rows, nodes = parents.shape
    return parents.new_empty((rows, 1, nodes, kv_length + nodes), dtype=dtype)


def _verify_tree(
    logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = (tokens.shape[0],)
    return tokens.new_empty(tokens.shape), tokens.new_empty(rows), tokens.new_empty(rows), tokens.new_empty(rows)


def _compact_kv(kv: Tensor, path: Tensor, num_accepted: Tensor, prefix_lengths: Tensor, kv_length: int) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "expand_frontier": _expand_frontier,
    "prune_tree": _prune_tree,
    "merge_trees": _merge_trees,
    "tree_depths": _tree_depths,
    "tree_paths": _tree_paths,
    "ancestor_bits": _ancestor_bits,
    "tree_attention_mask": _tree_attention_mask,
    "verify_tree": _verify_tree,
    "compact_kv": _compact_kv,
}
