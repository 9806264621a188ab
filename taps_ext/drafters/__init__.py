"""Drafters: the small trained models that propose draft trees, and their checkpoints."""

from __future__ import annotations

from .base import Drafter, DrafterState
from .checkpoint import average_drafters, load_drafter, load_drafters, load_network, save_drafter
from .eagle import EagleConfig, EagleDrafter, EagleNetwork, EagleState

__all__ = [
    "Drafter",
    "DrafterState",
    "EagleConfig",
    "EagleDrafter",
    "EagleNetwork",
    "EagleState",
    "average_drafters",
    "load_drafter",
    "load_drafters",
    "load_network",
    "save_drafter",
]
