"""The drafter protocol: a drafter observes committed tokens and proposes draft trees. Public as `taps.Drafter`.

Also the draft vocabulary, by which a drafter of a target with many tokens proposes few of them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling import SamplingRows
from ..tree import DraftTree, Lengths, TreeShape
from .coupling import Calibration


class DrafterState:
    """Hold what a drafter remembers during one call, such as its KV cache: made by `reset`, owned by the call.

    `evidence`, if `reset` was given a decay: float32 [B], the discounted log-probability (nats, temperature 1) that
    the drafter gave to the observed tokens of each row, as `evidence.py` defines it.
    """

    evidence: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """Hold the target's tokens that a drafter can propose. Dims: D of them, of the target's V.

    Equal tokens are equal vocabularies. Files hold them as EAGLE-3's do: offsets `d2t` and a mask `t2d`.

    >>> vocabulary = DraftVocabulary(torch.tensor([1, 4, 5]), vocab_size=6)
    >>> vocabulary.d2t, vocabulary.t2d.long(), vocabulary.draft_ids
    (tensor([1, 3, 3]), tensor([0, 1, 0, 0, 1, 1]), tensor([-1,  0, -1, -1,  1,  2]))
    """

    tokens: Tensor  # int64 [D], ascending, on the CPU
    vocab_size: int  # V

    def __post_init__(self) -> None:
        if self.tokens.dtype != torch.int64 or self.tokens.ndim != 1 or not len(self.tokens):
            raise ValueError(f"a draft vocabulary must be int64 [D], got {self.tokens.dtype} {[*self.tokens.shape]}")
        first, last = int(self.tokens[0]), int(self.tokens[-1])
        if first < 0 or last >= self.vocab_size or bool((self.tokens.diff() <= 0).any()):
            raise ValueError(
                f"the tokens of a draft vocabulary must ascend within 0..{self.vocab_size - 1}, "
                f"got {len(self.tokens)} from {first} to {last}"
            )

    @classmethod
    def of_maps(cls, d2t: Tensor, t2d: Tensor) -> DraftVocabulary:
        """Return the vocabulary of offsets int64 [D] and a mask bool [V]; raise ValueError if these disagree."""
        if d2t.dtype != torch.int64 or t2d.dtype != torch.bool or d2t.ndim != 1 or t2d.ndim != 1:
            got = f"{d2t.dtype} {[*d2t.shape]} and {t2d.dtype} {[*t2d.shape]}".replace("torch.", "")
            raise ValueError(f"d2t and t2d must be int64 [D] and bool [V], got {got}")
        vocabulary = cls(torch.arange(len(d2t)) + d2t.cpu(), len(t2d))
        if not torch.equal(vocabulary.t2d, t2d.cpu()):
            raise ValueError("the offsets d2t and the mask t2d name different tokens")
        return vocabulary

    @property
    def d2t(self) -> Tensor:
        """Return the offsets, int64 [D]: index i stands for token i + d2t[i]."""
        return self.tokens - torch.arange(len(self.tokens))

    @property
    def t2d(self) -> Tensor:
        """Return the mask, bool [V]: which tokens are in."""
        return torch.zeros(self.vocab_size, dtype=torch.bool).index_fill_(0, self.tokens, True)

    @property
    def draft_ids(self) -> Tensor:
        """Return the index of each of the target's tokens, int64 [V]: -1 for those that are not in."""
        return torch.full((self.vocab_size,), -1).index_copy_(0, self.tokens, torch.arange(len(self.tokens)))

    @property
    def checksum(self) -> str:
        """Return the SHA-256 of the tokens, in hex."""
        return hashlib.sha256(self.tokens.numpy().data).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DraftVocabulary):
            return NotImplemented
        return self is other or (self.vocab_size == other.vocab_size and torch.equal(self.tokens, other.tokens))

    def __hash__(self) -> int:
        return hash((len(self.tokens), self.vocab_size))

    def __len__(self) -> int:
        return len(self.tokens)


