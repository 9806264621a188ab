"""Growing draft trees level by level, for one EAGLE drafter or for several that share embedding and lm_head.

Each level takes one embedding look-up, one lm_head product and one `expand_frontier` for all drafters; their networks
run one after the other. One `prune_tree` ends it. The slots of the growing trees lie in the drafters' caches at common
columns behind the longest row's end; they are masked by row length and ancestry, and overwritten by whatever comes
next.

Source: EAGLE-2 (arXiv 2406.16858), section 4. Dims: B rows, R trees (drafter by drafter), F frontier nodes,
K branching, H hidden, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..products import pack_products
from ..tree import DraftTree, Lengths, TreeShape
from .base import DrafterState, DraftVocabulary
from .coupling import CoupledRows
from .network import EagleNetwork

MIN_CAPACITY = 256  # slots; capacities are powers of two, so a growth at least doubles


@dataclass(eq=False)
class EagleState(DrafterState):
    """Hold one drafter's caches during one call, its last outputs, and the evidence for it."""

    lengths: Lengths  # observed slots
    last_output: Tensor  # [B, H], the output of each row's last observed slot
    keys: Tensor  # [B, kv_heads, capacity, head_dim]
    values: Tensor  # [B, kv_heads, capacity, head_dim]
    coupled: CoupledRows | None = None  # None: drafts without the noise
    decay: float | None = None  # per token, of the evidence; None: keeps none
    evidence: Tensor | None = None  # float32 [B]
    last_logits: Tensor | None = None  # [B, V or D], of `last_output`, if evidence is kept

    def reserve(self, num_slots: int) -> None:
        """Grow the caches to at least `num_slots` per row, by doubling; the committed slots are kept."""
        batch_size, num_heads, capacity, head_dim = self.keys.shape
        if num_slots <= capacity:
            return
        capacity = max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length())
        with torch.inference_mode(False):
            grown = [self.keys.new_zeros(batch_size, num_heads, capacity, head_dim) for _ in range(2)]
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            new[:, :, : old.shape[2]] = old
        self.keys, self.values = grown

    def select(self, rows: Sequence[int], places: Tensor, num_slots: int) -> EagleState:
        """Return a copy of some rows to draft from, with `num_slots` cache slots; `places` is `rows` as int64 [r]."""
        host = self.lengths.host
        return EagleState(
            lengths=Lengths(self.lengths.tensor[places], tuple(host[row] for row in rows)),
            last_output=self.last_output[places],
            keys=self.keys[places, :, :num_slots],
            values=self.values[places, :, :num_slots],
            coupled=None if self.coupled is None else self.coupled.select(places),
            last_logits=None if self.last_logits is None else self.last_logits[places],
        )


