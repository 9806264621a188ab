"""What a drafter learns from: the target's features of a text, computed as the text comes, and shifted into place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DraftBatch:
    """A text of L tokens as T = L - 1 drafter slots: slot i has feature i and token i + 1, and guesses feature i + 1.

    `loss_mask` marks the slots whose guess, through the lm_head, draws a token that is to be learned (token i + 2).
    Shapes: B rows, T slots, H hidden.
    """

    features: Tensor  # float [B, T, H], the target's, of positions 0 .. T-1
    next_embeddings: Tensor  # float [B, T, H], the target's embeddings of tokens 1 .. T
    next_features: Tensor  # float [B, T, H], the target's, of positions 1 .. T
    loss_mask: Tensor  # bool [B, T]


class FrozenTarget:
    """The three parts of a target that training uses; none of them is changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._embedding = model.get_input_embeddings()
        weight = model.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        self._head = weight.detach().float()

    @property
    def embedding(self) -> Tensor:
        """The input embedding [V, H]."""
        weight = self._embedding.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V] of features [..., H]; gradients flow to the features only."""
        return F.linear(features, self._head.to(features.dtype)).float()

    @torch.no_grad()
    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """The batch as drafter slots: one forward of the target, its features those after the final norm."""
        base = self.model.base_model
        hidden: Tensor = base(input_ids=batch.tokens, use_cache=False).last_hidden_state.float()
        learned = F.pad(batch.loss_mask[:, 2:], (0, 1), value=False)
        embeddings = F.embedding(batch.tokens[:, 1:], self.embedding).float()
        return DraftBatch(hidden[:, :-1], embeddings, hidden[:, 1:], learned)


Head = Callable[[Tensor], Tensor]  # features [..., H] to float32 logits [..., V]
