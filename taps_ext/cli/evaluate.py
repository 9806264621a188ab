"""taps-ext evaluate | report | check-lossless."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.table import Column, Table
from rich.text import Text

from ..checkpoints import load_drafters
from ..checkpoints.load import is_lookup, open_target
from ..composition import COMPOSITIONS
from ..decode.decoder import check_drafting
from ..evaluation import contestants, lossless, results, runner
from ..evaluation.divergence import Divergence
from ..evaluation.lossless_report import TEMPERATURES, FrequencyCheck, LosslessReport, LosslessSettings, TextCheck
from ..evaluation.plan import Plan, Settings
from ..evaluation.prompting import Prompter, refuse_long
from ..evaluation.summary import Summary, summarise
from ..evaluation.tasks import TASKS, Question, find_task, load_prompts
from ..evaluation.variants import parse_variants
from ..native import choose_device
from ..target.end_tokens import end_tokens
from ..target.model import TargetModel
from ..tiny import TINY, resolve
from ..tree import TreeShape
from . import terminal
from .terminal import drafter_folders, load_target_and_tokenizer, number, show

TINY_TASKS = ("tiny_math", "tiny_chat")
EVALUATED_TEMPERATURES, CHECKED_TEMPERATURES = [0.0, 1.0], list(TEMPERATURES)
EVERY_COMPOSITION = list(COMPOSITIONS)
PROMPTS = "prompts"  # the task of a user's own prompts
SENTENCES = (
    "What is the difference between weather and climate?",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Explain your steps.",
    "Write a short poem about a lighthouse in winter.",
    "Explain to a ten-year-old why the sky is blue.",
    "List five things to check before renting a flat.",
    "If 3 pens cost 4.50, what do 7 pens cost?",
    "Write a Python function that tells whether a word is a palindrome.",
    "Summarise in two sentences what photosynthesis does.",
)
MOST_DIVERGENCES = 12  # shown; --json has all
STYLES = {"equal": "green", "as expected": "green", "near-ties": "yellow"}
FAULT = "bold red"


def evaluate(
    target: terminal.Target[str] = TINY,
    drafter: terminal.Drafters = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task as NAME or NAME=FILE: mt_bench, gsm8k, math500, svamp, tiny_math or tiny_chat. Repeatable."
        ),
    ] = None,
    prompts: terminal.Prompts = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="[LABEL=]COMPOSITION[:NAME+NAME][@NODES], then ,topk ,auto ,evidence=DECAY or ,weight=W. Repeatable."
        ),
    ] = None,
    temperature: terminal.Temperatures = EVALUATED_TEMPERATURES,
    limit: terminal.Limit[int | None] = None,
    max_new_tokens: terminal.MaxNewTokens = 64,
    batch_size: terminal.BatchSize = 8,
    depth: terminal.Depth[int] = 6,
    branching: terminal.Branching[int] = 10,
    max_nodes: terminal.MaxNodes[int] = 60,
    seed: terminal.Seed = 0,
    system_prompt: terminal.SystemPrompt = None,
    extend: terminal.Extend = False,
    costs: terminal.Costs = None,
    label: Annotated[str, typer.Option(help="Name of this run, to tell it from others in a report.")] = "",
    dtype: terminal.Dtype = "auto",
    device: terminal.Device = None,
    output: terminal.Output[Path] = Path("out/evaluation"),
    as_json: terminal.AsJson = False,
) -> None:
    """Answer benchmark questions with every variant and record each answer. See docs/evaluation.md.

    Question i draws with taps_ext.row_seed(--seed, i). The same command resumes a run that was stopped. The exit code
    is 1 if a text differs from plain decoding's in float32.
    """
    settings = Settings(max_new_tokens, batch_size, depth, branching, max_nodes, seed, system_prompt or "", extend)
    paths, place = drafter_folders(target, drafter), choose_device(device or _own_gpu())
    lookups = [name for name, path in paths.items() if is_lookup(path)]
    variants = parse_variants(variant or [], list(paths), temperature, max_nodes, lookups)
    asked, sources = _tasks(target, task or [], prompts, limit)
    facts = contestants.drafter_facts(contestants.check_drafters(paths, open_target(resolve(target)).config), paths)
    plan = Plan(asked, variants, temperature, settings, facts, sources, label, terminal.read_costs(costs))
    results.check_folder(output, plan.configuration())
    model, tokenizer = load_target_and_tokenizer(target, dtype, place)
    name = target if target == TINY else contestants.short_name(target)
    with terminal.progress() as update:
        runner.evaluate(model, tokenizer, paths, plan, output, update, target_name=name, command=_command())
    if not terminal.process_index():
        _show_summary(summarise(output), as_json)


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Directories that taps-ext evaluate wrote, directories that hold such, or a report.json."),
    ],
    output: terminal.Output[Path],
    as_json: terminal.AsJson = False,
) -> None:
    """Make tables, pictures and one page of evaluation results, in a directory.

    Runs with the same label and different drafters count as seeds of one drafter. A report that is there is replaced.
    """
    from ..evaluation import counts, report  # pandas and scipy: no other command waits for them

    report.check_report_output(output)
    with terminal.progress("answers"):
        read = counts.read(results)
        files = [str(path) for path in report.write(read, output, report.sections(read))]
    shown = f"wrote {output}: index.html, report.md, report.json, {len(files) - 3} tables and pictures"
    show(as_json, {"output": str(output), "files": files}, shown)


def check_lossless(
    target: terminal.Target[str] = TINY,
    drafter: terminal.Drafters = None,
    composition: terminal.Compositions = EVERY_COMPOSITION,
    merged_nodes: terminal.MergedNodes = None,
    temperature: terminal.Temperatures = CHECKED_TEMPERATURES,
    prompts: terminal.Prompts = None,
    limit: terminal.Limit[int] = 8,
    max_new_tokens: terminal.MaxNewTokens = 32,
    batch_size: terminal.BatchSize = 8,
    draws: Annotated[
        int,
        typer.Option(help="Number of draws for the frequencies of the first tokens; 20000 is a strong check, 0 none."),
    ] = 1000,
    depth: terminal.Depth[int] = 6,
    branching: terminal.Branching[int] = 10,
    max_nodes: terminal.MaxNodes[int] = 60,
    drafting: terminal.Drafting = "coupled",
    extend: terminal.Extend = False,
    seed: terminal.Seed = 0,
    dtype: terminal.Dtype = "auto",
    device: terminal.Device = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Check that your drafters do not change your target's text; exit with code 1 if they do.

    Greedy texts and texts drawn with the same noise must equal plain decoding's, and the frequencies of the first
    tokens of many draws must match the target's probabilities. In bfloat16 and float16 texts may differ at near-ties:
    these are shown with the logits there, and are not counted as faults. A thousand draws find only a coarse fault in
    the frequencies; --draws 20000 is the strong check.
    """
    shape = TreeShape(depth, branching, max_nodes)
    settings = LosslessSettings(tuple(temperature), max_new_tokens, batch_size, draws, seed=seed, shape=shape)
    paths = drafter_folders(target, drafter)
    ways = lossless.make_ways(list(paths), composition, check_drafting(drafting), merged_nodes, extend)
    questions, place = _questions(target, prompts, limit), choose_device(device)
    contestants.check_drafters(paths, open_target(resolve(target)).config)
    with terminal.progress() as update:
        model, tokenizer = load_target_and_tokenizer(target, dtype, place)
        taken, ends = TargetModel(model), end_tokens(model, tokenizer)
        tokens = _encoded(tokenizer, questions, taken, max(max_new_tokens, settings.num_first_tokens))
        done, total = count(1), lossless.count_units(ways, len(questions), settings)
        drafters = load_drafters(paths, taken, tokenizer)
        given = (taken, drafters, ways, tokens, settings, lambda what: update(what, next(done), total))
        found = lossless.check_lossless(*given, list(ends.values()) or None)
    show(as_json, {**found.to_dict(), "end_tokens": ends}, *_page(found, tokenizer))
    if not found.passed:
        raise typer.Exit(1)


