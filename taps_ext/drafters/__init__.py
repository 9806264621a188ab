"""Drafters: the small trained models that propose draft trees."""

from __future__ import annotations

from .base import Drafter, DrafterGroup, DrafterState
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
]
