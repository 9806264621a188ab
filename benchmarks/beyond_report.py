"""What the figures of `bench_beyond.py` say: tables for people, and which claims hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from beyond_cells import REJECTION, SWITCHING, TUNED, TUNING_SEED, is_peer
from beyond_figures import EVERYTHING, MIXTURE, WAYS, Figures, Panel
from beyond_sample import Sample, claim, table

from taps_ext.tree import TreeShape

DEPTH = TreeShape().depth
ERRORS = """After ± stands one standard error over prompts, of the drafters as they are: other trainings would move a
figure, too, as the claim about every drafter seed shows. The world of four domains was trained once, and its 8 drafters
are those of two objectives for each domain."""
LOSS = 0.05  # of acceptance length that routing by evidence may cost


class Report(Figures):
    """Tables and claims; a part that was not measured has none."""

    # ---- A: one drafter

    def coupled_table(self) -> list[str]:
        domains, temperatures, nodes, _ = self.axes()
        header = ["domain", "T", "nodes", "top-k", "coupled", "coupled - top-k", REJECTION, "sharpened"]
        rows = []
        for domain in domains:
            for temperature in temperatures:
                for count in nodes:
                    names = ("topk", "coupled", REJECTION, TUNED)
                    topk, coupled, *peers = [self.single(domain, temperature, count, name) for name in names]
                    peer = max(peers, key=lambda sample: sample.length)
                    greedy = self.single(domain, 0.0, count, "coupled")
                    figures = [f"{topk.length:.2f}", f"**{coupled.length:.2f}**", str(coupled - topk)]
                    figures += [
                        *(f"{one.length:.2f}" for one in peers),
                        str(coupled - peer),
                        f"{greedy.length:.2f}",
                        str(coupled - greedy),
                    ]
                    rows.append([domain, f"{temperature:g}", str(count), *figures])
        return table([*header, "coupled - the better", "T = 0", "coupled - T = 0"], rows)

    def places_table(self) -> list[str]:
        rows = []
        for domain in self.axes()[0]:
            topk, coupled = (self.at_places(domain, 1.0, drafting) for drafting in ("topk", "coupled"))
            greedy = self.at_places(domain, 0.0)
            figures = [f"{topk.length:.2f}", f"**{coupled.length:.2f}**", str(coupled - topk)]
            rows.append([domain, *figures, f"{greedy.length:.2f}", str(coupled - greedy)])
        header = ["domain", "top-k, T = 1", "coupled, T = 1", "coupled - top-k", "T = 0", "coupled - T = 0"]
        return table(header, rows)

    def coupled_claims(self) -> list[dict[str, Any]]:
        domains, temperatures, nodes, draws = self.axes()
        places = [(d, t, n) for d in domains for t in temperatures for n in nodes]
        cells = [(*place, draw) for place in places for draw in draws]
        gains = {
            cell: self.single(*cell[:3], "coupled", cell[3]) - self.single(*cell[:3], "topk", cell[3]) for cell in cells
        }
        pooled = {cell: self.single(*cell, "coupled") - self.single(*cell, "topk") for cell in places}
        claims = [
            claim("coupled is above top-k, all drafter seeds together", pooled, lambda gain: gain.value > 0),
            claim("coupled is above top-k with every drafter seed", gains, lambda gain: gain.value > 0),
        ]
        most = max(nodes)
        against_greedy = {
            domain: self.single(domain, 1.0, most, "coupled") - self.single(domain, 0.0, most, "coupled")
            for domain in domains
        }
        name = f"coupled at T = 1 and {most} nodes is at the level of T = 0, less one standard error"
        claims.append(claim(name, against_greedy, lambda gain: gain.value >= -gain.error))
        there = {domain: self.at_places(domain, 1.0) - self.at_places(domain, 0.0) for domain in domains}
        claims.append(claim(f"{name}, at the same places of the same texts", there, lambda g: g.value >= -g.error))
        peer = {cell: self.single(*cell, "coupled") - self.best_peer(*cell) for cell in places}
        return [*claims, claim(f"coupled is above {REJECTION}, sharpened or not", peer, lambda gain: gain.value > 0)]

    def best_peer(self, domain: str, temperature: float, nodes: int) -> Sample:
        found = [self.single(domain, temperature, nodes, way) for way in (REJECTION, TUNED)]
        return max(found, key=lambda sample: sample.length)

    # ---- B: several drafters

    def composed_table(self, panel: Panel, temperature: float) -> list[str]:
        columns = [*self.domains[panel.world], MIXTURE, *([SWITCHING] if self.switches(panel) else [])]
        best = {column: self.matched(panel, column, temperature) for column in columns}
        rows = []
        for place in range(len(panel.groups[0])):
            lengths = [self.composed(panel, column, temperature, place=place).length for column in columns]
            rows.append([f"single, {panel.name(place)}", "", *(f"{length:.2f}" for length in lengths)])
        rows.append(["*best single there*", "60", *(f"{best[column].length:.2f}" for column in columns)])
        for name, how in WAYS.items():
            if not self.has(panel, temperature, how):
                continue
            samples = {column: self.composed(panel, column, temperature, **how) for column in columns}
            figures = [f"{one.length:.2f} ({one - best[column]})" for column, one in samples.items()]
            rows.append([name, f"{self.nodes(panel, temperature, **how):.0f}", *figures])
        return table(["", "nodes a step", *columns], rows)

    def composed_claims(self, panel: Panel) -> list[dict[str, Any]]:
        domains, evidence, merged = self.domains[panel.world], WAYS["evidence"], WAYS["merged, 60 nodes, evidence"]
        routed, weighted, above = {}, {}, {}
        for temperature in panel.temperatures:
            for domain in domains:
                own, cell = self.matched(panel, domain, temperature), (domain, temperature)
                routed[cell] = self.composed(panel, domain, temperature, **evidence) - own
                weighted[cell] = self.composed(panel, domain, temperature, **merged) - own
            for column in (MIXTURE, SWITCHING, EVERYTHING) if self.switches(panel) else (MIXTURE,):
                ours = self.composed(panel, column, temperature, **merged)
                above[column, temperature] = ours - self.matched(panel, column, temperature)
        title = panel.title
        return [
            claim(f"{title}: evidence is within {LOSS} of the matched specialist", routed, lambda d: d.value >= -LOSS),
            claim(
                f"{title}: merged with evidence is not below the matched specialist by more than one standard error",
                weighted,
                lambda d: d.value >= -d.error,
            ),
            claim(
                f"{title}: merged with evidence is above every single drafter on mixtures", above, lambda d: d.value > 0
            ),
        ]

    # ---- C, D, E

    def cost_table(self) -> list[str]:
        header = ["rows", "drafters", "", "drafter forwards", "lm_head rows", "drafting ms", "step ms"]
        rows = []
        for cell in sorted(self.costs, key=lambda cell: cell.rows):
            for way, cost in self.done[cell.key].items():
                counts = [f"{cost[name]:.1f}" for name in ("forwards", "head_rows")]
                times = [f"{cost[name]['median']:.1f}" for name in ("drafting_ms", "step_ms")]
                rows.append([str(cell.rows), str(len(cell.drafters)), way, *counts, *times])
        return table(header, rows)

    def stop_table(self) -> list[str]:
        cells = self.parts["D"]
        nodes = list(dict.fromkeys(cell.nodes for cell in cells))
        rows = []
        for domain, temperature in dict.fromkeys((cell.domain, cell.temperature) for cell in cells):
            own = {
                cell.nodes: self.levels(cell)
                for cell in cells
                if (cell.domain, cell.temperature) == (domain, temperature)
            }
            shares = [f"{own[count]:.2f} ({1 - own[count] / DEPTH:.0%} saved)" for count in nodes]
            rows.append([domain, f"{temperature:g}", *shares])
        return table(["domain", "T", *(f"{count} nodes" for count in nodes)], rows)

    def evidence_table(self, panel: Panel) -> list[str]:
        columns = [*self.domains[panel.world], SWITCHING]
        rows = []
        for temperature in panel.temperatures:
            for decay, weight in dict.fromkeys((cell.decay, cell.prompt_weight) for cell in self.parts["E"]):
                how = {"way": "evidence", "decay": decay, "prompt_weight": weight, "prompts": TUNING_SEED}
                samples = [self.composed(panel, column, temperature, **how) for column in columns]
                rows.append(
                    [f"{temperature:g}", f"{decay:g}", f"{weight:g}", *(f"{one.length:.2f}" for one in samples)]
                )
        return table(["T", "decay", "weight of a prompt's tokens", *columns], rows)

    def filter_table(self) -> list[str]:
        cells = self.parts["F"]
        rows = []
        for domain, filters in dict.fromkeys((cell.domain, cell.filters) for cell in cells):
            own = [cell for cell in cells if (cell.domain, cell.filters) == (domain, filters)]
            alone, topk, both = (self.sample([cell]) for cell in own)
            name = ", ".join(f"{k} {v:g}" for k, v in zip(("top-k", "top-p", "min-p"), filters, strict=True))
            lengths = [f"{sample.length:.2f}" for sample in (topk, alone, both)]
            rows.append([domain, name, *lengths, str(both - alone)])
        return table(["domain", "filters", "top-k drafting", "coupled", "coupled, drafter filtered", "gained"], rows)

    # ---- all of it

    def text_claim(self) -> dict[str, Any]:
        found = [self.done[cell.key] for cell in self.every() if not is_peer(cell) and cell.places is None]
        same, texts = sum(one["identical"] for one in found), sum(len(one["steps"]) for one in found)
        detail = f"{same} of {texts} texts in {len(found)} cells"
        return {"claim": "every text is plain decoding's", "holds": same == texts, "detail": detail}

    def claims(self) -> list[dict[str, Any]]:
        found = [self.text_claim()] if self.every() else []
        if "A" in self.parts:
            found += self.coupled_claims()
        for panel in self.panels():
            found += self.composed_claims(panel)
        return found

    def tables(self) -> dict[str, list[str]]:
        found = {}
        if "A" in self.parts:
            found["A. One drafter, the domain's own"] = self.coupled_table()
            found["A. First steps at places of texts written at T = 1"] = self.places_table()
        for panel in self.panels():
            for temperature in panel.temperatures:
                found[f"B. {panel.title}, T = {temperature:g}"] = self.composed_table(panel, temperature)
        if self.costs:
            found["C. What a step costs, T = 1"] = self.cost_table()
        if "D" in self.parts:
            found[f"D. Levels drafted a step, of {DEPTH}"] = self.stop_table()
        if "F" in self.parts:
            found["F. The request's filters on the drafter's side, T = 1"] = self.filter_table()
        for panel in self.panels("E"):
            found[f"E. Routing by evidence, {panel.title}, on the prompts of tuning"] = self.evidence_table(panel)
        return found

    def markdown(self) -> str:
        lines = ["# Beyond the paper: acceptance lengths", ""]
        for one in self.claims():
            lines.append(f"- {'holds' if one['holds'] else '**fails**'}: {one['claim']} ({one['detail']})")
        lines += ["", ERRORS]
        for title, rows in self.tables().items():
            lines += ["", f"## {title}", "", *rows]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Claims, costs, and the figures of every cell."""
        cells = []
        for cell in self.every():
            result = self.done[cell.key]
            length = round(self.sample([cell]).length, 4)
            steps = sum(result["steps"])
            extra = {"identical": result["identical"], "nodes_per_step": round(result["nodes"] / steps, 2)}
            cells.append(
                {**asdict(cell), "acceptance_length": length, "num_steps": steps, **extra, "chosen": result["chosen"]}
            )
        costs = [
            {"drafters": list(cell.drafters), "rows": cell.rows, "ways": self.done[cell.key]} for cell in self.costs
        ]
        return json.loads(json.dumps({"claims": self.claims(), "costs": costs, "cells": cells}))  # type: ignore[no-any-return]
