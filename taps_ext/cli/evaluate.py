"""taps-ext evaluate."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..tiny import TINY
from .common import (
    DEVICE_HELP,
    JSON_HELP,
    drafter_folders,
    is_main_process,
    keep_logs_clean,
    load_target,
    progress,
    target_config,
)
from .train import STOPPED

if TYPE_CHECKING:
    from ..evaluation.summary import Summary
    from ..evaluation.tasks import Question

TINY_TASKS = ("tiny_math", "tiny_chat")
FILE_WIDTH = 200  # of what is printed where there is no terminal
PROMPTS = "prompts"  # the task of one's own prompts


def evaluate(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target; 'tiny' is the embedded one.")] = TINY,
    drafter: Annotated[
        list[str] | None, typer.Option(help="[NAME=]FOLDER-OR-HUB-ID, repeatable; tiny/math, tiny/chat.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME[=FILE], repeatable: mt_bench, gsm8k, math500, svamp, tiny_math, ...")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Your own prompts, a file of JSON lines.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="[LABEL=]COMPOSITION[:NAME+NAME][@NODES][,topk][,evidence=DECAY][,weight=W], repeatable."),
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="Repeatable; default: 0 and 1.")] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="So many of each task, evenly spread.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Questions decoded together.")] = 8,
    depth: Annotated[int, typer.Option(help="Levels that a drafter drafts.")] = 6,
    branching: Annotated[int, typer.Option(help="Children per expanded node.")] = 10,
    max_nodes: Annotated[int, typer.Option(help="Nodes of a drafter's tree, root included.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the noise: question i of a task has that of seed + i.")] = 0,
    system_prompt: Annotated[str, typer.Option(help="Put before conversations that bring none.")] = "",
    label: Annotated[str, typer.Option(help="Tells apart runs that a report compares.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for a line an answered question.")] = Path(
        "out/evaluation"
    ),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Answer benchmark questions with every variant and keep what happened; a stopped run goes on. See docs."""
    from ..device import choose
    from ..evaluation import contestants, results, runner
    from ..evaluation.plan import Plan, Settings
    from ..evaluation.summary import summarise
    from ..evaluation.variants import parse_variants

    temperatures = temperature or [0.0, 1.0]
    settings = Settings(max_new_tokens, batch_size, depth, branching, max_nodes, seed, system_prompt)
    paths = drafter_folders(target, drafter or [])
    variants = parse_variants(variant or [], list(paths), temperatures, max_nodes)
    place = choose(device or _own_gpu())
    asked, sources = _tasks(target, task or [], prompts, questions)
    files = contestants.check_drafters(paths, target_config(target))
    facts = contestants.drafter_facts(files, paths)
    plan = Plan(asked, variants, temperatures, settings, facts, sources, label)
    results.check_folder(output, plan.configuration())
    keep_logs_clean()
    model, tokenizer = load_target(target, dtype, place)
    with progress(is_shown=is_main_process()) as bars:
        bar = bars.add_task("loading", total=None)
        try:
            runner.evaluate(
                model,
                tokenizer,
                paths,
                asked,
                variants,
                temperatures,
                settings,
                output,
                lambda what, done, total: bars.update(bar, description=what, completed=done, total=total),
                label=label,
                target_name=target if target == TINY else contestants.short_name(target),
                sources=sources,
                command=_command(),
            )
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on in {output}", file=sys.stderr)
            raise typer.Exit(STOPPED) from None
    if is_main_process():
        summary = summarise(output)
        _show(summary, output, as_json)
        if summary.is_broken:
            raise typer.Exit(1)


def _tasks(
    target: str, specs: Sequence[str], prompts: Path | None, limit: int | None
) -> tuple[dict[str, list[Question]], dict[str, str]]:
    """The questions of each task, and where they are from."""
    from ..evaluation.tasks import find_task, load_prompts

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
        found = find_task(name)
        asked[name] = found.load(file or None, limit)
        sources[name] = Path(file).name if file else str(found.source)
    if prompts is not None:
        asked[PROMPTS], sources[PROMPTS] = load_prompts(prompts, limit), prompts.name
    return asked, sources


def _own_gpu() -> str | None:
    """The GPU of this process, where several were launched on a machine with GPUs."""
    import torch

    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if is_one_of_many and torch.cuda.is_available() else None


def _command() -> str:
    """The command line, with every path shortened to its last part: what others can repeat, not where it ran."""
    return shlex.join(["taps-ext", *map(_told, sys.argv[1:])])


def _told(argument: str) -> str:
    head, value = re.fullmatch(r"(-o|(?:.*=)?)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
    is_path = value.startswith(("/", "~", ".")) or (os.sep in value and Path(value).exists())
    return head + Path(value).expanduser().resolve().name if is_path else argument


def _show(summary: Summary, output: Path, as_json: bool) -> None:
    if as_json:
        from ..checkpoints.files import json_text

        print(json_text(summary.to_dict()))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(_table(summary))
    console.print()
    console.print(summary.verdict(), style="bold red" if summary.num_different else "")
    print(f"answers in {output}; tables and figures: taps-ext report {output} -o REPORT-FOLDER")


def _table(summary: Summary) -> Table:
    """A row a variant: its acceptance length on each task and temperature, and its texts that are plain's."""
    places = dict.fromkeys((temperature, task) for _, task, temperature in summary.cells)
    columns = sorted(places, key=lambda place: place[0])
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("acceptance length", overflow="fold")
    for temperature, task in columns:
        table.add_column(f"{task}\nT = {temperature:g}", justify="right")
    table.add_column("as plain", justify="right")
    for variant in dict.fromkeys(place[0] for place in summary.cells):
        cells = [summary.cells.get((variant, task, temperature)) for temperature, task in columns]
        there = [cell for cell in cells if cell is not None]
        equal, total = sum(cell.num_equal for cell in there), sum(cell.num_questions for cell in there)
        lengths = ["" if cell is None else f"{cell.acceptance_length:.2f}" for cell in cells]
        table.add_row(variant, *lengths, f"{equal}/{total}", style="bold red" if equal < total else "")
    return table
