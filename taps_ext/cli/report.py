"""taps-ext report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import progress


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Folders of taps-ext evaluate, folders that hold some, or a report.json.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; a report that is there is replaced.")],
) -> None:
    """Make tables, pictures and a page of results; runs of a label with other drafters count as drafter seeds."""
    from ..evaluation.report import files, reading

    files.check_output(output)
    with progress() as bars:
        bar = bars.add_task("answers", total=None)
        runs = reading.read(results)
        written = files.write(
            runs, output, lambda done, total: bars.update(bar, description="pictures", completed=done, total=total)
        )
    num_tables, num_pictures = (sum(path.suffix == ending for path in written) for ending in (".csv", ".png"))
    print(f"wrote {output}: report.md, index.html, report.json, {num_tables} tables and {num_pictures} pictures")
