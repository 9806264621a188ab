"""Where a number comes from: the command, the commit, the versions and the kind of machine, never its name or paths."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from taps_ext import native
from taps_ext.checkpoints.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
BUILD = ("compiler", "flags", "cuda", "cuda_architectures")


def provenance() -> dict[str, Any]:
    """Return all that a reader needs to repeat the run, as a JSON object."""
    facts = native.installation()
    return {
        "command": command(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **facts.provenance(),
        **native.code_version(".", f":!{RESULTS}"),  # scripts and tests count here
        "build": {name: value for name, value in (facts.native.build or {}).items() if name in BUILD},
        "device": device(),
        **({"gpu": gpu()} if facts.cuda.gpus else {}),
    }


def command() -> str:
    """Return the command line, with every path shortened to its last part."""
    arguments = [Path(argument).name if os.sep in argument else argument for argument in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def device() -> dict[str, Any]:
    """Return the model of the processor, its cores, and how busy the machine is."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def gpu() -> dict[str, Any]:
    """Return the kind of the first GPU and the CUDA of torch."""
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
    text = json.dumps(payload, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{text}\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
