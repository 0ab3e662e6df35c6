"""What the SQLite store needs of the disk beside SQLite: a lock, a reserve, free space, files that are surely on it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from rma_core.errors import OutOfSpace, SettingProblem

if TYPE_CHECKING:
    from collections.abc import Iterable

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

#: Ends of file names beside the database.
LOCK, RESERVE, LOG, LAST_BACKUP = ".lock", ".reserve", "-wal", ".last-backup"
#: Bytes written at once where a file cannot simply be given its space.
CHUNK_BYTES = 1 << 20

#: File systems across a network, whose locks and syncs cannot be relied on.
NETWORK = frozenset(
    {
        *(
            "afpfs",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "glusterfs",
            "lustre",
            "ncpfs",
            "nfs",
            "nfs4",
            "pvfs2",
            "smb2",
            "smb3",
        ),
        *("smbfs", "webdav", "fuse.ceph", "fuse.glusterfs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
    }
)
#: File systems that may be local or not: what lies behind them cannot be seen from here.
OPAQUE = frozenset({"9p", "virtiofs"})


def beside(path: Path, suffix: str) -> Path:
    """Return the file beside the database that ends in ``suffix``."""
    return path.with_name(path.name + suffix)


def free_bytes(folder: Path) -> int:
    """Return how much an ordinary program can still write there."""
    return shutil.disk_usage(folder).free


def sync_folder(folder: Path) -> None:
    """Put names that were made, changed or removed in a folder on disk."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Put a file's content on disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> int:
    """Give a finished file its name, once it is on disk; return its size in bytes. Raises OSError."""
    sync_file(temporary)
    size = temporary.stat().st_size
    temporary.rename(path)
    sync_folder(path.parent)
    return size


def write_anew(path: Path, length: int | None = None) -> None:
    """Put a file, or its first ``length`` bytes, on disk in a file made new, and let that one take its place.

    After a failed fsync the kernel may take a page for written that is not, and never writes it again; in a new
    file every page is. Does nothing without a file. Raises OSError; then the old file stands.
    """
    with contextlib.suppress(FileNotFoundError):
        content = path.read_bytes()[:length]
        temporary = beside(path, ".new")
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        with _new(temporary) as file:
            file.write(content)
        publish(temporary, path)


def make_empty(path: Path) -> None:
    """Make an empty file that only its owner can read. Raises OSError when it is there already."""
    _new(path).close()


def _new(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def has_reserve(path: Path, size_bytes: int) -> bool:
    """Say whether the reserve is there in its full size."""
    try:
        return path.stat().st_size >= size_bytes
    except FileNotFoundError:
        return not size_bytes


def make_reserve(path: Path, size_bytes: int) -> None:
    """Take space that is given back when the disk is full. Raises OSError, and then keeps none of it."""
    if has_reserve(path, size_bytes):
        return
    drop_reserve(path)
    try:
        with _new(path) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            else:
                for start in range(0, size_bytes, CHUNK_BYTES):
                    file.write(bytes(min(CHUNK_BYTES, size_bytes - start)))
    except OSError:
        drop_reserve(path)
        raise


def drop_reserve(path: Path) -> bool:
    """Give the reserve's space back; say whether there was any."""
    try:
        path.unlink()
    except OSError:
        return False
    return True


def lock(path: Path) -> int | None:
    """Hold a lock file for this process alone; return its descriptor, None where there are no such locks.

    Raises SettingProblem when another process holds it, OSError when it cannot be made.
    """
    if sys.platform == "win32":
        return None
    # Opened for reading, so that it does not keep a disk that failed from being mounted anew.
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise taken(path.with_name(path.name.removesuffix(LOCK))) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def unlock(descriptor: int | None) -> None:
    """Let a lock go; the file stays, for whoever comes next."""
    if descriptor is not None:
        os.close(descriptor)


def taken(path: Path) -> SettingProblem:
    """Return what the second coordinator on the same file is told."""
    return SettingProblem(f"another coordinator is using {path}", hints=("stop it, or give this one its own RMA_HOME",))


def mounts() -> list[tuple[str, str]]:
    """Return every mount point with the type of its file system."""
    import psutil

    return [(partition.mountpoint, partition.fstype) for partition in psutil.disk_partitions(all=True)]


def file_system(folder: Path, mounted: Iterable[tuple[str, str]]) -> str:
    """Return the type of the file system that holds a folder, empty when that is not known."""
    real = PurePath(os.path.realpath(folder))
    above = [(len(PurePath(point).parts), kind) for point, kind in mounted if real.is_relative_to(point)]
    # Of two mounts on one point the later covers the earlier; `max` would keep the first.
    return max(reversed(above), key=lambda one: one[0], default=(0, ""))[1].lower()


def check_place(folder: Path) -> None:
    """Raise SettingProblem where what is synced may not be on a disk; warn where that cannot be seen."""
    kind = file_system(folder, mounts())
    if kind in NETWORK:
        raise SettingProblem(
            f"{folder} is on a network file system ({kind}), where nothing is sure to be on disk",
            hints=("give the coordinator an RMA_HOME on a disk of its machine",),
        )
    if kind in OPAQUE:
        logger.warning("%s is shared into this machine (%s); see that its host syncs it to a disk", folder, kind)


def check_space(path: Path, *, needed_bytes: int, had_bytes: int) -> None:
    """Raise OutOfSpace unless so much is free, with what is ours already, on the disk that holds a file."""
    free = free_bytes(path.parent) + had_bytes
    if free < needed_bytes:
        raise OutOfSpace(
            f"the disk that holds {path} has {free >> 20} MiB free;"
            f" the coordinator starts with at least {needed_bytes >> 20} MiB",
            hints=("free some space, or give it an RMA_HOME on another disk",),
        )
