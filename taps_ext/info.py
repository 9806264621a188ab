"""What is installed, what was built and why: the facts behind `taps-ext info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import __version__, native

REQUIRED = ("torch", "transformers", "safetensors", "numpy")
OPTIONAL = ("typer", "rich", "matplotlib", "accelerate")


@dataclass(frozen=True)
class NativeModule:
    """The state of `taps_ext._C`; exactly one of `reason` and `build` is there."""

    available: bool
    reason: str | None  # why it cannot be used, and the command that mends it
    build: dict[str, str] | None  # what build_info() of the module says


@dataclass(frozen=True)
class Cuda:
    """Whether CUDA ops were built, why, and what torch finds on this machine."""

    ops_built: bool
    reason: str
    torch_cuda: str | None  # the CUDA version of this torch, None for a CPU build
    num_devices: int


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
        taps_ext=__version__,
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
    return Cuda(
        ops_built=built.get("cuda", "none") != "none",
        reason=built.get("cuda_reason", "the native module is not available"),
        torch_cuda=torch.version.cuda,
        num_devices=torch.cuda.device_count(),
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
