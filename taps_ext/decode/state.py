"""The state of one call. Models, drafters and the decoder are shared and never change; what changes is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..drafters import DrafterState
from ..sampling import SamplingRows
from ..target.kv_cache import TreeKVCache
from ..tree import DraftTree, Lengths
from .budget import HostOutlook, Outlook, TreeBudget
from .stats import DecodeStats


@dataclass(frozen=True)
class StopRules:
    """Say when a row ends: at its own length, at an EOS token, or when a criterion, asked after each token, says so."""

    max_new_tokens: tuple[int, ...]  # per row
    eos_tokens: frozenset[int]
    criteria: tuple[tuple[str, Any], ...]  # (finish reason, transformers StoppingCriteria over [1, length])


@dataclass
class RowText:
    """Hold the text of one row so far."""

    prompt: list[int]  # as given, padding included, like transformers' processors and criteria are shown it
    new_tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, tokens: list[int], row: int, rules: StopRules) -> list[int]:
        """Append tokens up to the first one that ends the row; return the appended ones."""
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
class Observation:
    """Hold committed tokens as `Drafter.observe` takes them."""

    features: Tensor  # [B, T, H]
    next_tokens: Tensor  # int64 [B, T]
    num_tokens: Lengths  # of each row; the slots behind are padding

    @classmethod
    def join(cls, parts: Sequence[Observation]) -> Observation:
        """Return the observations of several steps as one, each row's tokens in a row."""
        if len(parts) == 1:
            return parts[0]
        tokens = torch.cat([part.next_tokens for part in parts], dim=1)
        is_padding = torch.cat(
            [
                torch.arange(part.next_tokens.shape[1], device=tokens.device) >= part.num_tokens.tensor[:, None]
                for part in parts
            ],
            dim=1,
        )
        order = is_padding.long().argsort(dim=1, stable=True)
        features = torch.cat([part.features for part in parts], dim=1)
        features = features.gather(1, order[:, :, None].expand_as(features))
        return cls(features, tokens.gather(1, order), reduce(Lengths.plus, (part.num_tokens for part in parts)))


@dataclass(frozen=True)
class Acceptance:
    """Hold what the target keeps of each tree, and the token that it adds."""

    path: Tensor  # int64 [B, N], the root and the accepted nodes, then -1
    num_accepted: Tensor  # int64 [B], accepted draft tokens
    tokens: Tensor  # int64 [B, N], the accepted tokens, the bonus token behind them, then -1
    bonus_tokens: Tensor  # int64 [B], -1 where a visited row of logits was invalid
    is_invalid: Tensor  # bool [B], a visited row held NaN or no finite maximum


@dataclass(frozen=True)
class StepOutput:
    """Hold a verified step on the device."""

    tree: DraftTree
    acceptance: Acceptance
    features: Tensor  # [B, N, H], the target's, of every node; in a prefill [B, P, H], of the prompts
    next_tokens: Tensor  # int64 [B, N], the token behind each node of the accepted path; in a prefill [B, P]
    num_committed: Tensor  # int64 [B], tokens that join the prefix, 0 for a row that had ended
    choice: Tensor | None = None  # int64 [B], the drafter chosen; None: all took part
    log_probs: Tensor | None = None  # float32 [B, N], if asked for
    outlook: Outlook | None = None  # where the trees adapt
    is_prefill: bool = False  # the step committed prompts: it is no decode step


