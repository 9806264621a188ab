"""The EAGLE-2 drafter: its KV cache of committed tokens, and the draft tree it grows from the last of them.

Committed slots lie in row layout: row b owns columns 0 .. lengths[b] - 1 of the cache, and slot i has rotary position
i. The tree's slots are transient: they lie at common columns from the longest row's end, are masked by row length and
ancestry, and are overwritten by whatever comes next.

Source: EAGLE-2 (arXiv 2406.16858), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..tree import DraftTree, TreeShape
from .base import DrafterState
from .eagle_network import EagleConfig, EagleNetwork

__all__ = ["EagleConfig", "EagleDrafter", "EagleNetwork", "EagleState"]

MIN_CAPACITY = 256  # slots; capacities are powers of two, so a growth at least doubles


@dataclass(eq=False)
class EagleState(DrafterState):
    """One call's cache. `kv_length` is the longest row's length on the host, so that drafting reads no device value."""

    lengths: Tensor  # int64 [B], observed slots
    kv_length: int  # max(lengths)
    last_output: Tensor  # [B, H], the output of each row's last observed slot
    keys: Tensor  # [B, kv_heads, capacity, head_dim]
    values: Tensor  # [B, kv_heads, capacity, head_dim]

    @property
    def batch_size(self) -> int:
        """B, the call's rows."""
        return self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        """Slots of a row in the cache, committed and transient."""
        return self.keys.shape[2]


@dataclass(frozen=True)
class _Level:
    """The nodes of one tree level, F * K of them, and the K of them that are expanded next."""

    tokens: Tensor  # int64 [B, F * K]
    parents: Tensor  # int64 [B, F * K], pool indices
    scores: Tensor  # float32 [B, F * K]
    entropies: Tensor  # float32 [B, F * K]
    frontier: Tensor  # int64 [B, K], indices into this level
    frontier_parents: Tensor  # int64 [B, K], the parents' rows in the expanded layer, 0..F-1


