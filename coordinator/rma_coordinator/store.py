"""Where the coordinator keeps what must survive it: records by kind and key, committed all or nothing.

The records in memory lead; the store is written behind one door (`commit`), which returns when the changes are on disk.
One contract suite holds for every store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import apsw
import msgspec

from rma_core.errors import OutOfSpace, RMAError, SettingProblem

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=msgspec.Struct)

#: Counted up with the layout of the tables; an older file is migrated, a newer one refused.
SCHEMA_VERSION = 1
#: Commits that may wait for the writer; more means the disk does not keep up, and callers should wait.
MAX_WAITING = 10_000
#: Commits written in one transaction at most.
MAX_GROUP = 512
#: Seconds the writer gets to finish what waits when the store is closed.
CLOSE_WITHIN_S = 30.0


DAMAGED = ("is the disk full, the file damaged, or is it no file of RMA's? a copy of it can be put in its place",)


class StoreFailed(RMAError):
    """The store cannot keep anything now; what was not acknowledged is not kept."""

    code = "store"


class Put(NamedTuple):
    """Keep ``record`` under ``key`` among the records of its type."""

    key: str
    record: msgspec.Struct


class Delete(NamedTuple):
    """Forget the record of type ``kind`` under ``key``."""

    kind: type[msgspec.Struct]
    key: str


Change = Put | Delete


class Store(Protocol):
    """What every store can do."""

    async def open(self) -> None:
        """Make it ready. Raises SettingProblem when another coordinator holds it, StoreFailed when it is broken."""

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key."""

    async def commit(self, changes: Iterable[Change]) -> None:
        """Keep all of the changes or none; they are durable when this returns. Raises StoreFailed, OutOfSpace."""

    async def close(self) -> None:
        """Finish what waits and let go."""


class MemoryStore:
    """Keeps records as bytes in memory, for tests and `--store memory`; everything is gone with the process."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, bytes]] = {}

    async def open(self) -> None:
        """Nothing to do."""

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key."""
        table = self._tables.get(kind.__name__, {})
        return [msgspec.json.decode(table[key], type=kind) for key in sorted(table)]

    async def commit(self, changes: Iterable[Change]) -> None:
        """Keep all of the changes."""
        encoded = [_encoded(change) for change in changes]
        for kind, key, data in encoded:
            table = self._tables.setdefault(kind, {})
            if data is None:
                table.pop(key, None)
            else:
                table[key] = data

    async def close(self) -> None:
        """Nothing to do."""


class _Waiting(NamedTuple):
    rows: list[tuple[str, str, bytes | None]]
    done: asyncio.Future[None]
    loop: asyncio.AbstractEventLoop