class Drafter(ABC):
    """Propose draft trees for a target. Subclass it to bring your own drafter.

    A drafter is immutable, so that threads can share it: everything that changes is in the call's `DrafterState`. It
    never sees the target: it is fed with committed tokens and with the target's features (the hidden states behind the
    final norm). Dims: B rows, T slots, H hidden, V vocabulary.

    Any tree is allowed that `DraftTree.validate` accepts and whose root is the given token: a bad guess costs speed and
    never changes the text.

    >>> class Repeat(Drafter):  # propose the last token once more: one node below the root
    ...     def __init__(self, vocab_size, hidden_size):
    ...         self.name, self.vocab_size, self.hidden_size = "repeat", vocab_size, hidden_size
    ...     def reset(self, batch_size, sampling=None, decay=None):
    ...         return DrafterState()
    ...     def observe(self, state, features, next_tokens, num_tokens):
    ...         pass
    ...     def propose(self, state, root_tokens, shape, active):
    ...         tokens = root_tokens[:, None].repeat(1, 2)
    ...         parents = torch.tensor([-1, 0], device=tokens.device).expand_as(tokens)
    ...         score = torch.where(active, -0.7, -torch.inf)  # prune_tree drops nodes of score -inf
    ...         scores = torch.stack([torch.zeros_like(score), score], dim=1)
    ...         nodes = DraftTree(tokens, parents, scores, torch.full_like(root_tokens, 2))
    ...         return ops.prune_tree(nodes, shape.max_nodes).padded(shape.capacity(self.vocab_size))
    >>> drafter, roots = Repeat(vocab_size=10, hidden_size=4), torch.tensor([7])
    >>> drafter.propose(drafter.reset(1), roots, TreeShape(2, 1, 3), torch.tensor([True])).tokens
    tensor([[7, 7, 0]])
    """

    name: str  # reported by stats and compositions
    vocab_size: int  # V, the target's
    hidden_size: int  # H, the size of the target's features; not asked for without features
    uses_features: bool = True  # False: the drafter observes the rows' texts alone, see `observe`
    calibration: Calibration | None = None  # how coupled drafting weighs the noise; None: drafts without it

    @abstractmethod
    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> DrafterState:
        """Return a fresh state for `batch_size` rows that have observed nothing.

        Args:
            sampling: how the target will draw. A calibrated drafter then uses the same noise (coupled drafting); one
                without calibration drafts as if it were None. So do rows of temperature 0.
            decay: keep `evidence` in the state, discounted by this factor per token; None: keep none. A drafter that
                cannot keep evidence leaves it None, and is refused by compositions that need it.
        """

    @abstractmethod
    def observe(self, state: DrafterState, features: Tensor | None, next_tokens: Tensor, num_tokens: Lengths) -> None:
        """Take in committed tokens with the target's features; update `state` in place.

        A drafter with `uses_features = False` is given no features (None). Its `next_tokens` are each row's text from
        the prompt's first token on, in order and without gaps, on the CPU; the last one is the new root. The host has
        this text anyway, so that no device is waited for.

        Args:
            features: [B, T, H]; slot t of row b is the target's final hidden state at one position.
            next_tokens: int64 [B, T], the token behind that position (in the last slot: the new root).
            num_tokens: how many leading slots of each row count; the other slots are padding with any content, NaN
                included. A row of 0 tokens stays as it is.
        """

    @abstractmethod
    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """Return a draft tree per row, grown from the last observed slot; the committed part of `state` stays as it is.

        Args:
            root_tokens: int64 [B], the last observed token, node 0 of each tree; the tree lies on its device.
            shape: depth, branching and node budget. The tree has `shape.capacity(vocab_size)` slots. No node lies
                deeper than `shape.depth`, none scores below `shape.min_score`.
            active: bool [B]; other rows get a tree that is only its root.

        On a device a drafter must not read values here: the host would wait for them.
        """

    def propose_rows(
        self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor, rows: Sequence[int]
    ) -> DraftTree:
        """Return what `propose` returns, with only the root in all rows but `rows`.

        Override it if leaving rows out saves work.
        """
        is_drafted = torch.zeros_like(active).index_fill_(0, torch.tensor(rows, device=active.device), True)
        return self.propose(state, root_tokens, shape, active & is_drafted)

    def drafts_with(self, other: Drafter) -> bool:
        """Return whether `propose_together` does for both drafters what `propose` does for each, in fewer calls."""
        return False

    def propose_together(
        self,
        others: Sequence[Drafter],
        states: Sequence[DrafterState],
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
    ) -> list[DraftTree]:
        """Return the trees of this drafter and of `others`, which it `drafts_with`; `states` are in the same order."""
        drafters = (self, *others)
        return [one.propose(state, root_tokens, shape, active) for one, state in zip(drafters, states, strict=True)]