@dataclass(frozen=True)
class LogitRule:
    """Turn an lm_head's product into logits as the target does: scaled, then soft-capped."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, target_config: Any) -> LogitRule:
        """Return the rule that a transformers config names; compare it with the model's own logits before use.

        Names: Cohere's `logit_scale`, Granite's `logits_scaling` (a divisor, except in HyperCLOVA X), MiniCPM's
        `dim_model_base`, the multipliers of Falcon-H1 and Muse, and Gemma's `final_logit_softcapping`.
        """

        def get(name: str) -> Any:
            return getattr(target_config, name, None)

        divisor, base = get("logits_scaling") or 1.0, get("dim_model_base")
        scale = divisor if get("model_type") == "hyperclovax" else 1 / divisor
        if base and not get("logits_scaling"):  # MiniCPM3 names the same divisor both ways
            scale *= base / target_config.hidden_size
        for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
            scale *= get(name) or 1.0
        return cls(float(scale), get("final_logit_softcapping"))

    def apply(self, product: Tensor) -> Tensor:
        """Return the logits of the lm_head's product, both [..., V] and of one dtype."""
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class SharedEnds:
    """Hold the target's own embedding and lm_head, by reference; drafters with equal ends can draft together.

    With a draft vocabulary of D tokens the lm_head's rows of these tokens are copied once: D * H numbers of its dtype.
    """

    embedding: nn.Module
    lm_head: nn.Module
    head_dtype: torch.dtype  # that the lm_head computes in
    rule: LogitRule = LogitRule()
    vocabulary: DraftVocabulary | None = None  # None: all of the target's tokens
    head: nn.Module = field(init=False, compare=False)  # the lm_head, or its rows of the draft vocabulary
    token_ids: Tensor | None = field(init=False, compare=False)  # int64 [D] on the head's device, of a draft vocabulary
    draft_ids: Tensor | None = field(init=False, compare=False)  # int64 [V] there, the inverse, -1 outside

    def __post_init__(self) -> None:
        head, ids, inverse = self.lm_head, None, None
        if self.vocabulary is not None:
            head = rows_of_head(self.lm_head, self.vocabulary)
            pack_products(head)
            ids, inverse = (ids.to(head.weight.device) for ids in (self.vocabulary.tokens, self.vocabulary.draft_ids))
        for name, value in (("head", head), ("token_ids", ids), ("draft_ids", inverse)):
            object.__setattr__(self, name, value)

    def embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Return embeddings [..., H] of tokens, in the dtype and on the device of `like`."""
        embeddings: Tensor = self.embedding(tokens.to(next(self.embedding.parameters()).device))
        return embeddings.to(like.device, like.dtype)

    def logits(self, outputs: Tensor) -> Tensor:
        """Return the target's logits [..., V] of a network's outputs [..., H]; [..., D] with a draft vocabulary."""
        return self.rule.apply(self.head(outputs.to(self.head_dtype)))

    def indices(self, tokens: Tensor) -> Tensor:
        """Return the places of int64 tokens in the logits, of the same shape: -1 outside a draft vocabulary."""
        return tokens if self.draft_ids is None else self.draft_ids[tokens]


def rows_of_head(lm_head: nn.Module, vocabulary: DraftVocabulary) -> nn.Linear:
    """Copy the rows of an lm_head that make the logits of a draft vocabulary.

    Raise ValueError for an lm_head that is not a plain matrix: quantised, sharded, offloaded or wrapped.
    """
    weight: Any = getattr(lm_head, "weight", None)
    forward = getattr(type(lm_head), "forward", None)
    is_plain = forward is nn.Linear.forward and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not isinstance(lm_head, nn.Linear) or not is_plain or weight.device.type == "meta":
        kind = f"{type(lm_head).__name__} of {type(weight).__name__}"
        raise ValueError(
            f"a draft vocabulary needs rows of the target's lm_head, and cannot take them of a {kind}; load the target "
            f"with its lm_head unquantised, whole and on one device, or export the drafter with --whole-vocabulary"
        )
    if len(weight) < vocabulary.vocab_size:
        raise ValueError(f"the draft vocabulary is of {vocabulary.vocab_size} tokens, the lm_head of {len(weight)}")
    ids = vocabulary.tokens.to(weight.device)
    with torch.inference_mode(False), torch.device("meta"):
        head = nn.Linear(weight.shape[1], len(ids), bias=lm_head.bias is not None)
    for name, parameter in (("weight", weight), ("bias", lm_head.bias)):
        if parameter is not None:
            setattr(head, name, nn.Parameter(parameter.detach()[ids], requires_grad=False))
    return head


def grow(
    networks: Sequence[EagleNetwork],
    states: Sequence[EagleState],
    ends: SharedEnds,
    root_tokens: Tensor,
    shape: TreeShape,
    active: Tensor,
) -> DraftTree:
    """Return the trees [R, capacity] of drafters that have all observed the same slots.

    `root_tokens` and `active`, int64 and bool [B], lie on the drafters' device.
    """
    root_tokens, active = root_tokens.repeat(len(networks)), active.repeat(len(networks))
    frontier = _Frontier(networks, states, ends, shape)
    outputs = torch.cat([state.last_output for state in states])[:, None]
    last_logits = [state.last_logits for state in states if state.last_logits is not None]
    logits = torch.cat(last_logits)[:, None] if len(last_logits) == len(states) else ends.logits(outputs)
    scores = torch.zeros_like(root_tokens, dtype=torch.float32)[:, None]
    scores.masked_fill_(~active[:, None], -torch.inf)  # -inf: no child survives pruning
    expanded = frontier.expand(logits, scores, 1)
    levels = [Level.of(expanded, torch.zeros_like(expanded.frontier[:, :1]))]
    features = outputs.expand(-1, frontier.branching, -1)
    pool_start = 1
    for depth in range(1, shape.depth):
        level = levels[-1]
        if can_read(root_tokens.device) and bool(is_complete(levels, shape).all()):
            break
        outputs = frontier.forward(level, features, depth)
        expanded = frontier.expand(ends.logits(outputs), level.frontier_scores, depth + 1)
        levels.append(Level.of(expanded, pool_start + level.frontier))
        pool_start += level.tokens.shape[1]
        features = _gather_rows(outputs, levels[-1].frontier_parents)
    return best_nodes(root_tokens, levels, shape).padded(shape.capacity(networks[0].config.vocab_size))


def can_read(device: torch.device) -> bool:
    """Return whether the host may read values there without waiting: then drafting stops when no level can matter."""
    return device.type == "cpu"


class _Frontier:
    """Run drafters over the frontiers of their growing trees."""

    def __init__(
        self, networks: Sequence[EagleNetwork], states: Sequence[EagleState], ends: SharedEnds, shape: TreeShape
    ) -> None:
        self.networks, self.states, self.ends = networks, states, ends
        num_tokens = networks[0].config.vocab_size if ends.vocabulary is None else len(ends.vocabulary)
        self.branching = min(shape.branching, num_tokens)
        self.lengths, self.committed = states[0].lengths.tensor, states[0].lengths.longest
        num_columns = self.committed + shape.frontier_slots(networks[0].config.vocab_size)
        for state in states:
            state.reserve(num_columns)
        coupled = CoupledRows.join([state.coupled for state in states])
        self.couplings = None if coupled is None else coupled.by_depth(shape.depth, self.lengths)
        # bool [R, K, columns]: each row's committed columns, then the columns of the tree's slots, still closed
        mask = torch.arange(num_columns, device=self.lengths.device) < self.lengths[:, None]
        self.mask = mask[:, None].repeat(len(networks), self.branching, 1)

    def expand(self, logits: Tensor, scores: Tensor, depth: int) -> ops.ExpandedFrontier:
        """Return the children at `depth` of nodes with these logits [R, F, V or D] and scores [R, F]."""
        coupling = None if self.couplings is None else self.couplings[depth - 1]
        return ops.expand_frontier(logits, scores, self.branching, coupling, self.ends.token_ids)

    def forward(self, level: Level, features: Tensor, depth: int) -> Tensor:
        """Return the outputs [R, K, H] of a level's frontier; its keys and values join the transient slots.

        `features` are the outputs of the frontier's parents.
        """
        start = self.committed + (depth - 1) * self.branching
        end = start + self.branching
        if depth > 1:  # a node sees what its parent saw, then itself
            ancestors = self.mask[:, :, self.committed : start]
            ancestors.copy_(_gather_rows(ancestors, level.frontier_parents))
        self.mask[:, :, start:end] = torch.eye(self.branching, dtype=torch.bool, device=self.mask.device)
        visible = self.mask[:, None, :, :end]
        embeddings = self.ends.embed(level.tokens.gather(1, level.frontier), features)
        positions = (self.lengths + depth - 1)[:, None].expand(-1, self.branching)
        outputs = []
        for d, (network, state) in enumerate(zip(self.networks, self.states, strict=True)):
            rows = slice(d * len(self.lengths), (d + 1) * len(self.lengths))
            keys, values = state.keys[:, :, :end], state.values[:, :, :end]
            slots = embeddings[rows], features[rows], positions
            outputs.append(network.extend(*slots, keys, values, slice(start, end), visible[rows]))
        return torch.cat(outputs)


@dataclass(frozen=True)
class Level:
    """Hold the F * K nodes of one tree level, and which K of them are expanded next.

    All drafted nodes, root first and level by level, are the *pool*: parents are indices into it.
    """

    tokens: Tensor  # int64 [R, F * K]
    parents: Tensor  # int64 [R, F * K], pool indices
    scores: Tensor  # float32 [R, F * K]
    entropies: Tensor  # float32 [R, F * K]
    frontier: Tensor  # int64 [R, K], indices into this level, best first
    frontier_scores: Tensor  # float32 [R, K]
    frontier_parents: Tensor  # int64 [R, K], the parents' rows in the expanded layer, 0..F-1

    @classmethod
    def of(cls, expanded: ops.ExpandedFrontier, parent_nodes: Tensor) -> Level:
        """Return the level below the nodes `parent_nodes` (int64 [R, F], pool indices)."""
        branching, scores = expanded.tokens.shape[2], expanded.scores.flatten(1)
        return cls(
            tokens=expanded.tokens.flatten(1),
            parents=parent_nodes.repeat_interleave(branching, dim=1),
            scores=scores,
            entropies=expanded.entropies.repeat_interleave(branching, dim=1),
            frontier=expanded.frontier,
            frontier_scores=scores.gather(1, expanded.frontier),
            frontier_parents=expanded.frontier // branching,
        )


def is_complete(levels: Sequence[Level], shape: TreeShape) -> Tensor:
    """Return bool [R]: whether no deeper node can be kept, or whether a further level would hold too little.

    A node scores at most its ancestors and loses ties to the nodes before it. So nothing below the best frontier score
    is kept once as many nodes as the budget score no less. Reading the result makes the host wait for the device.
    """
    best = levels[-1].frontier_scores[:, 0]
    least = -torch.inf if shape.min_score is None else shape.min_score
    is_over = (best < least) | (best == -torch.inf)
    if shape.min_mass > 0:
        is_over |= levels[-1].frontier_scores.exp().sum(dim=1) < shape.min_mass
    num_kept = shape.max_nodes - 1
    scores = torch.cat([level.scores for level in levels], dim=1)
    if num_kept == 0 or scores.shape[1] < num_kept:
        return is_over | (num_kept == 0)
    return is_over | (scores.topk(num_kept, dim=1).values[:, -1] >= best)


def best_nodes(root_tokens: Tensor, levels: Sequence[Level], shape: TreeShape) -> DraftTree:
    """Return the trees of the best `shape.max_nodes` nodes of all levels; `root_tokens` is int64 [R]."""
    root = torch.zeros_like(levels[0].scores[:, :1])
    tokens = torch.cat([root_tokens[:, None], *(level.tokens for level in levels)], dim=1)
    scores = torch.cat([root, *(level.scores for level in levels)], dim=1)
    if shape.min_score is not None:
        scores = scores.masked_fill(scores < shape.min_score, -torch.inf)  # prune_tree drops them
    pool = DraftTree(
        tokens=tokens,
        parents=torch.cat([torch.full_like(root_tokens[:, None], -1), *(level.parents for level in levels)], dim=1),
        scores=scores,
        num_nodes=torch.full_like(root_tokens, tokens.shape[1]),
        entropies=torch.cat([root, *(level.entropies for level in levels)], dim=1),
    )
    return ops.prune_tree(pool, shape.max_nodes)


def _gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Return source[r, rows[r, k]]: [R, K, X] of source [R, F, X] and rows int64 [R, K]."""
    return source.gather(1, rows[..., None].expand(-1, -1, source.shape[-1]))