class SqliteStore:
    """Keeps records in one SQLite file: write-ahead log, every commit synced, one writer thread, grouped commits.

    One connection with an exclusive lock: SQLite before 3.51.3 can lose commits in WAL mode when two connections
    reset the log at once, and a second coordinator on the same folder must be refused anyway.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(maxsize=MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._connection: apsw.Connection | None = None

    async def open(self) -> None:
        """Open or make the file and start the writer."""
        self._connection = await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._write, name="rma-store", daemon=True)
        self._thread.start()

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key; call it before the first commit."""
        statement = "SELECT key, data FROM records WHERE kind = ? ORDER BY key"
        try:
            rows = list(self._db().execute(statement, (kind.__name__,)))
        except apsw.Error as error:
            raise StoreFailed(f"{self._path} cannot be read: {error}", hints=DAMAGED) from error
        return [self._read(kind, str(key), data) for key, data in rows]

    def _read(self, kind: type[R], key: str, data: object) -> R:
        try:
            return msgspec.json.decode(data, type=kind) if isinstance(data, bytes) else msgspec.convert(data, kind)
        except msgspec.DecodeError as error:
            where = f"{self._path} holds a {kind.__name__} ({key}) that cannot be read"
            raise StoreFailed(f"{where}: {error}", hints=DAMAGED) from error

    async def commit(self, changes: Iterable[Change]) -> None:
        """Keep all of the changes or none; returns when they are synced to disk."""
        rows = [_encoded(change) for change in changes]
        if not rows:
            return
        if self._thread is None:
            raise StoreFailed("the store is not open")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            self._queue.put_nowait(_Waiting(rows, done, loop))
        except queue.Full:
            raise StoreFailed("the disk does not keep up; try again shortly") from None
        await done

    async def close(self) -> None:
        """Write what waits, then close the file."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(self._queue.put, None)
            await asyncio.to_thread(thread.join, CLOSE_WITHIN_S)
            if thread.is_alive():
                # The connection is the writer's while it writes; the process ends without it.
                logger.error("%s was not closed: the disk has not answered for %d s", self._path, CLOSE_WITHIN_S)
                return
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _db(self) -> apsw.Connection:
        if self._connection is None:
            raise StoreFailed("the store is not open")
        return self._connection

    def _open(self) -> apsw.Connection:
        connection: apsw.Connection | None = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            connection = apsw.Connection(str(self._path))
            self._path.chmod(0o600)
            connection.set_busy_timeout(0)
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                connection.execute(f"PRAGMA {pragma}")
            self._migrate(connection)
        except (apsw.Error, OSError, SettingProblem) as error:
            if connection is not None:
                connection.close()
            raise self._refusal(error) from error
        return connection

    def _refusal(self, error: Exception) -> RMAError:
        """Return what a person reads when the file cannot be opened."""
        if isinstance(error, RMAError):
            return error
        if isinstance(error, apsw.BusyError):
            return SettingProblem(
                f"another coordinator is using {self._path}", hints=("stop it, or give this one its own RMA_HOME",)
            )
        if isinstance(error, apsw.FullError):
            return self._full()
        return StoreFailed(f"{self._path} cannot be opened: {error}", hints=DAMAGED)

    def _full(self) -> OutOfSpace:
        return OutOfSpace(
            f"the disk that holds {self._path} is full", hints=("free some space; nothing acknowledged is lost",)
        )

    def _migrate(self, connection: apsw.Connection) -> None:
        version = connection.pragma("user_version")
        if version > SCHEMA_VERSION:
            raise SettingProblem(
                f"{self._path} was written by a newer RMA (layout {version}); this one knows {SCHEMA_VERSION}"
            )
        with connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS records (kind TEXT NOT NULL, key TEXT NOT NULL, data BLOB NOT NULL,"
                " PRIMARY KEY (kind, key)) WITHOUT ROWID"
            )
            connection.pragma("user_version", SCHEMA_VERSION)

    def _write(self) -> None:
        """Take what waits, write it as one transaction, tell everyone; the thread ends on ``None``."""
        ended = False
        while not ended:
            first = self._queue.get()
            group = [] if first is None else [first]
            ended = first is None
            with contextlib.suppress(queue.Empty):
                while len(group) < MAX_GROUP and not ended:
                    following = self._queue.get_nowait()
                    ended = following is None
                    if following is not None:
                        group.append(following)
            for waiting, failure in self._outcomes(group):
                _settle(waiting, failure)

    def _outcomes(self, group: list[_Waiting]) -> list[tuple[_Waiting, RMAError | None]]:
        """Write a group at once; when that fails, each on its own, so that one bad commit costs no other."""
        failure = self._transaction(group)
        if failure is None or len(group) <= 1:
            return [(waiting, failure) for waiting in group]
        return [(waiting, self._transaction([waiting])) for waiting in group]

    def _transaction(self, group: list[_Waiting]) -> RMAError | None:
        try:
            connection = self._db()
            with connection:
                for waiting in group:
                    for kind, key, data in waiting.rows:
                        if data is None:
                            connection.execute("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))
                        else:
                            connection.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", (kind, key, data))
        except apsw.FullError:
            return self._full()
        except apsw.Error as error:
            return StoreFailed(f"{self._path} cannot be written: {error}")
        except Exception as error:
            # The writer must outlive any commit: without it every later one would wait for ever.
            logger.exception("a commit failed")
            return StoreFailed(f"{self._path} could not be written: {error}")
        return None


def _settle(waiting: _Waiting, failure: RMAError | None) -> None:
    # A closed loop means the coordinator is gone; nobody waits any more.
    with contextlib.suppress(RuntimeError):
        waiting.loop.call_soon_threadsafe(_resolve, waiting.done, failure)


def _resolve(done: asyncio.Future[None], failure: RMAError | None) -> None:
    if done.done():
        return
    if failure is None:
        done.set_result(None)
    else:
        done.set_exception(failure)


def _encoded(change: Change) -> tuple[str, str, bytes | None]:
    if isinstance(change, Delete):
        return change.kind.__name__, change.key, None
    return type(change.record).__name__, change.key, msgspec.json.encode(change.record)


def make_store(address: str, home: Path) -> Store:
    """Return the store a setting names: ``sqlite`` (in ``home``), ``sqlite:PATH`` or ``memory``.

    Raises SettingProblem for any other.
    """
    kind, _, rest = address.partition(":")
    if kind == "memory":
        return MemoryStore()
    if kind == "sqlite":
        return SqliteStore(Path(rest.removeprefix("//")).expanduser() if rest else home / "coordinator.db")
    raise SettingProblem(f"{address!r} is no store", hints=("use `sqlite`, `sqlite:PATH` or `memory`",))
