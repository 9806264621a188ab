"""What a drafter learns from: the target's features of a text, shifted into the drafter's slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafters import DraftVocabulary
from ..drafters.growth import LogitRule
from ..target.model import refuse_unlike_head
from .dataset import TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Head = Callable[[Tensor], Tensor]  # features [..., H] to float32 logits [..., V]


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
    lengths: Tensor  # int64 [B], slots that are no padding
    ids: tuple[int, ...]  # B, of the sequences: a hash of their content


class FeatureSource(Protocol):
    """What the trainer asks of the target, whether it is at hand or only its stored features are."""

    @property
    def embedding(self) -> Tensor:
        """The target's input embedding [V, H]."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V] of features [..., H]; gradients flow to the features only."""
        ...

    def draft_head(self, vocabulary: DraftVocabulary) -> Head:
        """Return the part of `logits` that makes the logits [..., D] of a draft vocabulary."""
        ...

    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """The batch, moved to the device of the features, as drafter slots."""
        ...

    def flush(self) -> None:
        """Bring to disk what was computed, where that is kept; called before each checkpoint and at the end."""
        ...


class FrozenTarget:
    """A `FeatureSource` that runs the target as the text comes; nothing of the target is changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        """ValueError for a target whose embedding or lm_head does more than look up and multiply."""
        self.model = model
        self._embedding = model.get_input_embeddings()
        weight = model.get_output_embeddings().weight
        assert isinstance(weight, Tensor)
        self._head, self._rule = weight.detach(), LogitRule.of(model.config.get_text_config())
        self._check_ends()

    @property
    def embedding(self) -> Tensor:
        """The input embedding [V, H]."""
        weight = self._embedding.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V] of features [..., H], computed in the lm_head's precision."""
        return head_logits(features, self._head, self._rule)

    def draft_head(self, vocabulary: DraftVocabulary) -> Head:
        """See `FeatureSource.draft_head`."""
        return head_rows(self._head, self._rule, vocabulary)

    @torch.no_grad()
    def _check_ends(self) -> None:
        """Training computes with the two matrices, and a scale and cap of logits: nothing else may be beside them."""
        tokens = torch.arange(min(8, len(self.embedding)), device=self.embedding.device)[None]
        name = type(self.model).__name__
        if not _are_close(self._embedding(tokens), F.embedding(tokens, self.embedding)):
            raise ValueError(f"the target {name} changes its embeddings (scaling), which drafters are not trained for")
        refuse_unlike_head(self.model, self.logits)

    @torch.no_grad()
    def features(self, batch: TokenBatch) -> Tensor:
        """float32 [B, L, H] after the target's final norm, by one forward; those of padding mean nothing."""
        tokens = batch.tokens.to(self.embedding.device)
        hidden: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden.float()

    def draft_batch(self, batch: TokenBatch) -> DraftBatch:
        """The batch as drafter slots, by one forward of the target."""
        return shift(self.features(batch), batch, self.embedding)

    def flush(self) -> None:
        """Nothing: nothing is kept."""


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Within what two ways of computing in bfloat16 differ by."""
    one, other = one.float(), other.to(one.device).float()
    return bool((one - other).abs().max() <= 0.02 * other.abs().max())


def head_logits(features: Tensor, head: Tensor, rule: LogitRule) -> Tensor:
    """float32 [..., V] of features [..., H] and an lm_head [V, H], whose product has the lm_head's precision.

    So does drafting; and a large lm_head must not be cast for every few hundred slots, as autocast would.
    """
    with torch.autocast(head.device.type, enabled=False):
        return rule.apply(F.linear(features.to(head.dtype), head).float())


def head_rows(head: Tensor, rule: LogitRule, vocabulary: DraftVocabulary) -> Head:
    """Return `head_logits` with the rows of an lm_head [V, H] that a draft vocabulary has, copied once."""
    return partial(head_logits, head=head[vocabulary.tokens.to(head.device)], rule=rule)


@torch.no_grad()
def shift(features: Tensor, batch: TokenBatch, embedding: Tensor) -> DraftBatch:
    """The drafter slots of a batch with the target's features [B, L, H] and input embedding [V, H]."""
    batch = batch.to(features.device)
    learned = F.pad(batch.loss_mask[:, 2:], (0, 1), value=False)
    embeddings = F.embedding(batch.tokens[:, 1:].to(embedding.device), embedding).to(features)
    return DraftBatch(features[:, :-1], embeddings, features[:, 1:], learned, batch.lengths - 1, batch.ids)
