"""The one table of draft trees, and a seeded generator of many more: what every op test runs over.

A tree is written as rows of (tokens, parents, scores), the root first; `batch` pads them side by side.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from taps_ext.tree import DraftTree

Row = tuple[list[int], list[int], list[float]]

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- building


def row(parents: list[int], tokens: Sequence[int] | None = None, scores: Sequence[float] | None = None) -> Row:
    """A tree from its parents; by default node i carries token i and scores minus its depth."""
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return (
        list(range(len(parents))) if tokens is None else list(tokens),
        parents,
        [-float(depth) for depth in depths] if scores is None else list(scores),
    )


def batch(rows: Sequence[Row], capacity: int | None = None) -> DraftTree:
    """The rows side by side, padded as `DraftTree` says."""
    size = max(len(tokens) for tokens, _, _ in rows) if capacity is None else capacity

    def padded(column: int, fill: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*one[column], *[fill] * (size - len(one[column]))] for one in rows], dtype=dtype)

    num_nodes = torch.tensor([len(one[0]) for one in rows])
    return DraftTree(
        padded(0, 0, torch.int64), padded(1, 0, torch.int64), padded(2, -math.inf, torch.float32), num_nodes
    )


def with_garbage_padding(tree: DraftTree, rng: random.Random) -> DraftTree:
    """The same trees with nonsense in every slot at or past `num_nodes`."""
    padding = ~tree.is_node()
    nonsense = torch.tensor([rng.choice([-(2**62), -7, -1, 3, 10**6, 2**62]) for _ in range(padding.numel())])
    nonsense = nonsense.reshape(padding.shape)
    return DraftTree(
        torch.where(padding, nonsense, tree.tokens),
        torch.where(padding, nonsense.roll(1), tree.parents),
        tree.scores.masked_fill(padding, rng.choice([math.nan, math.inf, 0.0])),
        tree.num_nodes,
    )


def strided(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps: every dimension but the last of logits, every dimension of the rest."""
    if tensor.is_floating_point() and tensor.ndim == 3:
        room = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
        view = room[..., 1:-2]
    else:
        room = torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)
        view = room[..., 0]
    view.copy_(tensor)
    return view


# ---- the table


def root_only() -> DraftTree:
    return batch([row([-1])])


def chain(num_nodes: int = 1024) -> DraftTree:
    """As deep as a tree can be."""
    return batch([row([i - 1 for i in range(num_nodes)])])


def star(num_nodes: int = 1024) -> DraftTree:
    """As wide as a tree can be."""
    return batch([row([-1] + [0] * (num_nodes - 1))])


