"""Fixtures for tests with a real engine and a real registry; conftest.py imports them by name.

``docker_engine`` is one engine for the whole run: the one that answers already, else one of our own. A test that stops
or kills its engine takes ``own_engine``, which is new for each test, so that no other test feels it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import base_image, engines, podmans
from tests.needs import forget, need

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where engines of a run are kept; CI names a folder, to find those of a run that was killed.
NOTES = Path(__file__).resolve().parents[1] / "containers" / "notes"
ENGINES = os.environ.get("RMA_TEST_ENGINES")


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[str]:
    """A Docker engine; its address, which DOCKER_HOST names too from here to the end of the run where it is ours."""
    if engines.answers() or engines.can_start_engine() is not None:
        need("docker")
        yield os.environ.get("DOCKER_HOST", "")
        return
    with _engine() as engine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", engine.host)
        forget("docker")
        need("docker")
        yield engine.host
    forget("docker")


@pytest.fixture
def own_engine() -> Iterator[engines.Engine]:
    """A new engine with ``rma-test/busybox`` in it, for this test alone: ``stop()``, ``kill()``, ``start()`` it."""
    if engines.can_start_engine() is not None:
        need("own-engine")
    with _engine() as engine:
        base_image.ensure(base_image.BUSYBOX, ["docker", "--host", engine.host])
        yield engine


@pytest.fixture(scope="session")
def rootful_podman() -> Iterator[podmans.Podman]:
    """A Podman of our own that runs as root."""
    need("podman")
    with podman_of_our_own() as podman:
        yield podman


@pytest.fixture(scope="session")
def rootless_podman() -> Iterator[podmans.Podman]:
    """A Podman of our own that runs as a user made for it."""
    need("podman-rootless")
    with podman_of_our_own(rootless=True) as podman:
        yield podman


@contextlib.contextmanager
def podman_of_our_own(*, rootless: bool = False) -> Iterator[podmans.Podman]:
    """A new Podman, of which nothing is left at the end."""
    with tempfile.TemporaryDirectory(prefix="rma-podman-", dir=ENGINES) as parent:
        Path(parent).chmod(0o711)
        folder = Path(parent) / "podman"
        podman = podmans.Podman(folder, podmans.make_user(folder) if rootless else "")
        try:
            podman.prepare()
            yield podman
        finally:
            podman.close()


@pytest.fixture(scope="session")
def registry() -> Iterator[str]:
    """A registry without credentials on loopback; its ``host:port``."""
    address = os.environ.get("RMA_TEST_REGISTRY", "")
    if address or engines.can_start_registry() is not None:
        need("registry")
        yield address
        return
    with tempfile.TemporaryDirectory(prefix="rma-registry-", dir=ENGINES) as folder:
        own = engines.Registry(Path(folder) / "registry")
        try:
            own.start()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("RMA_TEST_REGISTRY", own.address)
                forget("registry")
                need("registry")
                yield own.address
            forget("registry")
        finally:
            own.close()


@pytest.fixture(scope="session")
def busybox_image(docker_engine: str) -> str:
    """An image of 2 MB in ``docker_engine`` whose httpd answers ``/health`` on port 8000."""
    return base_image.ensure(base_image.BUSYBOX, _client(docker_engine))


@pytest.fixture(scope="session")
def python_image(docker_engine: str) -> str:
    """A Debian 12 with Python 3.11 in ``docker_engine``, to build services' images on; 40 s when not in the cache."""
    need("debootstrap")
    return base_image.ensure(base_image.BASE, _client(docker_engine))


def _client(host: str) -> list[str]:
    return ["docker", "--host", host] if host else ["docker"]


@contextlib.contextmanager
def _engine() -> Iterator[engines.Engine]:
    # Not pytest's tmp_path: sockets below it would have longer names than the kernel takes.
    with tempfile.TemporaryDirectory(prefix="rma-engine-", dir=ENGINES) as folder:
        engine = engines.Engine(Path(folder) / "engine")
        try:
            engine.start()
            yield engine
        finally:
            engine.close()


@pytest.fixture(scope="session")
def notes_image(docker_engine: str, python_image: str) -> str:
    """The image of the service `notes` in ``docker_engine``, built as `make images` does unless it is there already."""
    version = tomllib.loads((NOTES / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    name = f"ghcr.io/rma/notes-worker:{version}"
    if subprocess.run([*_client(docker_engine), "image", "inspect", name], capture_output=True, check=False).returncode:
        build = [sys.executable, str(NOTES.parent / "build.py"), "notes", "--base", python_image]
        subprocess.run(build, env={**os.environ, "DOCKER_HOST": docker_engine or ""}, check=True, timeout=600)
    return name