# ---- evaluate


def _show_summary(summary: Summary, as_json: bool) -> None:
    """Print acceptance lengths, and whether texts equal plain decoding's; exit with code 1 if they must and do not."""
    verdict = Text(summary.verdict(), style=FAULT if summary.is_broken else "")
    where = f"answers in {summary.folder}; tables and figures: taps-ext report {summary.folder} -o DIRECTORY"
    show(as_json, summary.to_dict(), _lengths(summary), "", verdict, where)
    if summary.is_broken:
        raise typer.Exit(1)


def _tasks(
    target: str, specs: Sequence[str], prompts: Path | None, limit: int | None
) -> tuple[dict[str, list[Question]], dict[str, str]]:
    """Return the questions of each task and where they come from."""
    if not specs and prompts is None and target != TINY:
        raise ValueError("give at least one --task NAME[=FILE], or --prompts FILE")
    asked: dict[str, list[Question]] = {}
    sources: dict[str, str] = {}
    for spec in specs or (TINY_TASKS if prompts is None else ()):
        name, equals, file = spec.partition("=")
        if equals and not file:
            raise ValueError(f"a task is NAME or NAME=FILE, got {spec!r}")
        if name in asked:
            raise ValueError(f"the task {name!r} is given twice")
        task = find_task(name)
        asked[name] = task.load(file or None, limit)
        sources[name] = Path(file).name if file else str(task.source)
    if prompts is not None:
        asked[PROMPTS], sources[PROMPTS] = load_prompts(prompts, limit), prompts.name
    return asked, sources


