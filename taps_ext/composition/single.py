"""One drafter's tree, as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..tree import DraftTree
from .base import Composed, choose


class Single:
    """The only drafter's tree."""

    def compose(self, trees: Sequence[DraftTree]) -> Composed:
        return choose(trees[:1], torch.zeros_like(trees[0].num_nodes))
