"""Fixtures of the whole suite; real engines are started when a test first asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    import pytest

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what this machine could not run, and why."""
    needs.summary(terminalreporter)
