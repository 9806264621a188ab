"""The plan of the house, held: which file may know which."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from taps_ext import native

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "taps_ext"
CSRC = ROOT / "csrc"

# What each room may import from taps_ext, itself included; a package stands for its files. The command line is not
# listed: it stands above everything.
BELOW_DECODE = {"composition", "drafters", "native", "ops", "products", "sampling", "target", "tree"}
MAY_IMPORT: dict[str, set[str]] = {
    "tree": set(),
    "sampling": set(),
    "native": set(),
    "products": set(),
    "ops": {"native", "tree"},
    "reference": {"ops", "tree"},
    "composition": {"ops", "tree"},
    "target": {"native", "ops", "products", "sampling", "target", "tree"},
    "drafters": {"drafters", "native", "ops", "products", "sampling", "tree"},
    "checkpoints": {"checkpoints", "drafters", "sampling", "target", "tree"},
    "decode": {"decode", "checkpoints.files", *BELOW_DECODE},
    "training": {"training", "checkpoints", "decode", "tiny", *BELOW_DECODE},
    "evaluation": {"evaluation", "checkpoints", "decode", "tiny", *BELOW_DECODE},
    "tiny": set(),
}
OPS = tuple(native.load().schemas)


@cache
def imports(path: Path) -> frozenset[str]:
    """The taps_ext modules that a file imports, anywhere in it, dotted and without the leading package."""
    found: set[str] = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found.update(_imported_modules(module, [alias.name for alias in node.names]))
    return frozenset(name.removeprefix("taps_ext.") for name in found if name.startswith("taps_ext."))


def _imported_modules(module: str, names: list[str]) -> set[str]:
    """`from a import b` imports a.b where that is a module, else a."""
    folder = ROOT.joinpath(*module.split("."))
    is_module = {name: (folder / f"{name}.py").exists() or (folder / name).is_dir() for name in names}
    submodules = {f"{module}.{name}" for name in names if is_module[name]}
    return submodules | (set() if all(is_module.values()) else {module})


def files_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py"))


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_lower_rooms_import_only_what_stands_below_them(room: str) -> None:
    files = files_of(room)
    assert files, f"{room} is gone: change the table"
    for path in files:
        strangers = {module for module in imports(path) if not is_allowed(module, MAY_IMPORT[room])}
        assert not strangers, f"{path.relative_to(ROOT)} may not import {sorted(strangers)}"


def test_only_tests_and_benchmarks_import_the_reference() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not is_allowed("reference", set(imports(path))), path
        assert path.name == "reference.py" or not re.search(r"import\b.*\breference\b", path.read_text()), path


def test_nothing_in_the_library_imports_tests_benchmarks_or_the_command_line() -> None:
    for path in PACKAGE.rglob("*.py"):
        is_command = path.is_relative_to(PACKAGE / "cli") or path.name == "__main__.py"
        assert is_command or not any(is_allowed(module, {"cli"}) for module in imports(path)), path
        assert not re.search(r"^\s*(from|import) (python_tests|benchmarks|pytest)\b", path.read_text(), re.M), path


def finished_files() -> list[Path]:
    """The files outside evaluation/, which are still to be put in order."""
    return [path for path in PACKAGE.rglob("*.py") if "evaluation" not in path.parts]


def test_a_public_name_is_defined_once() -> None:
    """Ops with their reference aside, and the functions that are commands, which are named as the command is."""
    homes: dict[str, list[str]] = {}
    for path in finished_files():
        place = path.relative_to(PACKAGE).as_posix()
        for node in ast.parse(path.read_text()).body:
            is_definition = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if is_definition and place != "reference.py" and not (place.startswith("cli/") and is_command(node.name)):
                homes.setdefault(node.name, []).append(place)
    assert len(homes) > 100
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def is_command(name: str) -> bool:
    from taps_ext import cli

    return name in {command.__name__ for command in cli.COMMANDS}


def test_a_directory_has_at_most_nine_files() -> None:
    """`__init__.py` aside."""
    homes = {path.parent for path in finished_files()}
    sizes = {home: sum(path.name != "__init__.py" for path in home.glob("*.py")) for home in homes}
    assert not {home.name for home, size in sizes.items() if size > 9} - {PACKAGE.name}


def test_files_import_each_other_in_no_circle() -> None:
    """At the top of a file or inside its functions; a package's __init__ counts as what it imports."""
    graph = {dotted(path): [one for one in imports(path) if one in known_modules()] for path in PACKAGE.rglob("*.py")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"imports go in a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@cache
def known_modules() -> frozenset[str]:
    return frozenset(dotted(path) for path in PACKAGE.rglob("*.py"))


def test_the_reader_of_imports_sees_every_kind_of_import() -> None:
    """The table above is only as good as `imports`."""
    assert {"ops", "tree", "drafters.base"} <= imports(PACKAGE / "drafters" / "growth.py")
    assert "cli" not in imports(PACKAGE / "cli" / "generate.py")
    assert "cli.terminal" in imports(PACKAGE / "cli" / "generate.py")
    assert "decode.decoder" in imports(PACKAGE / "cli" / "generate.py"), "an import inside a function"


# ---- C++

TORCH = re.compile(r'#include\s*[<"](torch|ATen|c10|pybind11)/', re.M)
QUOTED = re.compile(r'#include\s*"([^"]+)"')


def with_all_it_includes(path: Path) -> set[Path]:
    """The file and every file of csrc that it includes, directly or not."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        one = todo.pop()
        if one not in seen and one.exists():
            seen.add(one)
            todo += [CSRC / name for name in QUOTED.findall(one.read_text())]
            todo += [one.parent / name for name in QUOTED.findall(one.read_text())]
    return seen


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in CSRC.rglob(pattern))


def test_only_the_bindings_include_torch_extension() -> None:
    """It takes half a minute to compile."""
    including = [path.name for path in sources("*.cpp", "*.h", "*.cu*") if "torch/extension.h" in path.read_text()]
    assert including == ["bindings.cpp"]


@pytest.mark.parametrize("path", sources("*_cpu.cpp", "*_cuda.cu"), ids=lambda path: path.name)
def test_loops_and_kernels_know_no_torch(path: Path) -> None:
    knowing = [one.name for one in with_all_it_includes(path) if TORCH.search(one.read_text())]
    assert not knowing


@pytest.mark.parametrize(
    "name",
    [
        *("tree_rules.h", "philox.h", "sampling_rule.h", "logits_type.h", "device.h", "ticket.h"),
        "text_match.h",
        *("launch.cuh", "block_primitives.cuh"),
    ],
)
def test_rules_know_no_torch(name: str) -> None:
    knowing = [one.name for one in with_all_it_includes(CSRC / "common" / name) if TORCH.search(one.read_text())]
    assert not knowing


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_four_files_and_one_name_in_every_layer(op: str) -> None:
    files = {path.name: path for path in sources(f"{op}*")}
    assert {f"{op}.h", f"{op}.cpp", f"{op}_cpu.cpp", f"{op}_cuda.cu"} <= files.keys()
    assert re.search(rf"\bcuda::{op}\(", files[f"{op}.cpp"].read_text()), "the op does not call its kernel"
    for path in (CSRC / "ops.h", CSRC / "bindings.cpp", PACKAGE / "ops.py", PACKAGE / "reference.py"):
        assert re.search(rf"\b{op}\(", path.read_text()), f"{op} is missing in {path.name}"
    assert f"&taps::{op})" in (CSRC / "bindings.cpp").read_text(), "its row of the table names another function"


KERNEL_FILES = sources("*.cu", "*.cuh")


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_kernels_are_one_text_for_nvcc_and_for_the_stand_in(path: Path) -> None:
    """What the two spell differently is in two headers: launches, shared arrays, and one instruction."""
    spelt = re.findall(r"<<<|\b__shared__\b|TAPS_SIMT|__CUDACC__|__CUDA_ARCH__", path.read_text())
    assert not spelt or path.name in ("launch.cuh", "power_of_two.cuh")


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_launch_paths_take_no_memory_and_wait_for_nothing(path: Path) -> None:
    """A CUDA graph captures every op; and no sum may depend on the order in which threads arrive."""
    text = path.read_text()
    assert not re.findall(r"\bcuda(?:Malloc|Free|Memset|Memcpy|HostAlloc)\w*|\bcuda\w*Synchronize\w*", text)
    assert not re.findall(r"\batomicAdd\w*\((?:reinterpret_cast<)?\(?(?:float|double)\b", text)
