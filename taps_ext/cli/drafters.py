"""taps-ext average | export | validate | calibrate | index: drafters, and what they look up, as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .. import checkpoints
from ..checkpoints.corpus import tokenizer_fingerprint, write_store
from ..checkpoints.files import CALIBRATION_FILE
from ..checkpoints.load import open_target
from ..native import choose_device
from ..tiny import TINY, resolve
from ..training.calibrate import (
    NUM_CHILDREN,
    CalibrationReport,
    CalibrationSettings,
    calibratable,
    calibrate_drafter,
)
from ..training.data import JsonLines, prepare, with_chat_template
from ..training.recipe import DataConfig, SourceConfig
from . import terminal
from .terminal import show

TEMPERATURES = list(CalibrationSettings.temperatures)
ENCODED_TOGETHER = 256  # texts
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def average(
    drafters: terminal.DrafterArgument[list[str]],
    output: terminal.Output[Path],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of a drafter; a single one is the first drafter's of two. Repeatable. Default: equal."
        ),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Weights of the first of two drafters, as start:stop:step; one average for each.")
    ] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Average the weights of two or more drafters of one target into an ordinary drafter."""
    folders = [resolve(drafter) for drafter in drafters]
    if sweep is None:
        if weight and len(weight) == 1 and len(folders) == 2:
            weight = [weight[0], round(1 - weight[0], 12)]
        written = [checkpoints.average_drafters(folders, weight or None, output)]
    elif weight or len(folders) != 2:
        raise ValueError("--sweep takes two drafters and no --weight, such as A B --sweep 0.1:0.9:0.1")
    else:
        written = checkpoints.sweep(folders[0], folders[1], sweep, output)
    show(as_json, {"drafters": [str(path) for path in written]}, *(f"wrote {path}" for path in written))


