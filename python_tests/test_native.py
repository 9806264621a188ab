"""Loading the native module: what happens without it, with a foreign one, and what `import taps_ext` needs."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from taps_ext import native, ops

ROOT = Path(__file__).parent.parent

# Runs in a process of its own: taps_ext._C is hidden, and whatever a taps_ext file imports beyond the promised four
# and the standard library is refused.
WITHOUT_EXTRAS = """
import builtins, importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "taps_ext._C":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())

promised = {"torch", "transformers", "safetensors", "numpy", "taps_ext", *sys.stdlib_module_names}
original = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.split(".")[0] == "taps_ext" and name.split(".")[0] not in promised:
        raise ImportError(f"{importer} imports {name}")
    return original(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
for extra in ("typer", "rich", "matplotlib", "accelerate", "datasets", "hypothesis", "pytest", "yaml_extra"):
    sys.modules[extra] = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    script = WITHOUT_EXTRAS + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def fresh_loader() -> Iterator[None]:
    """`native.load` forgets what it loaded, before and after."""
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_the_package_imports_without_the_native_module_and_without_extras_and_the_first_op_says_what_to_do() -> None:
    done = run("""
        import taps_ext
        for name in taps_ext.__all__:
            getattr(taps_ext, name)
        import torch
        from taps_ext import ops
        try:
            ops.tree_depths(torch.tensor([[-1, 0]]), torch.tensor([2]))
        except ImportError as error:
            print(error)
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "taps_ext._C was not built; run: make build" in done.stdout
    assert "make build" in done.stdout


def test_a_module_built_for_another_torch_is_refused_with_both_versions(
    fresh_loader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = SimpleNamespace(build_info=lambda: {"torch": "1.13.1+cu117"})
    monkeypatch.setitem(sys.modules, "taps_ext._C", foreign)
    with pytest.raises(ImportError, match=rf"built for torch 1\.13\.1\+cu117, this is torch {torch.__version__[:3]}"):
        ops.tree_depths(torch.tensor([[-1]]), torch.tensor([1]))
    reason = native.unavailable_reason()
    assert reason is not None
    assert "pip install" in reason


def test_a_patch_release_of_torch_is_no_other_torch(fresh_loader: None, monkeypatch: pytest.MonkeyPatch) -> None:
    major_minor = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    close = SimpleNamespace(build_info=lambda: {"torch": f"{major_minor}.99+cu999"})
    monkeypatch.setitem(sys.modules, "taps_ext._C", close)
    assert native.load() is close


@pytest.mark.parametrize(
    "built, here, fits",
    [("12.6", "13.0", False), ("13.0", None, False), ("13.2", "13.0", True), ("none", "13.0", True)],
)
def test_a_module_built_for_another_cuda_major_is_refused_with_both_versions(
    fresh_loader: None, monkeypatch: pytest.MonkeyPatch, built: str, here: str | None, fits: bool
) -> None:
    module = SimpleNamespace(build_info=lambda: {"torch": torch.__version__, "cuda": built})
    monkeypatch.setitem(sys.modules, "taps_ext._C", module)
    monkeypatch.setattr(torch.version, "cuda", here)
    reason = native.unavailable_reason()
    assert (reason is None) == fits
    if reason:
        assert f"{torch.__version__} with CUDA {built}" in reason
        assert "rebuild it: make build" in reason


def test_a_module_that_does_not_load_is_named_with_its_error(
    fresh_loader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> importlib.machinery.ModuleSpec | None:
            if name == "taps_ext._C":
                raise ImportError("undefined symbol: _ZN3c105ErrorE")
            return None

    monkeypatch.delitem(sys.modules, "taps_ext._C", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"does not load with torch .*undefined symbol.*rebuild it: make build"):
        ops.tree_depths(torch.tensor([[-1]]), torch.tensor([1]))


def test_the_native_module_says_what_it_was_built_with() -> None:
    info = native.load().build_info()
    assert {"torch", "compiler", "cuda"} <= set(info)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in info.items())
    assert native.unavailable_reason() is None


@pytest.mark.parametrize(
    "architecture, runs",
    [("9.0", True), ("8.0", False), ("9.1", False), ("10.0", False), ("8.0+PTX", True), ("12.0+PTX", False)],
)
def test_a_gpu_runs_binaries_of_its_major_version_and_older_ptx(architecture: str, runs: bool) -> None:
    assert native._runs_on(architecture, (9, 0)) is runs


def test_what_results_say_of_their_origin_names_the_code_and_the_libraries() -> None:
    facts = native.installation()
    told = facts.provenance()
    assert told.items() >= native.code_version().items()
    assert told["versions"] == {"python": facts.python, **facts.versions}
    assert facts.versions["torch"] == torch.__version__
