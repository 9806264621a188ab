"""The sections of a report, a file each, in their order."""

from __future__ import annotations

from collections.abc import Sequence

from ..figures import View
from . import (
    averaging,
    budget,
    depth,
    differences,
    lossless,
    main,
    merging,
    paper,
    provenance,
    routing,
    signals,
    speed,
)
from .base import Section

SECTIONS = (
    *(main, differences, speed, depth, averaging, routing, signals, merging, budget),
    *(lossless, paper, provenance),
)

__all__ = ["Section", "sections"]


def sections(views: Sequence[View]) -> list[Section]:
    """The sections that the results have something for."""
    return [section for module in SECTIONS if (section := module.section(views))]
