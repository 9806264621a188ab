"""The inputs of the benchmarks: grown candidate pools, and trees whose walk visits a chosen number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from plain import Pool
from torch import Tensor

from taps_ext import ops
from taps_ext.sampling import SamplingParams, SamplingRows
from taps_ext.tree import DraftTree

DEPTH = 6  # drafted levels, as in EAGLE's published settings
POSITION = 100
LOGIT_SCALE = 2.0  # standard deviation of the logits that are verified: flat, the slower case for a pruned draw
DRAFTER_SCALE = 3.5  # and of the ones that grow a pool: peaked enough for trees of all six levels
SEED = 1  # gives trees of DEPTH levels at every size measured


@dataclass(frozen=True)
class VerifyCase:
    """A batch of equal trees whose walk visits exactly `rows` rows, on both sides."""

    logits: Tensor  # [B, N, V]
    tree: DraftTree
    sampling: SamplingRows
    positions: Tensor  # int64 [B]
    path: list[int]  # the nodes visited, the root first
    parents: list[int]  # of every tree

    def ours(self) -> ops.VerifiedPaths:
        s = self.sampling
        return ops.verify_tree(
            self.logits, self.tree, s.temperature, s.top_k, s.top_p, s.min_p, s.seeds, self.positions
        )

    def uniforms(self) -> Callable[[], float]:
        """Numbers for the plain accept loop that make it take the same path: 0 accepts, almost 1 rejects."""
        draws = self._draws()
        return lambda: next(draws)

    def _draws(self) -> Iterator[float]:
        for step, node in enumerate(self.path):
            onward = self.path[step + 1] if step + 1 < len(self.path) else None
            for child in range(1, len(self.parents)):
                if self.parents[child] == node:
                    yield 0.0 if child == onward else 1.0 - 2**-24
                    if child == onward:
                        break
        yield 0.5  # for the bonus token


def branching_for(num_nodes: int) -> int:
    """EAGLE's 10 children a node, or 20 where a pool of 10 (511 nodes) would leave nothing to prune."""
    return 10 if num_nodes <= 256 else 20


def grow_pool(seed: int, branching: int, vocabulary: int = 32000) -> Pool:
    """A candidate pool of DEPTH levels as a drafter grows it, with random peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    tokens, scores, group_parents = [], [], [torch.zeros(1, dtype=torch.int64)]
    frontier_scores, first = torch.zeros(1), 1  # `first`: 1 + the pool index where the next level starts
    for _ in range(DEPTH):
        own = torch.randn(len(frontier_scores), 200, generator=generator).mul_(DRAFTER_SCALE).log_softmax(-1)
        level = own.sort(dim=-1, descending=True).values[:, :branching] + frontier_scores[:, None]
        scores.append(level.flatten())
        tokens += [torch.randperm(vocabulary, generator=generator)[:branching] for _ in range(len(level))]
        best = torch.topk(scores[-1], branching)
        frontier_scores = best.values
        group_parents.append(best.indices + first)
        first += scores[-1].numel()
    return Pool(1, torch.cat(tokens), torch.cat(scores), torch.cat(group_parents[:-1]), branching)


def as_tree(pool: Pool, batch_size: int = 1) -> DraftTree:
    """The pool as `ops.prune_tree` takes it, `batch_size` times."""
    tokens = torch.cat((pool.tokens.new_tensor([pool.root_token]), pool.tokens))
    parents = torch.cat((tokens.new_tensor([-1]), pool.group_parents.repeat_interleave(pool.branching)))
    scores = torch.cat((pool.scores.new_zeros(1), pool.scores))
    tokens, parents, scores = (field.expand(batch_size, -1).contiguous() for field in (tokens, parents, scores))
    num_nodes = tokens.new_full((batch_size,), tokens.shape[1])
    return DraftTree(tokens, parents, scores, num_nodes, entropies=torch.zeros_like(scores))


def pruned_tree(num_nodes: int, batch_size: int = 1, seed: int = SEED, device: str = "cpu") -> DraftTree:
    """A tree of exactly `num_nodes` nodes."""
    pool = grow_pool(seed, branching_for(num_nodes)).to(device)
    return ops.prune_tree(as_tree(pool, batch_size), num_nodes)


def random_logits(batch_size: int, num_nodes: int, vocabulary: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """[B, N, V]; rows repeat after the 61st, since drawing a gigabyte of normal numbers would take longest."""
    rows = _random_rows(vocabulary).to(device, dtype)
    logits = torch.empty(batch_size, num_nodes, vocabulary, dtype=dtype, device=device)
    flat = logits.view(-1, vocabulary)
    for start in range(0, len(flat), 61):
        flat[start : start + 61] = rows[: len(flat) - start]
    return logits


@cache
def _random_rows(vocabulary: int) -> Tensor:
    return torch.randn(61, vocabulary, generator=torch.Generator().manual_seed(0)).mul_(LOGIT_SCALE)


def verify_case(
    logits: Tensor, rows: int, sampling: SamplingParams | None = None, tree: DraftTree | None = None
) -> VerifyCase:
    """A case on these logits whose walk visits `rows` rows (1 to DEPTH + 1): path tokens are the target's own draws."""
    batch_size, num_nodes, _ = logits.shape
    sampling_rows = (sampling or SamplingParams(temperature=1.0, seed=7)).rows(batch_size, logits.device)
    tree = tree or pruned_tree(num_nodes, batch_size, device=str(logits.device))
    positions = tree.num_nodes.new_full((batch_size,), POSITION)
    parents = tree.parents[0].tolist()
    case = VerifyCase(logits, tree, sampling_rows, positions, _path_of_length(parents, rows), parents)
    draws = torch.stack([_draws(case, node, depth) for depth, node in enumerate(case.path)], dim=1).cpu()
    tokens = torch.stack([_tokens_with_draws(num_nodes, case.path, row.tolist()) for row in draws])
    return replace(case, tree=replace(tree, tokens=tokens.to(logits.device)))


def longest_path(num_nodes: int) -> int:
    """The most rows that a walk down a tree of this size can visit."""
    tree = pruned_tree(num_nodes)
    return int(ops.tree_depths(tree.parents, tree.num_nodes).max()) + 1


def _path_of_length(parents: list[int], rows: int) -> list[int]:
    """The path to the first node of depth rows - 1."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    return next(path for path in paths if len(path) == rows)


def _tokens_with_draws(num_nodes: int, path: list[int], draws: list[int]) -> Tensor:
    """Tokens [N], distinct, of which only the path's carry the target's draws at their parents."""
    others = torch.arange(num_nodes + len(draws))
    tokens = others[~torch.isin(others, torch.tensor(draws))][:num_nodes].clone()
    for node, drawn in zip(path[1:], draws, strict=False):
        tokens[node] = drawn
    return tokens


def _draws(case: VerifyCase, node: int, depth: int) -> Tensor:
    """int64 [B]: the tokens that the target draws at this node: the bonus tokens of trees that are only a root."""
    zero = torch.zeros_like(case.positions)[:, None]
    roots = DraftTree(zero, zero - 1, zero.float(), case.positions.new_ones(len(zero)))
    s = case.sampling
    return ops.verify_tree(
        case.logits[:, node : node + 1],
        roots,
        s.temperature,
        s.top_k,
        s.top_p,
        s.min_p,
        s.seeds,
        case.positions + depth,
    ).bonus_tokens
