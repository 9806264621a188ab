"""The operations of a decode step, in decode-step order: one typed function per op of `csrc/ops.h`.

The batch is the first axis of every tensor, and `num_nodes` says how many node slots each row uses. Integers are int64,
scores float32, logits float32, bfloat16 or float16 (rows of any stride, the vocabulary contiguous). Bad input raises
ValueError, one sentence, before any work. Eager calls go straight to the pybind11 functions; under `torch.compile` the
same ops run through the dispatcher.

On CUDA tensors an op launches its kernel on the current stream and returns; a CUDA graph may capture it. Dtypes and
shapes are checked there as on the CPU. Values are not checked, since reading them would wait for the device: on input
that the CPU would refuse, results are unspecified (indices stay in range, and other rows of the batch are not
affected). `DraftTree.validate()` checks a tree on any device. Results have the same bits in every run, in any batch and
on any device, except the sums of `expand_frontier`, whose last digits differ between devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .tree import DraftTree

__all__ = [
    "Coupling",
    "ExpandedFrontier",
    "MergedTrees",
    "VerifiedPaths",
    "ancestor_bits",
    "compact_kv",
    "expand_frontier",
    "extend_tree",
    "merge_trees",
    "prune_tree",
    "tree_attention_mask",
    "tree_depths",
    "verify_tree",
]

INVALID_LOGITS = 1  # status bit of verify_tree


class Coupling(NamedTuple):
    """Which noise the target's draws will use, per row, and the weight of that noise in a drafter's ranking."""

    seeds: Tensor  # int64 [B]
    positions: Tensor  # int64 [B], the absolute position of the children
    temperature: Tensor  # float32 [B]; 0: this row is not coupled
    alpha: Tensor  # float32 [B], weight of logits / temperature, above 0
    beta: Tensor  # float32 [B], weight of the noise, at least 0


class ExpandedFrontier(NamedTuple):
    tokens: Tensor  # int64 [B, F, K], each node's best children, best first
    scores: Tensor  # float32 [B, F, K], cumulative: the node's score plus the child's log-probability
    frontier: Tensor  # int64 [B, K], flat indices into F*K of the best K children, best first
    entropies: Tensor  # float32 [B, F], nats, of each node's distribution


class MergedTrees(NamedTuple):
    tree: DraftTree  # with `proposers`
    node_map: Tensor  # int64 [B, D, N], each input node's merged node, -1 for padding and pruned nodes


class VerifiedPaths(NamedTuple):
    path: Tensor  # int64 [B, N], the root and the accepted nodes in order, then -1
    num_accepted: Tensor  # int64 [B], accepted nodes, the root and the bonus token not counted
    bonus_tokens: Tensor  # int64 [B], the token that the target adds; -1 where status is not 0
    status: Tensor  # int64 [B], 0, or INVALID_LOGITS: a visited row held NaN or no finite maximum


_NOT_COUPLED = (None,) * len(Coupling._fields)


def _ops() -> Any:
    """Return the pybind11 functions in eager mode (the shorter call), the dispatcher's ops under torch.compile."""
    if torch.compiler.is_compiling():
        load_for_tracing()
        return torch.ops.taps_ext
    module = native.load()
    if not _registered:
        load_for_tracing()
    return module


def expand_frontier(
    logits: Tensor,
    scores: Tensor,
    branching: int,
    coupling: Coupling | None = None,
    token_ids: Tensor | None = None,
) -> ExpandedFrontier:
    """Expand every frontier node into its best `branching` children, and rank all these children, in one pass.

    Each row of logits gives a log-softmax in float32 or better, the top K by logit (ties to the lowest token) and the
    entropy. NaN counts as -inf; a row without a finite maximum gives children of score -inf and entropy 0. The next
    frontier is the best K children of all, ordered by (cumulative score descending, flat index ascending). A child of
    score -inf does not exist: `prune_tree` drops it.

    With a coupling, alpha / T * logits + beta * gumbel(seed, position, token), in float32, takes the place of the
    logits: this is the noise of `verify_tree`, so that a drafter can propose the tokens that the target will draw. All
    nodes of a row share its position. A token whose logit is -inf keeps it. Where T = 0 nothing changes.

    Args:
        logits: [B, F, V], of the drafter.
        scores: float32 [B, F], cumulative log-probabilities of the frontier nodes, at most 0 (-inf: no such node).
        branching: K, at most V; on a CUDA device at most 256.
        token_ids: int64 [V], ascending, the target's token of each logit: children carry these tokens, and the noise is
            theirs. None: the index is the token. Entropies are over the given logits alone.

    Source: EAGLE-2 (arXiv 2406.16858), section 4.1; the coupling is ours.

    >>> logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    >>> expand_frontier(logits, torch.zeros(1, 1), 2).tokens
    tensor([[[0, 1]]])
    >>> zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    >>> coupling = Coupling(zero, zero + 9, one, one, one)  # with this noise the target would draw token 1
    >>> coupled = expand_frontier(logits, torch.zeros(1, 1), 2, coupling)
    >>> coupled.tokens, coupled.scores.exp()
    (tensor([[[1, 0]]]), tensor([[[0.8159, 0.1266]]]))
    >>> expand_frontier(logits, torch.zeros(1, 1), 2, token_ids=torch.tensor([5, 8, 11])).tokens
    tensor([[[5, 8]]])
    """
    return ExpandedFrontier(*_ops().expand_frontier(logits, scores, branching, *(coupling or _NOT_COUPLED), token_ids))


