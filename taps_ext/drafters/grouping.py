"""All drafters of a decoder, in as few groups as they fit into: what is alike drafts in lockstep, the rest alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling import SamplingRows
from ..tree import DraftTree, TreeShape
from .base import Drafter, DrafterGroup, DrafterState
from .eagle import EagleDrafter, in_lockstep
from .levels import capacity_of


class GroupedDrafters:
    """The drafters of a decoder: they observe the same and propose a tree each. Immutable, like each of them."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self.members: list[list[int]] = []  # the drafters of each group, by their place in `drafters`
        for place, drafter in enumerate(drafters):
            group = next((one for one in self.members if _are_alike(drafters[one[0]], drafter)), None)
            if group is None:
                self.members.append([place])
            else:
                group.append(place)
        self._groups = [_group([drafters[place] for place in places]) for places in self.members]

    def reset(
        self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None
    ) -> list[DrafterState]:
        """A fresh state a group; see `Drafter.reset`."""
        return [group.reset(batch_size, sampling, decay) for group in self._groups]

    def evidence(self, states: Sequence[DrafterState]) -> Tensor:
        """float32 [D, B], of every drafter, in their order; see `DrafterState`."""
        found: dict[int, Tensor] = {}
        for places, state in zip(self.members, states, strict=True):
            if state.evidence is None:
                raise ValueError(
                    f"drafter {places[0]} keeps no evidence; use another composition, or evidence_decay=0 with merged"
                )
            found |= zip(places, state.evidence, strict=True)
        return torch.stack([found[place].to(found[0].device) for place in sorted(found)])

    def observe(
        self,
        states: Sequence[DrafterState],
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int],
    ) -> None:
        """See `Drafter.observe`."""
        for group, state in zip(self._groups, states, strict=True):
            group.observe(state, features, next_tokens, num_tokens, counts)

    def propose(
        self,
        states: Sequence[DrafterState],
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
        choice: Sequence[int] | None = None,
    ) -> list[DraftTree]:
        """A tree a drafter, in the drafters' order; see `Drafter.propose`.

        `choice` names the one drafter of each row that drafts (None: all do); the others' trees are only the root.
        """
        trees: dict[int, DraftTree] = {}
        for places, group, state in zip(self.members, self._groups, states, strict=True):
            chosen = None
            if choice is not None:
                chosen = [[row for row, drafter in enumerate(choice) if drafter == place] for place in places]
            trees |= zip(places, group.propose(state, root_tokens, shape, active, chosen), strict=True)
        return [trees[place] for place in sorted(trees)]


@dataclass(frozen=True)
class _Alone:
    """A drafter that fits into no group."""

    drafter: Drafter

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> DrafterState:
        return self.drafter.reset(batch_size, sampling, decay)

    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.drafter.observe(state, features, next_tokens, num_tokens, counts)

    def propose(
        self,
        state: DrafterState,
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> list[DraftTree]:
        if chosen is not None:
            if len(chosen[0]) == 0:
                branching = min(shape.branching, self.drafter.vocab_size)
                return [DraftTree.of_roots(root_tokens).padded(capacity_of(shape, branching))]
            is_chosen = torch.zeros_like(active)
            is_chosen[list(chosen[0])] = True
            active = active & is_chosen
        return [self.drafter.propose(state, root_tokens, shape, active)]


def _are_alike(one: Drafter, other: Drafter) -> bool:
    """Only what is an EAGLE drafter and nothing more: a subclass may draft otherwise."""
    return type(one) is EagleDrafter and type(other) is EagleDrafter and one.is_like(other)


def _group(drafters: list[Drafter]) -> DrafterGroup:
    eagles = [drafter for drafter in drafters if isinstance(drafter, EagleDrafter) and _are_alike(drafter, drafter)]
    return in_lockstep(eagles) if eagles else _Alone(drafters[0])
