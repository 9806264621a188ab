"""The native module `taps_ext._C` and the machine under it: load it, choose a device, collect the facts about both."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import __version__

MEND = (
    "make build, or pip install --no-build-isolation --force-reinstall --no-deps . (in the source folder), "
    "or install the wheel for this torch"
)
LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "typer", "rich", "matplotlib", "accelerate")
GIT_SECONDS = 10


class NativeModuleError(ImportError):
    """The native module is missing or was built for another torch; the message says which, and the command."""


# ---- the module


def unavailable_reason() -> str | None:
    """Return why the native module cannot be used, or None when it can."""
    try:
        load()
    except NativeModuleError as error:
        return str(error)
    return None


@cache
def load() -> Any:
    """Return the native module. Raises `NativeModuleError`; the import of `taps_ext` itself never does."""
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
    return module


def _fits(built: dict[str, str]) -> bool:
    """Compare the minor version of torch and, where there are CUDA ops, the major version of CUDA."""
    cuda = built.get("cuda", "none")
    same_cuda = cuda == "none" or cuda.split(".")[0] == (torch.version.cuda or "").split(".")[0]
    return same_cuda and _minor(built["torch"]) == _minor(torch.__version__)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


# ---- the device of a target


def choose_device(name: str | None = None) -> torch.device:
    """Return the device named cpu, cuda or cuda:NUMBER; None: a GPU if there is one and ops for it, else the CPU.

    Raises ValueError for another name, for a GPU that torch does not find, and where there are no CUDA ops.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and reason_without_ops() is None else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    if kind == "cuda":
        _refuse_missing_gpu(name, int(index or 0))
        refuse_without_ops(f"device {name}")
    return torch.device(name)


def refuse_without_ops(what: str) -> None:
    """Raise ValueError when the native module has no ops for `what`, which is or wants to be on a CUDA device."""
    reason = reason_without_ops()
    if reason is not None:
        raise ValueError(
            f"{what} needs CUDA ops, but taps_ext was built without them ({reason}); with a CUDA build of torch and "
            f"the CUDA toolkit there, rebuild it: {MEND}; or use the CPU"
        )


def reason_without_ops() -> str | None:
    """Return why the native module has no CUDA ops, or None when it has."""
    info = load().build_info()
    return str(info["cuda_reason"]) if info["cuda"] == "none" else None


def _refuse_missing_gpu(name: str, index: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"finds {count} GPU{'s' * (count > 1)}, from cuda:0 on" if count else "finds no GPU"
        raise ValueError(f"device {name} was asked for, but torch {torch.__version__} {found}; choose another, or cpu")


# ---- the installation


@dataclass(frozen=True)
class NativeModule:
    """The state of `taps_ext._C`; exactly one of `reason` and `build` is None."""

    available: bool
    reason: str | None  # why it cannot be used, and the command that mends it
    build: dict[str, str] | None  # what build_info() of the module says


@dataclass(frozen=True)
class Gpu:
    """A device that torch sees."""

    name: str
    capability: str  # "9.0"
    has_kernels: bool  # the CUDA ops were built for it


@dataclass(frozen=True)
class Cuda:
    """Whether CUDA ops were built, why and for what, and what torch finds on this machine."""

    ops_built: bool
    reason: str
    version: str | None  # of the CUDA that compiled the ops
    architectures: list[str]  # that they were compiled for: "9.0"; "12.0+PTX" is for later ones too
    torch_cuda: str | None  # the CUDA version of this torch, None for a CPU build
    gpus: list[Gpu]


@dataclass(frozen=True)
class Installation:
    """The facts about an installation."""

    taps_ext: str
    code: dict[str, Any]  # see `code_version`
    python: str
    platform: str
    versions: dict[str, str | None]  # None: not installed
    native: NativeModule
    cuda: Cuda
    num_threads: int  # of torch, for one op
    num_cpus: int  # that this process may use

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def provenance(self) -> dict[str, Any]:
        """Return what saved results say about their origin, as JSON values: the code and the versions, not the host."""
        return {
            **self.code,
            "versions": {"python": self.python, **self.versions},
            "platform": f"{platform.system()} {platform.machine()}",
            "num_threads": self.num_threads,
        }


def installation() -> Installation:
    """Collect the facts about this installation; a missing part never raises."""
    reason = unavailable_reason()
    build = None if reason else {str(key): str(value) for key, value in load().build_info().items()}
    return Installation(
        taps_ext=_own_version(),
        code=code_version(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: _version(name) for name in LIBRARIES},
        native=NativeModule(available=reason is None, reason=reason, build=build),
        cuda=_cuda(build or {}),
        num_threads=torch.get_num_threads(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def code_version(*paths: str) -> dict[str, Any]:
    """Return the package's version and, in a checkout, its commit and whether files differ from it.

    `paths`: git's path specifications of the files that count; by default the library's.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"taps_ext": __version__}
    changes = _git(root, "status", "--porcelain", "--", *(paths or ("taps_ext", "csrc")))
    return {
        "taps_ext": __version__,
        "commit": _git(root, "rev-parse", "HEAD"),
        "is_changed": None if changes is None else bool(changes),
    }


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cuda(built: dict[str, str]) -> Cuda:
    version = built.get("cuda", "none")
    architectures = built.get("cuda_architectures", "").replace(" ", ";").split(";")
    return Cuda(
        ops_built=version != "none",
        reason=built.get("cuda_reason", "the native module is not available"),
        version=None if version == "none" else version,
        architectures=[architecture for architecture in architectures if architecture],
        torch_cuda=torch.version.cuda,
        gpus=[_gpu(index, architectures) for index in range(torch.cuda.device_count())],
    )


def _gpu(index: int, architectures: list[str]) -> Gpu:
    capability = torch.cuda.get_device_capability(index)
    return Gpu(
        name=torch.cuda.get_device_name(index),
        capability=".".join(map(str, capability)),
        has_kernels=any(_runs_on(architecture, capability) for architecture in architectures),
    )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs code for an architecture: its own major version up to its minor, or older PTX."""
    numbers = re.match(r"(\d+)\.(\d+)", architecture)
    if numbers is None:  # a family's name, such as Hopper, says nothing about the version
        return bool(architecture)
    major, minor = int(numbers[1]), int(numbers[2])
    is_binary = capability[0] == major and capability[1] >= minor
    return is_binary or (architecture.endswith("+PTX") and capability >= (major, minor))


def _own_version() -> str:
    """Return the version, with the label of a wheel built for one torch and CUDA when this code comes from one."""
    installed = _version("taps_ext")
    return installed if installed and installed.split("+")[0] == __version__ else __version__


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
