"""Options and fixtures that every test shares."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run the tests marked `long`, and 1,000 generated cases per op"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes or gigabytes; deselected unless --long is given")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """One thread unless a test asks for more: the suite shares its machine, and small ops are faster so."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def num_cases(pytestconfig: pytest.Config) -> int:
    """How many generated cases an op is compared on."""
    return 1000 if pytestconfig.getoption("--long") else 100
