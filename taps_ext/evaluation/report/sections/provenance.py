"""Where the numbers come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...variants import MERGED, Variant
from ..cells import Run
from ..figures import View
from ..tables import Column, Entry, Table
from .base import Section

TITLE = "Provenance"
TEXT = "What each results folder was asked, with what, and where it ran. report.json holds all counts of this report."


def section(views: Sequence[View]) -> Section:
    """A table of facts, a column a run; and one of what each variant is."""
    runs = list(dict.fromkeys(run for view in views for run in view.runs))
    told = [_facts(run) for run in runs]
    names = dict.fromkeys(name for facts in told for name in facts)
    rows: list[tuple[Entry, ...]] = [(name, *(facts.get(name) for facts in told)) for name in names]
    heads = [f"run {number}" for number in range(1, len(runs) + 1)]
    columns = (Column("fact"), *(Column(head) for head in heads))
    return Section("provenance", TITLE, TEXT, (_variants(views), Table("provenance", "Runs", "", columns, tuple(rows))))


def _variants(views: Sequence[View]) -> Table:
    specs = dict.fromkeys(spec for view in views for spec in view.specs.values())
    rows: list[tuple[Entry, ...]] = [
        (
            *(spec.label, spec.composition, ", ".join(spec.drafters)),
            _budget(spec),
            *(None if spec.is_plain else spec.drafting, spec.evidence_decay, spec.weight),
        )
        for spec in specs
    ]
    columns = (
        *(Column("variant"), Column("composition"), Column("drafters"), Column("node budget", ",d")),
        *(Column("drafting asked for"), Column("evidence decay", "g"), Column("first drafter's weight", "g")),
    )
    return Table("variants", "Variants", "Averages draft top-k, and every drafter at T = 0.", columns, tuple(rows))


def _budget(spec: Variant) -> Entry:
    if spec.adapts:
        return f"at most {spec.max_nodes}"
    return "union" if spec.composition == MERGED and not spec.max_nodes else spec.max_nodes


def _facts(run: Run) -> dict[str, str]:
    """Facts by dotted name, as text."""
    asked = run.configuration
    facts: dict[str, Any] = {"label": asked["label"], "target": asked["target"], "drafters": asked["drafters"]}
    facts["tasks"] = {
        name: {part: task[part] for part in ("num_questions", "source")} for name, task in asked["tasks"].items()
    }
    facts |= {"temperatures": asked["temperatures"], "settings": asked["settings"], **run.provenance}
    facts["resumed"] = [_resumption(one) for one in run.provenance.get("resumed", ())]
    return {name: _text(value) for name, value in _flat(facts) if value not in (None, "", [])}


def _resumption(facts: Mapping[str, Any]) -> str:
    """When, and by which code: an installed package knows its version alone."""
    return f"{facts['date']} at {facts.get('commit') or facts['taps_ext']}"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def _text(value: Any) -> str:
    """Checksums in their first 12 digits."""
    if isinstance(value, str):
        is_checksum = len(value) >= 40 and all(letter in "0123456789abcdef" for letter in value)
        return value[:12] if is_checksum else value
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)
