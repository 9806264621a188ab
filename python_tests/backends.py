"""Where the tests of the ops run: the CPU loops, the CUDA kernels under the host stand-in, the CUDA kernels on a GPU.

A backend looks like the native module: it has its functions. `ops` asks `ops._ops` for the module at every call, and
the fixture `backend` (conftest.py) answers there; no test and no op knows more. Tensors live on the host in every test.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from typing import Any

import torch

from taps_ext import native

NAMES = ("cpu", "simt", "cuda")
STAND_IN_LIBRARY = "TAPS_SIMT_LIBRARY"  # a file to load instead of taps_ext._simt: the one built with sanitizers

ORDERS = ("forward", "reverse", "shuffled")  # of the threads of a block, between its barriers
MULTIPROCESSORS = (1, 2, 132)  # what a launch is told that the device has


class StandInMissingError(ImportError):
    """The stand-in's module is not there; the message says what builds it."""


def missing(name: str) -> str | None:
    """Why the tests of this backend are left out, or None. The stand-in is never left out: without it they fail."""
    if name != "cuda":
        return None
    if not torch.cuda.is_available():
        return "no GPU here"
    if reason := native.unavailable_reason():
        return reason
    info = native.load().build_info()
    return info["cuda_reason"] if info["cuda"] == "none" else None


@cache
def load(name: str) -> Any:
    """The backend of this name."""
    if name == "simt":
        return StandIn(stand_in_module())
    return native.load() if name == "cpu" else OnDevice(torch.device("cuda", 0))


def stand_in_module() -> Any:
    """taps_ext._simt, or the file that TAPS_SIMT_LIBRARY names."""
    path = os.environ.get(STAND_IN_LIBRARY)
    spec = importlib.util.find_spec("taps_ext._simt")
    if path:
        spec = importlib.util.spec_from_file_location(
            "taps_ext._simt", path, loader=ExtensionFileLoader("taps_ext._simt", path)
        )
    if spec is None or spec.loader is None:
        raise StandInMissingError(
            "taps_ext._simt, the CUDA kernels under the host stand-in, was not built; run: make test"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class StandIn:
    """The stand-in's module; each call runs its threads in another order, on another number of multiprocessors."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.restart()

    def restart(self) -> None:
        """Back to the first arrangement, so that a test does not depend on those before it."""
        self._calls = itertools.count()
        self.latest: tuple[str, int, int] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self.module, name)

        def call(*arguments: Any) -> Any:
            self.arrange(*arrangement(next(self._calls)))
            return op(*arguments)

        return call

    def arrange(self, order: str, seed: int, multiprocessors: int) -> None:
        self.latest = order, seed, multiprocessors
        self.module.set_order(order, seed)
        self.module.set_multiprocessors(multiprocessors)

    def __str__(self) -> str:
        return f"the last call ran with (order, seed, multiprocessors) = {self.latest}"


def arrangement(call: int) -> tuple[str, int, int]:
    """Any pair of an order and a number of multiprocessors, out of step with the loops of the tests."""
    rng = random.Random(call)
    return rng.choice(ORDERS), call, rng.choice(MULTIPROCESSORS)


class OnDevice:
    """The native module's ops on copies of their host tensors, results back on the host; new memory is poisoned."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.module = native.load()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self.module, name)

        def call(*arguments: Any) -> Any:
            on_device = [moved(one, self.device) for one in arguments]
            with poisoned_memory():
                results = op(*on_device)
            if name == "compact_kv":  # the one op that writes in place
                arguments[0].copy_(on_device[0])
            return on_host(results)

        return call


def moved(value: Any, device: torch.device) -> Any:
    """A host tensor's view of a copy of the same memory, strides, offset and gaps included; other values as is."""
    if not torch.is_tensor(value) or not value.is_cpu:
        return value
    memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).to(device)
    empty = torch.empty(0, dtype=value.dtype, device=device)
    return empty.set_(memory.untyped_storage(), value.storage_offset(), value.size(), value.stride())


def on_host(results: Any) -> Any:
    if isinstance(results, tuple):
        return tuple(map(on_host, results))
    return results.cpu() if torch.is_tensor(results) else results


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Tensors made empty are filled with NaN or the largest integer: what torch does when it is deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
