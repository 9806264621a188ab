"""The command line: the table of its commands, and what happens to an error. `terminal.py` has what commands share."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

try:
    import rich  # noqa: F401  (a missing package is named here)
    import typer
except ModuleNotFoundError as missing:
    print(f"taps-ext: the command line needs {missing.name}: pip install 'taps_ext[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from ..native import NativeModuleError
from . import demo, drafters, evaluate, generate, train
from .terminal import process_index

COMMANDS = (
    *(demo.demo, generate.generate, generate.info),
    *(evaluate.evaluate, evaluate.report, evaluate.check_lossless),
    *(train.train, train.features, train.regenerate),
    *(drafters.calibrate, drafters.average, drafters.export, drafters.validate),
    drafters.index,
)
EXPECTED_ERRORS = (ValueError, OSError, NativeModuleError)
TRAINING_PACKAGES = ("accelerate", "datasets", "pydantic", "yaml")
WORKER_PATIENCE_S = 5.0  # far more than a launcher takes to end the workers of a main process that failed

app = typer.Typer(
    help="Decode losslessly with several drafters at once; train, evaluate and convert drafters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:  # typer keeps the line ends of a docstring, which then wrap badly in a narrow terminal
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print an expected error as one sentence on stderr and exit with code 2.

    `TAPS_TRACEBACK=1` shows the traceback instead.
    """
    try:
        app(args=arguments, prog_name="taps-ext")
    except EXPECTED_ERRORS as error:
        _fail(error, str(error))
    except ImportError as error:
        _fail(error, _missing_package(error))


def _missing_package(error: ImportError) -> str:
    """Return what to install; raise an import error of any other kind again."""
    if "pip install" in str(error):
        return str(error)
    package = (error.name or "").partition(".")[0]
    if package not in TRAINING_PACKAGES:
        raise error
    return f"training needs {package}: pip install 'taps_ext[train]'"


def _fail(error: Exception, sentence: str) -> NoReturn:
    if os.environ.get("TAPS_TRACEBACK"):
        raise error
    name = "taps-ext"
    if process_index() > 0:
        _wait_for_main_process()
        name = f"taps-ext (process {process_index()})"
    print(f"{name}: {' '.join(sentence.split()) or type(error).__name__}", file=sys.stderr)
    raise SystemExit(2) from None


def _wait_for_main_process() -> None:
    """Wait, so that an error which the main process has too is printed once: its launcher ends this process first."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(WORKER_PATIENCE_S)
