"""All drafters of a decoder, in as few groups as they fit into: what is alike drafts in lockstep, the rest alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..tree import DraftTree, TreeShape
from .base import Drafter, DrafterGroup, DrafterState
from .eagle import EagleDrafter, in_lockstep


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

    def reset(self, batch_size: int) -> list[DrafterState]:
        """A fresh state a group."""
        return [group.reset(batch_size) for group in self._groups]

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
        self, states: Sequence[DrafterState], root_tokens: Tensor, shape: TreeShape, active: Tensor
    ) -> list[DraftTree]:
        """A tree a drafter, in the drafters' order; see `Drafter.propose`."""
        trees: dict[int, DraftTree] = {}
        for places, group, state in zip(self.members, self._groups, states, strict=True):
            trees |= zip(places, group.propose(state, root_tokens, shape, active), strict=True)
        return [trees[place] for place in sorted(trees)]


@dataclass(frozen=True)
class _Alone:
    """A drafter that fits into no group."""

    drafter: Drafter

    def reset(self, batch_size: int) -> DrafterState:
        return self.drafter.reset(batch_size)

    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.drafter.observe(state, features, next_tokens, num_tokens, counts)

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> list[DraftTree]:
        return [self.drafter.propose(state, root_tokens, shape, active)]


def _are_alike(one: Drafter, other: Drafter) -> bool:
    """Only what is an EAGLE drafter and nothing more: a subclass may draft otherwise."""
    return type(one) is EagleDrafter and type(other) is EagleDrafter and one.is_like(other)


def _group(drafters: list[Drafter]) -> DrafterGroup:
    if len(drafters) == 1:
        return _Alone(drafters[0])
    return in_lockstep([drafter for drafter in drafters if isinstance(drafter, EagleDrafter)])
