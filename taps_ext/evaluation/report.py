"""The report of an evaluation: one page, its tables as CSV and Markdown, its pictures, and all counts as JSON.

The page begins with what a user asks first, the tokens per second against plain decoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader

from ..checkpoints.files import check_writable, replacing_directory, write_whole, written
from . import counts, figures
from .counts import Results, View
from .figures import (
    MEAN,
    Picture,
    Row,
    Sampled,
    Table,
    dots,
    lines,
    mean_over,
    plain_value,
    shares,
    variant_table,
)
from .results import PROVENANCE
from .variants import MERGED, PLAIN, SINGLE

MARKDOWN, PAGE, COUNTS, TABLES, PICTURES = "report.md", "index.html", "report.json", "tables", "pictures"
PARTS = (MARKDOWN, PAGE, TABLES, PICTURES, COUNTS)
TEMPLATE = "report.html"
SAVED = "nodes saved per step"
FEWEST = 20  # steps at the depth before: a share of fewer says nothing

Parts = tuple[list[Table], list[Picture]]


@dataclass(frozen=True)
class Section:
    """A heading, sentences, pictures and tables."""

    title: str
    text: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()


# ---- sections: of a view its tables and pictures


def sections(results: Results) -> list[Section]:
    """Return the sections that the results have something for."""
    found = []
    views = counts.views(results)
    for make, (title, text) in SECTIONS.items():
        tables, pictures = (list(chain(*parts)) for parts in zip(*map(make, views), strict=True))
        found.append(Section(title, text, [table for table in tables if len(table.rows)], pictures))
    return [*(section for section in found if section.tables), provenance(results)]


def _seconds(view: View) -> Parts:
    def speed_up(variant: str, task: str) -> float | None:
        speeds = view.speeds(variant, task)
        return speeds and speeds[0] / speeds[1]

    note = "Tokens per second over plain decoding's, on the same questions in the same process."
    table = variant_table(view, "speed-up", "Speed-up over plain decoding", note, speed_up)
    everyone, speed = list(view.specs), plain_value(view, lambda cell: (cell["tokens"], cell["seconds"]))
    forwards = plain_value(view, lambda cell: (cell["steps"] + cell["turns"], cell["tokens"]))
    note = "Of a row, its prefills included; plain decoding has 1."
    tables = [
        table,
        variant_table(view, "tokens-per-second", "Tokens per second", "", speed, ".1f", everyone),
        variant_table(view, "forwards", "Target forwards per token", note, forwards, ".3f", everyone),
    ]
    caption = "Right of the dashed line a variant is faster than plain decoding."
    return tables, _drawn(view, table, caption, "times plain", 1.0)


def _drawn(view: View, table: Table, caption: str, label: str, reference: float | None = None) -> list[Picture]:
    """Return a picture of the variants with usual trees, without columns about the tree."""
    usual = table.rows[table.rows["variant"].isin(view.usual())]
    columns = ("variant", *view.tasks.values(), MEAN)
    shown = replace(table, rows=usual, forms={head: form for head, form in table.forms.items() if head in columns})
    return [dots(shown, caption, label, reference)] if len(usual) else []


def _acceptance(view: View) -> Parts:
    singles = [one for one in view.usual() if view.specs[one].composition == SINGLE]
    best = {task: figures.best(view, singles, task) for task in view.tasks}
    named = ", ".join(f"{view.tasks[task]} {one}" for task, one in best.items() if one)

    def micro(variant: str, task: str) -> Sampled | None:
        return figures.value(view, variant, task, figures.acceptance_length)

    def macro(variant: str, task: str) -> Sampled | None:
        return figures.value(view, variant, task, figures.macro_acceptance_length)

    def against_best(variant: str, task: str) -> Sampled | None:
        reference = best[task]
        return None if reference is None else figures.difference(view, variant, reference, task)

    title, against = "Acceptance length", "Against the best single drafter"
    table = variant_table(view, "acceptance", title, _settings(view), micro, extra=_about_trees(view))
    tables = [
        table,
        variant_table(view, "acceptance-macro", f"{title}, mean of the questions", "", macro),
        variant_table(view, "against-best-single", against, f"Best single: {named}.", against_best, "+.2f"),
    ]
    caption = "Trees of the usual size, the union or what pays, with 95% intervals."
    return tables, _drawn(view, table, caption, "tokens per step")


def _about_trees(view: View) -> dict[str, tuple[str, Callable[[str], Any]]]:
    """Return the columns of a variant's trees, and of its drafter seeds where there are several."""
    nodes = plain_value(view, lambda cell: (cell["nodes"], cell["steps"]))

    def mean_nodes(variant: str) -> Any:
        return mean_over([nodes(variant, task) for task in view.tasks if view.seeds(variant, task)])

    def num_seeds(variant: str) -> int:
        return max(len(view.seeds(variant, task)) for task in view.tasks)

    def budget(variant: str) -> str:
        return f"at most {view.nodes(variant)}" if view.specs[variant].adapts else str(view.nodes(variant) or "union")

    columns: dict[str, tuple[str, Callable[[str], Any]]] = {
        "node budget": ("", budget),
        "nodes per step": (".1f", mean_nodes),
    }
    if any(num_seeds(one) > 1 for one in view.variants()):
        columns |= {"drafter seeds": ("d", num_seeds), "range over seeds": ("", lambda one: _seed_range(view, one))}
    return columns