@dataclass(frozen=True)
class StepRecord:
    """Hold a verified step on the host."""

    tokens: list[list[int]]  # accepted tokens, then the bonus token (missing where the logits were invalid)
    num_accepted: list[int]
    is_invalid: list[bool]
    num_nodes: list[int]
    proposers: list[list[int]]  # the bit mask of each accepted node
    choice: list[int] | None  # the drafter chosen; None: all took part
    log_probs: list[list[float]] | None
    outlook: HostOutlook | None

    @classmethod
    def fetch(cls, output: StepOutput) -> StepRecord:
        """Copy to the host what it needs: the one wait of a step."""
        acceptance, tree = output.acceptance, output.tree
        wanted: dict[str, Tensor] = {"is_invalid": acceptance.is_invalid, "tokens": acceptance.tokens}
        if tree.capacity > 1:
            assert tree.proposers is not None
            proposers = tree.proposers.gather(1, acceptance.path[:, 1:].clamp_min(0))
            wanted |= {"num_accepted": acceptance.num_accepted, "num_nodes": tree.num_nodes, "proposers": proposers}
        if output.choice is not None:
            wanted["choice"] = output.choice
        if output.log_probs is not None:
            wanted["log_probs"] = output.log_probs
        if output.outlook is not None:
            wanted |= vars(output.outlook)
        host = to_host(wanted)
        invalid, of_roots = host["is_invalid"], [0] * tree.batch_size
        counts, masks = host.get("num_accepted", of_roots), host.get("proposers", [[]] * tree.batch_size)
        ends = [count + (not bad) for count, bad in zip(counts, invalid, strict=True)]
        return cls(
            tokens=[row[:end] for row, end in zip(host["tokens"], ends, strict=True)],
            num_accepted=counts,
            is_invalid=invalid,
            num_nodes=host.get("num_nodes", [1] * tree.batch_size),
            proposers=[row[:count] for row, count in zip(masks, counts, strict=True)],
            choice=host.get("choice"),
            log_probs=host.get("log_probs"),
            outlook=(host["gains"], host["levels"], host["promised"]) if output.outlook is not None else None,
        )


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors as lists: copies that do not block, then one wait for the device."""
    device = next(iter(tensors.values())).device
    if device.type == "cpu":
        return {name: tensor.tolist() for name, tensor in tensors.items()}
    copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return {name: copy.tolist() for name, copy in copies.items()}


@dataclass(frozen=True)
class StepEvent:
    """Report what one step brought, per row: nothing for a row that had already finished."""

    new_tokens: list[list[int]]  # after the cuts by EOS, stop rules and length
    num_accepted: list[int | None]  # None: no decode step (the prefill's event, or a finished row)
    choices: list[str | tuple[str, ...] | None]
    accepted_proposers: list[tuple[tuple[str, ...], ...]]  # of each accepted draft token
    tree: DraftTree | None = None  # what the target verified; None: the prefill's event
    path: Tensor | None = None  # int64 [B, N], the accepted nodes in order, the root first, then -1


@dataclass
class DecodeState:
    """Hold one call's caches, lengths, seeds and text: two calls on one decoder share nothing that changes."""

    kv: TreeKVCache  # with the one `lengths` of the committed tokens
    drafter_states: list[DrafterState]  # one per drafter
    sampling: SamplingRows
    rules: StopRules
    rows: list[RowText]
    stats: DecodeStats
    last_positions: Tensor  # int64 [B], the last position whose logits can matter: behind it the text is full
    root_tokens: Tensor  # int64 [B], the last committed token, not yet in the cache
    roots: DraftTree  # trees of a root alone, of any token
    active: Tensor  # bool [B], rows that still decode
    text: Tensor | None  # int64 [B, longest + 1], the committed tokens, root included; None: nothing looks at them
    pending: list[list[Observation]]  # per drafter, what it has not observed yet
    budget: TreeBudget | None = None  # where the trees adapt
    root_state: DrafterState | None = None  # of what extends the roots from a store

    @property
    def is_finished(self) -> bool:
        """Whether all rows have ended."""
        return all(row.finish_reason is not None for row in self.rows)

    def running(self, lengths: Lengths) -> Lengths:
        """Return `lengths` with 0 for rows that have ended."""
        if not any(row.finish_reason for row in self.rows):
            return lengths
        host = tuple(0 if row.finish_reason else count for row, count in zip(self.rows, lengths.host, strict=True))
        return Lengths(torch.where(self.active, lengths.tensor, 0), host)

    def committed(self, output: StepOutput, record: StepRecord) -> Lengths:
        """Return the tokens that a decode step adds to each row's prefix; call it before `advance`."""
        pairs = zip(self.rows, record.num_accepted, strict=True)
        return Lengths(output.num_committed, tuple(0 if row.finish_reason else count + 1 for row, count in pairs))

    def advance(self, output: StepOutput, record: StepRecord) -> StepEvent:
        """Give a step's tokens to the rows that still decode, count the step, and end the rows that are done."""
        count = len(self.rows)
        verified = () if output.is_prefill else (output.tree, output.acceptance.path)
        event = StepEvent([[] for _ in self.rows], [None] * count, [None] * count, [()] * count, *verified)
        for b, row in enumerate(self.rows):
            if row.finish_reason is not None:
                continue
            event.new_tokens[b] = self._extend(b, row, record)
            if not output.is_prefill:
                choice = None if record.choice is None else record.choice[b]
                self.stats.record(b, record.num_nodes[b], choice, record.proposers[b])
                event.num_accepted[b] = self.stats.num_accepted[b][-1]
                event.choices[b] = self.stats.choices[b][-1]
                event.accepted_proposers[b] = self.stats.accepted_proposers[b][-1]
        if self.budget is not None and not output.is_prefill:
            self.budget.record(record.outlook, event.num_accepted, record.proposers)
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
            self.active[b].fill_(False)  # in place: a new tensor would have to be copied there, and the host would wait
        return kept