def prune_tree(candidates: DraftTree, max_nodes: int) -> DraftTree:
    """Prune each tree to its best `max_nodes` nodes, root included, closed under ancestors, renumbered in order.

    Nodes are ranked by (score descending, index ascending), where a node's score counts as at most its parent's, so
    that an ancestor always ranks before its descendants, exact ties included. Nodes of score -inf or NaN are dropped.
    Kept nodes keep their order (parents before children), their entropies and their proposers; the capacity is
    min(max_nodes, N).

    Source: EAGLE-2 (arXiv 2406.16858), section 4.2.

    >>> pool = DraftTree(torch.tensor([[7, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]),
    ...                  torch.tensor([[0.0, -0.1, -2.0, -0.3]]), torch.tensor([4]))
    >>> prune_tree(pool, 3).tokens
    tensor([[7, 1, 3]])
    """
    given = candidates
    entropies = torch.zeros_like(given.scores) if given.entropies is None else given.entropies
    tokens, parents, scores, num_nodes, entropies, proposers = _ops().prune_tree(
        given.tokens, given.parents, given.scores, given.num_nodes, entropies, given.proposers, max_nodes
    )
    return DraftTree(
        tokens,
        parents,
        scores,
        num_nodes,
        proposers=None if given.proposers is None else proposers,
        entropies=None if given.entropies is None else entropies,
    )


def merge_trees(
    tokens: Tensor, parents: Tensor, scores: Tensor, num_nodes: Tensor, max_nodes: int | None = None
) -> MergedTrees:
    """Merge D trees under their shared root: nodes of equal (parent, token) become one node, at every depth.

    The score of a merged node is the largest of its inputs, and its proposers are the bit mask of the drafters that
    hold it. Merged nodes are ordered by (depth, first input d * N + n). With `max_nodes` only the best are kept, ranked
    as in `prune_tree`, in the same order; the capacity is then min(max_nodes, D * (N - 1) + 1), else D * (N - 1) + 1.

    Args:
        tokens, parents, scores: [B, D, N], D from 1 to 63; on a CUDA device D * N is at most 65,536.
        num_nodes: [B, D]; a drafter without a proposal has 1.

    Source: TAPS (arXiv 2603.27027), merged-tree verification; the deduplication is ours.

    >>> tokens = torch.tensor([[[5, 1, 2], [5, 1, 3]]])
    >>> parents = torch.tensor([[[-1, 0, 1], [-1, 0, 1]]])
    >>> merged = merge_trees(tokens, parents, torch.zeros(1, 2, 3), torch.tensor([[3, 3]]))
    >>> merged.tree.tokens, merged.tree.proposers
    (tensor([[5, 1, 2, 3, 0]]), tensor([[3, 3, 1, 2, 0]]))
    """
    *fields, node_map = _ops().merge_trees(tokens, parents, scores, num_nodes, max_nodes)
    return MergedTrees(DraftTree(*fields), node_map)


