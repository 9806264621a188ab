"""The specification of the ops, in plain PyTorch and Python in float64, written to be read.

The functions have the signatures and results of `ops.py`, but other algorithms: ancestors by squaring the parent
relation, merging by dictionaries of token paths, top-p by sorting, Philox in int64 tensors. Nothing here is fast and
nothing calls the native module. Inputs must be valid: only `ops.py` refuses bad ones.

Tests compare scores and tokens exactly. Only logarithms and exponentials can differ between two correct
implementations, so the two ops that compute them come with a margin: the smallest change that would have changed the
float64 decision. An implementation must agree wherever the margin is not tiny.

This file is longer than others because a specification is read from end to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import INVALID_LOGITS, Coupling, ExpandedFrontier, MergedTrees, VerifiedPaths
from .tree import DraftTree

__all__ = [
    "Filters",
    "ancestor_bits",
    "compact_kv",
    "coupled_logits",
    "draw_margin",
    "draw_token",
    "expand_frontier",
    "expansion_margin",
    "extend_tree",
    "gumbel_noise",
    "is_ancestor",
    "kept_tokens",
    "merge_trees",
    "philox4x32",
    "prune_tree",
    "tree_attention_mask",
    "tree_depths",
    "verification_margin",
    "verify_tree",
]


class Filters(NamedTuple):
    """How one row of logits becomes a distribution; the values are the exact float32 values of the op's tensors."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off


# ---- tree attention: everything follows from the ancestor relation


def is_ancestor(parents: Tensor, num_nodes: Tensor) -> Tensor:
    """Return bool [B, N, N]: entry (i, j) says that j is i or an ancestor of i; padding is a child of the root."""
    batch_size, capacity = parents.shape
    slots = torch.arange(capacity)
    parents = torch.where(slots < num_nodes[:, None], parents, 0)
    reach = torch.eye(capacity).repeat(batch_size, 1, 1)
    reach[:, slots[1:], :] += torch.nn.functional.one_hot(parents[:, 1:], capacity).float()
    while not torch.equal(further := (reach @ reach).clamp(max=1), reach):  # squaring doubles the steps looked back
        reach = further
    return reach.bool()


def tree_depths(parents: Tensor, num_nodes: Tensor) -> Tensor:
    """Return the depth of every node: the number of its ancestors besides itself."""
    return is_ancestor(parents, num_nodes).sum(-1) - 1


def ancestor_bits(parents: Tensor, num_nodes: Tensor) -> Tensor:
    """Return the ancestor relation in words of 64 nodes, node 64 w + k in bit k of word w."""
    ancestor = is_ancestor(parents, num_nodes).long()
    batch_size, capacity = parents.shape
    num_words = -(-capacity // 64)
    padded = torch.nn.functional.pad(ancestor, (0, 64 * num_words - capacity))
    powers = torch.ones(64, dtype=torch.int64) << torch.arange(64)  # 2^63 is the sign bit: sums still are bit sets
    return (padded.reshape(batch_size, capacity, num_words, 64) * powers).sum(-1)


def tree_attention_mask(
    parents: Tensor, num_nodes: Tensor, prefix_lengths: Tensor, kv_length: int, dtype: torch.dtype = torch.bool
) -> Tensor:
    """Return the prefix columns of each row beside the ancestor relation, as bools or as 0 and -inf."""
    ancestor = is_ancestor(parents, num_nodes)
    prefix = torch.arange(kv_length) < prefix_lengths[:, None]
    visible = torch.cat([prefix[:, None].expand(-1, parents.shape[1], -1), ancestor], dim=-1)[:, None]
    return visible if dtype == torch.bool else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -math.inf)


# ---- tree expansion


def expand_frontier(
    logits: Tensor,
    scores: Tensor,
    branching: int,
    coupling: Coupling | None = None,
    token_ids: Tensor | None = None,
) -> ExpandedFrontier:
    """Expand each frontier node into its best children and rank them all; ties go to the lowest index throughout."""
    tokens, cumulative, entropies = _children(coupled_logits(logits, coupling, token_ids), scores, branching)
    tokens = tokens if token_ids is None else token_ids[tokens]
    flat = cumulative.float().flatten(1)
    frontier = flat.sort(dim=-1, descending=True, stable=True).indices[:, :branching]
    return ExpandedFrontier(tokens, cumulative.float(), frontier, entropies.float())


