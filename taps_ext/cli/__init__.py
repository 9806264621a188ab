"""The command line: the table of its commands, and what happens to an error. `terminal.py` has what commands share."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Annotated, Any, NoReturn

import torch
import transformers

try:
    import rich  # noqa: F401  (a missing package is named here)
    import typer
except ModuleNotFoundError as missing:
    print(f"taps-ext: the command line needs {missing.name}: pip install 'taps_ext[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from .. import __version__
from ..checkpoints.files import first_line
from ..native import NativeModuleError
from . import demo, drafters, evaluate, generate, train
from .terminal import STOPPED, note, process_index

COMMANDS = (
    *(demo.demo, generate.generate, generate.tune, generate.info),
    *(evaluate.evaluate, evaluate.report, evaluate.check_lossless),
    *(train.train, train.features, train.regenerate),
    *(drafters.calibrate, drafters.average, drafters.export, drafters.validate),
    drafters.index,
)
RESUMABLE = (evaluate.evaluate, train.train, train.features, train.regenerate)
EXPECTED_ERRORS = (ValueError, OSError, NativeModuleError)
TRAINING_PACKAGES = ("accelerate", "datasets", "omegaconf", "yaml")
REPORT_PACKAGES = ("pandas", "scipy", "matplotlib", "jinja2")
WORKER_PATIENCE_S = 5.0  # far more than a launcher takes to end the workers of a main process that failed


def _show_version(asked: bool) -> None:
    if asked:
        print(f"taps_ext {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
        raise typer.Exit


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that Ctrl-C ends with one line on stderr and the exit code 130."""

    @wraps(command)
    def stoppable(**options: Any) -> None:
        try:
            command(**options)
        except KeyboardInterrupt:
            after_the_sign = "\n" if sys.stderr.isatty() else ""  # the ^C that a terminal shows
            note(f"{after_the_sign}stopped{'; the same command resumes it' if command in RESUMABLE else ''}")
            raise typer.Exit(STOPPED) from None

    return stoppable


app = typer.Typer(
    help="Decode losslessly with several drafters at once; train, evaluate and convert drafters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare the options that come before a command."""


for command in COMMANDS:  # typer keeps the line ends of a docstring, which then wrap badly in a narrow terminal
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(_stoppable(command))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; print an expected error as one sentence on stderr and exit with code 2.

    `TAPS_TRACEBACK=1` shows the traceback instead.
    """
    transformers.utils.logging.disable_progress_bar()  # one bar at a time: `terminal.progress`
    try:
        with _plain_warnings():
            app(args=arguments, prog_name="taps-ext")
    except EXPECTED_ERRORS as error:
        _fail(error, str(error))
    except ImportError as error:
        _fail(error, _missing_package(error))
    except (RuntimeError, MemoryError) as error:
        _fail(error, _out_of_memory(error))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each warning once, as one line without the file and line number that a program would look for."""
    printed: set[str] = set()

    def show(message: Warning | str, *where: Any, **others: Any) -> None:
        sentence = f"warning: {' '.join(str(message).split())}"
        if sentence not in printed:
            printed.add(sentence)
            note(sentence)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _missing_package(error: ImportError) -> str:
    """Return what to install; raise an import error of any other kind again."""
    if "pip install" in str(error):
        return str(error)
    package = (error.name or "").partition(".")[0]
    if package in REPORT_PACKAGES:
        return f"the report needs {package}: pip install 'taps_ext[cli,eval]'"
    if package not in TRAINING_PACKAGES:
        raise error
    return f"training needs {package}: pip install 'taps_ext[train]'"


def _out_of_memory(error: Exception) -> str:
    """Return what takes less memory; raise an error of any other kind again."""
    if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
        raise error
    return f"out of memory ({first_line(error)}); give smaller batches, shorter texts, smaller trees or a smaller dtype"


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