def extend_tree(
    tree: DraftTree,
    text: Tensor,
    lengths: Tensor,
    log_probs: Sequence[float],
    max_extension: int,
    window: int,
    proposer: int = 0,
) -> DraftTree:
    """Append to each leaf the tokens that followed the end of its path at an earlier place of the row's own text.

    The context of a leaf is the row's text and, behind it, the tokens of the leaf's path below the root. Its match is
    the longest one, of at most M tokens, of the context's end with tokens of the text in front of another one; the
    latest place wins among equals. What followed there becomes a chain of `max_extension` nodes below the leaf. Behind
    the text the copy goes on in the path and then in itself: a text that repeats itself is continued. The chains stand
    behind the other nodes, in the order of their leaves, with entropy 0; `prune_tree` then lets all nodes compete. The
    capacity is N * (1 + max_extension).

    Args:
        tree: B trees of N slots; a root without children is a leaf.
        text: int64 [B, L], the committed tokens of each row, of which the last one is the root's.
        lengths: int64 [B], how many tokens of `text` count; a row of 0 is not extended.
        log_probs: M numbers of at most 0, M at most 32: of a token behind a match of 1, 2, ..., M or more tokens, added
            to its parent's score. A match grows with each token of its chain; -inf ends the chain.
        window: only so many tokens at the end of a text count.
        proposer: the bit mask of the new nodes, where the tree has `proposers`.

    Source: prompt look-up decoding, at the leaves of a drafted tree; the copy beyond the text is that of LZ77.

    >>> drafted = DraftTree(torch.tensor([[5, 6]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2), torch.tensor([2]))
    >>> text = torch.tensor([[5, 6, 7, 8, 5]])
    >>> extend_tree(drafted, text, torch.tensor([5]), [-1.0, -0.5], max_extension=2, window=100).tokens
    tensor([[5, 6, 7, 8, 0, 0]])
    """
    entropies = torch.zeros_like(tree.scores) if tree.entropies is None else tree.entropies
    tokens, parents, scores, num_nodes, entropies, proposers = _ops().extend_tree(
        *(tree.tokens, tree.parents, tree.scores, tree.num_nodes, entropies, tree.proposers),
        *(text, lengths, log_probs, max_extension, window, proposer),
    )
    return DraftTree(
        tokens,
        parents,
        scores,
        num_nodes,
        proposers=None if tree.proposers is None else proposers,
        entropies=None if tree.entropies is None else entropies,
    )


def tree_depths(parents: Tensor, num_nodes: Tensor) -> Tensor:
    """Return the depth of every node, int64 [B, N]: 0 at the root; padding counts as a child of the root.

    >>> tree_depths(torch.tensor([[-1, 0, 1, 0]]), torch.tensor([4]))
    tensor([[0, 1, 2, 1]])
    """
    result: Tensor = _ops().tree_depths(parents, num_nodes)
    return result


def ancestor_bits(parents: Tensor, num_nodes: Tensor) -> Tensor:
    """Return which nodes each node may attend to, itself and its ancestors, as bits: int64 [B, N, ceil(N / 64)].

    Bit j % 64 of word j // 64 stands for node j. Padding sees itself and the root, so that no row is empty.

    >>> ancestor_bits(torch.tensor([[-1, 0, 1, 0]]), torch.tensor([4]))[0, :, 0]
    tensor([1, 3, 7, 9])
    """
    result: Tensor = _ops().ancestor_bits(parents, num_nodes)
    return result


def tree_attention_mask(
    parents: Tensor, num_nodes: Tensor, prefix_lengths: Tensor, kv_length: int, dtype: torch.dtype = torch.bool
) -> Tensor:
    """Return the tree attention mask [B, 1, N, kv_length + N]: the prefix columns of each row, then the ancestors.

    Row b sees column c < kv_length if and only if c < prefix_lengths[b]; node i sees column kv_length + j if and only
    if j is i or its ancestor. The mask is bool (True: attend), or additive in float32, bfloat16 or float16 (0: attend,
    -inf: do not).

    >>> tree_attention_mask(torch.tensor([[-1, 0, 0]]), torch.tensor([3]), torch.tensor([1]), 2)[0, 0].long()
    tensor([[1, 0, 1, 0, 0],
            [1, 0, 1, 1, 0],
            [1, 0, 1, 0, 1]])
    """
    result: Tensor = _ops().tree_attention_mask(parents, num_nodes, prefix_lengths, kv_length, dtype)
    return result


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
    """Walk each tree with the target's own draws: descend while a child carries the drawn token.

    The draw at a node of depth d is y = argmax over the kept tokens of logits / T + gumbel(seed, position + d, token),
    T = 0: the argmax (ties to the lowest token). The filters apply in transformers' order to the temperature-scaled
    distribution: top-k (ties are kept), top-p (a token is kept while the probability of all strictly likelier tokens
    is below top_p, so equally likely tokens are kept or dropped together), min-p. The noise is Philox4x32-7 (see
    `csrc/common/philox.h`), so the text depends on logits, seed and position alone, never on the tree. Only the rows
    that the walk visits are read.

    Args:
        logits: [B, N, V], of the target, one row per node.
        tree: B trees of N slots.
        temperature, top_p, min_p: float32 [B]; top_p = 1 and min_p = 0 switch these filters off.
        top_k: int64 [B]; 0 switches it off, more than V keeps all.
        seeds: int64 [B]. positions: int64 [B], the absolute position of the token drawn at the root.

    Source: sample-then-match verification, which equals EAGLE's rule for deterministic candidates and is optimal there.

    >>> tree = DraftTree(torch.tensor([[9, 1]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2), torch.tensor([2]))
    >>> zero, one, off = torch.zeros(1), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    >>> logits = torch.eye(10)[torch.tensor([[1, 4]])]
    >>> verify_tree(logits, tree, zero, off, one, zero, off, off)[:3]
    (tensor([[0, 1]]), tensor([1]), tensor([4]))
    """
    return VerifiedPaths(
        *_ops().verify_tree(
            logits, tree.tokens, tree.parents, tree.num_nodes, temperature, top_k, top_p, min_p, seeds, positions
        )
    )