def coupled_logits(logits: Tensor, coupling: Coupling | None, token_ids: Tensor | None = None) -> Tensor:
    """Return the logits that rank children, float64 [B, F, V], NaN as -inf; a row of temperature 0 keeps its logits."""
    ranked = logits.double()
    ranked = ranked.masked_fill(ranked.isnan(), -math.inf)
    token_ids = torch.arange(logits.shape[-1]) if token_ids is None else token_ids
    for b, temperature in enumerate([] if coupling is None else coupling.temperature.tolist()):
        if coupling is not None and temperature > 0:
            noise = gumbel_noise(int(coupling.seeds[b]), int(coupling.positions[b]), int(token_ids[-1]) + 1)[token_ids]
            ranked[b] = float(coupling.alpha[b]) / temperature * ranked[b] + float(coupling.beta[b]) * noise
    return ranked


def expansion_margin(
    logits: Tensor,
    scores: Tensor,
    branching: int,
    coupling: Coupling | None = None,
    token_ids: Tensor | None = None,
) -> Tensor:
    """Return the smallest gap that decides the frontier, its order, or a coupled row's children, float64 [B].

    The logits of other rows are exact. A gap of exactly 0 decides nothing: equal numbers come from equal logits, and
    the lowest index wins.
    """
    ranked = coupled_logits(logits, coupling, token_ids)
    margin = _smallest_gap(_children(ranked, scores, branching)[1].flatten(1), branching)
    if coupling is None:
        return margin
    of_children = _smallest_gap(ranked, branching).amin(-1)
    return torch.where(coupling.temperature > 0, torch.minimum(margin, of_children), margin)


def _smallest_gap(values: Tensor, branching: int) -> Tensor:
    """Return the smallest gap between neighbours among the largest branching + 1 values of the last axis."""
    best = values.sort(dim=-1, descending=True).values[..., : branching + 1]
    gaps = best[..., :-1] - best[..., 1:]
    decided = gaps > 0  # NaN (-inf minus -inf) is an exact tie as well
    return torch.nn.functional.pad(gaps.masked_fill(~decided, math.inf), (0, 1), value=math.inf).amin(-1)