def _seed_range(view: View, variant: str) -> str | None:
    """Return the least and the greatest mean over tasks of one drafter seed."""
    seeds = sorted({seed for task in view.tasks for seed in view.seeds(variant, task)})
    of_seeds = [
        mean_over([figures.value(view, variant, task, figures.acceptance_length, [seed]) for task in view.tasks])
        for seed in seeds
    ]
    values = [figure.value for figure in of_seeds if figure is not None]
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else None


def _settings(view: View) -> str:
    """Return what was the same for every row, and which cells are incomplete."""
    settings, partial = view.settings, []
    asked = {name: facts["num_questions"] for run in view.runs for name, facts in run["tasks"].items()}
    for task, title in view.tasks.items():
        numbers = {one: len(cell) for one in view.specs if (cell := view.cell(one, task)) is not None}
        fewer = [one for one, number in numbers.items() if number < asked[task]]
        where = "" if len(fewer) == len(numbers) else f" ({', '.join(fewer)})"
        partial += [f"{title}, fewest {min(numbers.values())} of {asked[task]}{where}"] if fewer else []
    note = (
        f"Trees of {settings['depth']} levels, {settings['branching']} children per node and {settings['max_nodes']} "
        f"nodes (root included) unless a row says otherwise; at most {settings['max_new_tokens']} new tokens; "
        f"questions: {', '.join(f'{title} {asked[task]}' for task, title in view.tasks.items())}."
    )
    return f"{note} Incomplete: {'; '.join(partial)}." if partial else note


def _depth(view: View) -> Parts:
    depths = range(view.settings["depth"] + 1)
    rows: list[Row] = []
    marks: dict[str, dict[str, pd.Series]] = {}
    for task, title in view.tasks.items():
        for one in view.variants():
            if (cell := view.cell(one, task)) is None:
                continue
            steps = cell.sum().reindex([f"depth {depth}" for depth in depths], fill_value=0).tolist()
            found = pd.Series(conditional(steps), index=depths[1:], dtype=float)
            rows.append({"variant": one, "task": title} | {f"depth {depth}": share for depth, share in found.items()})
            if one in view.usual() and found.notna().any():
                marks.setdefault(title, {})[one] = found.dropna()
    forms = {"variant": "", "task": ""} | {f"depth {depth}": ".1%" for depth in depths[1:]}
    table = Table.of(f"depth-{view.slug}", f"Acceptance by depth: {view.name}", "", rows, forms)
    caption = "Share of the steps that go one level deeper; trees of the usual size, the union or what pays."
    return [table], [lines(table, caption, marks, "depth", "accepted, given the one before")] if marks else []


def conditional(steps_by_depth: Sequence[float]) -> list[float | None]:
    """Return the shares from depth 1 on, given the steps that accepted 0, 1, ... draft tokens."""
    reached = [sum(steps_by_depth[depth:]) for depth in range(len(steps_by_depth))]
    return [deeper / shallower if shallower >= FEWEST else None for shallower, deeper in pairwise(reached)]


def _proposers(view: View) -> Parts:
    routed = _share_table(view, "routing", "Steps by drafter", _routed)
    merged = _share_table(view, "merging", "Accepted tokens by proposer", _merged)
    disjoint = [head for head in merged.forms if head == "several" or head.endswith(" alone")]
    drawn = [(routed, list(routed.forms)[2:]), (merged, disjoint)]
    return [routed, merged], [shares(table, heads) for table, heads in drawn if len(table.rows)]


def _share_table(view: View, name: str, title: str, of: Callable[[View, str, pd.Series], Row]) -> Table:
    """Return a row per task and composition of several drafters that has shares."""
    rows = [
        {"variant": one, "task": view.tasks[task]} | row
        for task in view.tasks
        for one in view.variants()
        if (cell := view.cell(one, task)) is not None and (row := of(view, one, cell.sum()))
    ]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    forms = {head: "" if head in ("variant", "task") else ".1f" if head == SAVED else ".1%" for head in heads}
    return Table.of(f"{name}-{view.slug}", f"{title}: {view.name}", "", rows, forms)


