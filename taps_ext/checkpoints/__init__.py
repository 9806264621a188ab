"""Load, save, average, export and validate drafters; no other package reads or writes their files."""

from __future__ import annotations

from .average import average_drafters, sweep
from .corpus import CorpusStore
from .export import ValidationReport, export_drafter, validate_drafter
from .load import load_drafter, load_drafters, load_network, save_drafter

__all__ = [
    "CorpusStore",
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
