"""Statistics of a call, step by step: the only place that counts acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass
class DecodeStats:
    """Count acceptance per row and decode step; the prefill and its token are no step.

    `num_accepted[b][s]`: draft tokens kept in row b's step s, before any cut by EOS or length, without the bonus token.
    `choices[b][s]`: the name of the drafter chosen; for merged trees the names of those that proposed the deepest
    accepted node (empty when none was accepted). `accepted_proposers[b][s]`: the proposers of each accepted node.
    `num_nodes[b][s]`: the nodes that the target verified, root included.
    """

    drafters: tuple[str, ...]
    batch_size: int
    num_accepted: list[list[int]] = field(init=False, repr=False)
    choices: list[list[str | tuple[str, ...]]] = field(init=False, repr=False)
    accepted_proposers: list[list[tuple[tuple[str, ...], ...]]] = field(init=False, repr=False)
    num_nodes: list[list[int]] = field(init=False, repr=False)
    num_tokens: list[int] = field(init=False, repr=False)  # emitted, after the cuts, per row
    num_target_forwards: int = 0  # of the whole batch, prefill included

    def __post_init__(self) -> None:
        self.num_accepted = [[] for _ in range(self.batch_size)]
        self.choices = [[] for _ in range(self.batch_size)]
        self.accepted_proposers = [[] for _ in range(self.batch_size)]
        self.num_nodes = [[] for _ in range(self.batch_size)]
        self.num_tokens = [0] * self.batch_size

    @classmethod
    def joined(cls, parts: Sequence[DecodeStats]) -> DecodeStats:
        """Return the statistics of several runs with the same drafters as those of one run."""
        total = cls(parts[0].drafters, batch_size=0)
        total.batch_size = sum(part.batch_size for part in parts)
        for part in parts:
            total.num_accepted += part.num_accepted
            total.choices += part.choices
            total.accepted_proposers += part.accepted_proposers
            total.num_nodes += part.num_nodes
            total.num_tokens += part.num_tokens
            total.num_target_forwards += part.num_target_forwards
        return total

    def record(self, row: int, num_nodes: int, choice: int | None, proposer_masks: list[int]) -> None:
        """Count one decode step of a row: `proposer_masks` holds the bit mask of each accepted node, in order."""
        accepted = tuple(self.names(mask) for mask in proposer_masks)
        deepest = accepted[-1] if accepted else ()
        self.num_accepted[row].append(len(accepted))
        self.accepted_proposers[row].append(accepted)
        self.choices[row].append(deepest if choice is None else self.drafters[choice])
        self.num_nodes[row].append(num_nodes)

    def names(self, mask: int) -> tuple[str, ...]:
        """Return the names of the drafters whose bits are set."""
        return tuple(name for index, name in enumerate(self.drafters) if mask >> index & 1)

    @property
    def num_steps(self) -> int:
        """Decode steps, summed over rows."""
        return sum(map(len, self.num_accepted))

    @property
    def acceptance_length(self) -> float:
        """Accepted draft tokens per decode step + 1 (tau; micro average over all steps); NaN without a step."""
        return _mean([count + 1 for row in self.num_accepted for count in row])

    @property
    def acceptance_length_macro(self) -> float:
        """Mean over rows of each row's acceptance length (macro average)."""
        return _mean([_mean(row) + 1 for row in self.num_accepted if row])

    @property
    def tokens_per_forward(self) -> float:
        """Emitted tokens per target forward of a row, its prefill included."""
        return _ratio(sum(self.num_tokens), self.num_steps + self.batch_size)

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of accepted nodes of depth d among steps that accepted depth d - 1, for d = 1, 2, ..."""
        counts = [count for row in self.num_accepted for count in row]
        reached = [sum(count >= depth for count in counts) for depth in range(max(counts, default=0) + 1)]
        return [_ratio(deeper, shallower) for shallower, deeper in pairwise(reached)]

    @property
    def proposer_share(self) -> dict[str, float]:
        """Share of the accepted draft tokens that each drafter proposed; shared proposals count for each."""
        nodes = [names for row in self.accepted_proposers for step in row for names in step]
        return {name: _ratio(sum(name in names for names in nodes), len(nodes)) for name in self.drafters}

    @property
    def choice_share(self) -> dict[str, float]:
        """Share of the steps in which each drafter was chosen (empty for merged trees)."""
        chosen = [choice for row in self.choices for choice in row if isinstance(choice, str)]
        return {name: _ratio(chosen.count(name), len(chosen)) for name in self.drafters} if chosen else {}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values, the summary first."""
        return {
            "acceptance_length": self.acceptance_length,
            "acceptance_length_macro": self.acceptance_length_macro,
            "acceptance_by_depth": self.acceptance_by_depth,
            "proposer_share": self.proposer_share,
            "choice_share": self.choice_share,
            "tokens_per_forward": self.tokens_per_forward,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_target_forwards": self.num_target_forwards,
            "drafters": list(self.drafters),
            "num_accepted": self.num_accepted,
            "num_nodes": self.num_nodes,
            "choices": self.choices,
            "accepted_proposers": self.accepted_proposers,
        }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else float("nan")
