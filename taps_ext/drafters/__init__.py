"""Drafters: the small trained models that propose draft trees, and their checkpoints."""

from __future__ import annotations

from .base import Drafter, DrafterGroup, DrafterState
from .checkpoint import average_drafters, load_drafter, load_drafters, load_network, save_drafter
from .eagle import EagleConfig, EagleDrafter, EagleNetwork, EagleState
from .grouping import GroupedDrafters

__all__ = [
    "Drafter",
    "DrafterGroup",
    "DrafterState",
    "EagleConfig",
    "EagleDrafter",
    "EagleNetwork",
    "EagleState",
    "GroupedDrafters",
    "average_drafters",
    "load_drafter",
    "load_drafters",
    "load_network",
    "save_drafter",
]
