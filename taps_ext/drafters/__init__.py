"""Drafters: what proposes draft trees. Small trained models, and look-ups in the text."""

from __future__ import annotations

from .base import Drafter, DrafterState, DraftVocabulary
from .eagle import EagleConfig, EagleDrafter, EagleNetwork, EagleState
from .lookup import LookupDrafter

__all__ = [
    "DraftVocabulary",
    "Drafter",
    "DrafterState",
    "EagleConfig",
    "EagleDrafter",
    "EagleNetwork",
    "EagleState",
    "LookupDrafter",
]
