"""taps-ext average | export | validate: drafters as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..tiny import resolve
from .common import JSON_HELP, keep_logs_clean

if TYPE_CHECKING:
    from ..checkpoints import ValidationReport

DRAFTER_HELP = "Folder or hub id; tiny/math, tiny/chat."
TARGET_HELP = "Folder or hub id of the target; 'tiny' is the embedded one. Its layers are not read."
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def average(
    drafters: Annotated[list[str], typer.Argument(help=f"Two or more. {DRAFTER_HELP}")],
    output: Annotated[Path, typer.Option(help="Folder of the average; of all averages with --sweep.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="A drafter's, repeatable; one number with two drafters is the first one's. Default: equal."),
    ] = None,
    sweep: Annotated[str | None, typer.Option(help="Weights of the first of two: start:stop:step.")] = None,
) -> None:
    """The weighted average of drafters of one target, as an ordinary drafter."""
    from .. import checkpoints as library

    folders = [resolve(drafter) for drafter in drafters]
    if sweep is None:
        written = [library.average_drafters(folders, _weights(weight, len(folders)), output)]
    elif weight or len(folders) != 2:
        raise ValueError("--sweep takes two drafters and no --weight, such as A B --sweep 0.1:0.9:0.1")
    else:
        written = library.sweep(folders[0], folders[1], sweep, output)
    for folder in written:
        print(f"wrote {folder}")


def export(
    drafter: Annotated[str, typer.Argument(help=f"{DRAFTER_HELP} A training state needs --target.")],
    to: Annotated[str, typer.Option(help="eagle, hass, vllm or sglang.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the drafter's.")] = None,
    also_bin: Annotated[bool, typer.Option("--also-bin", help="Write pytorch_model.bin too.")] = False,
) -> None:
    """A drafter in the form that another program reads, or the reasons why it cannot be."""
    from ..checkpoints import export_drafter

    keep_logs_clean()
    folder = export_drafter(
        resolve(drafter), to, output, target=target and resolve(target), dtype=dtype, also_bin=also_bin
    )
    print(f"wrote {folder}")
    if target is None and to in ("vllm", "sglang"):
        length = json.loads((folder / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
        print(f"its max_position_embeddings is {length}: if the target's is larger, export it with --target")


def validate(
    drafter: Annotated[str, typer.Argument(help=DRAFTER_HELP)],
    target: Annotated[str | None, typer.Option(help=TARGET_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Whether a drafter is whole and fits its target, and which programs can read it; exit code 1 if not."""
    from ..checkpoints import validate_drafter

    keep_logs_clean()
    report = validate_drafter(resolve(drafter), target and resolve(target))
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console(highlight=False).print(_report_table(report))
    if not report.passed:
        raise typer.Exit(1)


def _weights(given: list[float] | None, num_drafters: int) -> list[float] | None:
    if given and len(given) == 1 and num_drafters == 2:
        return [given[0], round(1 - given[0], 12)]
    return given or None


def _report_table(report: ValidationReport) -> Table:
    """A row a check, then a row a program."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in report.checks:
        table.add_row(f"[{STYLES[check.status]}]{check.status}", check.name, check.message.replace("[", r"\["))
    for loader, reasons in report.loaders.items():
        table.add_row("reads it" if not reasons else "no", loader, "; ".join(reasons).replace("[", r"\["))
    return table