def _children(x: Tensor, scores: Tensor, branching: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [B, F, K], cumulative float64 scores [B, F, K] and entropies float64 [B, F]."""
    best, tokens = x.sort(dim=-1, descending=True, stable=True)
    has_maximum = best[..., :1].isfinite()
    normaliser = torch.where(has_maximum, x.logsumexp(-1, keepdim=True), 0)
    log_probabilities = torch.where(has_maximum, best[..., :branching] - normaliser, -math.inf)
    probabilities = torch.where(has_maximum, (x - normaliser).exp(), 0)
    entropies = torch.special.entr(probabilities).sum(-1)
    return tokens[..., :branching].contiguous(), scores.double()[..., None] + log_probabilities, entropies


def prune_tree(candidates: DraftTree, max_nodes: int) -> DraftTree:
    """Prune each tree to its best `max_nodes` nodes, in their old order."""
    rows = []
    for b in range(candidates.batch_size):
        count = int(candidates.num_nodes[b])
        parents, scores = candidates.parents[b, :count].tolist(), candidates.scores[b, :count].tolist()
        kept = _best_nodes(parents, scores, max_nodes)
        rows.append(
            _Row(
                candidates.tokens[b, kept].tolist(),
                [-1, *(kept.index(parents[node]) for node in kept[1:])],
                [scores[node] for node in kept],
                None if candidates.entropies is None else candidates.entropies[b, kept].tolist(),
                None if candidates.proposers is None else candidates.proposers[b, kept].tolist(),
            )
        )
    capacity = min(max_nodes, candidates.capacity)
    return _tree(rows, capacity, candidates.entropies is not None, candidates.proposers is not None)


def _best_nodes(parents: Sequence[int], scores: Sequence[float], max_nodes: int) -> list[int]:
    """Return the root and the best other nodes, ascending.

    A node's score counts as at most its parent's; nodes of score -inf and NaN are dropped.
    """
    limited: list[float] = []
    for score, parent in zip(scores, parents, strict=True):
        own = -math.inf if math.isnan(score) else score
        limited.append(own if parent < 0 else min(own, limited[parent]))
    present = [node for node in range(1, len(parents)) if limited[node] > -math.inf]
    ranked = sorted(present, key=lambda node: (-limited[node], node))
    return [0, *sorted(ranked[: max_nodes - 1])]


class _Row(NamedTuple):
    tokens: list[int]
    parents: list[int]
    scores: list[float]
    entropies: list[float] | None = None
    proposers: list[int] | None = None


def _tree(rows: list[_Row], capacity: int, has_entropies: bool = False, has_proposers: bool = False) -> DraftTree:
    """Return the rows as one batch, each padded to `capacity`."""

    def padded(values: list[list[int]] | list[list[float]], fill: float, dtype: torch.dtype) -> Tensor:
        full = [[*row, *[fill] * (capacity - len(row))] for row in values]
        return torch.tensor(full, dtype=dtype).reshape(len(rows), capacity)

    return DraftTree(
        padded([row.tokens for row in rows], 0, torch.int64),
        padded([row.parents for row in rows], 0, torch.int64),
        padded([row.scores for row in rows], -math.inf, torch.float32),
        torch.tensor([len(row.tokens) for row in rows], dtype=torch.int64),
        proposers=padded([row.proposers or [] for row in rows], 0, torch.int64) if has_proposers else None,
        entropies=padded([row.entropies or [] for row in rows], 0.0, torch.float32) if has_entropies else None,
    )


# ---- tree merging


class _UnionNode(NamedTuple):
    first: int  # d * N + n of the first input node with this path
    score: float
    proposers: int


def merge_trees(
    tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: Tensor, max_nodes: int | None = None
) -> MergedTrees:
    """Merge D trees: two nodes are one when the tokens from the root down to them are the same."""
    batch_size, num_drafters, capacity = tokens.shape
    node_map = torch.full((batch_size, num_drafters, capacity), -1)
    rows = []
    for b in range(batch_size):
        trees = [_token_paths(tokens[b, d], parents[b, d], int(num_nodes[b, d])) for d in range(num_drafters)]
        union = _union(trees, scores[b], capacity)
        paths = sorted(union, key=lambda path: (len(path), union[path].first))
        place = {path: i for i, path in enumerate(paths)}
        union_parents = [place.get(path[:-1], -1) for path in paths]
        if max_nodes is not None:
            paths = [paths[i] for i in _best_nodes(union_parents, [union[path].score for path in paths], max_nodes)]
            place = {path: i for i, path in enumerate(paths)}
        nodes = [union[path] for path in paths]
        rows.append(
            _Row(
                [path[-1] for path in paths],
                [place.get(path[:-1], -1) for path in paths],
                [node.score for node in nodes],
                proposers=[node.proposers for node in nodes],
            )
        )
        for d, tree in enumerate(trees):
            node_map[b, d, : len(tree)] = torch.tensor([place.get(path, -1) for path in tree])
    full = num_drafters * (capacity - 1) + 1
    return MergedTrees(_tree(rows, full if max_nodes is None else min(max_nodes, full), has_proposers=True), node_map)


def _token_paths(tokens: Tensor, parents: Tensor, num_nodes: int) -> list[tuple[int, ...]]:
    """Return the tokens from the root down to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens[:num_nodes].tolist(), parents[:num_nodes].tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def _union(trees: list[list[tuple[int, ...]]], scores: Tensor, capacity: int) -> dict[tuple[int, ...], _UnionNode]:
    union: dict[tuple[int, ...], _UnionNode] = {}
    for d, tree in enumerate(trees):
        for n, (path, score) in enumerate(zip(tree, scores[d].tolist(), strict=False)):
            known = union.get(path, _UnionNode(d * capacity + n, math.nan, 0))
            best = score if math.isnan(known.score) or score > known.score else known.score
            union[path] = _UnionNode(known.first, best, known.proposers | 1 << d)
    return union


# ---- tree extension


def extend_tree(
    tree: DraftTree,
    text: Tensor,
    lengths: Tensor,
    log_probs: Sequence[float],
    max_extension: int,
    window: int,
    proposer: int = 0,
) -> DraftTree:
    """Append to each leaf the tokens behind the longest match of its context in the text, the latest one of these."""
    rows = []
    for b in range(tree.batch_size):
        count = int(tree.num_nodes[b])
        row = _Row(
            tree.tokens[b, :count].tolist(),
            tree.parents[b, :count].tolist(),
            tree.scores[b, :count].tolist(),
            None if tree.entropies is None else tree.entropies[b, :count].tolist(),
            None if tree.proposers is None else tree.proposers[b, :count].tolist(),
        )
        paths = _token_paths(tree.tokens[b], tree.parents[b], count)
        counted = text[b, : int(lengths[b])].tolist()[-window:]
        for leaf in (node for node in range(count) if node not in row.parents):
            copied, matched = _continuation(counted, [*counted, *paths[leaf][1:]], len(log_probs), max_extension)
            scores = _chain_scores(row.scores[leaf], log_probs, matched, len(copied))
            row.parents.extend([leaf, *range(len(row.tokens), len(row.tokens) + len(scores))][: len(scores)])
            row.tokens.extend(copied[: len(scores)])
            row.scores.extend(scores)
            (row.entropies or []).extend([0.0] * len(scores))
            (row.proposers or []).extend([proposer] * len(scores))
        rows.append(row)
    capacity = tree.capacity * (1 + max_extension)
    return _tree(rows, capacity, tree.entropies is not None, tree.proposers is not None)


def _continuation(text: list[int], context: list[int], longest: int, limit: int) -> tuple[list[int], int]:
    """Return the tokens that followed the longest, latest match of the context's end, and its length."""
    for matched in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, matched - 1, -1):
            if text[end - matched : end] == context[-matched:]:
                copied = list(context)
                for place in range(end, end + limit):
                    copied.append(copied[place])
                return copied[len(context) :], matched
    return [], 0


