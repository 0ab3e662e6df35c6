"""Files of this user: replaced as a whole (a power cut leaves the old one or the new one), and closed to others."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def replace(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read: temporary file, fsync, rename, fsync of the folder. Raises OSError."""
    # mkstemp opens with O_EXCL and 0600, so nobody can read a key between its birth and a chmod.
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - mkstemp gives a string
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108 - as above
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make a rename last; Windows has no handle on a folder, and its rename is journalled."""
    if sys.platform != "win32":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def others_can_change(path: Path) -> str:
    """Say who else could change a file or folder, or nothing; on Windows the profile's own permissions protect it."""
    if sys.platform != "win32":
        about = path.stat()
        if about.st_uid not in (0, os.getuid()):
            return f"{path.name} belongs to another user: copy it, so that it is yours"
        if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may change {path.name}: chmod go-w {path}"
    return ""
