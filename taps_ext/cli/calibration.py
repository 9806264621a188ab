"""taps-ext calibrate."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..checkpoints.files import CALIBRATION_FILE, check_writable, write_text
from ..tiny import resolve
from .common import DEVICE_HELP, JSON_HELP, keep_logs_clean, load_target, progress

if TYPE_CHECKING:
    from ..training.calibration_report import CalibrationReport

PICTURE, REPORT = "calibration.png", "calibration-report.json"


def calibrate(
    drafter: Annotated[str, typer.Argument(help="Folder; calibration.json is written into it.")],
    target: Annotated[str, typer.Option(help="Folder or hub id of the target; 'tiny' is the embedded one.")],
    data: Annotated[list[str], typer.Option(help="Conversations: a file, folder or data set; repeatable.")],
    temperature: Annotated[
        list[float] | None, typer.Option(help="To fit at, repeatable. Default: 0.3, 0.7, 1 and 1.5.")
    ] = None,
    depth: Annotated[int, typer.Option(help="Levels to fit; deeper ones draft as the last.")] = 6,
    positions: Annotated[int, typer.Option(help="Draws to fit on and to measure with.")] = 2048,
    seed: Annotated[int, typer.Option(help="Of the places in the text and of the draws.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens; a longer conversation is cut there.")] = 2048,
    chat_template: Annotated[str | None, typer.Option(help="A jinja file; default: the tokenizer's own.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Put before conversations that bring none.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the picture and the report.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Fit how far a drafter is to be trusted against the target's noise, so that it can draft with it."""
    from ..device import choose
    from ..training import calibrating
    from ..training.config import DataConfig, SourceConfig
    from ..training.data import prepare, with_chat_template

    chosen = {"temperatures": tuple(sorted(set(temperature)))} if temperature else {}
    settings = calibrating.CalibrationSettings(depth=depth, positions=positions, seed=seed, **chosen)
    if resolve(drafter) != drafter:
        raise ValueError(f"{drafter} is a part of this installation, and calibrated; give a copy of {resolve(drafter)}")
    folder = calibrating.calibratable(drafter)
    if output is not None:
        _check_output(output, folder)
    place = choose(device)
    keep_logs_clean()
    model, tokenizer = load_target(target, "auto", place)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
    sources = tuple(SourceConfig(path) for path in data)
    config = DataConfig(sources, min(max_length, longest), 0, system_prompt, seed=seed)
    with progress() as bars:
        bar = bars.add_task("conversations", total=None)
        texts = prepare(
            config,
            with_chat_template(tokenizer, chat_template),
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
        report = calibrating.calibrate_drafter(
            folder,
            model,
            texts.training,
            settings,
            lambda what, done, total: bars.update(bar, description=what, completed=done, total=total),
            target_name=resolve(target),
        )
    files = [folder / CALIBRATION_FILE, *(_save(report, output) if output is not None else ())]
    if as_json:
        print(json.dumps({**report.to_dict(), "files": [str(path) for path in files]}, indent=2))
        return
    Console(highlight=False, soft_wrap=True).print(_table(report))
    for path in files:
        print(f"wrote {path}")


def _check_output(output: Path, folder: Path) -> None:
    """ValueError or OSError, in a sentence, before the work: nothing but a drafter belongs into its folder."""
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} is the drafter's own folder; give another --output")
    if find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib: pip install 'taps_ext[cli]', or leave --output out")
    check_writable(output)


def _save(report: CalibrationReport, output: Path) -> list[Path]:
    """The picture and the report for programs."""
    from ..training import calibration_picture

    picture = calibration_picture.save(report, output / PICTURE)
    write_text(output / REPORT, json.dumps(report.to_dict(), indent=1) + "\n")
    return [picture, output / REPORT]


def _table(report: CalibrationReport) -> Group:
    """A row a temperature and depth, and what the columns are."""
    from ..training.calibration_report import NUM_CHILDREN, TOPK, UNCOUPLED

    plain: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}
    gains, hits = ("nats over\nbeta = 0", "nats over\ntop-k"), ("hits\ncoupled", "hits\ntop-k")
    table = Table("\nT", "\ndepth", "\nalpha", "\nbeta", *gains, *hits, "\nmisplaced", **plain)
    for cell in report.cells:
        table.add_row(
            f"{cell.temperature:g}" if cell.depth == 1 else "",
            str(cell.depth),
            *(f"{value:.2f}" for value in (cell.alpha, cell.beta)),
            *(f"{cell.gain_over(rule):.3f}" for rule in (UNCOUPLED, TOPK)),
            *(f"{rate:.1%}" for rate in (cell.coupled.hit_rate, cell.rules[TOPK].hit_rate)),
            f"{cell.coupled.calibration_error:.3f}",
        )
    sentences = (
        f"fitted at {report.num_fitted:,} places of the text, measured at {report.num_held_out:,} of other texts",
        f"nats: gained a drawn token; hits: it is among the {NUM_CHILDREN} best children",
        "misplaced: how much of the probability given to these children is too much or too little",
    )
    return Group(table, Text(), *map(Text, sentences))