def _routed(view: View, variant: str, sums: pd.Series) -> Row:
    """Return each drafter's share of the steps, where one tree of several is chosen."""
    names = view.specs[variant].drafters
    steps = {name: float(sums.get(f"chosen {name}", 0)) for name in names}
    total = sum(steps.values())
    return {name: steps[name] / total for name in names} if len(names) > 1 and total else {}


def _merged(view: View, variant: str, sums: pd.Series) -> Row:
    """Return the shares of a merged tree's accepted tokens by proposer, and the nodes that merging saved."""
    if view.specs[variant].composition != MERGED:
        return {}
    names, saved = view.specs[variant].drafters, sums["proposed"] - (sums["nodes"] - sums["steps"])
    of = {part: [sums.get(f"{part} {name}", 0) for name in names] for part in ("proposers", "alone")}
    tokens = [*of["proposers"], *of["alone"], sums["accepted"] - sum(of["alone"])]
    heads = [*names, *(f"{name} alone" for name in names), "several"]
    row = {head: float(count / max(sums["accepted"], 1)) for head, count in zip(heads, tokens, strict=True)}
    return row | {SAVED: saved / max(sums["steps"], 1), "share saved": saved / max(sums["proposed"], 1)}


def _lossless(view: View) -> Parts:
    equal = plain_value(view, lambda cell: (cell["equal"], cell["turns"]))

    def right(variant: str, task: str) -> Sampled | None:
        return figures.value(view, variant, task, lambda cell: (cell["right"], cell["scored"]))

    title, note = "Texts equal to plain decoding's", "Share of the turns, token by token."
    tables = [variant_table(view, "equal-to-plain", title, note, equal, ".1%")]
    note = "Share of the scored turns."
    return [*tables, variant_table(view, "accuracy", "Accuracy", note, right, ".1%", list(view.specs))], []


SECTIONS: dict[Callable[[View], Parts], tuple[str, str]] = {
    _seconds: (
        "Seconds",
        "Measured on the machine named under provenance, without an interval, because resampled questions cannot tell "
        "how busy the machine was. Target forwards per token say what a larger target would save: a small target's "
        "forward costs about as much as a drafter's.",
    ),
    _acceptance: (
        "Acceptance length",
        "Tokens that a decode step adds: accepted draft tokens and the target's own, over all steps (micro), or as the "
        "mean of the questions' own lengths (macro). The prefill and its token are no step. Intervals hold 95% of "
        "2,000 resamples of the questions (percentile bootstrap). Differences are paired by question: an interval "
        "without 0 is a difference. The best single drafter is chosen with hindsight, which favours it a little.",
    ),
    _depth: (
        "Acceptance by depth",
        "Conditional: P(a draft token at depth d is accepted, given that the one at depth d - 1 was). A level whose "
        f"predecessor fewer than {FEWEST} steps reached is left out.",
    ),
    _proposers: (
        "Routing and proposers",
        "Routing: the share of the decode steps in which each drafter's tree was chosen. Merged trees: accepted draft "
        "tokens by who proposed them, a drafter (alone or with others), one alone, or several. Saved: nodes that "
        "several drafters proposed are verified once; the share is of all proposed nodes that were kept.",
    ),
    _lossless: (
        "Losslessness",
        "Speculation may not change the text. float32 must give 100%; in lower precision the shape of a batch moves "
        "logits, and taps-ext check-lossless shows where. Accuracy must equal plain decoding's.",
    ),
}


def provenance(results: Results) -> Section:
    """Return what each variant is, and a column of facts per run."""
    specs = {name: spec for run in results.runs for name, spec in run["variants"].items()}
    asked = [{"variant": name} | spec | {"drafters": ", ".join(spec["drafters"])} for name, spec in specs.items()]
    facts = {f"run {number}": _facts(run) for number, run in enumerate(results.runs, start=1)}
    names = dict.fromkeys(name for one in facts.values() for name in one)
    rows: list[Row] = [{"fact": name} | {run: one.get(name) for run, one in facts.items()} for name in names]
    tables = [
        Table.of("variants", "Variants", "", asked, dict.fromkeys(asked[0], "")),
        Table.of("provenance", "Runs", "", rows, dict.fromkeys(["fact", *facts], "")),
    ]
    text = "What each results directory was asked, with what, and where it ran. report.json holds all counts."
    return Section("Provenance", text, tables)


