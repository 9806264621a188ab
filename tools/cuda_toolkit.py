"""The CUDA toolkit that compiles the kernels: directory, architectures and flags; for setup.py and cuda_check.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # those of them that the installed nvcc knows

# Device and host round in the same way: neither contracts to a fused multiply-add. The -U undo what torch's
# BuildExtension defines, so that a kernel means the same wherever it is compiled.
NVCC_FLAGS = (
    *("-std=c++20", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"),
    *("-Xfatbin", "-compress-all"),  # a quarter of the size
    *(f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")),
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
)


@dataclass(frozen=True)
class Toolkit:
    """An nvcc with its headers."""

    home: Path
    version: str  # "13.0"
    architectures: tuple[str, ...]  # those of ARCHITECTURES that it knows

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def major(self) -> str:
        return self.version.split(".")[0]


def find() -> Toolkit | None:
    """Find the toolkit in CUDA_HOME (or CUDA_PATH), or the one whose nvcc is on PATH, or /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    homes = [Path(on_path).resolve().parent.parent] if on_path else []
    for home in [Path(named)] if named else [*homes, Path("/usr/local/cuda")]:
        # an nvcc on PATH can be a script that calls the one elsewhere: only the headers show where the toolkit is
        headers = [home / "include" / "cuda_runtime.h", *home.glob("targets/*/include/cuda_runtime.h")]
        if (home / "bin" / "nvcc").exists() and any(header.exists() for header in headers):
            return Toolkit(home, *_known(home / "bin" / "nvcc"))
    return None


def _known(nvcc: Path) -> tuple[str, tuple[str, ...]]:
    def says(option: str) -> str:
        return subprocess.run([nvcc, option], capture_output=True, text=True).stdout

    release = re.search(r"release (\d+\.\d+)", says("--version"))
    if release is None:
        raise SystemExit(f"{nvcc} --version names no release")
    known = says("--list-gpu-arch").split()
    return release[1], tuple(arch for arch in ARCHITECTURES if f"compute_{digits(arch)}" in known)


def decision(torch_cuda: str | None, toolkit: Toolkit | None) -> tuple[bool, str]:
    """Return whether to build the CUDA ops, and the reason; it does not depend on the GPU of the machine."""
    if switched_on("TAPS_NO_CUDA"):
        return False, "TAPS_NO_CUDA=1"
    if torch_cuda is None:
        missing = "this torch was built without CUDA"
    elif toolkit is None:
        missing = (
            f"torch has CUDA {torch_cuda}, but no CUDA toolkit was found (CUDA_HOME must hold bin/nvcc and include)"
        )
    elif toolkit.major != torch_cuda.split(".")[0]:
        raise SystemExit(
            f"torch has CUDA {torch_cuda}, but {toolkit.nvcc} belongs to CUDA {toolkit.version}: set CUDA_HOME to a "
            f"toolkit of CUDA {torch_cuda}, install a torch for CUDA {toolkit.major}, or set TAPS_NO_CUDA=1 for "
            "CPU ops only"
        )
    else:
        return True, f"torch has CUDA {torch_cuda}, and nvcc {toolkit.version} was found"
    if switched_on("TAPS_FORCE_CUDA", "FORCE_CUDA"):
        raise SystemExit(f"CUDA ops are asked for (TAPS_FORCE_CUDA or FORCE_CUDA), but {missing}")
    return False, missing


def architecture_list(toolkit: Toolkit, capabilities: Iterable[tuple[int, int]]) -> str:
    """Return TORCH_CUDA_ARCH_LIST, or if unset those of ARCHITECTURES that nvcc knows, not just of the GPUs here."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked == "native":
        asked = ";".join(f"{major}.{minor}" for major, minor in sorted(set(capabilities)))
        if not asked:
            raise SystemExit("TORCH_CUDA_ARCH_LIST=native, but no GPU is visible: name the architecture, as in 9.0")
    early = re.search(r"(?<![\d.])[5-7]\.\d", asked)
    if early:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST names {early[0]}, but the kernels need 8.0 or later: leave it out")
    return asked or ";".join(toolkit.architectures) + "+PTX"


def digits(architecture: str) -> str:
    """Return "9.0" as nvcc writes it: "90"."""
    return architecture.replace(".", "")


def switched_on(*names: str) -> bool:
    """Return whether one of these variables is set to anything but 0."""
    return any(os.environ.get(name, "") not in ("", "0") for name in names)


def max_jobs() -> int:
    """Return MAX_JOBS, or as many compilers as there are cores and 2 GB of free memory for each."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _free_bytes() // (2 << 30)))


def _free_bytes() -> int:
    try:
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        free = None
    return int(free[1]) * 1024 if free else 1 << 62
