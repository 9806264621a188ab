"""The EAGLE-2 drafter: a network with the target's own embedding and lm_head; how it drafts is in `eagle_group.py`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..sampling import SamplingRows
from ..tree import DraftTree, TreeShape
from .base import DrafterState
from .coupling import Calibration
from .eagle_group import EagleGroup, compute_dtype_and_device
from .eagle_stack import layout
from .eagle_state import EagleState
from .network import EagleConfig, EagleNetwork

__all__ = ["EagleConfig", "EagleDrafter", "EagleNetwork", "EagleState", "compute_dtype_and_device", "in_lockstep"]


class EagleDrafter:
    """An EAGLE-2 network with the target's own embedding and lm_head (held by reference, never copied)."""

    def __init__(
        self,
        network: EagleNetwork,
        embedding: nn.Module,
        lm_head: nn.Module,
        name: str = "eagle",
        calibration: Calibration | None = None,
    ) -> None:
        """Put `network` on the lm_head's device. One still in training can be measured so and stays as it is; the
        parameters of a frozen one may become slices of a stack, equal in value, when it drafts beside others.

        `calibration` is what coupled drafting needs; without it the drafter drafts as EAGLE-2 does.
        """
        self.name = name
        self.vocab_size = network.config.vocab_size
        self.hidden_size = network.config.hidden_size
        self.network = network
        self.calibration = calibration
        self.embedding = embedding
        self.lm_head = lm_head
        self.dtype, self.device = network.fc.weight.dtype, network.fc.weight.device
        self._alone = EagleGroup([network], embedding, lm_head, [calibration])

    def reset(self, batch_size: int, sampling: SamplingRows | None = None, decay: float | None = None) -> EagleState:
        """See `Drafter.reset`."""
        return self._alone.reset(batch_size, sampling, decay)

    def observe(
        self,
        state: DrafterState,
        features: Tensor,
        next_tokens: Tensor,
        num_tokens: Tensor,
        counts: Sequence[int] | None = None,
    ) -> None:
        """See `Drafter.observe`."""
        self._alone.observe(state, features, next_tokens, num_tokens, counts)

    def propose(self, state: DrafterState, root_tokens: Tensor, shape: TreeShape, active: Tensor) -> DraftTree:
        """See `Drafter.propose`. Reads nothing from the device."""
        return self._alone.propose(state, root_tokens, shape, active)[0]

    def is_like(self, other: EagleDrafter) -> bool:
        """Whether both can draft in lockstep: one embedding and lm_head, and networks that make one stack (`layout`).

        Networks in training make none: such drafters draft alone.
        """
        mine = layout(self.network)
        return (
            self.embedding is other.embedding
            and self.lm_head is other.lm_head
            and mine is not None
            and mine == layout(other.network)
        )


def in_lockstep(drafters: Sequence[EagleDrafter]) -> EagleGroup:
    """Drafters that are alike (`is_like`), as one."""
    first = drafters[0]
    networks, calibrations = [one.network for one in drafters], [one.calibration for one in drafters]
    return EagleGroup(networks, first.embedding, first.lm_head, calibrations)