def _chain_scores(score: float, log_probs: Sequence[float], matched: int, count: int) -> list[float]:
    """Return the cumulative scores of a chain, up to the first one of -inf, in float32."""
    scores: list[float] = []
    sums = torch.tensor(score)
    for step in range(count):
        sums = sums + torch.tensor(log_probs[min(matched + step, len(log_probs)) - 1])
        if not sums > -math.inf:
            break
        scores.append(float(sums))
    return scores


# ---- the draw

_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor | int], key: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-7: four random words of 32 bits (in int64) for four counter words and two key words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(7):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps: the 64 bits are right, the sign is not
        high0, high1 = product0 >> 32 & _WORD, product1 >> 32 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3  # broadcast against one another: each depends on every input word


def gumbel_noise(seed: int, position: int, vocabulary_size: int) -> Tensor:
    """Return the Gumbel noise of every token at this position, float64 [V]; it is finite, since 0 < u < 1."""
    blocks = torch.arange(-(-vocabulary_size // 4))
    words = philox4x32((blocks, 0, position & _WORD, position >> 32), (seed & _WORD, seed >> 32 & _WORD))
    u = (torch.stack(words, dim=-1).flatten()[:vocabulary_size].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u))


def kept_tokens(row: Tensor, filters: Filters) -> Tensor:
    """Return which tokens of a row may be drawn at a temperature above 0, bool [V]; filters in transformers' order."""
    x = row.double()
    z = (x - x.max()) / filters.temperature
    kept = _top_k(x, filters.top_k)
    if filters.top_p < 1:
        kept = kept & (_mass_above(x, z, kept) < filters.top_p)
    if filters.min_p > 0:
        kept = kept & (z >= math.log(filters.min_p))
    return kept | (x == x.max())


def _top_k(x: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < len(x):
        return torch.ones(len(x), dtype=torch.bool)
    return x >= x.sort(descending=True).values[top_k - 1]


def _mass_above(x: Tensor, z: Tensor, kept: Tensor) -> Tensor:
    """Return the share of the kept probability that lies on strictly likelier tokens, float64 [V].

    Probabilities are integers (units of 2^-44 of the likeliest token's), so that their sums have no order.
    """
    weights = torch.where(kept, (z.exp() * 2.0**44).round().long(), 0)
    order = x.argsort(descending=True)
    ranked = x[order]
    cumulative = torch.nn.functional.pad(weights[order].cumsum(0), (1, 0))
    first_equal = torch.searchsorted(-ranked, -ranked, side="left")  # the first place with the same logit
    above = torch.empty_like(z)
    above[order] = cumulative[first_equal].double() / int(weights.sum())
    return above


def draw_token(row: Tensor, filters: Filters, seed: int, position: int) -> int | None:
    """Return the token that the target draws from a logits row [V], or None for a row with NaN or no finite maximum."""
    if row.isnan().any() or not row.max().isfinite():
        return None
    x = row.double()
    if filters.temperature == 0:
        return int((x == x.max()).nonzero()[0])
    perturbed = (x - x.max()) / filters.temperature + gumbel_noise(seed, position, len(x))
    perturbed = perturbed.masked_fill(~kept_tokens(row, filters), -math.inf)
    return int((perturbed == perturbed.max()).nonzero()[0])


def draw_margin(row: Tensor, filters: Filters, seed: int, position: int) -> float:
    """Return the smallest change of a number behind the draw that changes the drawn token.

    The token changes if another one overcomes every obstacle (its lower value after noise, the top-p cut, the min-p
    cut), so that its distance is the largest of these, or if a cut removes the drawn token. Distances are in nats, and
    in probability at the top-p cut. Comparisons of logits (greedy, top-k) are exact: their distance is infinite.
    """
    token = draw_token(row, filters, seed, position)
    if token is None or filters.temperature == 0:
        return math.inf
    x = row.double()
    z = (x - x.max()) / filters.temperature
    perturbed = z + gumbel_noise(seed, position, len(x))
    is_free = x == x.max()  # never cut
    top_k = _top_k(x, filters.top_k)
    distance = perturbed[token] - perturbed
    own = torch.tensor(math.inf, dtype=torch.float64)
    cuts = [_mass_above(x, z, top_k) - filters.top_p] if filters.top_p < 1 else []
    cuts += [math.log(filters.min_p) - z] if filters.min_p > 0 else []
    for cut in cuts:  # positive: cut off by this much
        distance = torch.maximum(distance, cut.masked_fill(is_free, -math.inf))
        own = own if is_free[token] else torch.minimum(own, -cut[token])
    distance = distance.masked_fill(~top_k, math.inf)
    distance[token] = math.inf
    return float(torch.minimum(distance.min().clamp(min=0), own.clamp(min=0)))


# ---- tree verification


def verify_tree(
    logits: Tensor,
    tree: DraftTree,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> VerifiedPaths:
    """Walk each tree with the target's draws: descend to the first child that carries the draw, else stop."""
    batch_size, capacity = tree.tokens.shape
    path = torch.full((batch_size, capacity), -1)
    num_accepted, bonus_tokens, status = (torch.zeros(batch_size, dtype=torch.int64) for _ in range(3))
    for b in range(batch_size):
        filters = _filters(b, temperature, top_k, top_p, min_p)
        for depth, (node, token) in enumerate(_walk(logits[b], tree, b, filters, int(seeds[b]), int(positions[b]))):
            path[b, depth] = node
            num_accepted[b] = depth
            bonus_tokens[b] = -1 if token is None else token
            status[b] = INVALID_LOGITS if token is None else 0
    return VerifiedPaths(path, num_accepted, bonus_tokens, status)


def verification_margin(
    logits: Tensor,
    tree: DraftTree,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Return the smallest margin of the draws at the visited nodes of each tree, float64 [B]."""
    margins = torch.full((tree.batch_size,), math.inf, dtype=torch.float64)
    for b in range(tree.batch_size):
        filters = _filters(b, temperature, top_k, top_p, min_p)
        for depth, (node, _) in enumerate(_walk(logits[b], tree, b, filters, int(seeds[b]), int(positions[b]))):
            margin = draw_margin(logits[b, node], filters, int(seeds[b]), int(positions[b]) + depth)
            margins[b] = min(float(margins[b]), margin)
    return margins


def _filters(b: int, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Filters:
    return Filters(float(temperature[b]), int(top_k[b]), float(top_p[b]), float(min_p[b]))


def _walk(
    logits: Tensor, tree: DraftTree, b: int, filters: Filters, seed: int, position: int
) -> Iterator[tuple[int, int | None]]:
    """Yield the visited nodes of row b from the root down, each with the token drawn there."""
    count = int(tree.num_nodes[b])
    tokens, parents = tree.tokens[b, :count].tolist(), tree.parents[b, :count].tolist()
    visited: int | None = 0
    depth = 0
    while visited is not None:
        node, token = visited, draw_token(logits[visited], filters, seed, position + depth)
        yield node, token
        visited = next((i for i in range(node + 1, count) if parents[i] == node and tokens[i] == token), None)
        depth += 1


# ---- kv compaction


def compact_kv(kv: Tensor, path: Tensor, num_accepted: Tensor, prefix_lengths: Tensor, kv_length: int) -> None:
    """Copy the accepted rows aside, then write them behind the prefix."""
    for b in range(kv.shape[1]):
        count = int(num_accepted[b]) + 1
        rows = kv[:, b, :, kv_length + path[b, :count]]  # indexing by a tensor copies
        start = int(prefix_lengths[b])
        kv[:, b, :, start : start + count] = rows
