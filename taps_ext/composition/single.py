"""One drafter's tree, as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tree import DraftTree
from .base import Composed, Composition, choose


class Single(Composition):
    """The only drafter's tree."""

    def compose(self, trees: Sequence[DraftTree], evidence: Tensor | None = None) -> Composed:
        return choose(trees[:1], torch.zeros_like(trees[0].num_nodes))
