"""The decode step's tree work in plain PyTorch, on any device: what `taps_ext.ops` is measured against.

The methods are those of common Python implementations of EAGLE-2: one row at a time, tensor ops for the long
vectors, a Python loop over the nodes for the mask, `.tolist()` where Python decides, walks for the leaf paths, a
softmax over all rows and a loop over candidates that accepts, or zeroes and renormalises. Within these methods each
function is as fast as we could make it; `tree_work_lean` and `verify_sampled_lazily` leave the methods for the best
plain code we know. On a GPU, too, Python decides on the host: what it needs comes over by `.tolist()` or `.item()`, the
loop over the nodes makes its mask there, and the result goes back in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """The candidates of one row, level by level, in sibling groups of `branching`; the root is not among them."""

    root_token: int
    tokens: Tensor  # int64 [P]
    scores: Tensor  # float32 [P], cumulative log-probabilities
    group_parents: Tensor  # int64 [P / branching], 1 + the index of the group's parent in the pool, 0: the root
    branching: int

    def to(self, device: torch.device | str) -> Pool:
        fields = {name: getattr(self, name).to(device) for name in ("tokens", "scores", "group_parents")}
        return replace(self, **fields)


def expand(logits: Tensor, scores: Tensor, branching: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [..., F, K], scores [..., F, K], the next frontier [..., K], entropies [..., F] of logits [..., F, V]."""
    log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    best = torch.topk(log_probabilities, branching, dim=-1)
    cumulative = best.values + scores[..., None]
    frontier = torch.topk(cumulative.flatten(-2), branching).indices
    entropies = torch.linalg.vecdot(log_probabilities.exp(), log_probabilities).neg()
    return best.indices, cumulative, frontier, entropies


