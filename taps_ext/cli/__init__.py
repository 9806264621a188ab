"""The command line: a table of its commands, and what becomes of an error. A file each of generation and training."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

try:
    import rich.progress  # noqa: F401  (to miss it here)
    import typer
except ModuleNotFoundError as missing:
    print(f"taps-ext: the command line needs {missing.name}: pip install 'taps_ext[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from ..native import NativeModuleError
from . import calibration, drafters, report
from . import evaluate as evaluation
from . import evaluate_lossless as evaluation_lossless
from . import generate as generation
from . import train as training
from .common import process_index

EXPECTED_ERRORS = (ValueError, OSError, NativeModuleError)
TRAINING_PACKAGES = ("accelerate", "datasets", "pydantic", "yaml")
WORKER_PATIENCE_S = 5.0  # far more than a launcher takes to end the workers of a main process that failed

app = typer.Typer(
    help="Lossless speculative decoding with several drafters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(generation.demo, generation.generate, generation.info),
    *(evaluation.evaluate, report.report, evaluation_lossless.check_lossless),
    *(training.train, training.features, training.regenerate),
    *(calibration.calibrate, drafters.average, drafters.export, drafters.validate),
)
for command in COMMANDS:
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an expected error is one sentence on stderr and exit code 2."""
    try:
        app(args=arguments, prog_name="taps-ext")
    except EXPECTED_ERRORS as error:
        _fail(error, str(error))
    except ImportError as error:
        _fail(error, _missing_package(error))


def _missing_package(error: ImportError) -> str:
    """What to install; an import that fails for another reason is raised again."""
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
        _let_the_main_process_speak()
        name = f"taps-ext (process {process_index()})"
    print(f"{name}: {' '.join(sentence.split()) or type(error).__name__}", file=sys.stderr)
    raise SystemExit(2) from None


def _let_the_main_process_speak() -> None:
    """Wait: when the main process fails for the same reason, its launcher ends this one before it repeats it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(WORKER_PATIENCE_S)
