"""The host stand-in for CUDA finds each defect that its header claims it finds, and runs right kernels right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "python_tests" / "simt_kernels.cu"
ORDERS = [("forward", "0"), ("reverse", "0"), *(("shuffled", str(seed)) for seed in range(4))]

SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
WATCHED = ["-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"]  # python_tests/simt/races.h

Results = dict[str, str]


def compiled(folder: Path, *flags: str) -> Path:
    """The program of simt_kernels.cu."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    include = [f"-I{ROOT / folder}" for folder in ("python_tests/simt/include", "python_tests", "csrc")]
    command = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", *flags, *include]
    objects = [str(folder / "kernels.o"), str(folder / "simt.o")]
    subprocess.run([*command, "-x", "c++", "-c", str(KERNELS), "-o", objects[0]], check=True)
    subprocess.run([*command, "-c", str(ROOT / "python_tests/simt/simt.cpp"), "-o", objects[1]], check=True)
    program = folder / "simt_kernels"
    for_linker = [flag for flag in flags if flag not in WATCHED]
    subprocess.run([compiler, *for_linker, *objects, "-o", str(program)], check=True)
    return program


def results(program: Path, order: str, seed: str, *cases: str) -> Results:
    output = subprocess.run([program, order, seed, *cases], check=True, capture_output=True, text=True).stdout
    return dict(line.split("\t", 1) for line in output.splitlines())


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("simt"), "-O2")


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("simt_asan"), *SANITIZERS)