def expand_coupled(
    logits: Tensor, scores: Tensor, branching: int, scale: float, beta: float, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by scale * logits + beta * noise. The noise [..., V] is given: torch has none that is keyed by token."""
    return expand(torch.add(logits.float() * scale, noise[..., None, :], alpha=beta), scores, branching)


def prune(pool: Pool, max_nodes: int) -> tuple[Tensor, list[int]]:
    """Tokens [N] and parents of the best nodes and the root, in pool order. Exact score ties may orphan a node."""
    top = torch.topk(pool.scores, min(max_nodes - 1, pool.scores.numel()), sorted=False).indices
    kept = torch.sort(top).values
    tokens = torch.cat((kept.new_tensor([pool.root_token]), pool.tokens[kept]))
    parents = pool.group_parents[kept // pool.branching]
    local = torch.searchsorted(kept, parents - 1) + 1  # the root's -1 is found at 0, and 0 + 1 must become 0
    return tokens, [-1, *local.masked_fill_(parents == 0, 0).tolist()]


def tree_mask(parents: Sequence[int]) -> Tensor:
    """bool [N, N]: each node sees itself and all that its parent sees."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    rows = mask.unbind(0)  # views made once: indexing mask[i] costs more than the OR itself
    for node in range(1, len(parents)):
        rows[node].logical_or_(rows[parents[node]])
    return mask


def tree_mask_by_index(parents: Sequence[int]) -> Tensor:
    """The same as it is usually written."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node in range(1, len(parents)):
        mask[node] |= mask[parents[node]]
    return mask


def attention_mask(ancestors: Tensor, prefix_length: int, kv_length: int) -> Tensor:
    """bool [1, 1, N, kv_length + N]: the committed prefix, then the tree."""
    nodes = ancestors.shape[0]
    mask = ancestors.new_zeros(1, 1, nodes, kv_length + nodes)
    mask[..., :prefix_length] = True
    mask[0, 0, :, kv_length:] = ancestors
    return mask


def depths(ancestors: Tensor) -> Tensor:
    """int64 [N]: the number of ancestors."""
    return ancestors.sum(dim=1) - 1


def leaf_paths(parents: Sequence[int], node_depths: Sequence[int]) -> Tensor:
    """int64 [leaves, max depth + 1]: the nodes from the root to each leaf, padded with -1."""
    length = max(node_depths) + 1
    return torch.tensor(_padded_leaf_paths(parents, length)).view(-1, length)


def _padded_leaf_paths(parents: Sequence[int], length: int) -> list[int]:
    inner = set(parents)
    pads = [[-1] * (length - used) for used in range(length + 1)]
    paths = [[0]]
    padded = [] if 0 in inner else [0, *pads[1]]
    for node in range(1, len(parents)):
        path = [*paths[parents[node]], node]
        paths.append(path)
        if node not in inner:
            padded += path
            padded += pads[len(path)]
    return padded


def tree_work(
    pool: Pool, max_nodes: int, prefix_length: int, mask_of: Callable[[Sequence[int]], Tensor] = tree_mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, attention mask, depths and leaf paths of the pruned tree: all that a step needs between models."""
    tokens, parents = prune(pool, max_nodes)
    ancestors = mask_of(parents)
    node_depths = depths(ancestors)
    paths = leaf_paths(parents, node_depths.tolist())
    mask = attention_mask(ancestors.to(tokens.device), prefix_length, prefix_length)
    return tokens, mask, node_depths.to(tokens.device), paths.to(tokens.device)


def tree_work_by_index(pool: Pool, max_nodes: int, prefix_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the mask as it is usually written."""
    return tree_work(pool, max_nodes, prefix_length, tree_mask_by_index)


def tree_work_lean(pool: Pool, max_nodes: int, prefix_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same by other methods, the fastest Python we know: ancestors as the bits of an int, depths on the way."""
    tokens, parents = prune(pool, max_nodes)
    num_nodes, num_bytes = len(parents), -(-len(parents) // 8)
    bits, node_depths = [1], [0]
    for node in range(1, num_nodes):
        bits.append(bits[parents[node]] | 1 << node)
        node_depths.append(node_depths[parents[node]] + 1)
    packed = np.frombuffer(b"".join(b.to_bytes(num_bytes, "little") for b in bits), np.uint8)
    ancestors = np.unpackbits(packed.reshape(num_nodes, num_bytes), axis=1, count=num_nodes, bitorder="little")
    mask = attention_mask(torch.from_numpy(ancestors).to(tokens.device).bool(), prefix_length, prefix_length)
    length = max(node_depths) + 1
    paths = torch.from_numpy(np.array(_padded_leaf_paths(parents, length)).reshape(-1, length)).to(tokens.device)
    return tokens, mask, torch.from_numpy(np.array(node_depths)).to(tokens.device), paths


def merge(tokens: Tensor, parents: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Tokens, parents and proposers of the union of D full trees [D, N], by depth and then by first appearance."""
    nodes: dict[tuple[int, int], int] = {}  # (merged parent, token) -> place in `merged`
    merged = [[0, int(tokens[0, 0]), -1, (1 << len(tokens)) - 1]]  # depth, token, parent, proposers
    for drafter, (own_tokens, own_parents) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        places = [0]
        for token, parent in zip(own_tokens[1:], own_parents[1:], strict=True):
            key = (places[parent], token)
            if key not in nodes:
                nodes[key] = len(merged)
                merged.append([merged[key[0]][0] + 1, token, key[0], 0])
            places.append(nodes[key])
            merged[nodes[key]][3] |= 1 << drafter
    order = sorted(range(len(merged)), key=lambda place: merged[place][0])
    rank = {place: new for new, place in enumerate(order)} | {-1: -1}
    rows = [merged[place] for place in order]
    return [row[1] for row in rows], [rank[row[2]] for row in rows], [row[3] for row in rows]


def verify_greedy(logits: Tensor, tokens: Tensor, paths: Tensor) -> tuple[list[int], int]:
    """The longest path of `paths` that the target's argmax [N] follows, and the argmax at its end."""
    drawn = logits.max(dim=-1).indices  # twice as fast as argmax on a CPU
    matches = (tokens[paths[:, 1:]] == drawn[paths[:, :-1]]) & (paths[:, 1:] >= 0)
    accepted = matches.long().cumprod(dim=1).sum(dim=1)
    best = int(accepted.argmax())
    path = paths[best, : int(accepted[best]) + 1].tolist()
    return path, int(drawn[path[-1]])


def verify_sampled(
    logits: Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    temperature: float,
    uniform: Callable[[], float],
    buffer: Tensor,
    top_p: float = 1.0,
) -> tuple[list[int], int]:
    """The accepted path and the bonus token; `uniform` draws from [0, 1), once a candidate and once for the bonus.

    `buffer`, float32 [N, V], is overwritten: allocating the probabilities would cost as much as computing them.
    """
    if temperature == 1 and logits.dtype == torch.float32 and top_p == 1:
        probabilities = torch.softmax(logits, dim=-1, out=buffer)
    else:
        scaled = buffer.copy_(logits) if temperature == 1 else buffer.copy_(logits).div_(temperature)
        probabilities = torch.softmax(_cut_top_p(scaled, top_p), dim=-1, out=buffer)
    return _accept_loop(probabilities.__getitem__, tokens, parents, uniform)


def verify_sampled_lazily(
    logits: Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    temperature: float,
    uniform: Callable[[], float],
    buffer: Tensor,
    top_p: float = 1.0,
) -> tuple[list[int], int]:
    """As `verify_sampled`, with the softmax of the visited rows only."""

    def row(node: int) -> Tensor:
        scaled = logits[node] if temperature == 1 else logits[node].float() / temperature
        return torch.softmax(_cut_top_p(scaled, top_p), dim=-1, dtype=torch.float32)

    return _accept_loop(row, tokens, parents, uniform)


def _cut_top_p(scaled: Tensor, top_p: float) -> Tensor:
    """Logits [..., V] with -inf outside the likeliest tokens that hold `top_p`: by sorting, as transformers does it."""
    if top_p == 1:
        return scaled
    ascending, order = torch.sort(scaled, dim=-1)
    is_cut = ascending.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1) <= 1 - top_p
    is_cut[..., -1] = False
    return scaled.masked_fill(is_cut.scatter(-1, order, is_cut), -torch.inf)


def _accept_loop(
    row: Callable[[int], Tensor], tokens: Sequence[int], parents: Sequence[int], uniform: Callable[[], float]
) -> tuple[list[int], int]:
    children: list[list[int]] = [[] for _ in parents]
    for node in range(1, len(parents)):
        children[parents[node]].append(node)
    path = [0]
    while True:
        probabilities = row(path[-1])
        accepted = _accept_child(probabilities, children[path[-1]], tokens, uniform)
        if accepted is None:
            return path, _draw(probabilities, uniform())
        path.append(accepted)


def _accept_child(
    probabilities: Tensor, children: Sequence[int], tokens: Sequence[int], uniform: Callable[[], float]
) -> int | None:
    for child in children:
        if uniform() <= probabilities[tokens[child]].item():
            return child
        probabilities[tokens[child]] = 0
        probabilities.div_(probabilities.sum())
    return None


def _draw(probabilities: Tensor, uniform: float) -> int:
    # By inversion: torch.multinomial makes V exponential numbers, thirty times the cost.
    sums = probabilities.cumsum(dim=0)
    return min(int(torch.searchsorted(sums, uniform * sums[-1].item(), right=True)), len(sums) - 1)


def compact(kv: Tensor, path: Sequence[int], prefix_length: int, kv_length: int, row: int = 0) -> None:
    """Gather the path's rows of kv [2 * layers, B, heads, capacity, head_dim] and copy them behind the prefix."""
    slots = torch.tensor(path, device=kv.device) + kv_length
    kv[:, row, :, prefix_length : prefix_length + len(path)] = kv[:, row].index_select(2, slots)
