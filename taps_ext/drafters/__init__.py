"""Drafters: the small trained models that propose draft trees, and their checkpoints."""

from __future__ import annotations

from .averaging import average_drafters, sweep
from .base import Drafter, DrafterGroup, DrafterState
from .checkpoint import load_drafter, load_drafters, load_network, save_drafter
from .eagle import EagleConfig, EagleDrafter, EagleNetwork, EagleState
from .export import export_drafter
from .grouping import GroupedDrafters
from .validation import ValidationReport, validate_drafter

__all__ = [
    "Drafter",
    "DrafterGroup",
    "DrafterState",
    "EagleConfig",
    "EagleDrafter",
    "EagleNetwork",
    "EagleState",
    "GroupedDrafters",
    "ValidationReport",
    "average_drafters",
    "export_drafter",
    "load_drafter",
    "load_drafters",
    "load_network",
    "save_drafter",
    "sweep",
    "validate_drafter",
]
