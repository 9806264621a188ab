"""The EAGLE-2 drafter: one network over the target's features, with the target's own embedding and lm_head.

Committed slots lie in row layout: row b owns columns 0 .. lengths[b] - 1 of the caches, and slot i has rotary position
i. The slots of a growing tree are transient: they lie at common columns behind the longest row's end, are masked by
row length and ancestry, and are overwritten by whatever comes next.

Drafters of one target draft together, level by level: one embedding look-up, one lm_head product and one
`expand_frontier` per level for all of them, and one `prune_tree` at the end. Their networks run one after the other.

Source: EAGLE-2 (arXiv 2406.16858), section 4. Dims: B rows, R trees (drafter by drafter), T slots, H hidden,
K branching, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..sampling import SamplingRows
from ..tree import DraftTree, Lengths, TreeShape
from . import evidence
from .base import Drafter, DrafterState, own_state
from .coupling import Calibration, CoupledRows
from .levels import Level, best_nodes, is_complete
from .network import EagleConfig, EagleNetwork

__all__ = ["EagleConfig", "EagleDrafter", "EagleNetwork", "EagleState", "compute_dtype_and_device"]

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
    last_logits: Tensor | None = None  # [B, V], of `last_output`, if evidence is kept

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


class EagleDrafter(Drafter):
    """Draft with an EAGLE-2 network and the target's own embedding and lm_head, held by reference, never copied."""

    def __init__(
        self,
        network: EagleNetwork,
        embedding: nn.Module,
        lm_head: nn.Module,
        name: str = "eagle",
        calibration: Calibration | None = None,
    ) -> None:
        """Take a network that is on the lm_head's device; one that is being trained can be measured and stays as it is.

        `calibration` is needed for coupled drafting; without it the drafter drafts as EAGLE-2 does.
        """
        self.name = name
        self.vocab_size = network.config.vocab_size
        self.hidden_size = network.config.hidden_size
        self.network = network
        self.calibration = calibration
        self.embedding = embedding
        self.lm_head = lm_head
        self.dtype, self.device = network.fc.weight.dtype, network.fc.weight.device
        self._lm_head_dtype, _ = compute_dtype_and_device(lm_head, embedding)

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> EagleState:
        """See `Drafter.reset`. The caches are allocated by the first `observe`, when their size is known."""
        config = self.network.config
        with torch.inference_mode(False):  # ordinary tensors, so that every mode may write to them later
            empty = torch.zeros(
                batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=self.dtype, device=self.device
            )
            return EagleState(
                lengths=Lengths.of([0] * batch_size, self.device),
                last_output=torch.zeros(batch_size, config.hidden_size, dtype=self.dtype, device=self.device),
                keys=empty,
                values=empty,
                coupled=None if sampling is None else CoupledRows.of(self.calibration, sampling, self.device),
                decay=decay,
                evidence=None if decay is None else torch.zeros(batch_size, device=self.device),
            )

    @torch.no_grad()
    def observe(self, state: DrafterState, features: Tensor, next_tokens: Tensor, num_tokens: Lengths) -> None:
        """See `Drafter.observe`."""
        state = own_state(state, EagleState)
        self._check_observed(state, features, next_tokens, num_tokens)
        num_slots = num_tokens.longest
        if num_slots == 0:
            return
        counts = num_tokens.tensor.to(self.device)
        slots = torch.arange(num_slots, device=self.device)
        is_slot = slots < counts[:, None]
        # Padding may hold anything, NaN included, and zero times NaN would reach a row through its masked columns.
        tokens = torch.where(is_slot, next_tokens[:, :num_slots].to(self.device), 0)
        features = torch.where(is_slot[..., None], features[:, :num_slots].to(self.device, self.dtype), 0)
        outputs = self._extend_committed(state, self.embed(tokens), features, slots)
        if state.decay is not None:
            self._keep_evidence(state, outputs, tokens, counts, state.decay)
        last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, 1, outputs.shape[-1])
        state.last_output = torch.where((counts > 0)[:, None], outputs.gather(1, last)[:, 0], state.last_output)
        state.lengths = state.lengths.plus(num_tokens)

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`."""
        return self.propose_together((), [state], root_tokens, shape, active)[0]

    def propose_rows(
        self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor, rows: Sequence[int]
    ) -> DraftTree:
        """See `Drafter.propose_rows`: the other rows take no part in any forward."""
        state = own_state(state, EagleState)
        num_slots = state.lengths.longest + _num_tree_slots(shape, self.vocab_size)
        state.reserve(num_slots)
        places = torch.tensor(rows, device=self.device)
        root_tokens_here, active = root_tokens.to(self.device), active.to(self.device)
        part = state.select(rows, places, num_slots)
        grown = _grow([self], [part], root_tokens_here[places], shape, active[places])
        roots = DraftTree.of_roots(root_tokens_here).padded(grown.capacity)
        return roots.with_rows(places, grown).to(root_tokens.device)

    def drafts_with(self, other: Drafter) -> bool:
        """See `Drafter.drafts_with`: both share embedding, lm_head, dtype and device. A subclass drafts alone."""
        return (
            type(self) is type(other) is EagleDrafter
            and self.embedding is other.embedding
            and self.lm_head is other.lm_head
            and (self.dtype, self.device) == (other.dtype, other.device)
        )

    @torch.no_grad()
    def propose_together(
        self,
        others: Sequence[Drafter],
        states: Sequence[DrafterState],
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
    ) -> list[DraftTree]:
        """See `Drafter.propose_together`."""
        drafters = [self, *(other for other in others if isinstance(other, EagleDrafter))]
        own_states = [own_state(state, EagleState) for state in states]
        for state in own_states:
            state.reserve(state.lengths.longest + _num_tree_slots(shape, self.vocab_size))
        device = root_tokens.device
        grown = _grow(drafters, own_states, root_tokens.to(self.device), shape, active.to(self.device))
        return [tree.to(device) for tree in _split(grown, len(drafters))]

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the target's embeddings [..., H] of tokens, on the network's device and in its dtype."""
        embeddings: Tensor = self.embedding(tokens.to(next(self.embedding.parameters()).device))
        return embeddings.to(self.device, self.dtype)

    def logits(self, outputs: Tensor) -> Tensor:
        """Return the target's lm_head [..., V] of the network's outputs [..., H]."""
        logits: Tensor = self.lm_head(outputs.to(self._lm_head_dtype))
        return logits

    def _extend_committed(self, state: EagleState, embeddings: Tensor, features: Tensor, slots: Tensor) -> Tensor:
        """Return the outputs [B, T, H] of new slots behind each row's committed ones.

        A row's padding lands behind its new length, where no mask shows it to anyone.
        """
        start = state.lengths.longest
        end = start + len(slots)
        state.reserve(end)
        keys, values = state.keys[:, :, :end], state.values[:, :, :end]
        columns = state.lengths.tensor[:, None] + slots
        if start == 0:  # nothing observed yet: plain causal attention among the new slots
            return self.network.extend(embeddings, features, columns, keys, values, slice(0, end), None)
        visible = torch.arange(end, device=self.device) <= columns[..., None]
        return self.network.extend(embeddings, features, columns, keys, values, columns, visible[:, None])

    def _keep_evidence(self, state: EagleState, outputs: Tensor, tokens: Tensor, counts: Tensor, decay: float) -> None:
        """Discount the evidence by the observed tokens, and add the log-probabilities that the drafter gave them."""
        assert state.evidence is not None
        is_prompt = state.lengths.tensor == 0
        gained, logits = evidence.of_observation(
            outputs, tokens, counts, is_prompt, decay, self.logits, self.vocab_size
        )
        is_observed = counts > 0
        if state.last_logits is not None:  # the first token was predicted by the slot before
            first = evidence.token_log_probs(state.last_logits, tokens[:, 0])
            is_predicted = is_observed & (state.lengths.tensor > 0)
            gained = gained + torch.where(is_predicted, first * decay ** (counts - 1).clamp(min=0).float(), 0)
            logits = torch.where(is_observed[:, None], logits, state.last_logits)
        state.last_logits = logits
        state.evidence = state.evidence * decay ** counts.float() + gained

    def _check_observed(self, state: EagleState, features: Tensor, next_tokens: Tensor, num_tokens: Lengths) -> None:
        batch_size = len(state.lengths.host)
        if next_tokens.ndim != 2 or next_tokens.shape[0] != batch_size:
            raise ValueError(f"next_tokens must be [{batch_size}, T], got {list(next_tokens.shape)}")
        if features.shape != (*next_tokens.shape, self.hidden_size):
            raise ValueError(f"features must be {[*next_tokens.shape, self.hidden_size]}, got {list(features.shape)}")
        if len(num_tokens.host) != batch_size:
            raise ValueError(f"num_tokens must be [{batch_size}], got [{len(num_tokens.host)}]")
        if num_tokens.longest > next_tokens.shape[1]:
            raise ValueError(
                f"num_tokens must lie in 0..{next_tokens.shape[1]} (the slots given), got {num_tokens.longest}"
            )


def compute_dtype_and_device(lm_head: nn.Module, embedding: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Return the lm_head's dtype and device; a quantised lm_head has no dtype to compute in: then the embedding's."""
    embedded = next(embedding.parameters())
    weight = next(lm_head.parameters(), embedded)
    computes = weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (weight if computes else embedded).dtype, weight.device


def can_read(device: torch.device) -> bool:
    """Return whether the host may read values there without waiting: then drafting stops when no level can matter."""
    return device.type == "cpu"


@torch.no_grad()
def _grow(
    drafters: Sequence[EagleDrafter],
    states: Sequence[EagleState],
    root_tokens: Tensor,
    shape: TreeShape,
    active: Tensor,
) -> DraftTree:
    """Return the trees [R, capacity] of all drafters and rows, level by level, as deep as the budget can tell."""
    first, branching = drafters[0], min(shape.branching, drafters[0].vocab_size)
    root_tokens, active = root_tokens.repeat(len(drafters)), active.repeat(len(drafters))
    frontier = _Frontier(drafters, states, branching, shape.depth - 1)
    outputs = torch.cat([state.last_output for state in states])[:, None]
    last_logits = [state.last_logits for state in states if state.last_logits is not None]
    logits = torch.cat(last_logits)[:, None] if len(last_logits) == len(states) else first.logits(outputs)
    scores = torch.zeros_like(root_tokens, dtype=torch.float32)[:, None]
    scores.masked_fill_(~active[:, None], -torch.inf)  # -inf: no child survives pruning
    expanded = frontier.expand(logits, scores, 1)
    levels = [Level.of(expanded, torch.zeros_like(expanded.frontier[:, :1]))]
    features = outputs.expand(-1, branching, -1)
    pool_start = 1
    for depth in range(1, shape.depth):
        level = levels[-1]
        if can_read(first.device) and bool(is_complete(levels, shape).all()):
            break
        outputs = frontier.forward(level, features, depth)
        expanded = frontier.expand(first.logits(outputs), level.frontier_scores, depth + 1)
        levels.append(Level.of(expanded, pool_start + level.frontier))
        pool_start += level.tokens.shape[1]
        features = _gather_rows(outputs, levels[-1].frontier_parents)
    return best_nodes(root_tokens, levels, shape).padded(shape.capacity(first.vocab_size))


class _Frontier:
    """Run drafters over the frontiers of their growing trees. All drafters have observed the same slots."""

    def __init__(
        self, drafters: Sequence[EagleDrafter], states: Sequence[EagleState], branching: int, num_rounds: int
    ) -> None:
        self.drafters, self.states, self.branching = drafters, states, branching
        self.lengths = states[0].lengths
        coupled = [state.coupled for state in states if state.coupled is not None]
        is_coupled = len(coupled) == len(states) and any(one.calibration is not None for one in drafters)
        self.coupled = CoupledRows.join(coupled) if is_coupled else None
        # bool [R, K, columns]: each row's committed columns, then the columns of the tree's slots, still closed
        columns = torch.arange(self.lengths.longest + num_rounds * branching, device=drafters[0].device)
        committed = columns < self.lengths.tensor[:, None]
        self.mask = committed[:, None].repeat(len(drafters), branching, 1)

    def expand(self, logits: Tensor, scores: Tensor, depth: int) -> ops.ExpandedFrontier:
        """Return the children at `depth` of nodes with these logits [R, F, V] and scores [R, F]."""
        coupling = None if self.coupled is None else self.coupled.at(depth, self.lengths.tensor)
        return ops.expand_frontier(logits, scores, self.branching, coupling)

    def forward(self, level: Level, features: Tensor, depth: int) -> Tensor:
        """Return the outputs [R, K, H] of a level's frontier; its keys and values join the transient slots.

        `features` are the outputs of the frontier's parents.
        """
        committed, batch_size = self.lengths.longest, len(self.lengths.host)
        start = committed + (depth - 1) * self.branching
        end = start + self.branching
        if depth > 1:  # a node sees what its parent saw, then itself
            ancestors = self.mask[:, :, committed:start]
            ancestors.copy_(_gather_rows(ancestors, level.frontier_parents))
        self.mask[:, :, start:end] = torch.eye(self.branching, dtype=torch.bool, device=self.mask.device)
        visible = self.mask[:, None, :, :end]
        embeddings = self.drafters[0].embed(level.tokens.gather(1, level.frontier))
        positions = (self.lengths.tensor + depth - 1)[:, None].expand(-1, self.branching)
        outputs = []
        for d, (drafter, state) in enumerate(zip(self.drafters, self.states, strict=True)):
            rows = slice(d * batch_size, (d + 1) * batch_size)
            keys, values = state.keys[:, :, :end], state.values[:, :, :end]
            slots = embeddings[rows], features[rows], positions
            outputs.append(drafter.network.extend(*slots, keys, values, slice(start, end), visible[rows]))
        return torch.cat(outputs)


def _num_tree_slots(shape: TreeShape, vocab_size: int) -> int:
    """Return the cache slots that a growing tree takes: those of all expanded frontiers but the root's."""
    return (shape.depth - 1) * min(shape.branching, vocab_size)


def _split(trees: DraftTree, num_drafters: int) -> list[DraftTree]:
    """Return each drafter's trees, of the trees of all, drafter by drafter."""
    assert trees.entropies is not None
    parts = (trees.tokens, trees.parents, trees.scores, trees.num_nodes, trees.entropies)
    return [
        DraftTree(tokens, parents, scores, num_nodes, entropies=entropies)
        for tokens, parents, scores, num_nodes, entropies in zip(
            *(part.chunk(num_drafters) for part in parts), strict=True
        )
    ]


def _gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Return source[r, rows[r, k]]: [R, K, X] of source [R, F, X] and rows int64 [R, K]."""
    return source.gather(1, rows[..., None].expand(-1, -1, source.shape[-1]))
