"""The SQLite file: how it is opened, looked through, migrated and copied."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from typing import TYPE_CHECKING

import apsw

from rma_coordinator.store import disk
from rma_coordinator.store.base import StoreFailed, StoreState
from rma_core.errors import OutOfSpace, RMAError, SettingProblem

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

RECORDS = (
    "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, data BLOB NOT NULL,"
    " PRIMARY KEY (kind, key)) WITHOUT ROWID"
)
#: The statements that lead from each layout to the next; a file's ``user_version`` says how many of them it has had.
MIGRATIONS: tuple[tuple[str, ...], ...] = ((RECORDS,),)
#: What SQLite keeps in the file's head to tell one program's files from another's: "RMA1".
APPLICATION_ID = 0x524D4131
#: The same in a copy that nobody has opened yet: "RMAC". A log beside one belongs to the file that was there before.
COPY_ID = 0x524D4143
#: Where that stands in the file: offset and bytes, the highest first.
APPLICATION_ID_AT, APPLICATION_ID_BYTES = 68, 4
#: Set on every connection. The writer moves the log into the file itself, so that a failure there is not overlooked.
PRAGMAS = (
    "locking_mode = EXCLUSIVE",
    "journal_mode = WAL",
    "synchronous = FULL",
    "fullfsync = 1",
    "checkpoint_fullfsync = 1",
    "wal_autocheckpoint = 0",
    "journal_size_limit = 16777216",
    "trusted_schema = OFF",
    "cache_size = -4000",
    "mmap_size = 0",
)
#: Copies from before a migration that are kept.
KEPT_COPIES = 3
#: Up to this size a file is looked through at every start; a larger one only after a failure: it takes too long.
LOOKED_THROUGH_BYTES = 16 << 20
#: A log's head, and what stands before each of its pages.
LOG_HEAD_BYTES, FRAME_HEAD_BYTES = 32, 24


def connect(path: Path, *, create: bool, vfs: str | None = None) -> apsw.Connection:
    """Open the file for this process alone, for writing. Raises SettingProblem, apsw.Error, OSError."""
    flags = apsw.SQLITE_OPEN_READWRITE | (apsw.SQLITE_OPEN_CREATE if create else 0)
    connection = apsw.Connection(str(path), flags=flags, vfs=vfs)
    try:
        if connection.readonly("main"):
            raise apsw.ReadOnlyError(f"{path} could only be opened for reading")
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        connection.set_busy_timeout(0)
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").fetchall()
        if connection.pragma("journal_mode") != "wal":
            raise SettingProblem(f"the file system of {path} cannot hold a write-ahead log; use another RMA_HOME")
    except BaseException:
        let_go(connection)
        raise
    return connection


def let_go(connection: apsw.Connection) -> None:
    """Close without writing anything: what could not be synced must not be moved into the file."""
    with contextlib.suppress(apsw.Error):
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    with contextlib.suppress(apsw.Error):
        connection.close(True)  # noqa: FBT003 - the name of the argument is not public


def renew_log(path: Path, frames: int | None, page_bytes: int = 4096) -> None:
    """Put the log on disk anew, before anyone opens the file: all of it, or the pages that were acknowledged.

    Raises StoreFailed for a log whose file is gone (SQLite would delete it) or exchanged for a copy (SQLite would mix
    both), OSError.
    """
    log = disk.beside(path, disk.LOG)
    if not log.exists() or not log.stat().st_size:
        return
    if not path.exists() or not path.stat().st_size:
        raise StoreFailed(
            f"{log} is there, but {path}, which it belongs to, is not", hints=("put both back, or move the log away",)
        )
    with path.open("rb") as file:
        head = file.read(APPLICATION_ID_AT + APPLICATION_ID_BYTES)
    if int.from_bytes(head[APPLICATION_ID_AT:], "big") == COPY_ID:
        raise StoreFailed(
            f"{path} is a copy that was put back, but {log} belongs to the file that was there before",
            hints=(f"move {log.name} away too (to that file, if it is kept), and start again",),
        )
    length = None if frames is None else frames and LOG_HEAD_BYTES + frames * (FRAME_HEAD_BYTES + page_bytes)
    disk.write_anew(log, length)


def empty_log(connection: apsw.Connection) -> None:
    """Move what the log holds into the file, and cut it. Raises apsw.Error."""
    connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_TRUNCATE)


def look_through(connection: apsw.Connection) -> None:
    """Raise apsw.CorruptError when SQLite finds the file damaged."""
    found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found is None or found[0] != "ok":
        raise apsw.CorruptError(str(found and found[0]))


@contextlib.contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """Keep all that is done within, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def migrate(
    connection: apsw.Connection, path: Path, *, migrations: Sequence[Sequence[str]] = MIGRATIONS, now: float
) -> None:
    """Bring an older file to the newest layout, each step whole, after a copy was made; a newer one is refused.

    ``now`` in seconds since 1970 names the copy. Raises SettingProblem, StoreFailed, apsw.Error, OSError.
    """
    version = connection.pragma("user_version")
    _recognise(connection, path, version, len(migrations))
    if 0 < version < len(migrations):
        copy = _copy(connection, path, version, now)
        logger.info("%s was copied to %s before its layout changes", path, copy, extra={"action": "store_copied"})
    for number in range(version + 1, len(migrations) + 1):
        try:
            with transaction(connection):
                for statement in migrations[number - 1]:
                    connection.execute(statement)
                connection.pragma("user_version", number)
        except (apsw.SQLError, apsw.ConstraintError) as error:
            raise StoreFailed(
                f"{path} could not be brought to layout {number}: {error}; it still has layout {number - 1}",
                hints=("go back to the RMA that wrote it, and report this",),
            ) from error
    if connection.pragma("application_id") != APPLICATION_ID:
        connection.pragma("application_id", APPLICATION_ID)
        # From here on a log beside the file is its own, which the file itself must say.
        empty_log(connection)


