"""Builds the native module `taps_ext._C` against the torch that is installed; everything else is in pyproject.toml.

TAPS_NO_EXT=1      pure Python, no native module
TAPS_NO_CUDA=1     CPU ops only                    TAPS_FORCE_CUDA=1  CUDA ops, or fail
TAPS_DEBUG=1       -O0 -g                          MAX_JOBS           parallel compilers
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CC, CXX, CXXFLAGS as everywhere
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import setup

HERE = Path(__file__).resolve().parent
HINT = "taps_ext compiles against your installed torch: pip install torch, then pip install --no-build-isolation ."
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"  # when TORCH_CUDA_ARCH_LIST is unset, whatever the GPU here


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def sources(pattern: str) -> list[str]:
    """The files of csrc/ and its op families, so that a new op needs no edit here; csrc/simt/ is for the tests."""
    paths = [*HERE.glob(f"csrc/{pattern}"), *HERE.glob(f"csrc/*/{pattern}")]
    return sorted(str(path.relative_to(HERE)) for path in paths if path.parent.name != "simt")


def cuda_decision(version: str | None, home: str | None, has_sources: bool) -> tuple[bool, str]:
    """Whether to build the CUDA ops, and the reason; the machine's GPU plays no part."""
    if switched_on("TAPS_NO_CUDA"):
        return False, "TAPS_NO_CUDA=1"
    if not has_sources:
        if switched_on("TAPS_FORCE_CUDA"):
            raise SystemExit("TAPS_FORCE_CUDA=1, but this version has no CUDA ops; unset it")
        return False, "this version has no CUDA ops"
    if switched_on("TAPS_FORCE_CUDA"):
        return True, "TAPS_FORCE_CUDA=1"
    if version is None:
        return False, "this torch was built without CUDA"
    if home is None:
        return False, f"torch has CUDA {version}, but no CUDA toolkit was found (set CUDA_HOME)"
    return True, f"torch has CUDA {version} and CUDA_HOME is set"


def write_build_info(fields: dict[str, str]) -> Path:
    """The include folder of the generated header that `build_info()` returns; untouched when nothing changed."""
    folder = HERE / "build" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'    {{"{key}", R"taps({value})taps"}},' for key, value in fields.items()]
    text = "\n".join(["#define TAPS_BUILD_INFO \\", "  { \\", *(f"{line} \\" for line in lines), "  }", ""])
    header = folder / "taps_build_info.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return folder


def native_module() -> dict[str, Any]:
    """`ext_modules` and `cmdclass`, or nothing with TAPS_NO_EXT=1."""
    if switched_on("TAPS_NO_EXT"):
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(HINT) from error

    cpp, cu, headers = sources("*.cpp"), sources("*_cuda.cu"), sources("*.h") + sources("*.cuh")
    cuda, reason = cuda_decision(torch.version.cuda, cpp_extension.CUDA_HOME, bool(cu))
    optimise = ["-O0", "-g"] if switched_on("TAPS_DEBUG") else ["-O3", "-g0"]
    flags = ["-std=c++20", *optimise, "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"]
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        flags.append("-DTAPS_WITH_CUDA")
    build_info = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "unknown" if cuda else "none",
        "cuda_reason": reason,
        "flags": " ".join(flags),
    }
    if cuda:
        build_info["cuda_architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "taps_ext._C",
        cpp + cu if cuda else cpp,
        depends=headers + cu,  # for the sdist too
        include_dirs=[str(HERE / "csrc"), str(write_build_info(build_info))],
        extra_compile_args={"cxx": flags, "nvcc": ["-std=c++20", *optimise, "-fmad=false"]},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


setup(**native_module())
