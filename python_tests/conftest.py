"""Options and fixtures that every test shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import backends
import pytest
import torch

from taps_ext import ops
from taps_ext.decode import costs

ROOT = Path(__file__).parent.parent
# A warning is attributed to the module of a caller: one of ours, or torch where a deprecated argument reaches a model
# through `Module.__call__` or a function under `torch.no_grad`.
OURS = ["taps_ext", r"torch\.nn\.modules\.module$", r"torch\.utils\._contextlib$"]
OURS += sorted(
    f"{file.stem}$" for room in ("python_tests", "benchmarks", "tools") for file in (ROOT / room).rglob("*.py")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long`, and 1,000 generated cases an op")
    parser.addoption("--cases", type=int, metavar="N", help="generated cases an op, instead of 300")
    parser.addoption(
        "--backend",
        choices=(*backends.NAMES, "none"),
        help="only the tests of the ops, on this backend: the CPU, the CUDA kernels under the host stand-in, or a GPU; "
        "none: only the other tests",
    )


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="taps_ext_tests_")  # of cost tables
    costs.SECONDS = 0.2
    config.addinivalue_line("markers", "long: takes minutes or gigabytes; deselected unless --long is given")
    config.addinivalue_line("markers", "backends(*names): of the tests that use `backend`, where this one runs")
    config.addinivalue_line("markers", "gpu: needs a GPU and the CUDA ops; belongs to the backend cuda")
    for category in ("DeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}:({'|'.join(OURS)})")


def pytest_report_header() -> str:
    left_out = [f"{name} ({reason})" for name in backends.NAMES if (reason := backends.missing(name))]
    return f"backends of the ops: {', '.join(map(str, _present()))}; left out: {', '.join(left_out) or 'none'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.definition.get_closest_marker("backends")
        names = [name for name in _present() if chosen is None or name in chosen.args]
        metafunc.parametrize("backend", names, indirect=True)


def _present() -> list[str]:
    return [name for name in backends.NAMES if not backends.missing(name)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := backends.missing("cuda")):
            item.add_marker(pytest.mark.skip(reason=reason))
    wanted = [item for item in items if _is_wanted(config, item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


def _is_wanted(config: pytest.Config, item: pytest.Item) -> bool:
    if item.get_closest_marker("long") and not config.getoption("--long"):
        return False
    return config.getoption("--backend") in (None, _backend_of(item))


def _backend_of(item: pytest.Item) -> str:
    if item.get_closest_marker("gpu"):
        return "cuda"
    call = getattr(item, "callspec", None)
    return str(call.params.get("backend", "none")) if call else "none"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """A failure says how the stand-in had arranged its threads."""
    report = yield
    backend = getattr(item, "funcargs", {}).get("backend")
    if report.failed and isinstance(backend, backends.StandIn):
        report.sections.append(("stand-in", str(backend)))
    return report


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Use one thread unless a test asks for more: the tests run on every core already, and small ops are faster so."""
    torch.set_num_threads(1)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The native module that `ops` calls during the test; a test file that uses it runs on every backend."""
    try:
        module = backends.load(request.param)
    except backends.StandInMissingError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
    if isinstance(module, backends.StandIn):
        module.restart()
    monkeypatch.setattr(ops, "_ops", lambda: module)
    return module


@pytest.fixture(scope="session")
def num_cases(pytestconfig: pytest.Config) -> int:
    """On how many generated cases an op is compared with the reference; other claims are held on a third of them."""
    default = 1000 if pytestconfig.getoption("--long") else 300
    return pytestconfig.getoption("--cases") or default