def _recognise(connection: apsw.Connection, path: Path, version: int, newest: int) -> None:
    owner = connection.pragma("application_id")
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    if owner not in {0, APPLICATION_ID, COPY_ID} or (tables and "records" not in tables):
        raise SettingProblem(f"{path} is a database of another program", hints=("give RMA a file of its own",))
    if version > newest:
        raise SettingProblem(f"{path} was written by a newer RMA (layout {version}); this one knows {newest}")


def _copy(connection: apsw.Connection, path: Path, version: int, now: float) -> Path:
    """Copy the file as it is, and keep only the newest copies."""
    copy = path.with_name(f"{path.name}.v{version}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}")
    temporary = disk.beside(copy, ".new")
    temporary.unlink(missing_ok=True)
    try:
        disk.make_empty(temporary)
        connection.execute("VACUUM INTO ?", (str(temporary),))
        finish_copy(temporary)
        disk.publish(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)
    for old in copies(path)[KEPT_COPIES:]:
        old.unlink()
    return copy


def finish_copy(path: Path) -> None:
    """Look a copy through, and mark it as one; it is a single file then. Raises apsw.Error."""
    with contextlib.closing(apsw.Connection(str(path))) as copy:
        copy.execute("PRAGMA journal_mode = DELETE").fetchall()
        look_through(copy)
        copy.pragma("application_id", COPY_ID)


def copies(path: Path) -> list[Path]:
    """Return the copies from before migrations, the newest first."""
    found = [one for one in path.parent.glob(f"{path.name}.v*-*Z") if one.is_file()]
    return sorted(found, key=lambda one: one.stat().st_mtime_ns, reverse=True)


def note_backup(path: Path, backup: Path) -> None:
    """Remember where the last backup was put; whoever finds the file damaged is told."""
    note = disk.beside(path, disk.LAST_BACKUP)
    note.write_text(f"{backup.absolute()}\n", encoding="utf-8")
    note.chmod(0o600)


def newest_copy(path: Path) -> Path | None:
    """Return the newest copy that is known: of a migration, or the last backup if it is still where it was made."""
    known = copies(path)[:1]
    with contextlib.suppress(OSError, ValueError):
        last = path.__class__(disk.beside(path, disk.LAST_BACKUP).read_text(encoding="utf-8").strip())
        known += [last] if last.is_file() else []
    return max(known, key=lambda one: one.stat().st_mtime_ns, default=None)


# -- what went wrong, in words -------------------------------------------------------------------------------------


def full(path: Path) -> StoreState:
    """Return the state in which there is no space left."""
    return StoreState(
        ok=False,
        code="full",
        reason=f"the disk that holds {path} is full",
        hints=("free some space; nothing acknowledged is lost, and work goes on by itself then",),
    )


def read_only(path: Path) -> StoreState:
    """Return the state in which the file or its folder cannot be written."""
    return StoreState(
        ok=False,
        code="read_only",
        reason=f"{path} cannot be written: the file, its folder or the disk is read-only",
        hints=("see whether the disk was mounted read-only (after an error, too) and whose the folder is",),
    )


def damaged(path: Path, error: object) -> StoreState:
    """Return the state in which the file's content cannot be trusted."""
    copy = newest_copy(path)
    back = f"put a copy back: the newest known is {copy}" if copy else "put a backup back"
    return StoreState(
        ok=False,
        code="damaged",
        reason=f"{path} is damaged, or is no file of RMA's: {error}",
        hints=(
            f"stop the coordinator, move {path.name} and {path.name}-wal away together and keep them, then {back}",
            "nothing was written to it since",
        ),
    )


def failed(path: Path, error: object, every_s: float) -> StoreState:
    """Return the state in which the disk does not do what it should."""
    return StoreState(
        ok=False,
        code="failed",
        reason=f"{path} cannot be read or written: {error}",
        hints=(f"look at the disk and the system's log; it is opened again every {every_s:g} s",),
    )


def ill(error: BaseException, path: Path, every_s: float) -> StoreState | None:
    """Return the state a failure leads to; None for one that concerns nothing but the commit it came with."""
    if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
        return damaged(path, error)
    number = getattr(error, "errno", None)
    if isinstance(error, (apsw.FullError, OutOfSpace)) or number in {errno.ENOSPC, errno.EDQUOT}:
        return full(path)
    if isinstance(error, (apsw.ReadOnlyError, PermissionError)) or number == errno.EROFS:
        return read_only(path)
    if isinstance(
        error, (apsw.IOError, apsw.CantOpenError, apsw.BusyError, apsw.LockedError, apsw.ProtocolError, OSError)
    ):
        return failed(path, error, every_s)
    return None


def refusal(error: Exception, path: Path) -> RMAError:
    """Return what a person reads when the file cannot be opened."""
    if isinstance(error, RMAError):
        return error
    if isinstance(error, (apsw.BusyError, apsw.LockedError)):
        return disk.taken(path)
    state = ill(error, path, 0)
    if state is None or state.code == "failed":
        hints = ("see whether the path is right and the disk is well; a backup can be put in its place",)
        return StoreFailed(f"{path} cannot be opened: {error}", hints=hints)
    return state.error()
