"""The figures of `bench_beyond.py` by part: which cells belong together, and what they measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from beyond_cells import SUM, SWITCHING, Cell, CostCell, domain_of
from beyond_sample import Sample

from taps_ext.composition import EVIDENCE_DECAY

MIXTURE = "mixture"  # of all domains
EVERYTHING = "mixture and switching"
WAYS: dict[str, dict[str, Any]] = {
    "evidence": {"way": "evidence", "decay": EVIDENCE_DECAY},
    "merged, 60 nodes, evidence": {"way": "merged", "budget": 60, "decay": EVIDENCE_DECAY},
    "merged, 60 nodes": {"way": "merged", "budget": 60},
    "merged, union": {"way": "merged"},
    "confidence": {"way": "confidence"},
    "entropy": {"way": "entropy"},
    "merged by sum, 60 nodes, evidence": {"way": SUM, "budget": 60, "decay": EVIDENCE_DECAY},
    "merged by sum, 60 nodes": {"way": SUM, "budget": 60},
    "confidence, top-k": {"way": "confidence", "drafting": "topk"},
    "merged, 60 nodes, top-k": {"way": "merged", "budget": 60, "drafting": "topk"},
    "the paper's routing": {"way": "the paper's routing"},
    "the paper's merging, 60 nodes": {"way": "the paper's merging"},
    "the paper's merging, 119 nodes": {"way": "the paper's merging", "nodes": 119},
}


@dataclass(frozen=True)
class Panel:
    """The drafters that were composed: one group, or the same from several training seeds."""

    world: str
    temperatures: tuple[float, ...]
    groups: tuple[tuple[str, ...], ...]
    draws: tuple[int, ...]

    @property
    def title(self) -> str:
        seeds = f", {len(self.groups)} training seeds" if len(self.groups) > 1 else ""
        return f"{len(self.groups[0])} drafters ({self.world}{seeds})"

    def name(self, place: int) -> str:
        """What the drafter at a place of each group is called."""
        return self.groups[0][place] if len(self.groups) == 1 else domain_of(self.groups[0][place])


class Figures:
    """What was measured; a part may be missing."""

    def __init__(self, cells: Mapping[str, Sequence[Cell | CostCell]], done: Mapping[str, Any]) -> None:
        self.done = done
        self.parts = {part: [cell for cell in found if isinstance(cell, Cell)] for part, found in cells.items()}
        self.costs = [cell for cell in cells.get("C", []) if isinstance(cell, CostCell)]
        self.domains = {
            world: [d for d in dict.fromkeys(c.domain for c in self.every() if c.world == world) if d != SWITCHING]
            for world in dict.fromkeys(cell.world for cell in self.every())
        }

    def every(self) -> list[Cell]:
        return list(dict.fromkeys(cell for cells in self.parts.values() for cell in cells))

    def sample(self, cells: Iterable[Cell]) -> Sample:
        return Sample.of((cell, self.done[cell.key]) for cell in cells)

    # ---- A: one drafter

    def single(self, domain: str, temperature: float, nodes: int, how: str, draw: int | None = None) -> Sample:
        """Of the part A: `how` is "coupled", "topk" or the peer, at temperature 0 "coupled"; one draw, or all."""
        wanted = (domain, temperature, nodes, how)
        return self.sample(
            cell
            for cell in self.parts["A"]
            if cell.places is None
            and (cell.domain, cell.temperature, cell.nodes, way_of(cell)) == wanted
            and draw in (None, cell.draw)
        )

    def at_places(self, domain: str, temperature: float, drafting: str = "coupled") -> Sample:
        """Of the first steps at places of texts written at temperature 1."""
        wanted = (domain, temperature, drafting)
        return self.sample(
            cell
            for cell in self.parts["A"]
            if cell.places is not None and (cell.domain, cell.temperature, cell.drafting) == wanted
        )

    def axes(self) -> tuple[list[str], list[float], list[int], list[int]]:
        """Domains, temperatures above 0, nodes and draws of part A."""
        cells = self.parts.get("A", [])
        temperatures = [cell.temperature for cell in cells if cell.temperature > 0]
        found = ([c.domain for c in cells], temperatures, [c.nodes for c in cells], [c.draw for c in cells])
        domains, sampled, nodes, draws = (list(dict.fromkeys(values)) for values in found)
        return domains, sampled, nodes, draws  # type: ignore[return-value]

    # ---- B and E: several drafters

    def panels(self, part: str = "B") -> list[Panel]:
        routed = [cell for cell in self.parts.get(part, []) if cell.way == "evidence"]
        temperatures = tuple(dict.fromkeys(cell.temperature for cell in routed))
        found: dict[tuple[str, int], dict[tuple[str, ...], int]] = {}
        for cell in routed:
            found.setdefault((cell.world, len(cell.drafters)), {})[cell.drafters] = cell.draw
        return [
            Panel(world, temperatures, tuple(groups), tuple(groups.values())) for (world, _), groups in found.items()
        ]

    def composed(self, panel: Panel, column: str, temperature: float, **how: Any) -> Sample:
        """On a domain, on `SWITCHING`, or on a pool of them; `how` are a cell's fields, `place` a single drafter's."""
        domains = self.domains[panel.world]
        pool = {MIXTURE: domains, EVERYTHING: [*domains, SWITCHING]}.get(column, [column])
        place = how.pop("place", None)
        cells = []
        for drafters, draw in zip(panel.groups, panel.draws, strict=True):
            who = drafters if place is None else (drafters[place],)
            one = Cell(panel.world, who, "single", "", temperature, draw=draw)
            cells += [replace(one, domain=domain, **how) for domain in pool]
        return self.sample(cells)

    def has(self, panel: Panel, temperature: float, how: Mapping[str, Any]) -> bool:
        """Whether that was measured."""
        one = Cell(panel.world, panel.groups[0], "", self.domains[panel.world][0], temperature, draw=panel.draws[0])
        return replace(one, **how).key in self.done

    def switches(self, panel: Panel) -> bool:
        """Whether prompts that switch domain were measured."""
        cells = (cell for cell in self.parts["B"] if (cell.world, cell.drafters) == (panel.world, panel.groups[0]))
        return any(cell.domain == SWITCHING for cell in cells)

    def nodes(self, panel: Panel, temperature: float, **how: Any) -> float:
        """Nodes that the target verified in a step, roots included, over all domains."""
        cells = [
            replace(Cell(panel.world, drafters, "", domain, temperature, draw=draw), **how)
            for drafters, draw in zip(panel.groups, panel.draws, strict=True)
            for domain in self.domains[panel.world]
        ]
        found = [self.done[cell.key] for cell in cells]
        return float(sum(one["nodes"] for one in found)) / sum(sum(one["steps"]) for one in found)

    def singles(self, panel: Panel, column: str, temperature: float) -> dict[str, Sample]:
        places = range(len(panel.groups[0]))
        return {panel.name(place): self.composed(panel, column, temperature, place=place) for place in places}

    def matched(self, panel: Panel, domain: str, temperature: float) -> Sample:
        """The domain's own specialist; of several the best one. Of a pool of domains the best drafter on it."""
        singles = self.singles(panel, domain, temperature)
        own = [sample for name, sample in singles.items() if domain_of(name) == domain]
        return max(own or singles.values(), key=lambda sample: sample.length)

    # ---- D

    def levels(self, cell: Cell) -> float:
        """Levels drafted a step: as many drafter forwards, the one over the committed tokens included."""
        result = self.done[cell.key]
        return float(result["levels"]) / sum(result["steps"])


def way_of(cell: Cell) -> str:
    return cell.drafting if cell.way == "single" else cell.way