def _facts(run: Mapping[str, Any]) -> dict[str, str]:
    """Return facts by dotted name, as text, checksums by their first 12 digits."""
    kept = {name: run[name] for name in ("label", "target", "drafters", "tasks", "temperatures", "settings")}
    again = [f"{one['date']} at {one.get('commit') or one['taps_ext']}" for one in run[PROVENANCE].get("resumed", ())]
    facts = pd.json_normalize(kept | run[PROVENANCE] | {"resumed": again}).iloc[0].dropna()
    texts = {
        str(name): ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in facts.items()
    }
    return {name: re.sub(r"^([0-9a-f]{12})[0-9a-f]{28,}$", r"\1", text) for name, text in texts.items() if text}


# ---- the files


def check_report_output(output: Path) -> None:
    """Raise ValueError or OSError, in one sentence, unless a report can be written to the directory."""
    check_writable(output)
    foreign = [name for name in PARTS if (output / name).exists()]
    if foreign and not (output / COUNTS).is_file():
        name = output / foreign[0]
        raise ValueError(f"{name} was not written by `taps-ext report`; choose another --output directory")


def write(results: Results, output: Path, parts: Sequence[Section]) -> list[Path]:
    """Write the report and return its files; a report that is there is replaced, and other files stay."""
    check_report_output(output)
    files = make(results, parts)
    output.parent.mkdir(parents=True, exist_ok=True)
    with written("the report", output.parent, "make room and report again"):
        output.mkdir(exist_ok=True)
        for name in (COUNTS, MARKDOWN, PAGE):
            write_whole(output / name, [files[name]])
        for name in (TABLES, PICTURES):
            with replacing_directory(output / name) as fresh:
                for path, content in files.items():
                    if path.startswith(f"{name}/"):
                        (fresh / Path(path).name).write_bytes(content)
    return [output / path for path in files]


def make(results: Results, parts: Sequence[Section]) -> dict[str, bytes]:
    """Return the content of every file of the report, by its path in the directory."""
    tables = [table for part in parts for table in part.tables]
    records = [{"name": table.name, "title": table.title, "rows": table.records} for table in tables]
    lead, found = _lead(results), answers(results)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    page = environment.get_template(TEMPLATE).render(lead=lead, answers=found, sections=parts)
    files = {COUNTS: counts.to_json(results, records), MARKDOWN: _markdown(lead, found, parts), PAGE: page}
    files |= {f"{TABLES}/{table.name}.csv": table.csv for table in tables}
    images = {f"{PICTURES}/{picture.name}.png": picture.png for part in parts for picture in part.pictures}
    return {name: text.encode() for name, text in files.items()} | images


def answers(results: Results) -> list[str]:
    """Return the answers to a user's questions: how much faster is it than plain decoding, and is it the same text?"""
    found, views = [], counts.views(results)
    for view in views:
        speeds = {one: [view.speeds(one, task) for task in view.tasks] for one in view.variants()}
        known = {one: np.array(pairs) for one, pairs in speeds.items() if None not in pairs}
        ratios = {one: float(np.mean(pairs[:, 0] / pairs[:, 1])) for one, pairs in known.items()}
        if ratios:
            best = max(ratios, key=lambda one: ratios[one])
            is_faster, (own, plain) = ratios[best] > 1, known[best].mean(axis=0)
            words = "is the fastest" if is_faster else "comes closest, and nothing is faster than plain decoding"
            numbers = f"{ratios[best]:.2f} times plain decoding's tokens per second ({own:.1f} against {plain:.1f})"
            found.append(f"{view.name}: {best} {words}: {numbers}, mean over tasks.")
    plain_names = {name for view in views for name in view.variants(PLAIN)}
    rows = results.questions[~results.questions["variant"].isin(plain_names)]
    equal, turns = int(rows["equal"].sum()), int(rows["turns"].sum())
    return [*found, f"{equal:,} of {turns:,} turns equal plain decoding's, token by token."] if turns else found


def _lead(results: Results) -> str:
    targets, labels = ([run[name] for run in results.runs] for name in ("target", "label"))
    drafters = [name for run in results.runs for name in run["drafters"]]
    tasks = [facts["title"] for run in results.runs for facts in run["tasks"].values()]
    parts = {"Target": [target["name"] for target in targets], "drafters": drafters, "tasks": tasks, "labels": labels}
    return "; ".join(f"{name} {', '.join(filter(None, dict.fromkeys(of)))}" for name, of in parts.items() if any(of))


def _markdown(lead: str, found: Sequence[str], parts: Sequence[Section]) -> str:
    text = [f"# Evaluation\n\n{lead}\n", *(f"- {answer}" for answer in found), ""]
    for part in parts:
        text.append(f"## {part.title}\n\n{part.text}\n")
        text += [f"![{one.title}]({PICTURES}/{one.name}.png)\n\n{one.caption}\n" for one in part.pictures]
        text += [table.markdown for table in part.tables]
    return "\n".join(text)
