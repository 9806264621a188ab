"""Build the native module `taps_ext._C` against the torch that is installed; everything else is in pyproject.toml.

TAPS_NO_EXT=1      pure Python, no native module
TAPS_NO_CUDA=1     CPU ops only                    TAPS_FORCE_CUDA=1, FORCE_CUDA=1   CUDA ops, or fail
TAPS_DEBUG=1       -O0 -g, kernels -lineinfo       MAX_JOBS   compilers at once, by default as cores and memory allow
TAPS_PIN_TORCH=1   a wheel to hand on (make wheel): version 0.1.0+cu130torch2.13, and that minor of torch required
TAPS_SIMT=1        `taps_ext._simt` instead, for the tests; with TAPS_SANITIZE=memory or races for `make sanitize`
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CC, CXX, CXXFLAGS as everywhere; docs/building.md says more
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tools"))

import cuda_toolkit  # noqa: E402
from cuda_toolkit import Toolkit, switched_on  # noqa: E402

HINT = "taps_ext compiles against your installed torch: pip install torch, then pip install --no-build-isolation ."
# Python's own flags define signed overflow, which would hide it. Of -fsanitize=thread the stand-in wants the calls that
# it makes at every access (python_tests/simt/races.h), not the library that answers them.
MEMORY_CHECKS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-fno-wrapv",
]
RACE_CHECKS = ["-fsanitize=thread", "--param=tsan-distinguish-volatile=1"]
SANITIZERS = {"": ([], []), "memory": (MEMORY_CHECKS, MEMORY_CHECKS), "races": (RACE_CHECKS, [])}  # compile, link


def files(pattern: str) -> list[str]:
    """Return the source files that match, relative to this directory; a new op in csrc/ needs no edit here."""
    return sorted(str(path.relative_to(HERE)) for path in HERE.glob(pattern))


def write(path: Path, text: str) -> Path:
    """Write a generated file, unless it has this text already: then nothing is compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def build_info_header(base: Path, fields: dict[str, str]) -> Path:
    """Write the header that holds what `build_info()` returns."""
    lines = [f'    {{"{key}", R"taps({value})taps"}},' for key, value in fields.items()]
    text = "\n".join(["#define TAPS_BUILD_INFO \\", "  { \\", *(f"{line} \\" for line in lines), "  }", ""])
    return write(base / "include" / "taps_build_info.h", text)


def native_module(torch: Any, cpp_extension: Any, base: Path, cuda: Toolkit | None, reason: str) -> Extension:
    """Return `taps_ext._C`: every op for the CPU, and for CUDA where there is a toolkit to build it with."""
    debug = switched_on("TAPS_DEBUG")
    optimise = ["-O0", "-g"] if debug else ["-O3", "-g0"]
    flags = ["-std=c++20", *optimise, "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"]
    build_info = {"torch": torch.__version__, "cuda": "none", "cuda_reason": reason}
    if cuda:
        flags.append("-DTAPS_WITH_CUDA")
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_toolkit.architecture_list(cuda, capabilities)
        build_info |= {"cuda": cuda.version, "cuda_architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    header = build_info_header(base, {**build_info, "flags": " ".join(flags)})
    cpp, cu = files("csrc/**/*.cpp"), files("csrc/*/*_cuda.cu")
    return (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "taps_ext._C",
        cpp + cu if cuda else cpp,
        include_dirs=[str(HERE / "csrc"), str(header.parent)],
        extra_compile_args={"cxx": flags, "nvcc": [*cuda_toolkit.NVCC_FLAGS, *(["-g", "-lineinfo"] if debug else [])]},
        extra_link_args=["-fopenmp"],
    )


def stand_in_module(torch: Any, cpp_extension: Any, base: Path) -> Extension:
    """Return `taps_ext._simt`: the same ops, their kernels as C++ for the stand-in for CUDA (python_tests/simt)."""
    kernels = []
    for kernel in map(Path, files("csrc/*/*_cuda.cu")):  # under names that mean C++
        source = write(base / "source" / f"{kernel.stem}.cpp", f'#include "{kernel.relative_to("csrc")}"\n')
        kernels.append(str(source.relative_to(HERE)))
    build_info = {"torch": torch.__version__, "cuda": "none", "cuda_reason": "the host stand-in for CUDA"}
    header = build_info_header(base, build_info)
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-fvisibility=hidden", "-DTAPS_SIMT"]
    flags.append("-Wno-unknown-pragmas")  # of nvcc
    compiled, linked = SANITIZERS[os.environ.get("TAPS_SANITIZE", "")]
    return cpp_extension.CppExtension(
        "taps_ext._simt",
        [*files("csrc/**/*.cpp"), *files("python_tests/simt/*.cpp"), *kernels],
        include_dirs=[str(HERE / path) for path in ("python_tests/simt/include", "python_tests", "csrc")]
        + [str(header.parent)],
        extra_compile_args={"cxx": flags + compiled},
        extra_link_args=linked,
    )


def pinned_to(torch: Any, cuda: bool) -> type[Distribution]:
    """Return the metadata of a wheel to hand on: a native module fits one minor version of torch, and one CUDA."""
    minor = re.match(r"\d+\.\d+", torch.__version__)[0]  # type: ignore[index]
    label = f"cu{torch.version.cuda.replace('.', '')}" if cuda else "cpu"

    class Pinned(Distribution):
        def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
            super().parse_config_files(*args, **kwargs)  # reads pyproject.toml
            self.metadata.version += f"+{label}torch{minor}"
            self.install_requires = self.metadata.install_requires = [
                f"torch=={minor}.*" if re.match(r"torch\b", requirement) else requirement
                for requirement in self.install_requires
            ]

    return Pinned


def arguments() -> dict[str, Any]:
    """Return what setup() needs beside pyproject.toml; nothing with TAPS_NO_EXT=1."""
    if switched_on("TAPS_NO_EXT"):
        return {}
    try:
        import torch
    except ImportError as error:
        raise SystemExit(HINT) from error
    toolkit = cuda_toolkit.find() if torch.version.cuda else None
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # cpp_extension looks for it once, on import
    os.environ["MAX_JOBS"] = str(cuda_toolkit.max_jobs())
    from torch.utils import cpp_extension

    known: dict[str, Any] = {"cmdclass": {"build_ext": cpp_extension.BuildExtension}}
    if switched_on("TAPS_SIMT"):
        if sys.argv[1:2] != ["build_ext"]:
            raise SystemExit("TAPS_SIMT=1 is for python setup.py build_ext: the tests' module is never installed")
        base = HERE / "build" / (os.environ.get("TAPS_SANITIZE") or "simt")
        # a build folder of its own: whatever lies in build/lib* would go into the next wheel
        known["options"] = {"build": {"build_base": str(base), "build_platlib": str(base)}}
        return known | {"ext_modules": [stand_in_module(torch, cpp_extension, base)]}
    cuda, reason = cuda_toolkit.decision(torch.version.cuda, toolkit)
    base = HERE / "build"
    if switched_on("TAPS_PIN_TORCH"):
        base = base / "wheel"
        base.mkdir(parents=True, exist_ok=True)
        known["options"] = {"build": {"build_base": str(base)}, "egg_info": {"egg_base": str(base)}}
        known["distclass"] = pinned_to(torch, cuda)
    return known | {"ext_modules": [native_module(torch, cpp_extension, base, toolkit if cuda else None, reason)]}


setup(**arguments())