def export(
    drafter: terminal.DrafterArgument[str],
    to: Annotated[str, typer.Option(help="Program that will read it: eagle, hass, vllm or sglang.")],
    output: terminal.Output[Path],
    target: terminal.Target[str | None] = None,
    dtype: terminal.Dtype = "auto",
    also_bin: Annotated[bool, typer.Option("--also-bin", help="Write pytorch_model.bin too.")] = False,
    whole_vocabulary: Annotated[
        bool, typer.Option("--whole-vocabulary", help="Leave out a draft vocabulary, which other programs cannot read.")
    ] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Write a drafter in the form that another program reads, or print why that is not possible.

    A training state needs --target, whose layers are not read.
    """
    chosen, paired = terminal.check_dtype(dtype), target and resolve(target)
    folder = checkpoints.export_drafter(
        resolve(drafter),
        to,
        output,
        target=paired,
        dtype=None if chosen == "auto" else chosen,
        also_bin=also_bin,
        whole_vocabulary=whole_vocabulary,
    )
    notes = []
    if target is None and to in ("vllm", "sglang"):
        length = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
        notes = [f"its max_position_embeddings is {length}: if the target's is larger, export it with --target"]
    show(as_json, {"drafter": str(folder), "notes": notes}, f"wrote {folder}", *notes)


def validate(
    drafter: terminal.DrafterArgument[str],
    target: terminal.Target[str | None] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Check that a drafter is complete and fits its target, and list the programs that can read it.

    The exit code is 1 if a check fails. The target's layers are not read.
    """
    report = checkpoints.validate_drafter(resolve(drafter), target and resolve(target))
    show(as_json, report.to_dict(), _checks(report))
    if not report.passed:
        raise typer.Exit(1)


def calibrate(
    drafter: terminal.DrafterArgument[str],
    target: terminal.Target[str],
    data: terminal.Data,
    temperature: terminal.Temperatures = TEMPERATURES,
    depth: terminal.Depth[int] = 6,
    positions: Annotated[int, typer.Option(help="Number of draws to fit and measure with.")] = 2048,
    seed: terminal.Seed = 0,
    max_length: Annotated[int, typer.Option(help="Number of tokens after which a conversation is cut.")] = 2048,
    chat_template: terminal.ChatTemplate = None,
    system_prompt: terminal.SystemPrompt = None,
    device: terminal.Device = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Fit how strongly a drafter should follow the target's noise at each temperature and depth.

    Coupled drafting needs it. calibration.json is written into the drafter's directory. Levels deeper than --depth use
    the last fitted one.
    """
    settings = CalibrationSettings(tuple(sorted(set(temperature))), depth, positions, seed)
    if resolve(drafter) != drafter:
        raise ValueError(f"{drafter} is part of this installation and calibrated; give a copy of {resolve(drafter)}")
    folder = calibratable(drafter)
    place = choose_device(device)
    model, tokenizer = terminal.load_target_and_tokenizer(target, "auto", place)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
    sources = [SourceConfig(path) for path in data]
    config = DataConfig(sources, min(max_length, longest), 0, system_prompt, seed=seed)
    tokenizer = with_chat_template(tokenizer, chat_template)
    with terminal.progress("conversations") as update:
        texts = prepare(config, tokenizer, partial(update, "conversations")).training
        report = calibrate_drafter(folder, model, texts, settings, update, target_name=resolve(target))
    path = str(folder / CALIBRATION_FILE)
    lines = (
        f"fitted at {report.num_fitted:,} positions of the texts, measured at {report.num_held_out:,} of other texts",
        f"nats: gained per drawn token; hits: the token is among the {NUM_CHILDREN} best children",
        "misplaced: probability given to these children that is too high or too low, in sum",
        f"wrote {path}",
    )
    show(as_json, {**report.to_dict(), "files": [path]}, _table(report), "", *lines)


def _checks(report: checkpoints.ValidationReport) -> Table:
    """Return a row per check, then a row per program."""
    table = Table(show_header=False, **terminal.PLAIN)
    for check in report.checks:
        table.add_row(Text(check.status, STYLES[check.status]), check.name, check.message)
    for loader, reasons in report.loaders.items():
        table.add_row("no" if reasons else "reads it", loader, "; ".join(reasons))
    return table


def _table(report: CalibrationReport) -> Table:
    """Return a row per temperature and depth."""
    gains, hits = ("nats over\nbeta = 0", "nats over\ntop-k"), ("hits\ncoupled", "hits\ntop-k")
    table = Table("\nT", "\ndepth", "\nalpha", "\nbeta", *gains, *hits, "\nmisplaced", **terminal.PLAIN)
    for cell in report.cells:
        table.add_row(
            f"{cell.temperature:g}" if cell.depth == 1 else "",
            str(cell.depth),
            *(f"{value:.2f}" for value in (cell.alpha, cell.beta)),
            *(f"{rule.nats - cell.coupled.nats:.3f}" for rule in (cell.uncoupled, cell.topk)),
            *(f"{rule.hit_rate:.1%}" for rule in (cell.coupled, cell.topk)),
            f"{cell.coupled.calibration_error:.3f}",
        )
    return table


def index(
    texts: Annotated[Path, typer.Argument(metavar="TEXTS", help='Documents, JSON Lines: {"text": "..."}.')],
    output: terminal.Output[Path],
    target: terminal.Target[str] = TINY,
    as_json: terminal.AsJson = False,
) -> None:
    """Write a corpus store: the documents as the target's tokens, and an index of what followed any few of them."""
    from transformers import AutoTokenizer

    if not texts.is_file():
        raise ValueError(f"{texts} is not a file; give JSON Lines with a text per line")
    folder = resolve(target)
    vocab_size = open_target(folder).config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with terminal.progress("tokenizing") as report:
        documents = _documents(JsonLines(str(texts)), tokenizer, report)
        header = write_store(output, documents, vocab_size, tokenizer_fingerprint(tokenizer))
    sizes = f"{header['num_documents']:,} documents, {header['num_tokens']:,} tokens"
    show(as_json, {"store": str(output), **header}, f"wrote {output}: {sizes}")


def _documents(source: JsonLines, tokenizer: Any, report: terminal.Report) -> Iterator[list[int]]:
    """Yield the token ids of each text; raise ValueError for a line that holds none."""
    for first in range(0, len(source), ENCODED_TOGETHER):
        places = range(first, min(first + ENCODED_TOGETHER, len(source)))
        yield from tokenizer([_text(source, i) for i in places], add_special_tokens=False, verbose=False)["input_ids"]
        report("tokenizing", places.stop, len(source))


def _text(source: JsonLines, place: int) -> str:
    try:
        record = source.record(place)
    except ValueError as error:
        raise ValueError(f"{source.origin(place)}: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{source.origin(place)} holds no {{"text": "..."}}; give a JSON object with a text per line')
    return text
