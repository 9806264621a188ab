"""What one call owns. Models, drafters and the decoder are shared and never change; all that changes is here."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..drafters.base import DrafterState
from ..sampling import SamplingRows
from ..target.kv_cache import TreeKVCache
from ..tree import DraftTree
from .stats import DecodeStats
from .verification import Acceptance


@dataclass(frozen=True)
class StopRules:
    """When a row ends: its own length, an EOS token, or a criterion asked token by token."""

    max_new_tokens: tuple[int, ...]  # per row
    eos_tokens: frozenset[int]
    criteria: tuple[tuple[str, Any], ...]  # (finish reason, transformers StoppingCriteria over [1, length])


@dataclass
class RowText:
    """The text of one row so far."""

    prompt: list[int]  # as given, padding included: what transformers' processors and criteria are shown
    new_tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, tokens: list[int], row: int, rules: StopRules) -> list[int]:
        """Append tokens up to the first that ends the row; returns those that were kept."""
        kept: list[int] = []
        for token in tokens:
            if self.finish_reason is not None:
                break
            self.new_tokens.append(token)
            kept.append(token)
            self.finish_reason = self._reason_to_stop(row, rules)
        return kept

    def _reason_to_stop(self, row: int, rules: StopRules) -> str | None:
        if self.new_tokens[-1] in rules.eos_tokens:
            return "eos"
        if rules.criteria:
            ids = torch.tensor([self.prompt + self.new_tokens])
            for reason, criterion in rules.criteria:
                if bool(torch.as_tensor(criterion(ids, None)).all()):
                    return reason
        return "length" if len(self.new_tokens) >= rules.max_new_tokens[row] else None


@dataclass(frozen=True)
class StepRecord:
    """A verified step on the host: the one synchronisation of a step."""

    tokens: list[list[int]]  # accepted tokens, then the bonus token (left out where the logits were invalid)
    num_accepted: list[int]
    is_invalid: list[bool]
    num_nodes: list[int]
    lengths: list[int]  # committed tokens of each row behind this step
    proposers: list[list[int]]  # the bit mask of each accepted node
    choice: list[int | None]  # the drafter chosen, None when all took part
    log_probs: list[list[float]] | None
    is_prefill: bool

    @classmethod
    def fetch(
        cls,
        tree: DraftTree,
        acceptance: Acceptance,
        lengths: Tensor,
        choice: Tensor | None = None,
        log_probs: Tensor | None = None,
        is_prefill: bool = False,
    ) -> StepRecord:
        """Copy what the host needs, in one transfer. A tree without `proposers` is the prefill's root."""
        no_choice = torch.full_like(lengths, -1)
        scalars = [acceptance.num_accepted, acceptance.is_invalid, tree.num_nodes, lengths]
        scalars.append(no_choice if choice is None else choice)
        masks = torch.zeros_like(tree.tokens) if tree.proposers is None else tree.proposers
        parts = [torch.stack(scalars, dim=1), acceptance.tokens, masks.gather(1, acceptance.path.clamp_min(0))[:, 1:]]
        if log_probs is not None:
            parts.append(log_probs.view(torch.int32).to(torch.int64))
        rows = torch.cat(parts, dim=1).tolist()
        columns = zip(*(row[:5] for row in rows), strict=True)
        counts, invalid, num_nodes, host_lengths, choices = (list(column) for column in columns)
        first_mask = 5 + tree.capacity
        first_bits = first_mask + tree.capacity - 1
        ends = [5 + count + (not bad) for count, bad in zip(counts, invalid, strict=True)]
        return cls(
            tokens=[row[5:end] for row, end in zip(rows, ends, strict=True)],
            num_accepted=counts,
            is_invalid=[bool(bad) for bad in invalid],
            num_nodes=num_nodes,
            lengths=host_lengths,
            proposers=[row[first_mask : first_mask + count] for row, count in zip(rows, counts, strict=True)],
            choice=[None if index < 0 else index for index in choices],
            log_probs=None if log_probs is None else [_floats(row[first_bits:]) for row in rows],
            is_prefill=is_prefill,
        )


def _floats(bits: list[int]) -> list[float]:
    """The float32 values of these bits."""
    return list(struct.unpack(f"{len(bits)}f", struct.pack(f"{len(bits)}i", *bits)))


@dataclass(frozen=True)
class StepEvent:
    """What one step brought, per row: nothing for a row that had already finished."""

    new_tokens: list[list[int]]  # after the cuts by EOS, stop rules and length
    num_accepted: list[int | None]  # None: no decode step (the prefill's event, or a finished row)
    choices: list[str | tuple[str, ...] | None]
    accepted_proposers: list[tuple[tuple[str, ...], ...]]  # of each accepted draft token
    tree: DraftTree | None = None  # what the target verified; None: the prefill's event
    path: Tensor | None = None  # int64 [B, N], its accepted nodes in order from the root on, -1 behind


@dataclass
class DecodeState:
    """One call's caches, lengths, seeds and text: two calls on one decoder share nothing that changes."""

    kv: TreeKVCache
    drafter_states: list[DrafterState]  # a group of drafters
    sampling: SamplingRows
    rules: StopRules
    rows: list[RowText]
    stats: DecodeStats
    prefix_lengths: Tensor  # int64 [B], tokens of each row whose keys and values are committed
    last_positions: Tensor  # int64 [B], the last position whose logits can matter: the text is full behind it
    root_tokens: Tensor  # int64 [B], the last committed token, not yet in the cache
    active: Tensor  # bool [B], rows that still decode

    @property
    def is_finished(self) -> bool:
        return all(row.finish_reason is not None for row in self.rows)

    def advance(self, record: StepRecord) -> StepEvent:
        """Hand a step's tokens to the rows that still decode, count it, and end the rows that are done."""
        count = len(self.rows)
        event = StepEvent([[] for _ in self.rows], [None] * count, [None] * count, [()] * count)
        for b, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            event.new_tokens[b] = self._extend(b, row, record)
            if not record.is_prefill:
                self.stats.record(b, record.num_nodes[b], record.choice[b], record.proposers[b])
                event.num_accepted[b] = self.stats.num_accepted[b][-1]
                event.choices[b] = self.stats.choices[b][-1]
                event.accepted_proposers[b] = self.stats.accepted_proposers[b][-1]
        self.stats.num_target_forwards += 1
        return event

    def _extend(self, b: int, row: RowText, record: StepRecord) -> list[int]:
        kept = row.extend(record.tokens[b], b, self.rules)
        if record.is_invalid[b] and row.finish_reason is None:
            row.finish_reason = "invalid_logits"
        if record.log_probs is not None:
            row.log_probs += record.log_probs[b][: len(kept)]
        self.stats.num_tokens[b] += len(kept)
        if row.finish_reason is not None:
            self.active[b].fill_(False)  # where it lies: a new tensor would be copied there, and the host would wait
        return kept
