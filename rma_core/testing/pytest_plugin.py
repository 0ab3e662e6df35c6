"""A pytest plugin for those who write RMA plugins: ``rma_check`` runs each check of `rma plugins check` as a test.

In a test module beside the plugin's pyproject.toml, or below it::

    pytest_plugins = ["rma_core.testing.pytest_plugin"]

    def test_it_does_what_every_detector_must(rma_check):
        rma_check()

``RMA_PLUGIN = "foo"`` in that module means the installed plugin of that name instead; ``RMA_CONFIG = {…}`` is its
table.
"""

from __future__ import annotations

import asyncio
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.deprecations import PluginDeprecation
from rma_core.errors import RMAError
from rma_core.testing.checking import CONTRACTS, result_of, targets

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rma_core.testing.watching import PluginCase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each check."""
    if "rma_check" not in metafunc.fixturenames:
        return
    named = getattr(metafunc.module, "RMA_PLUGIN", None) or _project(Path(str(metafunc.module.__file__)))
    config = getattr(metafunc.module, "RMA_CONFIG", {})
    try:
        # All checks of a plugin share its case, and so its first run.
        cases = [(target, target.case({target.name: config})) for target in targets(named)]
    except RMAError as error:
        raise pytest.UsageError(str(error)) from None
    checks = [
        pytest.param(_test(check, case), id=f"{target.name}-{check.__name__}")
        for target, case in cases
        for check in CONTRACTS[target.kind][1]
    ]
    metafunc.parametrize("rma_check", checks)


def _project(file: Path) -> str:
    """Return the folder of the project that a file belongs to."""
    found = (folder for folder in file.resolve().parents if (folder / "pyproject.toml").exists())
    return str(next(found, file.parent))


def _test(check: Callable[[Any], Awaitable[None]], case: PluginCase) -> Callable[[], None]:
    def run() -> None:
        result = asyncio.run(result_of(check, case))
        if result.state == "open":
            pytest.skip(result.message)
        if result.state == "broken":
            pytest.fail(result.message, pytrace=False)
        if result.state == "deprecated":
            warnings.warn(result.message, PluginDeprecation, stacklevel=2)

    return run
