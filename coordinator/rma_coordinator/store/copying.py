"""A backup in the making: a few pages at a time, over the connection that everything is written with."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import apsw

from rma_coordinator.store import layout
from rma_coordinator.store.base import StoreFailed
from rma_core.errors import OutOfSpace, RMAError

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

#: Pages copied between two groups of commits: a megabyte.
BACKUP_PAGES = 256


class Copy(NamedTuple):
    """A backup into an empty file; ``done`` gets None once every page is there, or the failure."""

    target: Path
    done: asyncio.Future[None]


class Copying(NamedTuple):
    """A backup that has begun."""

    copy: Copy
    target: apsw.Connection
    backup: apsw.Backup


def begin(copy: Copy, source: apsw.Connection) -> Copying:
    """Begin to copy. Raises StoreFailed, OutOfSpace."""
    try:
        target = apsw.Connection(str(copy.target))
        # The file gets its name only when it is whole and synced, so a journal of its own is of no use.
        target.execute("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF").fetchall()
        return Copying(copy, target, target.backup("main", source, "main"))
    except apsw.Error as error:
        raise _failure(copy, error) from error


def step(copying: Copying) -> bool:
    """Copy a few pages, and say whether that was all; what is committed meanwhile goes to both files.

    Raises StoreFailed, OutOfSpace.
    """
    if copying.copy.done.cancelled():
        raise StoreFailed("the backup was given up")
    try:
        if not copying.backup.step(BACKUP_PAGES):
            return False
        copying.backup.finish()
        copying.target.close()
    except apsw.Error as error:
        raise _failure(copying.copy, error) from error
    return True


def end(copying: Copying) -> None:
    """Give up what is not finished."""
    copying.backup.close(True)  # noqa: FBT003 - the name of the argument is not public
    layout.let_go(copying.target)


def _failure(copy: Copy, error: apsw.Error) -> RMAError:
    if isinstance(error, apsw.FullError):
        return OutOfSpace(f"the disk that holds {copy.target} is full; no backup was made")
    return StoreFailed(f"no backup was made at {copy.target}: {error}")
