"""The inputs of the benchmarks: grown candidate pools, and trees whose walk visits a chosen number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
        parents = self.tree.parents[0].tolist()
        for step, node in enumerate(self.path):
            onward = self.path[step + 1] if step + 1 < len(self.path) else None
            for child in range(1, len(parents)):
                if parents[child] == node:
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
    tokens = torch.cat((torch.tensor([pool.root_token]), pool.tokens))
    parents = torch.cat((torch.tensor([-1]), pool.group_parents.repeat_interleave(pool.branching)))
    scores = torch.cat((torch.zeros(1), pool.scores))
    tokens, parents, scores = (field.expand(batch_size, -1).contiguous() for field in (tokens, parents, scores))
    num_nodes = torch.full((batch_size,), tokens.shape[1])
    return DraftTree(tokens, parents, scores, num_nodes, entropies=torch.zeros_like(scores))


def pruned_tree(num_nodes: int, batch_size: int = 1, seed: int = SEED) -> DraftTree:
    """A tree of exactly `num_nodes` nodes."""
    return ops.prune_tree(as_tree(grow_pool(seed, branching_for(num_nodes)), batch_size), num_nodes)


def random_logits(batch_size: int, num_nodes: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """[B, N, V]; rows repeat after the 61st, since drawing a gigabyte of normal numbers would take longest."""
    rows = torch.randn(61, vocabulary, generator=torch.Generator().manual_seed(0)).mul_(LOGIT_SCALE).to(dtype)
    logits = torch.empty(batch_size, num_nodes, vocabulary, dtype=dtype)
    flat = logits.view(-1, vocabulary)
    for start in range(0, len(flat), 61):
        flat[start : start + 61] = rows[: len(flat) - start]
    return logits


def verify_case(
    logits: Tensor, rows: int, sampling: SamplingParams | None = None, tree: DraftTree | None = None
) -> VerifyCase:
    """A case on these logits whose walk visits `rows` rows (1 to DEPTH + 1): path tokens are the target's own draws."""
    batch_size, num_nodes, _ = logits.shape
    sampling = sampling or SamplingParams(temperature=1.0, seed=7)
    tree = tree or pruned_tree(num_nodes, batch_size)
    path = _path_of_length(tree.parents[0].tolist(), rows)
    case = VerifyCase(logits, tree, sampling.rows(batch_size), torch.full((batch_size,), POSITION), path)
    tokens = tree.tokens.clone()
    for row in range(batch_size):
        tokens[row] = _tokens_with_draws(case, row)
    return replace(case, tree=replace(tree, tokens=tokens))


def _path_of_length(parents: list[int], rows: int) -> list[int]:
    """The path to the first node of depth rows - 1."""
    paths = [[0]]
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    return next(path for path in paths if len(path) == rows)


def _tokens_with_draws(case: VerifyCase, row: int) -> Tensor:
    """Tokens [N], distinct, of which only the path's carry the target's draws at their parents."""
    draws = [_draw(case, row, node, depth) for depth, node in enumerate(case.path)]
    others = torch.arange(case.tree.capacity + len(draws))
    tokens = others[~torch.isin(others, torch.tensor(draws))][: case.tree.capacity].clone()
    for node, drawn in zip(case.path[1:], draws, strict=False):
        tokens[node] = drawn
    return tokens


def _draw(case: VerifyCase, row: int, node: int, depth: int) -> int:
    """The token that the target draws at this node: the bonus token of a tree that is only a root."""
    one = torch.zeros(1, 1, dtype=torch.int64)
    root = DraftTree(one, one - 1, torch.zeros(1, 1), torch.ones(1, dtype=torch.int64))
    one_row = slice(row, row + 1)
    s = case.sampling
    drawn = ops.verify_tree(
        case.logits[one_row, node : node + 1],
        root,
        s.temperature[one_row],
        s.top_k[one_row],
        s.top_p[one_row],
        s.min_p[one_row],
        s.seeds[one_row],
        case.positions[one_row] + depth,
    )
    return int(drawn.bonus_tokens)
