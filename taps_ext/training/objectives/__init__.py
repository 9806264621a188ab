"""Training objectives: same network, different loss. Each yields the scalars whose gradients are summed in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...drafters.eagle_network import EagleNetwork
from ..config import TrainingConfig
from ..features import DraftBatch, Head
from .eagle2 import eagle2_losses
from .hass import hass_losses

Objective = Callable[[EagleNetwork, Head, DraftBatch, TrainingConfig, torch.Generator], Iterator[Tensor]]

OBJECTIVES: dict[str, Objective] = {"eagle2": eagle2_losses, "hass": hass_losses}
