"""The device of a target: which one to take, and why one cannot be had."""

from __future__ import annotations

import torch

from . import native


def reason_without_ops() -> str | None:
    """Why the native module has no CUDA ops, or None when it has."""
    info = native.load().build_info()
    return str(info["cuda_reason"]) if info["cuda"] == "none" else None


def refuse_without_ops(what: str) -> None:
    """Raise when the native module has no ops for `what`, which is or wants to be on a CUDA device."""
    reason = reason_without_ops()
    if reason is not None:
        raise ValueError(
            f"{what} needs CUDA ops, but taps_ext was built without them ({reason}); with a CUDA build of torch and "
            f"the CUDA toolkit there, rebuild it: {native.MEND}; or use the CPU"
        )


def choose(name: str | None = None) -> torch.device:
    """The device named cpu, cuda or cuda:NUMBER; None: a GPU where there is one and ops for it, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() and reason_without_ops() is None else "cpu")
    kind, colon, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device must be cpu, cuda or cuda:NUMBER, got {name!r}")
    if kind == "cuda":
        _refuse_missing_gpu(name, int(index or 0))
        refuse_without_ops(f"device {name}")
    return torch.device(name)


def _refuse_missing_gpu(name: str, index: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"finds {count} GPU{'s' * (count > 1)}, from cuda:0 on" if count else "finds no GPU"
        raise ValueError(f"device {name} was asked for, but torch {torch.__version__} {found}; choose another, or cpu")
