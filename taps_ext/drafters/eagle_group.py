"""EAGLE-2 drafters of one shape that draft in lockstep: one embedding look-up, one lm_head product, one
expand_frontier a level and one prune_tree for all of them. What drafts alone is a group of one.

Committed slots lie in row layout: row b owns columns 0 .. lengths[b] - 1 of the caches, and slot i has rotary position
i. The trees' slots are transient: they lie at common columns from the longest row's end, are masked by row length and
ancestry, and are overwritten by whatever comes next.

Source: EAGLE-2 (arXiv 2406.16858), section 4. Dims: D drafters, B rows, R = D * B trees (drafter by drafter), T slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..sampling import SamplingRows
from ..tree import DraftTree, TreeShape
from . import evidence
from .base import DrafterState
from .coupling import Calibration, couple
from .eagle_stack import EagleStack
from .eagle_state import EagleState, own_state
from .levels import Level, capacity_of, is_complete, scatter_rows, split, to_tree
from .network import EagleNetwork


class EagleGroup:
    """Networks that make one stack, over one embedding and lm_head. See `DrafterGroup`."""

    def __init__(
        self,
        networks: Sequence[EagleNetwork],
        embedding: nn.Module,
        lm_head: nn.Module,
        calibrations: Sequence[Calibration | None] | None = None,
    ) -> None:
        self.networks = list(networks)
        self.config = self.networks[0].config
        self.embedding = embedding
        self.lm_head = lm_head
        self.calibrations = list(calibrations or [None] * len(self.networks))
        weight = self.networks[0].fc.weight
        self.dtype, self.device = weight.dtype, weight.device
        self._lm_head_dtype, _ = compute_dtype_and_device(lm_head, embedding)
        self._stack = EagleStack(self.networks)
        self._alone = [self]
        if len(self.networks) > 1:
            pairs = zip(self.networks, self.calibrations, strict=True)
            self._alone = [EagleGroup([network], embedding, lm_head, [found]) for network, found in pairs]

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> EagleState:
        """See `Drafter.reset`; the caches are allocated by the first observe, when their size is known."""
        config, rows = self.config, (len(self.networks), batch_size)
        with torch.inference_mode(False):  # ordinary tensors, so that every mode may write to them later
            empty = torch.zeros(
                *rows, config.num_key_value_heads, 0, config.head_dim, dtype=self.dtype, device=self.device
            )
            return EagleState(
                lengths=torch.zeros(batch_size, dtype=torch.int64, device=self.device),
                row_lengths=[0] * batch_size,
                last_output=torch.zeros(*rows, config.hidden_size, dtype=self.dtype, device=self.device),
                keys=empty,
                values=empty,
                coupled=None if sampling is None else couple(self.calibrations, sampling, self.device),
                decay=decay,
                evidence=None if decay is None else torch.zeros(rows, device=self.device),
            )

    @torch.no_grad()
    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        """See `Drafter.observe`."""
        state = own_state(state)
        self._check_observed(state, features, next_tokens, num_tokens)
        counts = num_tokens.tolist() if counts is None else counts
        num_slots = max(counts)
        if num_slots > next_tokens.shape[1]:
            raise ValueError(f"num_tokens must lie in 0..{next_tokens.shape[1]} (the slots given), got {num_slots}")
        if num_slots == 0:
            return
        num_tokens = num_tokens.to(self.device)
        slots = torch.arange(num_slots, device=self.device)
        is_slot = slots < num_tokens[:, None]
        # Padding may hold anything, NaN included, and zero times NaN would reach a row through its masked columns.
        tokens = torch.where(is_slot, next_tokens[:, :num_slots].to(self.device), 0)
        features = torch.where(is_slot[..., None], features[:, :num_slots].to(self.device, self.dtype), 0)
        out = self._forward_committed(state, self._embed(tokens), features, slots)
        if state.decay is not None:
            self._keep_evidence(state, out, tokens, num_tokens, state.decay)
        last = (num_tokens - 1).clamp(min=0)[None, :, None, None].expand(*out.shape[:2], 1, out.shape[-1])
        state.last_output = torch.where((num_tokens > 0)[:, None], out.gather(2, last)[:, :, 0], state.last_output)
        state.lengths = state.lengths + num_tokens
        state.row_lengths = [length + count for length, count in zip(state.row_lengths, counts, strict=True)]

    def _keep_evidence(self, state: EagleState, out: Tensor, tokens: Tensor, num_tokens: Tensor, decay: float) -> None:
        """Discount the evidence by the tokens observed, and add what their predictions say."""
        assert state.evidence is not None
        is_prompt = state.lengths == 0
        found, logits = evidence.observed(
            out, tokens, num_tokens, is_prompt, decay, self._logits, self.config.vocab_size
        )
        is_observed = num_tokens > 0
        if state.last_logits is not None:  # the first token was predicted by the slot before
            first = evidence.log_probability(state.last_logits, tokens[:, 0].expand(len(self.networks), -1))
            is_predicted = is_observed & (state.lengths > 0)
            found = found + torch.where(is_predicted, first * decay ** (num_tokens - 1).clamp(min=0).float(), 0)
            logits = torch.where(is_observed[:, None], logits, state.last_logits)
        state.last_logits = logits
        state.evidence = state.evidence * decay ** num_tokens.float() + found

    def _forward_committed(self, state: EagleState, embeddings: Tensor, features: Tensor, slots: Tensor) -> Tensor:
        """The outputs [D, B, T, H] of new slots behind each row's own, of embeddings and features [B, T, H].

        A row's padding lands past its length, where no mask lets anybody see it.
        """
        start, every = state.kv_length, (len(self.networks), -1, -1, -1)
        end = start + len(slots)
        state.reserve(end)
        columns = state.lengths[:, None] + slots
        embeddings, features = embeddings.expand(every), features.expand(every)
        if start == 0:  # nothing observed yet: plain causal attention among the new slots
            return self._forward(state, embeddings, features, columns, slice(0, end), end, None)
        visible = torch.arange(end, device=self.device) <= columns[..., None]
        mask = visible[:, None].expand(len(self.networks), -1, -1, -1, -1)
        return self._forward(state, embeddings, features, columns, columns, end, mask)

    @torch.no_grad()
    def propose(
        self,
        state: DrafterState,
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> list[DraftTree]:
        """A tree a drafter, see `DrafterGroup.propose`. Reads nothing from a device that it would have to wait for."""
        state, device = own_state(state), root_tokens.device
        branching = min(shape.branching, self.config.vocab_size)
        num_slots = state.kv_length + (shape.depth - 1) * branching
        state.reserve(num_slots)
        root_tokens, active = root_tokens.to(self.device), active.to(self.device)
        if chosen is None:
            return split(self._grow(state, root_tokens, active, shape), len(self.networks), device)
        trees = []
        for d, rows in enumerate(chosen):
            tree = DraftTree.of_roots(root_tokens).padded(capacity_of(shape, branching))
            if len(rows) > 0:
                places = slice(None) if len(rows) == len(active) else torch.tensor(rows, device=self.device)
                part = state.part(d, rows, places, num_slots)
                grown = self._alone[d]._grow(part, root_tokens[places], active[places], shape)
                tree = grown if isinstance(places, slice) else scatter_rows(tree, places, grown)
            trees += split(tree, 1, device)
        return trees

    def _grow(self, state: EagleState, root_tokens: Tensor, active: Tensor, shape: TreeShape) -> DraftTree:
        """The trees [R, capacity] of all networks and rows, level by level, no further than the budget can tell."""
        num_drafters, branching = len(self.networks), min(shape.branching, self.config.vocab_size)
        root_tokens, active = root_tokens.repeat(num_drafters), active.repeat(num_drafters)
        last_output = state.last_output.flatten(0, 1)[:, None]
        logits = self._logits(last_output) if state.last_logits is None else state.last_logits.flatten(0, 1)[:, None]
        root_scores = torch.zeros_like(root_tokens, dtype=torch.float32)[:, None]
        root_scores.masked_fill_(~active[:, None], -torch.inf)  # -inf: no child survives pruning
        expanded = self._expand(state, logits, root_scores, branching, 1)
        levels = [Level.of(expanded, torch.zeros_like(expanded.frontier[:, :1]))]
        mask = _prefix_mask(state, branching, shape.depth - 1)
        features = last_output.expand(-1, branching, -1)
        pool_start = 1
        for depth in range(1, shape.depth):
            level = levels[-1]
            if can_read(self.device) and bool(is_complete(levels, shape).all()):
                break
            out = self._forward_frontier(state, level, features, mask, depth)
            expanded = self._expand(state, self._logits(out), level.frontier_scores, branching, depth + 1)
            levels.append(Level.of(expanded, pool_start + level.frontier))
            pool_start += level.tokens.shape[1]
            features = _gather_rows(out, levels[-1].frontier_parents)
        return to_tree(root_tokens, levels, shape, capacity_of(shape, branching))

    def _expand(
        self, state: EagleState, logits: Tensor, scores: Tensor, branching: int, depth: int
    ) -> ops.ExpandedFrontier:
        """The children, of depth `depth`, of nodes with these logits [R, F, V] and scores [R, F]."""
        if state.coupled is None:
            return ops.expand_frontier(logits, scores, branching)
        return ops.expand_frontier(logits, scores, branching, state.coupled.at(depth, state.lengths))

    def _forward_frontier(self, state: EagleState, level: Level, features: Tensor, mask: Tensor, depth: int) -> Tensor:
        """The outputs [R, K, H] of a level's frontier; its keys and values join the transient slots.

        `features` are the outputs of the frontier's parents, `mask` [R, K, kv_length + all tree slots] is updated.
        """
        rows = (len(self.networks), len(state.row_lengths))
        branching = level.frontier.shape[1]
        start = state.kv_length + (depth - 1) * branching
        end = start + branching
        if depth > 1:  # a node sees what its parent saw, then itself
            ancestors = mask[:, :, state.kv_length : start]
            ancestors.copy_(_gather_rows(ancestors, level.frontier_parents))
        mask[:, :, start:end] = torch.eye(branching, dtype=torch.bool, device=self.device)
        embeddings = self._embed(level.tokens.gather(1, level.frontier)).unflatten(0, rows)
        positions = (state.lengths + depth - 1)[:, None].expand(-1, branching)
        visible = mask[:, None, :, :end].unflatten(0, rows)
        out = self._forward(state, embeddings, features.unflatten(0, rows), positions, slice(start, end), end, visible)
        return out.flatten(0, 1)

    def _forward(
        self,
        state: EagleState,
        embeddings: Tensor,
        features: Tensor,
        positions: Tensor,
        columns: Tensor | slice,
        end: int,
        mask: Tensor | None,
    ) -> Tensor:
        """Every network over its own slots: outputs [D, B, T, H] of embeddings and features [D, B, T, H].

        Keys and values go to `columns`, a slice or int64 [B, T], all below `end`; `mask` is bool [D, B, 1, T, end], or
        None for a causal one. The one place where the networks run.
        """
        x = self._stack.project(embeddings, features)
        query, key, value = self._stack.qkv(x, positions)
        state.write(columns, key, value)
        attended = self._stack.attend(query, state.keys[:, :, :, :end], state.values[:, :, :, :end], mask)
        return self._stack.finish(x, attended)

    def _embed(self, tokens: Tensor) -> Tensor:
        """The target's embeddings [..., T, H] of the tokens; a target over several devices may hold them elsewhere."""
        embeddings: Tensor = self.embedding(tokens.to(next(self.embedding.parameters()).device))
        return embeddings.to(self.device, self.dtype)

    def _logits(self, out: Tensor) -> Tensor:
        """The target's lm_head [R, T, V] of the networks' outputs [R, T, H]."""
        logits: Tensor = self.lm_head(out.to(self._lm_head_dtype))
        return logits

    def _check_observed(self, state: EagleState, features: Tensor, next_tokens: Tensor, num_tokens: Tensor) -> None:
        batch, hidden = len(state.row_lengths), self.config.hidden_size
        if next_tokens.ndim != 2 or next_tokens.shape[0] != batch:
            raise ValueError(f"next_tokens must be [{batch}, T], got {list(next_tokens.shape)}")
        if features.shape != (*next_tokens.shape, hidden):
            raise ValueError(f"features must be {[*next_tokens.shape, hidden]}, got {list(features.shape)}")
        if num_tokens.shape != (batch,):
            raise ValueError(f"num_tokens must be [{batch}], got {list(num_tokens.shape)}")


def compute_dtype_and_device(lm_head: nn.Module, embedding: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The lm_head's; a quantised lm_head has no dtype to compute in (or no parameter at all), then the embedding's."""
    embedded = next(embedding.parameters())
    weight = next(lm_head.parameters(), embedded)
    computes = weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return (weight if computes else embedded).dtype, weight.device


def can_read(device: torch.device) -> bool:
    """Whether the host may read a value there without waiting: then drafting ends where no further level can matter."""
    return device.type == "cpu"


def _prefix_mask(state: EagleState, branching: int, num_rounds: int) -> Tensor:
    """bool [R, K, kv_length + rounds * K]: the row's own committed columns; the tree's columns are still closed."""
    length = state.kv_length + num_rounds * branching
    columns = torch.arange(length, device=state.lengths.device)
    return (columns < state.lengths[:, None])[:, None].repeat(state.keys.shape[0], branching, 1)


def _gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """source[r, rows[r, k]]: [R, K, X] of source [R, F, X] and rows int64 [R, K]."""
    return source.gather(1, rows[..., None].expand(-1, -1, source.shape[-1]))
