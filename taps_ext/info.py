"""What is installed, what was built and why: the facts behind `taps-ext info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__, native

REQUIRED = ("torch", "transformers", "safetensors", "numpy")
GIT_SECONDS = 10
OPTIONAL = ("typer", "rich", "matplotlib", "accelerate")


@dataclass(frozen=True)
class NativeModule:
    """The state of `taps_ext._C`; exactly one of `reason` and `build` is there."""

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
class Info:
    """The facts about an installation."""

    taps_ext: str
    python: str
    platform: str
    versions: dict[str, str | None]  # None: not installed
    native: NativeModule
    cuda: Cuda
    num_threads: int  # of torch, for one op
    num_cpus: int  # that this process may use

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def collect() -> Info:
    """The facts about this installation; never raises for a missing part."""
    module = _native_module()
    return Info(
        taps_ext=_own_version(),
        python=platform.python_version(),
        platform=platform.platform(),
        versions={name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        native=module,
        cuda=_cuda(module),
        num_threads=torch.get_num_threads(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _native_module() -> NativeModule:
    reason = native.unavailable_reason()
    build = None if reason else {str(key): str(value) for key, value in native.load().build_info().items()}
    return NativeModule(available=reason is None, reason=reason, build=build)


def _cuda(module: NativeModule) -> Cuda:
    built = module.build or {}
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
        has_kernels=any(runs_on(architecture, capability) for architecture in architectures),
    )


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for an architecture: its own major version up to its minor, or older PTX."""
    numbers = re.match(r"(\d+)\.(\d+)", architecture)
    if numbers is None:  # a family's name, such as Hopper: not ours to judge
        return bool(architecture)
    major, minor = int(numbers[1]), int(numbers[2])
    is_binary = capability[0] == major and capability[1] >= minor
    return is_binary or (architecture.endswith("+PTX") and capability >= (major, minor))


def _own_version() -> str:
    """With the label of a wheel that was built for one torch and CUDA, when this code comes from one."""
    installed = _version("taps_ext")
    return installed if installed and installed.split("+")[0] == __version__ else __version__


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_version() -> dict[str, Any]:
    """The package's version and, when it runs from a checkout, its commit and whether files differ from it."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"taps_ext": __version__}
    changes = _git(root, "status", "--porcelain", "--", "taps_ext")
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
