"""Loading the native module `taps_ext._C`: what was built, and the sentence that mends it when it is not there."""

from __future__ import annotations

import importlib
import threading
from functools import cache
from typing import Any

import torch

from . import fakes

MEND = (
    "make build, or pip install --no-build-isolation --force-reinstall --no-deps . (in the source folder), "
    "or install the wheel for this torch"
)


class NativeModuleError(ImportError):
    """The native module is missing or was built for another torch; the message says which, and the command."""


def unavailable_reason() -> str | None:
    """Why the native module cannot be used, or None when it can."""
    try:
        load()
    except NativeModuleError as error:
        return str(error)
    return None


@cache
def load() -> Any:
    """The native module. Raises `NativeModuleError`; the import of `taps_ext` itself never does."""
    try:
        module = importlib.import_module("taps_ext._C")
    except ModuleNotFoundError as error:
        raise NativeModuleError(f"the native module taps_ext._C was not built; run: {MEND}") from error
    except ImportError as error:
        raise NativeModuleError(
            f"the native module taps_ext._C does not load with torch {torch.__version__} ({error}); rebuild it: {MEND}"
        ) from error
    built = module.build_info()
    if not _fits(built):
        cuda = "" if torch.version.cuda is None else f" with CUDA {torch.version.cuda}"
        built_cuda = "" if built.get("cuda", "none") == "none" else f" with CUDA {built['cuda']}"
        raise NativeModuleError(
            f"the native module taps_ext._C was built for torch {built['torch']}{built_cuda}, "
            f"this is torch {torch.__version__}{cuda}; rebuild it: {MEND}"
        )
    with _REGISTRATION:
        fakes.register(module)
    return module


def load_for_tracing() -> bool:
    """True, once the ops and their fakes are in `torch.ops.taps_ext`."""
    load()
    return True


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo (seconds): the compiler calls
# the function while it traces instead of tracing into it, so that a compiled function may be the first caller.
load_for_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

_REGISTRATION = threading.Lock()  # `cache` lets two first callers in at once


def _fits(built: dict[str, str]) -> bool:
    """The same minor version of torch; and of CUDA, where there are CUDA ops, the same major version."""
    cuda = built.get("cuda", "none")
    same_cuda = cuda == "none" or cuda.split(".")[0] == (torch.version.cuda or "").split(".")[0]
    return same_cuda and _minor(built["torch"]) == _minor(torch.__version__)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])