def _own_gpu() -> str | None:
    """Return the GPU of this process, if several processes were launched on a machine with GPUs."""
    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if is_one_of_many and torch.cuda.is_available() else None


def _command() -> str:
    """Return the command line with every path cut to its last part: what others can repeat, not where it ran."""
    return shlex.join(["taps-ext", *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    head, value = re.fullmatch(r"(-o|(?:.*=)?)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
    is_path = value.startswith(("/", "~", ".")) or (os.sep in value and Path(value).exists())
    return head + Path(value).expanduser().resolve().name if is_path else argument


def _lengths(summary: Summary) -> Table:
    """Return a row per variant: its acceptance length per task and temperature, and its texts equal to plain's."""
    columns = sorted(dict.fromkeys((t, task) for _, task, t in summary.cells), key=lambda column: column[0])
    headings = [Column(f"{task}\nT = {temperature:g}", justify="right") for temperature, task in columns]
    first, last = Column("acceptance length", overflow="fold"), Column("as plain", justify="right")
    table = Table(first, *headings, last, **terminal.PLAIN)
    for variant in dict.fromkeys(variant for variant, _, _ in summary.cells):
        cells = {(t, task): cell for (name, task, t), cell in summary.cells.items() if name == variant}
        lengths = [f"{cells[column].acceptance_length:.2f}" if column in cells else "" for column in columns]
        equal, total = (sum(getattr(cell, name) for cell in cells.values()) for name in ("num_equal", "num_questions"))
        table.add_row(variant, *lengths, f"{equal}/{total}", style=FAULT if equal < total else "")
    return table


# ---- check-lossless


def _questions(target: str, prompts: Path | None, limit: int) -> list[Question]:
    if prompts is not None:
        return load_prompts(prompts, limit)
    if target == TINY:
        halves = zip(TINY_TASKS, (limit - limit // 2, limit // 2), strict=True)
        return [question for task, half in halves if half for question in TASKS[task].load(limit=half)]
    return [Question(str(number), "built-in", (text,)) for number, text in enumerate(SENTENCES)][:limit]


def _encoded(
    tokenizer: Any, questions: Sequence[Question], target: TargetModel, num_new_tokens: int
) -> list[list[int]]:
    """Return the tokens of each question; raise ValueError for a text that leaves the target's context."""
    terminal.note_without_template(tokenizer)
    prompts = [_encode(tokenizer, question) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        refuse_long(question, len(prompt) + num_new_tokens, target)
    return prompts


def _encode(tokenizer: Any, question: Question) -> list[int]:
    """Return the tokens of a question's first turn, through the chat template if there is one."""
    if getattr(tokenizer, "chat_template", None):
        return Prompter(tokenizer).encode(question, [])
    texts = [*(message["content"] for message in question.history), question.turns[0]]
    tokens: list[int] = tokenizer("\n".join(texts))["input_ids"]
    return tokens


def _page(report: LosslessReport, tokenizer: Any) -> Iterator[Any]:
    """Yield the verdicts, what was drawn, the places where texts differ, and the conclusion."""
    yield _verdicts(report)
    for check in report.frequencies[:1]:
        draws = f"{report.settings.num_first_tokens} in each of {check.num_draws} draws at T = {check.temperature:g}"
        yield f"first tokens: {draws}, with the same noise in each row"
    yield ""
    yield from _divergences(report, tokenizer)
    style = FAULT if not report.passed else "bold green" if report.verdict == "lossless" else "bold yellow"
    yield Text(report.verdict, style=style)
    yield from report.notes


def _verdicts(report: LosslessReport) -> Table:
    """Return a row per way of decoding: its texts at each temperature, and the frequencies of its first tokens."""
    headings = ["texts equal\nto plain's", *(f"\nT = {temperature:g}" for temperature in report.settings.temperatures)]
    headings += ["acceptance\nlength", *(["first tokens\nchi-square", "\np-value"] if report.frequencies else [])]
    table = Table(*(Column(heading, no_wrap=True) for heading in headings), **terminal.PLAIN)
    frequencies = {check.way: check for check in report.frequencies}
    for way in dict.fromkeys([*frequencies, *(check.way for check in report.texts)]):
        checks = [check for check in report.texts if check.way == way]
        cells = [_text_cell(check) for check in checks] or [Text("")] * len(report.settings.temperatures)
        lengths = [check.acceptance_length for check in checks if not math.isnan(check.acceptance_length)]
        length = number(mean(lengths)) if lengths else ""
        table.add_row(way, *cells, length, *(_frequency_cells(frequencies[way]) if way in frequencies else ()))
    return table


def _text_cell(check: TextCheck) -> Text:
    equal = f"{check.num_texts - len(check.divergences)}/{check.num_texts}"
    return Text(equal if check.verdict == "equal" else f"{equal} {check.verdict}", STYLES.get(check.verdict, FAULT))


def _frequency_cells(check: FrequencyCheck) -> tuple[str, Text]:
    unexpected = "" if check.verdict == "as expected" else f", {check.verdict}"
    p_value = Text(f"{check.test.p_value:.2g}{unexpected}", STYLES.get(check.verdict, FAULT))
    return f"{check.test.statistic:.1f} in {check.test.num_cells} cells", p_value


def _divergences(report: LosslessReport, tokenizer: Any) -> Iterator[Text]:
    """Yield where texts differ, faults first, and what the logits say there."""
    pairs = [(check, divergence) for check in report.texts for divergence in check.divergences]
    pairs.sort(key=lambda pair: pair[1].is_near_tie)
    for check, divergence in pairs[:MOST_DIVERGENCES]:
        here, plain = (_spelled(tokenizer, token) for token in (divergence.token, divergence.plain_token))
        where = f"{check.way}, T = {check.temperature:g}, text {divergence.row}, token {divergence.place}"
        style = STYLES["near-ties"] if divergence.is_near_tie else FAULT
        reason = _reason(divergence, here, report.dtype)
        yield Text.assemble((f"{where}: {here} instead of {plain}", style), f"\n  {reason}")
    if len(pairs) > MOST_DIVERGENCES:
        yield Text(f"... and {len(pairs) - MOST_DIVERGENCES} more; --json has all")
    if pairs:
        yield Text()


def _reason(divergence: Divergence, token: str, dtype: str) -> str:
    evidence = divergence.evidence
    if evidence is None:
        return "fault: one text continues and the other ends, which no rounding explains"
    leads = f"{token} leads by {evidence.tree_lead:+.4g} in the tree, by {evidence.plain_lead:+.4g} in the plain step"
    apart, rounding = (value / evidence.spacing for value in (evidence.difference, evidence.rounding))
    logits = f"their logits are up to {apart:.3g} spacings of {dtype} apart, and rounding moves them by {rounding:.3g}"
    if divergence.is_near_tie:
        return f"near-tie: {leads}; {logits}"
    cause = "the tree's logits are not the target's" if evidence.is_drawn else "not what these logits draw"
    return f"fault, {cause}: {leads}; {logits}"


def _spelled(tokenizer: Any, token: int | None) -> str:
    return "the end" if token is None else repr(tokenizer.decode([token]))
