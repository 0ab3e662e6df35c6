"""Fixtures of the whole suite; real engines are started when a test first asks for one."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests import needs
from tests.fixtures import (
    busybox_image,
    docker_engine,
    notes_image,
    own_engine,
    python_image,
    registry,
    rootful_podman,
    rootless_podman,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "busybox_image",
    "docker_engine",
    "notes_image",
    "own_engine",
    "python_image",
    "registry",
    "rootful_podman",
    "rootless_podman",
]


# How long an example takes is up to whatever else the machine does.
settings.register_profile("rma", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rma")

#: Tests of what the coordinator's server has a part in run on each of them.
ON_EVERY_SERVER = frozenset(
    {
        "test_at_once",
        "test_channel",
        "test_hostile_bytes",
        "test_server",
        "test_v1_browsers",
        "test_v1_leaving",
        "test_v1_losses",
        "test_v1_streams",
        "test_v1_whole",
    }
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let some files' tests run once for each server."""
    if metafunc.module.__name__.rpartition(".")[2] in ON_EVERY_SERVER:
        metafunc.parametrize("served_by", ["hypercorn", "uvicorn"], indirect=True)


@pytest.fixture(autouse=True)
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What serves the coordinators of a test; of every test, for nothing sets up what a test does not ask for."""
    name = str(getattr(request, "param", "hypercorn"))
    monkeypatch.setenv("RMA_TEST_SERVER", name)
    return name


@pytest.fixture(autouse=True)
def _what_commands_set() -> Iterator[None]:
    """Leave to the next test what a command sets for its process, which is the tests': loggers' levels, the umask."""
    loggers = [logging.getLogger(name) for name in (None, "rma_core", "rma_coordinator")]
    levels = [logger.level for logger in loggers]
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this machine could not run, and why."""
    needs.summary(terminalreporter)
