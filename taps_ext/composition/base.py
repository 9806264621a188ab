"""What a composition is: several drafters' trees in, one tree out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tree import DraftTree


@dataclass(frozen=True)
class Composed:
    """The tree to verify, with `proposers`, and per row the index of the drafter chosen (None: all took part)."""

    tree: DraftTree
    choice: Tensor | None  # int64 [B]


class Composition(ABC):
    """A policy over trees. It sees nothing but them, and how well their drafters did: any drafter, any number."""

    decay: float | None = None  # of the evidence that it looks at, a token; None: it looks at none

    def choose(self, evidence: Tensor | None) -> Tensor | None:
        """int64 [B], the drafter of each row that is to draft, chosen before any does; None: all of them draft.

        `evidence` is float32 [D, B], see `DrafterState`; None where `decay` is.
        """
        return None

    @abstractmethod
    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        """One tree of all drafters' trees, in their order; those that were not to draft bring their root."""


def check_decay(decay: Any) -> float:
    """`decay`; ValueError unless evidence can be discounted by it."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
        raise ValueError(f"evidence_decay must be above 0 and at most 1, or 0 with merged, got {decay!r}")
    return float(decay)


def choose(trees: Sequence[DraftTree], choice: Tensor) -> Composed:
    """Row by row the chosen drafter's tree; `choice` int64 [B]. Trees must share their capacity."""
    rows = torch.arange(len(choice), device=choice.device)

    def pick(name: str) -> Tensor:
        return torch.stack([getattr(tree, name) for tree in trees])[choice, rows]

    chosen = DraftTree(pick("tokens"), pick("parents"), pick("scores"), pick("num_nodes"))
    proposers = torch.where(chosen.is_node(), (torch.ones_like(choice) << choice)[:, None], 0)
    entropies = None if any(tree.entropies is None for tree in trees) else pick("entropies")
    return Composed(replace(chosen, proposers=proposers, entropies=entropies), choice)


def mean_over_nodes(tree: DraftTree, values: Tensor) -> Tensor:
    """The mean of `values` [B, N] over each row's drafted nodes (the root excluded), float32 [B]; NaN without any."""
    drafted = tree.is_node()
    drafted[:, 0] = False
    return torch.where(drafted, values, 0).sum(dim=1) / drafted.sum(dim=1)
