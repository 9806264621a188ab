"""Coupled drafting, running evidence, evidence in merging, the stop rule: acceptance lengths and cost.

    python benchmarks/bench_beyond.py --seeds FOLDER --four FOLDER --output results.json

Each folder is a world as `runs/worlds.sh` makes it: `target/` and calibrated `drafters/`. In the first one there are
the same drafters from several training seeds, and each seed's are measured for themselves; in the second one there are
two kinds of drafters for each of four domains. Parts:
  A  single drafter: top-k against coupled, by nodes and temperature, beside recursive rejection and temperature 0
  B  every composition against the domain's own specialist: each domain, their mixture, and prompts that switch domain
  C  what a step costs with 1, 2, 4 and 8 drafters: forwards, rows of the lm_head, milliseconds
  D  levels that the stop rule leaves undrafted, one row at a time
  E  routing by evidence with other constants, on other prompts: those that the constants were chosen on
  F  the request's filters, applied to the target alone and to the drafter as well
A cell is kept in the journal when it is done (`--journal`, by default beside the output): a second start goes on.
Beside the JSON there are a table (.md) and a picture (.png). The last line printed is one line of JSON for programs.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import beyond_picture
import beyond_report
import torch
from beyond_cells import (
    PAPER,
    REJECTION,
    ROWS,
    SUM,
    SWITCHING,
    TUNED,
    TUNING_SEED,
    Cell,
    CostCell,
    Settings,
    World,
    as_key,
    code_digest,
    domain_of,
)
from provenance import provenance, write_json
from tqdm import tqdm

from taps_ext.composition import EVIDENCE_DECAY

NODES = (8, 16, 30, 60)
SAMPLED = (1.0, 0.7)  # temperatures of one drafter, beside 0
COMPOSED = (0.0, 1.0)  # temperatures of several
FILTERS = ((10, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1))  # top_k, top_p, min_p
DECAYS, PROMPT_WEIGHTS = (0.8, 0.9, 0.95, 0.98), (1.0, 0.3, 0.1)  # of the evidence
QUICK = Settings(prompts=2, max_new_tokens=24)

AnyCell = Cell | CostCell


def coupled_cells(world: World) -> Iterator[Cell]:
    """Part A."""
    for draw, specialists in enumerate(world.sets):
        for name in specialists:
            domain = domain_of(name)
            one = Cell(world.name, (name,), "single", domain, 0.0, draw=draw)
            for nodes in NODES:
                yield replace(one, nodes=nodes)
                for temperature in SAMPLED:
                    for more in ({}, {"drafting": "topk"}, {"way": REJECTION}, {"way": TUNED}):
                        yield replace(one, nodes=nodes, temperature=temperature, **more)
            for more in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "drafting": "topk"}):
                yield replace(one, nodes=NODES[-1], places=1.0, **more)


def groups(world: World, each_set: bool) -> list[tuple[str, ...]]:
    """The drafters that are composed: those of each set, or those of the first, the first two ... sets together."""
    if each_set:
        return [tuple(specialists) for specialists in world.sets]
    return [tuple(chain(*world.sets[:count])) for count in range(1, len(world.sets) + 1)]


def composed_cells(world: World, each_set: bool) -> Iterator[Cell]:
    """Part B. Where the drafters are the same from several seeds, the target was not trained on switching prompts."""
    for place, drafters in enumerate(groups(world, each_set)):
        for temperature in COMPOSED:
            for domain in world.domains if each_set else (*world.domains, SWITCHING):
                one = Cell(world.name, drafters, "", domain, temperature, draw=place if each_set else 0)
                yield from (replace(one, drafters=(name,), way="single") for name in drafters)
                yield from compositions(one)


def compositions(one: Cell) -> Iterator[Cell]:
    """The ways to compose the drafters of a cell; of more than four only the main ones, which take their time."""
    yield replace(one, way="evidence", decay=EVIDENCE_DECAY)
    yield replace(one, way="confidence")
    yield replace(one, way="merged", budget=60)
    yield replace(one, way="merged", budget=60, decay=EVIDENCE_DECAY)
    if len(one.drafters) > 4:
        return
    yield replace(one, way="entropy")
    yield replace(one, way="merged")
    for decay in (None, EVIDENCE_DECAY):
        yield replace(one, way=SUM, budget=60, decay=decay)
    if one.temperature > 0:
        yield replace(one, way="confidence", drafting="topk")
        yield replace(one, way="merged", budget=60, drafting="topk")
    if len(one.drafters) == 2:
        yield from (replace(one, way=way) for way in PAPER)
        yield replace(one, way="the paper's merging", nodes=119)


def cost_cells(world: World) -> Iterator[CostCell]:
    """Part C."""
    most = groups(world, each_set=False)[-1]
    for count in (2, 4, 8):
        if count <= len(most):
            yield from (CostCell(world.name, most[:count], 1.0, rows) for rows in (1, ROWS))


def stop_cells(world: World) -> Iterator[Cell]:
    """Part D. A batch drafts on for its deepest row, so it is one row at a time here."""
    for name in world.sets[0]:
        for temperature in (0.0, *SAMPLED):
            for nodes in NODES:
                one = Cell(world.name, (name,), "single", domain_of(name), temperature, nodes=nodes)
                yield replace(one, rows=1, share=0.25)


def evidence_cells(world: World) -> Iterator[Cell]:
    """Part E."""
    drafters = groups(world, each_set=False)[0]
    for temperature in COMPOSED:
        for domain in (*world.domains, SWITCHING):
            one = Cell(world.name, drafters, "evidence", domain, temperature, prompts=TUNING_SEED)
            for decay, weight in product(DECAYS, PROMPT_WEIGHTS):
                yield replace(one, decay=decay, prompt_weight=weight)


def filter_cells(world: World) -> Iterator[Cell]:
    """Part F."""
    for name in world.sets[0]:
        for filters in FILTERS:
            one = Cell(world.name, (name,), "single", domain_of(name), 1.0, filters=filters)
            yield from (one, replace(one, drafting="topk"), replace(one, filters_drafter=True))


def plan(seeds: World | None, four: World | None, parts: Sequence[str]) -> dict[str, list[AnyCell]]:
    """The cells of each part; parts share cells."""
    pairs = [(world, world is seeds) for world in (seeds, four) if world]
    widest = (four or seeds,) if pairs else ()
    found: dict[str, list[AnyCell]] = {
        "A": [cell for world, each_set in pairs if each_set for cell in coupled_cells(world)],
        "B": [cell for world, each_set in pairs for cell in composed_cells(world, each_set)],
        "C": [cell for world in widest if world for cell in cost_cells(world)],
        "D": [cell for world in widest if world for cell in stop_cells(world)],
        "E": [cell for world in widest if world for cell in evidence_cells(world)],
        "F": [cell for world, _ in pairs[:1] for cell in filter_cells(world)],
    }
    return {part: list(dict.fromkeys(cells)) for part, cells in found.items() if part in parts and cells}


class Journal:
    """What is done, in a file of JSON lines: the settings, then a cell a line. A second start reads it and goes on."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may have been cut off
        told = [json.loads(line) for line in whole]
        if told and told[0] != json.loads(json.dumps(settings)):
            raise SystemExit(
                f"{path} was begun with other settings, models or code; delete it, or name another --journal"
            )
        self.done: dict[str, Any] = {as_key(entry["cell"]): entry["result"] for entry in told[1:]}
        self._file = path.open("r+b" if lines else "wb")
        self._file.truncate(sum(map(len, whole)))
        self._file.seek(0, os.SEEK_END)
        if not told:
            self._write(settings)

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        self._write({"cell": json.loads(key), "result": result})
        self.done[key] = dict(result)

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def run(worlds: dict[str, World], cells: Sequence[AnyCell], journal: Journal) -> None:
    """Measure what the journal does not have yet."""
    with tqdm(total=len(cells), unit="cell", smoothing=0) as bar:
        for cell in cells:
            world = worlds[cell.world]
            if isinstance(cell, CostCell):
                bar.set_description(f"cost of {len(cell.drafters)} drafters")
            else:
                bar.set_description(f"{cell.way}, {len(cell.drafters)}, {cell.domain}, T={cell.temperature:g}")
            if cell.key not in journal.done:
                journal.add(cell.key, world.cost(cell) if isinstance(cell, CostCell) else world.measure(cell))
            bar.update()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure coupled drafting, evidence and the stop rule.")
    parser.add_argument("--seeds", type=Path, help="a world whose sets are the same drafters from several seeds")
    parser.add_argument("--four", type=Path, help="a world of many domains, whose sets together are the many drafters")
    parser.add_argument("--parts", nargs="+", choices=list("ABCDEF"), default=list("ABCDEF"))
    parser.add_argument("--output", type=Path, required=True, help="the results; a table and a picture go beside them")
    parser.add_argument("--journal", type=Path, help="where finished cells are kept (default: OUTPUT.jsonl)")
    parser.add_argument("--prompts", type=int, default=Settings.prompts, help="of each domain")
    parser.add_argument("--max-new-tokens", type=int, default=Settings.max_new_tokens)
    parser.add_argument("--quick", action="store_true", help="a few prompts and tokens, to try the script")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args(arguments)
    if not (options.seeds or options.four):
        parser.error("give --seeds, --four, or both")
    torch.set_num_threads(options.threads)
    settings = QUICK if options.quick else Settings(options.prompts, options.max_new_tokens)
    folders = {"seeds": options.seeds, "four": options.four}
    worlds = {name: World(name, folder, settings) for name, folder in folders.items() if folder}
    told = {**asdict(settings), "worlds": {name: world.digest for name, world in worlds.items()}}
    journal = Journal(options.journal or options.output.with_suffix(".jsonl"), {**told, "code": code_digest()})
    cells = plan(worlds.get("seeds"), worlds.get("four"), options.parts)
    run(worlds, list(dict.fromkeys(cell for part in cells.values() for cell in part)), journal)

    report = beyond_report.Report(cells, journal.done)
    results: dict[str, Any] = {"provenance": provenance(), "settings": told, **report.as_json()}
    write_json(options.output, results)
    options.output.with_suffix(".md").write_text(report.markdown())
    beyond_picture.draw(report, options.output.with_suffix(".png"))
    print(report.markdown())
    print(json.dumps({claim["claim"]: claim["holds"] for claim in results["claims"]}, separators=(",", ":")))


if __name__ == "__main__":
    main()
