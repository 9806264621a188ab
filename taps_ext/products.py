"""Faster matrix products of a few rows on a CPU, with packed copies of large weights.

In a product of 4 to 128 rows the CPU spends much of its time on rearranging the weight. oneDNN, which comes with torch,
can do that once and keep the result, a second copy of the weight. One thread with AVX-512, milliseconds as is and
packed: an LM head of 49,152 x 576 takes 28 and 11 at 8 rows, 22 and 13 at 16; a layer of 2,048 x 2,048 takes 3.1 and
1.8, 2.8 and 2.3. Up to 3 rows, and beyond 128, packing gains nothing. `benchmarks/bench_products.py` measures it.

`pack_products` gives each large `nn.Linear` of a model a forward that uses a packed copy while a call of this library
runs, and is torch's own otherwise. A copy is made when it is first needed and freed with its module. Weights can
change in ways that leave no trace (through `.data`, as adapters are merged), so each call compares every copy that it
uses with its weight once; that takes as long as a product of one row.
"""

from __future__ import annotations

import os
import platform
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SWITCH = "TAPS_PACKED"  # environment: 0 makes and uses no copies
FEWEST_ROWS, MOST_ROWS = 4, 128
LEAST_SIZE = 500_000  # elements of a weight; smaller ones gain less than they cost
PACKED_FOR_ROWS = 32  # oneDNN chooses the layout for this many rows; it serves all
MEMORY_LEFT = 0.25  # share of the machine's (or container's) memory that stays free, or no copy is made
CGROUP = Path("/sys/fs/cgroup")

_RUNNING: ContextVar[PackedProducts | None] = ContextVar("taps_ext_products", default=None)


class PackedProducts:
    """Hold which packed weights one call has compared with their modules' weights."""

    def __init__(self) -> None:
        self.checked: set[PackedForward] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Use packed weights inside the block, in this thread, unless gradients or autocast are on."""
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        token = _RUNNING.set(self if is_plain and os.environ.get(SWITCH) != "0" else None)
        try:
            yield
        finally:
            _RUNNING.reset(token)


@dataclass(frozen=True)
class PackedWeight:
    """Hold a packed weight, and what tells whether it is still a copy of the module's weight."""

    packed: Tensor
    address: int
    version: int
    mark: Tensor  # float32 [out], the weight's product with `_probe`

    @classmethod
    def of(cls, weight: Tensor, mark: Tensor) -> PackedWeight:
        """Return a packed copy of a weight [out, in] whose mark is known."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        return cls(packed, weight.data_ptr(), weight._version, mark)

    def is_at(self, weight: Tensor) -> bool:
        """Return whether the weight is where it was, and was not changed in a way that torch counts."""
        return self.version == weight._version and self.address == weight.data_ptr()


class PackedForward:
    """Be the forward of one `nn.Linear`: packed where a running call gains by it, otherwise torch's own.

    The module is held weakly, so that it is freed as before, and a copy or pickle of the module gets a forward of its
    own, without a packed weight.
    """

    __slots__ = ("__weakref__", "_module", "_weight")

    def __init__(self, module: nn.Linear) -> None:
        self._module = weakref.ref(module)
        self._weight: PackedWeight | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedForward, (self._module(),)

    def __call__(self, input: Tensor) -> Tensor:
        module: Any = self._module()
        if torch.compiler.is_compiling() or (products := _RUNNING.get()) is None or not _has_few_rows(input):
            return nn.Linear.forward(module, input)
        weight = self._current(module.weight, products)
        if weight is None:
            return nn.Linear.forward(module, input)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight.packed, module.bias, "none", [], "")
        return product

    def _current(self, weight: Tensor, products: PackedProducts) -> PackedWeight | None:
        """Return the packed copy of what the weight is now; None if it cannot be packed or memory is short."""
        if not _is_packable(weight):
            self._weight = None
            return None
        kept = self._weight
        if self in products.checked and (kept is None or kept.is_at(weight)):
            return kept
        products.checked.add(self)
        mark = weight.mv(_probe(weight.shape[1]))
        if kept is None or not kept.is_at(weight) or not _is_same(kept.mark, mark):
            kept = self._weight = PackedWeight.of(weight, mark) if _has_room(weight.nbytes) else None
        return kept


def pack_products(model: nn.Module) -> None:
    """Let the large `nn.Linear` modules of a model use packed weights while calls run; once is enough.

    Left alone: what is not float32 on the CPU, subclasses of `nn.Linear`, and modules whose forward was replaced before
    (as by accelerate's hooks).
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module) and _is_packable(module.weight):
            vars(module)["forward"] = PackedForward(module)


def _has_few_rows(input: Tensor) -> bool:
    return (
        FEWEST_ROWS <= input.shape[:-1].numel() <= MOST_ROWS
        and type(input) is Tensor
        and input.dtype == torch.float32
        and input.is_cpu
    )


def _is_packable(weight: Tensor) -> bool:
    return (
        type(weight) is nn.Parameter
        and weight.numel() >= LEAST_SIZE
        and weight.dtype == torch.float32
        and weight.is_cpu
        and weight.is_contiguous()
        and not weight.is_inference()  # which count no versions
        and _is_measured()
    )


@cache
def _is_measured() -> bool:
    """Return whether this is a kind of processor for which packing was measured: x86 with AVX2 or AVX-512."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return is_x86 and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


@cache
def _probe(size: int) -> Tensor:
    """Return a fixed random vector. Products with it differ if the weights do, by more than rounding hides.

    Plain sums would not: they are the same for the columns in another order.
    """
    with torch.inference_mode(False):
        return torch.rand(size, generator=torch.Generator().manual_seed(size)) + 0.5


def _is_same(mark: Tensor, other: Tensor) -> bool:
    """Return whether both are the same, bit by bit, NaN included."""
    return torch.equal(mark.view(torch.int32), other.view(torch.int32))


def _has_room(num_bytes: int) -> bool:
    """Return whether `MEMORY_LEFT` stays free behind a copy of this size; False where the system does not tell."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {line[0]: int(line[1]) * 1024 for line in lines}
        total, free = sizes["MemTotal:"], sizes["MemAvailable:"]
        limit = CGROUP / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            total = min(total, int(text))
            free = min(free, int(text) - int((CGROUP / "memory.current").read_text()))
    except (OSError, KeyError, ValueError):
        return False
    return free - num_bytes >= MEMORY_LEFT * total
