"""The compile gate, and what the build decides about CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_check
import cuda_toolkit
import pytest

ROOT = Path(__file__).parent.parent
NVCC_HERE = cuda_toolkit.find()
VARIABLES = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TAPS_NO_CUDA", "TAPS_FORCE_CUDA", "FORCE_CUDA")

PTXAS_OUTPUT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodPf' for 'sm_80'
ptxas info    : Function properties for _Z4goodPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3badPf' for 'sm_90'
ptxas info    : Function properties for _Z3badPf
    24 bytes stack frame, 28 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
GOOD = """
__global__ void __launch_bounds__(128) reverse(float* x) {
  __shared__ float tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[127 - threadIdx.x];
}
"""
STACK = "  float a[64]; for (int i = 0; i < n; ++i) { a[i % 64] = x[i]; } x[threadIdx.x] = a[n % 64];"
SINS = {
    "stack frame": f"__global__ void __launch_bounds__(32) f(float* x, int n) {{ {STACK} }}",
    "spill stores": """
        __global__ void __launch_bounds__(1024, 2) f(double* x) {
          double a[64];
          _Pragma("unroll") for (int i = 0; i < 64; ++i) { a[i] = x[i * 32 + threadIdx.x]; }
          __syncthreads();
          _Pragma("unroll") for (int i = 0; i < 64; ++i) { x[i * 37 + threadIdx.x] = a[i] * a[(i + 7) % 64]; }
        }""",
    "has no __launch_bounds__": "__global__ void f(float* x) { x[threadIdx.x] = 1; }",
    "declared but never referenced": "__global__ void __launch_bounds__(32) f(float* x) { int unused; x[0] = 1; }",
    "different signedness": "bool host(int a, unsigned b) { return a < b; }",
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def gate(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "cuda_check.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def toolkit(folder: Path, version: str, *architectures: str) -> Path:
    """A folder that looks like a CUDA toolkit."""
    for part in ("bin", "include"):
        (folder / part).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    nvcc = folder / "bin" / "nvcc"
    known = " ".join(f"compute_{architecture}" for architecture in architectures)
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "tools, release {version}, V1" || echo "{known}"\n')
    nvcc.chmod(0o755)
    return folder


def test_the_gate_reads_registers_shared_memory_and_local_memory() -> None:
    good, bad = cuda_check.parse_usages(PTXAS_OUTPUT)
    assert good == cuda_check.Usage("_Z4goodPf", "sm_80", 40, 4096, "")
    assert bad == cuda_check.Usage("_Z3badPf", "sm_90", 255, 0, "24 bytes stack frame, 28 bytes spill stores")


def test_without_nvcc_the_gate_says_so_in_a_line_and_passes(tmp_path: Path) -> None:
    done = gate(CUDA_HOME=str(tmp_path))
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert "no nvcc" in done.stdout


@pytest.mark.skipif(NVCC_HERE is None, reason="no nvcc here")
def test_a_kernel_without_sins_passes_the_gate_and_is_in_its_table(tmp_path: Path) -> None:
    source = tmp_path / "good_cuda.cu"
    source.write_text(GOOD)
    done = gate(source, "--architectures", "8.0", "9.0")
    assert done.returncode == 0, done.stdout
    row = next(line for line in done.stdout.splitlines() if "reverse" in line).split()
    assert row[:3] == ["good:", "reverse", "128"]
    assert row[-1] == "512"


@pytest.mark.skipif(NVCC_HERE is None, reason="no nvcc here")
@pytest.mark.parametrize("complaint", SINS)
def test_the_gate_stops(tmp_path: Path, complaint: str) -> None:
    source = tmp_path / "bad_cuda.cu"
    source.write_text(SINS[complaint])
    done = gate(source, "--architectures", "8.0")
    assert done.returncode == 1, done.stdout
    assert complaint in done.stdout


def test_the_default_architectures_are_those_that_nvcc_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path, "12.6", "75", "80", "86", "89", "90")))
    found = cuda_toolkit.find()
    assert found is not None
    assert (found.version, found.home) == ("12.6", tmp_path)
    assert cuda_toolkit.architecture_list(found, [(12, 0)]) == "8.0;8.6;8.9;9.0+PTX"


def test_asked_architectures_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cuda_toolkit.Toolkit(Path("/cuda"), "13.0", ("9.0",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.7")
    assert cuda_toolkit.architecture_list(known, []) == "8.7"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    assert cuda_toolkit.architecture_list(known, [(9, 0), (9, 0), (12, 0)]) == "9.0;12.0"
    with pytest.raises(SystemExit, match=r"no GPU is visible.*9\.0"):
        cuda_toolkit.architecture_list(known, [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0")
    with pytest.raises(SystemExit, match=r"names 7\.5, but the kernels need 8\.0"):
        cuda_toolkit.architecture_list(known, [])


def test_a_named_toolkit_is_not_replaced_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = toolkit(tmp_path / "other", "13.0", "90")
    monkeypatch.setenv("PATH", f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = cuda_toolkit.find()
    assert found is not None
    assert found.home == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "missing"))
    assert cuda_toolkit.find() is None


def test_cuda_ops_are_built_where_torch_and_a_toolkit_have_the_same_major_version() -> None:
    known = cuda_toolkit.Toolkit(Path("/cuda"), "13.2", ("9.0",))
    assert cuda_toolkit.decision("13.0", known) == (True, "torch has CUDA 13.0, and nvcc 13.2 was found")
    assert cuda_toolkit.decision(None, known) == (False, "this torch was built without CUDA")
    assert cuda_toolkit.decision("13.0", None)[0] is False
    with pytest.raises(SystemExit, match=r"has CUDA 12\.6, but /cuda/bin/nvcc belongs to CUDA 13\.2: set CUDA_HOME"):
        cuda_toolkit.decision("12.6", known)


@pytest.mark.parametrize("variable", ["TAPS_FORCE_CUDA", "FORCE_CUDA"])
def test_forced_cuda_ops_are_built_or_the_build_stops(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SystemExit, match="this torch was built without CUDA"):
        cuda_toolkit.decision(None, None)
    monkeypatch.setenv("TAPS_NO_CUDA", "1")
    assert cuda_toolkit.decision("13.0", None) == (False, "TAPS_NO_CUDA=1")


def test_the_number_of_compilers_follows_max_jobs_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "7")
    assert cuda_toolkit.max_jobs() == 7
    monkeypatch.setenv("MAX_JOBS", "")
    monkeypatch.setattr(cuda_toolkit, "_free_bytes", lambda: 3 << 30)
    assert cuda_toolkit.max_jobs() == 1
