"""The compile gate (make cuda-check): every kernel for every architecture, without spills, stack frames or warnings.

Prints the registers a thread takes, by kernel and architecture, and the static shared memory of a block. A kernel must
state its largest block (`__launch_bounds__`), because nothing else shows here that its registers let it be launched.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cuda_toolkit
from cuda_toolkit import Toolkit, digits

CSRC = Path(__file__).resolve().parent.parent / "csrc"


@dataclass(frozen=True)
class Usage:
    """What ptxas reports about one kernel on one architecture."""

    kernel: str  # mangled
    architecture: str  # "sm_90"
    registers: int
    shared_bytes: int
    local_memory: str  # "8 bytes stack frame, 4 bytes spill stores", or nothing


@dataclass(frozen=True)
class Compiled:
    """One file for all architectures."""

    usages: tuple[Usage, ...]
    blocks: dict[str, int]  # of a mangled kernel that has launch bounds: its largest block
    problems: tuple[str, ...]


def parse_usages(text: str) -> list[Usage]:
    """Parse what `ptxas -v` printed, kernel by kernel, with the local memory of the functions that a kernel calls."""
    usages = []
    for part in re.split(r"^ptxas info\s*: Compiling entry function ", text, flags=re.MULTILINE)[1:]:
        name, architecture = re.match(r"'(\S+)' for '(\S+)'", part).groups()  # type: ignore[union-attr]
        local = re.findall(r"[1-9]\d* bytes (?:stack frame|spill stores|spill loads)", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        sizes = [int(found[1]) if found else 0 for found in (registers, shared)]
        usages.append(Usage(name, architecture, sizes[0], sizes[1], ", ".join(local)))
    return usages


def parse_blocks(ptx: str) -> dict[str, int]:
    """Parse the largest block of each kernel that states one."""
    entries = re.findall(r"\.entry (\S+?)\((.*?)\{", ptx, flags=re.DOTALL)
    bounds = {name: re.search(r"\.maxntid (\d+)", head) for name, head in entries}
    return {name: int(bound[1]) for name, bound in bounds.items() if bound}


def compile_one(toolkit: Toolkit, source: Path, architectures: Sequence[str]) -> Compiled:
    """Compile a file for these architectures and to PTX of the last, and throw the object file away."""
    numbers = [digits(architecture) for architecture in architectures]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    codes.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        command = [str(toolkit.nvcc), *cuda_toolkit.NVCC_FLAGS, f"-I{CSRC}", *codes, "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "--keep", "--keep-dir", folder]
        command += ["-c", str(source), "-o", str(Path(folder, "kernel.o"))]
        done = subprocess.run(command, capture_output=True, text=True)
        ptx = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    usages, blocks = parse_usages(done.stderr), parse_blocks(ptx)
    problems = [f"nvcc fails on {source.name}:\n{done.stdout}{done.stderr}"] if done.returncode else []
    for usage in usages:
        if usage.local_memory:
            problems.append(f"{short_name(usage.kernel)} on {usage.architecture}: {usage.local_memory}")
        if usage.kernel not in blocks:
            problems.append(f"{short_name(usage.kernel)} in {source.name} has no __launch_bounds__")
    return Compiled(tuple(usages), blocks, tuple(dict.fromkeys(problems)))


@cache
def short_name(mangled: str) -> str:
    """Return `verify_kernel<256, float>` for its mangled name, where a demangler is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return mangled
    name = subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\b[a-z_]\w*::", "", name.replace("(anonymous namespace)::", "")).removeprefix("void ")
    depth = 0
    for index, character in enumerate(name):  # up to the arguments: the first bracket outside the template's own
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:index]
    return name


def table(results: dict[Path, Compiled], architectures: Sequence[str]) -> str:
    """Return a table, a row per kernel: largest block, registers per thread by architecture, static shared bytes."""
    columns = [f"sm_{digits(architecture)}" for architecture in architectures]
    rows = [["kernel", "block", *columns, "shared"]]
    for source, result in results.items():
        for kernel in sorted({usage.kernel for usage in result.usages}, key=short_name):
            found = {usage.architecture: usage for usage in result.usages if usage.kernel == kernel}
            registers = [str(found[column].registers) if column in found else "-" for column in columns]
            shared = max(usage.shared_bytes for usage in found.values())
            name = f"{source.stem.removesuffix('_cuda')}: {short_name(kernel)}"
            rows.append([name, str(result.blocks.get(kernel, "?")), *registers, str(shared)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justified = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join(map("  ".join, justified))


def main() -> int:
    """Check every kernel; return 0 when nothing is wrong, and where there is no nvcc."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="*", type=Path, help="by default every kernel file of csrc")
    parser.add_argument("--architectures", nargs="+", help="by default " + " ".join(cuda_toolkit.ARCHITECTURES))
    arguments = parser.parse_args()
    toolkit = cuda_toolkit.find()
    if toolkit is None:
        print("cuda-check: skipped, there is no nvcc on this machine (PATH, CUDA_HOME)")
        return 0
    sources = arguments.sources or sorted(CSRC.glob("*/*_cuda.cu"))
    architectures = arguments.architectures or toolkit.architectures
    with ThreadPoolExecutor(cuda_toolkit.max_jobs()) as pool:
        compiled = pool.map(lambda source: compile_one(toolkit, source, architectures), sources)
        results = dict(zip(sources, compiled, strict=True))
    problems = [problem for result in results.values() for problem in result.problems]
    print(f"nvcc {toolkit.version}: registers a thread, and bytes of static shared memory a block")
    print(table(results, architectures))
    unknown = [architecture for architecture in cuda_toolkit.ARCHITECTURES if architecture not in toolkit.architectures]
    if unknown:
        print(f"left out, because this nvcc does not know them: {' '.join(unknown)}")
    print("\n".join(problems) or f"cuda-check: {len(sources)} files, no spills, no stack frames, no warnings")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
