"""What a drafter is to the rest of the library: it observes committed tokens and proposes draft trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ..sampling import SamplingRows
from ..tree import DraftTree, TreeShape
from .coupling import Calibration


class DrafterState:
    """What a drafter remembers of one call (KV, lengths, last output): opaque, made by `reset`, owned by the call.

    `evidence`, where `reset` was asked for it: float32 [D, B], for each of the state's drafters and each row the
    discounted log-probability (nats, temperature 1) that it gave to the tokens observed, as `evidence.py` defines it.
    """

    evidence: Tensor | None = None


class Drafter(Protocol):
    """A drafter is immutable: threads share it, each call with its own state. Dims: B rows, T slots, H hidden."""

    @property
    def name(self) -> str:
        """The name that stats and compositions report."""

    @property
    def vocab_size(self) -> int:
        """V, the tokens it can propose: the target's."""

    @property
    def hidden_size(self) -> int:
        """H, the size of the target's features that it takes."""

    @property
    def calibration(self) -> Calibration | None:
        """How it weighs the noise in coupled drafting; None: it drafts without a look at it."""

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> DrafterState:
        """A fresh state for `batch_size` rows that have observed nothing.

        Args:
            sampling: how the target will draw. A calibrated drafter then looks at the same noise (coupled drafting);
                one that is not drafts as without. Rows of temperature 0 are drafted as without, too.
            decay: keep evidence in the state, discounted by this a token; a drafter that cannot raises ValueError.
        """

    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Take in committed tokens with the target's true features; `state` is updated in place.

        Args:
            features: [B, T, H]; slot t of row b is the target's final hidden state of a position.
            next_tokens: int64 [B, T], the token after that position (for the last slot: the new root).
            num_tokens: int64 [B], how many leading slots of the row count; the rest is padding of any content.
                0: nothing happens to that row.
            counts: `num_tokens` on the host, which the caller has from its one fetch of the step: a drafter takes its
                sizes from here and reads nothing from the device. None: it may read `num_tokens`.
        """

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """A draft tree a row, grown from the last observed slot; the committed part of `state` stays as it is.

        Args:
            root_tokens: int64 [B], the last token observed, node 0 of each tree; the trees lie on its device.
            shape: depth, branching and node budget. The capacity is min(max_nodes, 1 + K + (depth - 1) * K * K)
                with K = min(branching, V).
            active: bool [B]; other rows get a tree that is only its root.

        No node lies deeper than `shape.depth`, none scores below `shape.min_score`. A drafter reads nothing from the
        device here.
        """


class DrafterGroup(Protocol):
    """Drafters that do together what each would do alone, in fewer calls: one state, and a tree each."""

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> DrafterState:
        """See `Drafter.reset`."""

    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        """See `Drafter.observe`: every drafter observes the same."""

    def propose(
        self,
        state: DrafterState,
        root_tokens: Tensor,
        shape: TreeShape,
        active: Tensor,
        chosen: Sequence[Sequence[int]] | None = None,
    ) -> list[DraftTree]:
        """The trees that the drafters would propose one by one, in their order.

        `chosen` names the rows that each of them drafts for (None: all); its other rows get only their root.
        """