def complete(arity: int = 3, num_nodes: int = 121) -> DraftTree:
    return batch([row([-1] + [(i - 1) // arity for i in range(1, num_nodes)])])


def ragged() -> DraftTree:
    """Rows of very different sizes, one of them without a draft."""
    shapes = [[-1], [-1, 0, 0, 1, 1, 2], [-1, 0, 1, 2, 3], [-1, 0]]
    return batch([row(parents) for parents in shapes], capacity=8)


def garbage_padding() -> DraftTree:
    return with_garbage_padding(ragged(), random.Random(1))


def saturated() -> DraftTree:
    """A drafter sure of itself: every score is 0.0 or -0.0, so that every comparison is a tie."""
    parents = [-1, 0, 0, 1, 2, 3, 3, 4]
    return batch([row(parents, scores=[0.0, -0.0, 0.0, 0.0, -0.0, 0.0, -0.0, 0.0]), row(parents, scores=[0.0] * 8)])


def equal_logprobs() -> DraftTree:
    """Two subtrees of the same scores, interleaved."""
    return batch([row([-1, 0, 0, 1, 2, 3, 4], scores=[0.0, -0.5, -0.5, -1.0, -1.0, -1.0, -1.0])])


def repeated_tokens() -> DraftTree:
    """One token under every parent: equal tokens are different nodes where their parents differ."""
    return batch([row([-1, 0, 0, 1, 2, 3, 4], tokens=[7, 7, 3, 7, 7, 7, 7])])


TREES: dict[str, Callable[[], DraftTree]] = {
    "root only": root_only,
    "chain of 1,024": chain,
    "star of 1,024": star,
    "complete ternary": complete,
    "ragged batch": ragged,
    "garbage in the padding": garbage_padding,
    "saturated scores": saturated,
    "equal log-probabilities": equal_logprobs,
    "one token at many parents": repeated_tokens,
}


# ---- the generator


def random_capacity(rng: random.Random) -> int:
    """Mostly small trees, some beyond one 64-bit word, now and then the largest."""
    low, high = rng.choices([(1, 1), (2, 16), (17, 70), (71, 256), (1024, 1024)], [5, 55, 29, 10, 1])[0]
    return rng.randint(low, high)


def random_row(rng: random.Random, num_nodes: int, vocabulary: int = 50, root: int | None = None) -> Row:
    """A valid tree of at most `num_nodes` nodes: any shape, any scores, siblings distinct."""
    pick_parent = _parent_rule(rng)
    drop = _score_rule(rng)
    tokens, parents, scores = [rng.randrange(vocabulary) if root is None else root], [-1], [0.0]
    taken: set[tuple[int, int]] = set()
    for node in range(1, num_nodes):
        child = (pick_parent(node), rng.randrange(vocabulary))
        if child in taken:
            child = (node - 1, rng.randrange(vocabulary))
        taken.add(child)
        parents.append(child[0])
        tokens.append(child[1])
        scores.append(scores[child[0]] - drop())
    return tokens, parents, scores


def _parent_rule(rng: random.Random) -> Callable[[int], int]:
    arity = rng.randint(2, 10)
    return rng.choice(
        [
            lambda node: rng.randrange(node),
            lambda node: max(0, node - rng.randint(1, 3)),
            lambda node: rng.randrange(max(1, node // 8)),
            lambda node: (node - 1) // arity,
        ]
    )


def _score_rule(rng: random.Random) -> Callable[[], float]:
    return rng.choice(
        [
            lambda: rng.expovariate(1.0),
            lambda: rng.choice([0.0, 0.5, 1.0]),  # many exact ties
            lambda: 0.0 * rng.choice([1.0, -1.0]),  # saturated
            lambda: rng.choice([0.0, 0.25, 3.0, math.inf]),  # some children are not there
        ]
    )


def random_tree(seed: int, vocabulary: int = 50) -> DraftTree:
    """Trees of a ragged batch: valid where there are nodes, nonsense in the padding of half of the cases."""
    rng = random.Random(seed)
    capacity = random_capacity(rng)
    batch_size = 1 if capacity > 256 else rng.randint(1, 4)
    counts = [capacity if rng.random() < 0.3 else rng.randint(1, capacity) for _ in range(batch_size)]
    tree = batch([random_row(rng, count, vocabulary) for count in counts], capacity)
    return with_garbage_padding(tree, rng) if rng.random() < 0.5 else tree


def random_trees(num_cases: int) -> Iterator[tuple[str, DraftTree]]:
    """Named trees: the table, then `num_cases` generated ones, every fifth as strided views."""
    for name, build in TREES.items():
        yield name, build()
    for seed in range(num_cases):
        tree = random_tree(seed)
        if seed % 5 == 0:
            tree = DraftTree(*(strided(field) for field in (tree.tokens, tree.parents, tree.scores, tree.num_nodes)))
        yield f"seed {seed}", tree


# ---- reading a tree as a person would


def token_path(tree: DraftTree, b: int, node: int) -> tuple[int, ...]:
    """The tokens from the root down to a node."""
    path: list[int] = []
    while node >= 0:
        path.append(int(tree.tokens[b, node]))
        node = int(tree.parents[b, node])
    return tuple(reversed(path))


def token_paths(tree: DraftTree, b: int) -> list[tuple[int, ...]]:
    """The token path of every node of row b."""
    tokens, parents = tree.tokens[b].tolist(), tree.parents[b].tolist()
    paths: list[tuple[int, ...]] = []
    for node in range(int(tree.num_nodes[b])):
        paths.append((*(paths[parents[node]] if node else ()), tokens[node]))
    return paths


def assert_same(actual: Tensor | None, expected: Tensor | None, where: str) -> None:
    """Equal in dtype, shape and every element; NaN equals NaN."""
    if actual is None or expected is None:
        assert actual is expected, where
        return
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")


def assert_same_tree(actual: DraftTree, expected: DraftTree, where: str) -> None:
    for field in ("tokens", "parents", "scores", "num_nodes", "proposers", "entropies"):
        assert_same(getattr(actual, field), getattr(expected, field), f"{where}, {field}")
