"""The sections of a report, a file each, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..figures import View
from ..pictures import drawable
from . import averaging, budget, depth, differences, main, merging, paper, plain, provenance, routing, signals
from .base import Section

SECTIONS = (main, differences, plain, depth, averaging, routing, signals, merging, budget, paper, provenance)

__all__ = ["Section", "sections"]


def sections(views: Sequence[View]) -> list[Section]:
    """The sections that the results have something for, without empty tables and pictures."""
    shown = []
    for module in SECTIONS:
        section = module.section(views)
        tables = tuple(table for table in section.tables if table.rows)
        pictures = tuple(picture for one in section.pictures if (picture := drawable(one)) is not None)
        if tables or pictures:
            shown.append(replace(section, tables=tables, pictures=pictures))
    return shown
