"""Each op twice, on any device: its public function and the plain way, with the bytes that either must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plain
import torch
from cases import DEPTH, as_tree, branching_for, grow_pool, pruned_tree, random_logits, verify_case

from taps_ext import ops, reference
from taps_ext.sampling import SamplingParams
from taps_ext.tree import DraftTree

PREFIX = 256  # committed tokens of every row
SEED = 1
FRONTIER = 10
VISITED_ROWS = 4
KV_LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128  # the target's cache in compact_kv: Llama-3-8B's


@dataclass(frozen=True)
class Sides:
    """One op on one input: two calls with the same result, and the bytes that must be read or written for it."""

    ours: Callable[[], object]
    plain: Callable[[], object]
    num_bytes: int


def prune_tree(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    pool = grow_pool(SEED, branching_for(num_nodes)).to(device)
    candidates = as_tree(pool, batch_size)
    return Sides(
        lambda: ops.prune_tree(candidates, num_nodes),
        lambda: [plain.prune(pool, num_nodes) for _ in range(batch_size)],
        batch_size * (20 * candidates.capacity + 20 * num_nodes),
    )


def tree_attention_mask(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    tree = pruned_tree(num_nodes, batch_size, device=device)
    parents = tree.parents[0].tolist()
    prefix = torch.full((batch_size,), PREFIX, device=device)

    def one_row() -> torch.Tensor:
        return plain.attention_mask(plain.tree_mask(parents).to(device), PREFIX, PREFIX)

    return Sides(
        lambda: ops.tree_attention_mask(tree.parents, tree.num_nodes, prefix, PREFIX),
        lambda: [one_row() for _ in range(batch_size)],
        batch_size * num_nodes * (8 + PREFIX + num_nodes),
    )


def ancestor_bits(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    tree = pruned_tree(num_nodes, batch_size, device=device)
    parents = tree.parents[0].tolist()
    return Sides(
        lambda: ops.ancestor_bits(tree.parents, tree.num_nodes),
        # the same relation, a byte an entry
        lambda: [plain.tree_mask(parents).to(device) for _ in range(batch_size)],
        batch_size * num_nodes * 8 * (1 + -(-num_nodes // 64)),
    )


def tree_depths(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    tree = pruned_tree(num_nodes, batch_size, device=device)
    ancestors = plain.tree_mask(tree.parents[0].tolist()).to(device)
    return Sides(
        lambda: ops.tree_depths(tree.parents, tree.num_nodes),
        lambda: [plain.depths(ancestors) for _ in range(batch_size)],  # given the mask, which it sums
        batch_size * num_nodes * 16,
    )


def merge_trees(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    """Two drafters' trees of `num_nodes` nodes that share about half of their nodes."""
    first = pruned_tree(num_nodes, device=device)
    tokens = first.tokens.repeat(2, 1)
    tokens[1, num_nodes // 2 :] += 1000
    parents, scores, counts = first.parents.repeat(2, 1), first.scores.repeat(2, 1), first.num_nodes.repeat(2)
    rows = [field.expand(batch_size, *field.shape).contiguous() for field in (tokens, parents, scores, counts)]

    def one_row() -> list[torch.Tensor]:
        return [torch.tensor(column, device=device) for column in plain.merge(tokens, parents)]

    return Sides(
        lambda: ops.merge_trees(rows[0], rows[1], rows[2], rows[3]),
        lambda: [one_row() for _ in range(batch_size)],
        batch_size * num_nodes * 2 * (20 + 28 + 8),
    )


def compact_kv(num_nodes: int, batch_size: int, device: str = "cpu") -> Sides:
    """The path of one accepted node a level, in every layer of a bfloat16 cache."""
    capacity = PREFIX + num_nodes
    pattern = torch.arange(capacity * HEAD_DIM, device=device).remainder_(251).bfloat16()  # zeros can move faster
    size = (2 * KV_LAYERS, batch_size, KV_HEADS, capacity, HEAD_DIM)
    kv = pattern.view(capacity, HEAD_DIM).expand(size).contiguous()
    nodes = torch.linspace(0, num_nodes - 1, DEPTH + 1).long()
    path = torch.full((batch_size, num_nodes), -1, device=device)
    path[:, : DEPTH + 1] = nodes
    accepted, prefix = (torch.full((batch_size,), value, device=device) for value in (DEPTH, PREFIX))
    slots = nodes.tolist()

    def ours() -> torch.Tensor:
        ops.compact_kv(kv, path, accepted, prefix, PREFIX)
        return kv

    def one_row_after_the_other() -> None:
        for row in range(batch_size):
            plain.compact(kv, slots, PREFIX, PREFIX, row)

    moved = 2 * KV_LAYERS * batch_size * KV_HEADS * (DEPTH + 1) * HEAD_DIM * 2
    return Sides(ours, one_row_after_the_other, 2 * moved)


def tree_work(
    num_nodes: int, batch_size: int = 1, device: str = "cpu", *, method: Callable[..., object] = plain.tree_work
) -> Sides:
    """Compute from the candidate pool all that the models and verification need: prune, mask, depths.

    The plain way computes the leaves' paths too, which its verification walks; ours walks the parent array.
    """
    pool = grow_pool(SEED, branching_for(num_nodes)).to(device)
    candidates, prefix = as_tree(pool, batch_size), torch.full((batch_size,), PREFIX, device=device)

    def ours() -> object:
        tree = ops.prune_tree(candidates, num_nodes)
        mask = ops.tree_attention_mask(tree.parents, tree.num_nodes, prefix, PREFIX)
        depths = ops.tree_depths(tree.parents, tree.num_nodes)
        return tree.tokens, mask, depths

    parts = (prune_tree, tree_attention_mask, tree_depths)
    num_bytes = sum(make(num_nodes, batch_size).num_bytes for make in parts)
    return Sides(ours, lambda: [method(pool, num_nodes, PREFIX) for _ in range(batch_size)], num_bytes)


def expand_frontier(vocabulary: int, dtype: torch.dtype, batch_size: int, device: str = "cpu") -> Sides:
    """One level of ten frontier nodes; the plain way takes the whole batch at once."""
    logits = random_logits(batch_size, FRONTIER, vocabulary, dtype, device)
    scores = torch.linspace(-0.1, -3.0, FRONTIER).repeat(batch_size, 1).to(device)
    return Sides(
        lambda: ops.expand_frontier(logits, scores, FRONTIER),
        lambda: plain.expand(logits, scores, FRONTIER),
        logits.numel() * logits.element_size(),
    )


def expand_coupled(
    vocabulary: int,
    dtype: torch.dtype,
    batch_size: int,
    device: str = "cpu",
    *,
    frontier: int = FRONTIER,
    against_uncoupled: bool = False,
) -> Sides:
    """The same with the noise of the target's draws, beside the plain way or beside the op without noise.

    The floor is that of the bytes. On a GPU the noise takes longer than they do, some 90 instructions a token: at 3e13
    a second, an H100's, 4 us at V = 128,256 and 260 us for a batch of 64.
    """
    temperature, alpha, beta = 0.7, 1.3, 1.1
    logits = random_logits(batch_size, frontier, vocabulary, dtype, device)
    scores = torch.linspace(-0.1, -3.0, frontier).repeat(batch_size, 1).to(device)
    weights = (torch.full((batch_size,), value) for value in (temperature, alpha, beta))
    columns = (torch.arange(batch_size), torch.full((batch_size,), PREFIX), *weights)
    coupling = ops.Coupling(*(column.to(device) for column in columns))
    noise = torch.empty(0)
    if not against_uncoupled:
        noise = torch.stack([reference.gumbel_noise(seed, PREFIX, vocabulary) for seed in range(batch_size)])
        noise = noise.to(device, torch.float32)

    def other() -> object:
        if against_uncoupled:
            return ops.expand_frontier(logits, scores, FRONTIER)
        return plain.expand_coupled(logits, scores, FRONTIER, alpha / temperature, beta, noise)

    return Sides(
        lambda: ops.expand_frontier(logits, scores, FRONTIER, coupling),
        other,
        logits.numel() * logits.element_size(),
    )


def verify_tree(
    num_nodes: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    device: str = "cpu",
    *,
    rows: int = VISITED_ROWS,
    sampling: SamplingParams | None = None,
    method: Callable[..., object] = plain.verify_sampled,
) -> Sides:
    """A walk that visits `rows` rows of each tree, by sampling at temperature 1 or as `sampling` says."""
    case = verify_case(random_logits(batch_size, num_nodes, vocabulary, dtype, device), rows, sampling)
    tree, temperature, top_p = case.tree, float(case.sampling.temperature[0]), float(case.sampling.top_p[0])
    tokens = tree.tokens.tolist()
    buffer: list[torch.Tensor] = []  # made when the plain way first runs

    def sampled() -> object:
        if not buffer:
            buffer.append(torch.empty(num_nodes, vocabulary, device=device))
        return [
            method(case.logits[row], tokens[row], case.parents, temperature, case.uniforms(), buffer[0], top_p)
            for row in range(batch_size)
        ]

    return Sides(
        case.ours,
        sampled if temperature > 0 else _greedy(case.logits, tree),
        batch_size * rows * vocabulary * case.logits.element_size(),
    )


def _greedy(logits: torch.Tensor, tree: DraftTree) -> Callable[[], object]:
    parents = tree.parents[0].tolist()
    paths = plain.leaf_paths(parents, plain.depths(plain.tree_mask(parents)).tolist()).to(logits.device)
    return lambda: [plain.verify_greedy(rows, tokens, paths) for rows, tokens in zip(logits, tree.tokens, strict=True)]


BY_NODES: dict[str, Callable[[int, int, str], Sides]] = {
    "prune_tree": prune_tree,
    "merge_trees": merge_trees,
    "tree_attention_mask": tree_attention_mask,
    "ancestor_bits": ancestor_bits,
    "tree_depths": tree_depths,
    "compact_kv": compact_kv,
}
