"""Where a number comes from: the command, the commit, the versions and the machine's kind, never its name or paths."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from taps_ext import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"


def provenance() -> dict[str, Any]:
    """All that a reader needs to repeat the run, as a JSON object."""
    return {
        "command": command(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "device": device(),
        **({"gpu": gpu()} if torch.cuda.is_available() else {}),
    }


def command() -> str:
    """The command line, with every path shortened to its last part."""
    arguments = [Path(argument).name if os.sep in argument else argument for argument in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def commit() -> dict[str, Any]:
    """The commit and whether anything but the results differs from it; None outside a git checkout."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", f":!{RESULTS}")
    return {"revision": revision, "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Python, the libraries, and the compiler that built the native module."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "transformers", "taps_ext"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    reason = native.unavailable_reason()
    build = {} if reason else native.load().build_info()
    of_build = {"compiler": build.get("compiler"), "cxx_flags": build.get("flags")}
    if build.get("cuda", "none") != "none":
        of_build |= {"cuda": build["cuda"], "cuda_architectures": build.get("cuda_architectures")}
    return {**found, **of_build}


def device() -> dict[str, Any]:
    """The processor's model, its cores, torch's threads now, and how busy the machine is."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def gpu() -> dict[str, Any] | None:
    """The GPU's kind and its driver's CUDA; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_mib": round(properties.L2_cache_size / 2**20, 1),
        "torch_cuda": torch.version.cuda,
    }


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write the payload so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".json")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(payload, file, indent=1)
            file.write("\n")
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
