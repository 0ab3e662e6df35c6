"""What the tests of stores share: records, a store that asks little of the disk, a small disk."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING, Any

import msgspec

from rma_coordinator.store import SqliteStore
from tests.needs import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20


class Pear(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    weight: float = 1.0


class Apple(msgspec.Struct, frozen=True, kw_only=True):
    name: str


class Unkeepable(msgspec.Struct, frozen=True, kw_only=True):
    what: object


def small_store(path: Path, **options: Any) -> SqliteStore:
    """Return a store that needs no space to speak of and looks at its disk often."""
    asked = {"reserve_bytes": 64 * KIB, "start_free_bytes": 0, "recover_free_bytes": 128 * KIB, "check_every_s": 0.05}
    return SqliteStore(path, **(asked | options))


@contextlib.asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[SqliteStore]:
    """Open a small store and close it in the end."""
    made = small_store(path, **options)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


async def until(what: Callable[[], object], within_s: float = 20) -> None:
    """Wait until something holds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not what():
        assert loop.time() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def disk_of(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a few megabytes in memory."""
    need("mount")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, timeout=20)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder, or a file, a read-only mount, which binds root too."""
    need("mount")
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True, timeout=20)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True, timeout=20)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)