class EagleDrafter:
    """An EAGLE-2 network with the target's own embedding and lm_head (held by reference, never copied)."""

    def __init__(self, network: EagleNetwork, embedding: nn.Module, lm_head: nn.Module, name: str = "eagle") -> None:
        """`network` stays as it is: put it on the lm_head's device. A network still in training can be measured so."""
        self.name = name
        self.vocab_size = network.config.vocab_size
        self.hidden_size = network.config.hidden_size
        self.network = network
        self.embedding = embedding
        self.lm_head = lm_head
        self.dtype, self.device = network.fc.weight.dtype, network.fc.weight.device
        self._lm_head_dtype, _ = compute_dtype_and_device(lm_head, embedding)

    def reset(self, batch_size: int) -> EagleState:
        """A state for `batch_size` rows; the cache is allocated by the first observe, when its size is known."""
        config = self.network.config
        with torch.inference_mode(False):  # ordinary tensors, so that every mode may write to them later
            empty = torch.zeros(
                batch_size, config.num_key_value_heads, 0, config.head_dim, dtype=self.dtype, device=self.device
            )
            return EagleState(
                lengths=torch.zeros(batch_size, dtype=torch.int64, device=self.device),
                kv_length=0,
                last_output=torch.zeros(batch_size, config.hidden_size, dtype=self.dtype, device=self.device),
                keys=empty,
                values=empty,
            )

    @torch.no_grad()
    def observe(self, state: DrafterState, features: Tensor, next_tokens: Tensor, num_tokens: Tensor) -> None:
        """See `Drafter.observe`. Reads two numbers from the device: the longest row and the most new slots."""
        state = _own(state)
        self._check_observed(state, features, next_tokens, num_tokens)
        num_tokens = num_tokens.to(self.device)
        old_lengths, old_kv_length = state.lengths, state.kv_length
        lengths = old_lengths + num_tokens
        kv_length, num_slots = torch.stack((lengths.max(), num_tokens.max())).tolist()
        if num_slots > next_tokens.shape[1]:
            raise ValueError(f"num_tokens must lie in 0..{next_tokens.shape[1]} (the slots given), got {num_slots}")
        if num_slots == 0:
            return
        slots = torch.arange(num_slots, device=self.device)
        is_slot = slots < num_tokens[:, None]
        # Padding may hold anything, NaN included, and zero times NaN would reach a row through its masked columns.
        tokens = torch.where(is_slot, next_tokens[:, :num_slots].to(self.device), 0)
        features = torch.where(is_slot[..., None], features[:, :num_slots].to(self.device, self.dtype), 0)
        _reserve(state, old_kv_length + num_slots)
        out = self._forward_committed(state, tokens, features, old_lengths[:, None] + slots, old_kv_length + num_slots)
        last = (num_tokens - 1).clamp(min=0)[:, None]
        state.last_output = torch.where(num_tokens[:, None] > 0, _gather_rows(out, last)[:, 0], state.last_output)
        state.lengths, state.kv_length = lengths, kv_length

    def _forward_committed(
        self, state: EagleState, tokens: Tensor, features: Tensor, columns: Tensor, end: int
    ) -> Tensor:
        """The outputs [B, T, H] of new slots, whose keys and values go to `columns` int64 [B, T], all below `end`.

        A row's padding lands past its length, where no mask lets anybody see it.
        """
        x = self.network.project(self._embed(tokens), features)
        query, key, value = self.network.qkv(x, columns)
        if end == tokens.shape[1]:  # nothing observed yet: plain causal attention among the new slots
            state.keys[:, :, :end], state.values[:, :, :end] = key, value
            return self.network.finish(x, self.network.attend(query, key, value, None))
        rows = torch.arange(state.batch_size, device=self.device)[:, None]
        state.keys[rows, :, columns], state.values[rows, :, columns] = key.transpose(1, 2), value.transpose(1, 2)
        visible = torch.arange(end, device=self.device) <= columns[..., None]
        keys, values = state.keys[:, :, :end], state.values[:, :, :end]
        return self.network.finish(x, self.network.attend(query, keys, values, visible[:, None]))

    @torch.no_grad()
    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`. Reads nothing from the device."""
        state = _own(state)
        branching = min(shape.branching, self.vocab_size)
        _reserve(state, state.kv_length + (shape.depth - 1) * branching)
        root_scores = torch.zeros(state.batch_size, 1, dtype=torch.float32, device=self.device)
        root_scores.masked_fill_(~active.to(self.device)[:, None], -torch.inf)  # -inf: no child survives pruning
        expanded = ops.expand_frontier(self._logits(state.last_output[:, None]), root_scores, branching)
        levels = [_level(expanded, torch.zeros_like(expanded.frontier[:, :1]))]
        mask = _prefix_mask(state, branching, shape.depth - 1)
        features = state.last_output[:, None].expand(-1, branching, -1)
        pool_start = 1
        for depth in range(1, shape.depth):
            level = levels[-1]
            out = self._forward_frontier(state, level, features, mask, depth)
            expanded = ops.expand_frontier(self._logits(out), level.scores.gather(1, level.frontier), branching)
            levels.append(_level(expanded, pool_start + level.frontier))
            pool_start += level.tokens.shape[1]
            features = _gather_rows(out, levels[-1].frontier_parents)
        return ops.prune_tree(_pool(root_tokens.to(self.device), levels), shape.max_nodes)

    def _forward_frontier(self, state: EagleState, level: _Level, features: Tensor, mask: Tensor, depth: int) -> Tensor:
        """The outputs [B, K, H] of a level's frontier; its keys and values join the transient slots.

        `features` are the outputs of the frontier's parents, `mask` [B, 1, K, kv_length + all tree slots] is updated.
        """
        branching = level.frontier.shape[1]
        start = state.kv_length + (depth - 1) * branching
        end = start + branching
        if depth > 1:  # a node sees what its parent saw, then itself
            ancestors = mask[:, 0, :, state.kv_length : start]
            ancestors.copy_(_gather_rows(ancestors, level.frontier_parents))
        mask[:, 0, :, start:end] = torch.eye(branching, dtype=torch.bool, device=self.device)
        x = self.network.project(self._embed(level.tokens.gather(1, level.frontier)), features)
        positions = (state.lengths + depth - 1)[:, None].expand(-1, branching)
        query, state.keys[:, :, start:end], state.values[:, :, start:end] = self.network.qkv(x, positions)
        keys, values = state.keys[:, :, :end], state.values[:, :, :end]
        return self.network.finish(x, self.network.attend(query, keys, values, mask[..., :end]))

    def _embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings [B, T, H] of the tokens; a target over several devices may hold them elsewhere."""
        embeddings: Tensor = self.embedding(tokens.to(next(self.embedding.parameters()).device))
        return embeddings.to(self.device, self.dtype)

    def _logits(self, out: Tensor) -> Tensor:
        """The target's lm_head [B, T, V] of the network's outputs."""
        logits: Tensor = self.lm_head(out.to(self._lm_head_dtype))
        return logits

    def _check_observed(self, state: EagleState, features: Tensor, next_tokens: Tensor, num_tokens: Tensor) -> None:
        batch, hidden = state.batch_size, self.network.config.hidden_size
        if next_tokens.ndim != 2 or next_tokens.shape[0] != batch:
            raise ValueError(f"next_tokens must be [{batch}, T], got {list(next_tokens.shape)}")
        if features.shape != (*next_tokens.shape, hidden):
            raise ValueError(f"features must be {[*next_tokens.shape, hidden]}, got {list(features.shape)}")
        if num_tokens.shape != (batch,):
            raise ValueError(f"num_tokens must be [{batch}], got {list(num_tokens.shape)}")


def _own(state: DrafterState) -> EagleState:
    if not isinstance(state, EagleState):
        raise TypeError(f"an EAGLE drafter needs the state that its reset() made, got {type(state).__name__}")
    return state


def compute_dtype_and_device(lm_head: nn.Module, embedding: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The lm_head's; a quantised lm_head has no dtype to compute in (or no parameter at all), then the embedding's."""
    embedded = next(embedding.parameters())
    weight = next(lm_head.parameters(), embedded)
    computes = weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (weight if computes else embedded).dtype, weight.device


def _reserve(state: EagleState, num_slots: int) -> None:
    """Grow the cache to at least `num_slots` a row: rare, by doubling, the committed slots kept."""
    if num_slots <= state.capacity:
        return
    capacity = max(MIN_CAPACITY, 1 << (num_slots - 1).bit_length())
    batch, heads, held, head_dim = state.keys.shape
    with torch.inference_mode(False):
        grown = [state.keys.new_zeros(batch, heads, capacity, head_dim) for _ in range(2)]
    for new, old in zip(grown, (state.keys, state.values), strict=True):
        new[:, :, :held] = old
    state.keys, state.values = grown


def _prefix_mask(state: EagleState, branching: int, num_rounds: int) -> Tensor:
    """bool [B, 1, K, kv_length + rounds * K]: the row's own committed columns; the tree's columns are still closed."""
    length = state.kv_length + num_rounds * branching
    columns = torch.arange(length, device=state.lengths.device)
    return (columns < state.lengths[:, None])[:, None, None].repeat(1, 1, branching, 1)


def _level(expanded: ops.ExpandedFrontier, parent_nodes: Tensor) -> _Level:
    """The level below the nodes `parent_nodes` (int64 [B, F], pool indices), flattened."""
    branching = expanded.tokens.shape[2]
    return _Level(
        tokens=expanded.tokens.flatten(1),
        parents=parent_nodes.repeat_interleave(branching, dim=1),
        scores=expanded.scores.flatten(1),
        entropies=expanded.entropies.repeat_interleave(branching, dim=1),
        frontier=expanded.frontier,
        frontier_parents=expanded.frontier // branching,
    )


def _pool(root_tokens: Tensor, levels: list[_Level]) -> DraftTree:
    """All nodes drafted, root first, level by level."""
    root = torch.zeros_like(levels[0].scores[:, :1])
    tokens = torch.cat([root_tokens[:, None], *(level.tokens for level in levels)], dim=1)
    return DraftTree(
        tokens=tokens,
        parents=torch.cat([torch.full_like(root_tokens[:, None], -1), *(level.parents for level in levels)], dim=1),
        scores=torch.cat([root, *(level.scores for level in levels)], dim=1),
        num_nodes=torch.full_like(root_tokens, tokens.shape[1]),
        entropies=torch.cat([root, *(level.entropies for level in levels)], dim=1),
    )


def _gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """source[b, rows[b, k]]: [B, K, X] of source [B, F, X] and rows int64 [B, K]."""
    return source.gather(1, rows[..., None].expand(-1, -1, source.shape[-1]))