@pytest.fixture(scope="session")
def races(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """The results in every order when accesses are watched."""
    program = compiled(tmp_path_factory.mktemp("simt_races"), "-O1", *WATCHED)
    return [results(program, *order) for order in ORDERS[:3]]


@pytest.fixture(scope="session")
def by_order(program: Path) -> list[Results]:
    return [results(program, *order) for order in ORDERS]


def numbers(values: list[int]) -> str:
    return " ".join(map(str, values))


RIGHT = {
    "sums 32": "0",  # wrong results
    "sums 64": "0",
    "sums 1024": "0",
    "select": "123",
    "last block": str(2 * sum(64 * block + 64 * 63 // 2 for block in range(9))),
    "indices": str(2 * 3 * 4 * 5 * 6 * 7),
    "warp operations": "0",  # the last line that was wrong
    "block votes": "0",
    "intrinsics": "0",
    "dynamic shared": "00",
    "rotates in warp": numbers([(thread ^ 31) + 2 for thread in range(64)]),
    "reads volatile": numbers([0] * 64),
    "writes the same": numbers([256] * 64),
    "parameters": str(2 * (1 + 8 + 12 + 16 + 20 + 64 + 400)),
    "atomics": f"{2 * 96 * 95 // 2} -95 95 {2**30 - 1} {-(2**30)} 0 -192 384 192",
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels_are_right_in_every_order(case: str, by_order: list[Results]) -> None:
    assert [found[case] for found in by_order] == [RIGHT[case]] * len(ORDERS)


FOUND = {  # in every order
    "returns before barrier": r"__syncthreads \(simt_kernels.cu:\d+\), but thread 40 has left the kernel",
    "has two barriers": r"thread \d+ waits at __syncthreads \(.*\), but thread \d+ waits at __syncthreads",
    "returns before shuffle": r"__shfl_sync .*(thread 7 has|0x00000080 have) left the kernel",
    "names missing lanes": r"for lanes 0xFFFFFFFF, of which 0xFFFF0000 have left the kernel or do not exist",
    "lacks itself": r"__syncwarp .* for lanes 0x0000FFFF, which lack its own",
    "disagrees on mask": r"__syncwarp .* for lanes 0x\w+, but .*__syncwarp .* for lanes 0x",
    "disagrees on operation": r"__(any|all)_sync .* but .*__(all|any)_sync",
    "reads outside mask": r"reads from lane \d+, which is not in its mask of lanes 0x000000FF",
    "waits for each other": r"no thread can go on: .*__syncthreads .*with 62 more; thread 5 waits at __syncwarp",
    "spins": r"spins and no thread makes progress",
    "writes past shared": r"wrote outside the shared array values of 6 bytes",
    "writes before shared": r"wrote outside the shared array values of 6 bytes",
    "writes past dynamic shared": r"wrote outside the shared array of the launch of 33 bytes",
    "static shared beyond 48 KB": r"48768 bytes of static shared memory",
    "dynamic shared beyond 48 KB": r"50000 bytes of dynamic shared memory, of 49152",
    "empty grid": r"the grid is \(0, 1, 1\)",
    "tall grid": r"the grid is \(1, 65536, 1\)",
    "grid beyond 32 bits": r"4294967297 does not fit in 32 bits",
    "large block": r"the block is \(1025, 1, 1\)",
}


@pytest.mark.parametrize("case", FOUND)
def test_a_wrong_kernel_fails_in_every_order(case: str, by_order: list[Results]) -> None:
    for found in by_order:
        assert re.search("^error: .*" + FOUND[case], found[case])


SUMS = sum(range(128)) * 10 + sum(range(1, 129))
SHOWN = {  # what the kernel would give with its barrier or atomic; some order must give another result
    "lacks barrier": numbers([thread ^ 1 for thread in range(64)]),
    "lacks barrier below": numbers([0, *range(63)]),
    "lacks barrier after atomics": numbers([64] * 64),
    "lacks second barrier": numbers([SUMS] * 128),
    "lacks syncwarp": numbers([31 - thread for thread in range(32)]),
    "lacks atomic": "64",
    "writes different": numbers([63 * 256] * 64),
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_missing_barrier_shows_in_some_order(case: str, by_order: list[Results]) -> None:
    assert {found[case] for found in by_order} - {SHOWN[case]}


def test_reverse_shows_what_forward_hides(by_order: list[Results]) -> None:
    right = SHOWN["lacks barrier below"]
    assert [found["lacks barrier below"] == right for found in by_order[:2]] == [True, False]


@pytest.mark.parametrize("case", SHOWN)
def test_a_missing_barrier_is_a_race_in_every_order(case: str, races: list[Results]) -> None:
    for found in races:
        assert re.search(r"^error: .* threads \d+ and \d+ race for byte \d+ of .*, with no barrier", found[case])


def test_right_kernels_have_no_races(races: list[Results]) -> None:
    for found in races:
        assert {case: found[case] for case in RIGHT} == RIGHT


def test_unwritten_shared_memory_is_poison(by_order: list[Results]) -> None:
    """NaN as a float and as a double, far from zero as an integer."""
    assert {found["reads unwritten shared"] for found in by_order} == {"111"}


@pytest.mark.parametrize("order", ORDERS[:3], ids=lambda order: order[0])
def test_right_kernels_are_clean_under_sanitizers(order: tuple[str, str], sanitized: Path) -> None:
    """Switches between stacks, and stacks left in the middle by an error, do not confuse AddressSanitizer."""
    cases = ["returns before barrier", "waits for each other", *RIGHT]
    found = results(sanitized, *order, *cases)
    assert {case: found[case] for case in RIGHT} == RIGHT


@pytest.mark.parametrize("case", ["writes past shared", "reads past shared", "writes past dynamic shared"])
def test_address_sanitizer_names_the_access_outside_a_shared_array(case: str, sanitized: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        results(sanitized, "forward", "0", case)
    assert "AddressSanitizer: heap-buffer-overflow" in error.value.stderr
    assert "simt_kernels.cu" in error.value.stderr


def test_ucontext_switches_like_the_own_switch(program: Path, tmp_path: Path, by_order: list[Results]) -> None:
    other = compiled(tmp_path, "-O0", "-DSIMT_UCONTEXT")
    assert results(other, *ORDERS[0]) == by_order[0]


def test_nvcc_compiles_the_same_kernels(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    command = [nvcc, "-std=c++20", "-arch=sm_90", f"-I{ROOT / 'csrc'}", "-c", str(KERNELS), "-o", str(tmp_path / "o")]
    subprocess.run(command, check=True)