def compact_kv(kv: Tensor, path: Tensor, num_accepted: Tensor, prefix_lengths: Tensor, kv_length: int) -> None:
    """Move the KV rows of each accepted path behind the row's prefix, all layers in one call, in place.

    For i in 0..num_accepted[b]: kv[:, b, :, prefix_lengths[b] + i] = kv[:, b, :, kv_length + path[b, i]]. Ascending
    order is safe because a path's i-th node is at least i. A row with num_accepted = -1 moves nothing.

    Args:
        kv: [2 * layers, B, heads, capacity, head_dim], contiguous, any dtype.
        path: int64 [B, N], as verify_tree returns it (root first).

    >>> kv = torch.arange(4.0).reshape(1, 1, 1, 4, 1)
    >>> compact_kv(kv, torch.tensor([[0, 2, -1]]), torch.tensor([1]), torch.tensor([1]), 1)
    >>> kv.flatten()
    tensor([0., 1., 3., 3.])
    """
    _ops().compact_kv(kv, path, num_accepted, prefix_lengths, kv_length)


# ---- tracing: each op as torch.compile and opcheck see it


def _tree_shapes(rows: int, nodes: int, max_nodes: int | None, num_further: int) -> list[tuple[int, ...]]:
    """Return the shapes of tokens, parents, scores, num_nodes and further fields of trees of at most `max_nodes`."""
    slots = (rows, nodes if max_nodes is None else torch.sym_min(max_nodes, nodes))
    return [slots, slots, slots, (rows,), *[slots] * num_further]


def _merged_shapes(tokens: Tensor, max_nodes: int | None, **_: Any) -> list[tuple[int, ...]]:
    rows, drafters, nodes = tokens.shape
    return [*_tree_shapes(rows, drafters * (nodes - 1) + 1, max_nodes, 1), (rows, drafters, nodes)]


# The shapes of an op's results, from its arguments by name: all that a fake needs beside the op's schema. Results are
# int64, except those whose names are below and the mask, whose dtype is an argument.
_DTYPES = {"scores": torch.float32, "entropies": torch.float32}
_SHAPES: dict[str, Callable[..., Sequence[Sequence[int]]]] = {
    "expand_frontier": lambda scores, branching, **_: [
        *[(*scores.shape, branching)] * 2, (scores.shape[0], branching), scores.shape
    ],
    "prune_tree": lambda tokens, max_nodes, **_: _tree_shapes(tokens.shape[0], tokens.shape[1], max_nodes, 2),
    "merge_trees": _merged_shapes,
    "extend_tree": lambda tokens, max_extension, **_: _tree_shapes(
        tokens.shape[0], tokens.shape[1] * (1 + max_extension), None, 2
    ),
    "tree_depths": lambda parents, **_: [parents.shape],
    "ancestor_bits": lambda parents, **_: [(*parents.shape, (parents.shape[1] + 63) // 64)],
    "tree_attention_mask": lambda parents, kv_length, **_: [
        (parents.shape[0], 1, parents.shape[1], kv_length + parents.shape[1])
    ],
    "verify_tree": lambda tokens, **_: [tokens.shape, *[tokens.shape[:1]] * 3],
    "compact_kv": lambda **_: [],
}  # fmt: skip
_registered: set[str] = set()
_REGISTRATION = threading.Lock()


def load_for_tracing() -> bool:
    """Load the native module, register the fake of each op of its table, once per process, and return True."""
    module = native.load()
    with _REGISTRATION:
        for name in sorted(module.schemas.keys() - _registered):
            torch.library.register_fake(f"taps_ext::{name}", _fake(name, _SHAPES[name]))
            _registered.add(name)
    return True


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo (seconds): the compiler calls
# the function while it traces instead of tracing into it, so that a compiled function may be the first caller.
load_for_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fake(name: str, shapes: Callable[..., Sequence[Sequence[int]]]) -> Callable[..., Any]:
    """Return a function with the schema of the op whose results are empty tensors of the right shapes and dtypes."""
    schema = getattr(torch.ops.taps_ext, name).default._schema
    names = [argument.name for argument in schema.arguments]

    def fake(*given: Any, **named: Any) -> Any:
        arguments = {**dict(zip(names, given, strict=False)), **named}
        like, default = arguments[names[0]], arguments.get("dtype", torch.int64)
        results = tuple(
            like.new_empty(shape, dtype=_DTYPES.get(result.name, default))
            for result, shape in zip(schema.returns, shapes(**arguments), strict=True)
        )
        return results if len(results) > 1 else next(iter(results), None)

    return fake
