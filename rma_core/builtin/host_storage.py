"""Where containers would live on this machine, and how much room there is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

DOCKER_ROOT = "var/lib/docker"
PODMAN_ROOTS = ("var/lib/containers/storage",)
#: Below the home folder of the agent's user: Podman without root.
PODMAN_HOME = ".local/share/containers/storage"


class Storage(NamedTuple):
    """Room for containers; ``place`` says whose it is (``docker``, ``podman``, ``rma``, ``storage_path``)."""

    place: str
    free_bytes: int
    total_bytes: int
    filesystem: str


def find(configured: object = None, *, root: Path = Path("/"), home: Path | None = None) -> Storage | None:
    """Return the roomiest place an engine on this machine keeps containers in, else where RMA keeps its state.

    ``configured`` (``storage_path``) overrides the search.
    """
    if isinstance(configured, str) and configured:
        return _measure("storage_path", Path(configured).expanduser())
    home = home or _home()
    engines = [found for place, path in _engines(root, home) if _there(path) and (found := _measure(place, path))]
    if engines:
        return max(engines, key=lambda found: found.free_bytes)
    return _measure("rma", Path(os.environ.get("RMA_HOME") or home).expanduser())


def _engines(root: Path, home: Path) -> Iterable[tuple[str, Path]]:
    yield "docker", root / _data_root(root / "etc/docker/daemon.json").lstrip("/")
    for path in PODMAN_ROOTS:
        yield "podman", root / path
    yield "podman", home / PODMAN_HOME


def _data_root(settings: Path) -> str:
    """Return where Docker was told to keep its data, or its default."""
    try:
        told = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DOCKER_ROOT
    path = told.get("data-root") if isinstance(told, dict) else None
    return path if isinstance(path, str) and path else DOCKER_ROOT


def _measure(place: str, path: Path) -> Storage | None:
    """Measure the file system that holds ``path``, or would hold it once it is made."""
    import psutil

    path = path.absolute()
    for folder in (path, *path.parents):
        try:
            usage = psutil.disk_usage(str(folder))
        except OSError:
            continue
        return Storage(place, usage.free, usage.total, _filesystem(folder))
    return None


def _filesystem(path: Path) -> str:
    """Return the type of the file system at ``path`` (``ext4``, ``apfs``), or an empty string."""
    import psutil

    try:
        mounts = psutil.disk_partitions(all=True)
        path = path.resolve()
    except (OSError, RuntimeError):
        return ""
    holding = [mount for mount in mounts if path.is_relative_to(mount.mountpoint)]
    return max(holding, key=lambda mount: len(mount.mountpoint)).fstype if holding else ""


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")


def _there(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
