"""The store in one SQLite file: the side of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import apsw
import msgspec

from rma_coordinator.store import disk, layout
from rma_coordinator.store.base import CLOSED, TRIED_IN, StoreFailed, StoreState, encoded
from rma_coordinator.store.copying import Copy
from rma_coordinator.store.writer import GET, Ask, Commit, Options, Writer
from rma_core.errors import OutOfSpace, SettingProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from pathlib import Path

    from rma_coordinator.store.base import Change, R
    from rma_coordinator.store.writer import Outcome

logger = logging.getLogger(__name__)

A = TypeVar("A")

#: Commits and questions that may wait for the writer; more means the disk does not keep up, and callers should wait.
MAX_WAITING = 10_000
#: Bytes of records that may wait for the writer.
MAX_WAITING_BYTES = 32 << 20
#: Bytes set aside, so that the ends of tasks that run can be written when the disk is full.
RESERVE_BYTES = 32 << 20
#: Bytes that must be free, the reserve included, to begin with.
START_FREE_BYTES = 100 << 20
#: Bytes that must be free, beside the reserve, to take new work again after the disk was full.
RECOVER_FREE_BYTES = 64 << 20
#: Seconds between looks at a disk that was full, failed or read-only.
CHECK_EVERY_S = 10.0
#: Seconds between looks at whether the writer gets on.
WATCH_S = 1.0
#: Such looks that may find the same commit waiting before no new work is taken.
STALLED_LOOKS = 5
#: Such looks after which nobody waits for it any more.
GIVEN_UP_LOOKS = 30
#: Seconds a backup may take.
BACKUP_WITHIN_S = 3600.0
#: Seconds the writer gets to finish what waits when the store is closed.
CLOSE_WITHIN_S = 30.0

LOAD = "SELECT key, data FROM records WHERE kind = ? ORDER BY key"
PAGE = "SELECT key, data FROM records WHERE kind = ? AND key > ? ORDER BY key LIMIT ?"
FIRST_PAGE = "SELECT key, data FROM records WHERE kind = ? ORDER BY key LIMIT ?"


class SqliteStore:
    """Keeps records in one SQLite file: write-ahead log, every commit synced, one writer thread, grouped commits.

    One connection with an exclusive lock: SQLite before 3.51.3 can lose commits in WAL mode when two connections
    reset the log at once, and a second coordinator on the same folder must be refused anyway.
    ``clock`` (monotonic) and ``now`` (since 1970) in seconds; ``vfs`` names another SQLite VFS; the rest as the
    constants of the same names say. What changes in ``state`` is logged here, once: ERROR when it turns, INFO when it
    is ok again.
    """

    def __init__(
        self,
        path: Path,
        *,
        reserve_bytes: int = RESERVE_BYTES,
        start_free_bytes: int = START_FREE_BYTES,
        recover_free_bytes: int = RECOVER_FREE_BYTES,
        check_every_s: float = CHECK_EVERY_S,
        watch_s: float = WATCH_S,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        vfs: str | None = None,
        migrations: Sequence[Sequence[str]] = layout.MIGRATIONS,
    ) -> None:
        self._path = path
        self._options = Options(
            path=path,
            reserve_bytes=reserve_bytes,
            start_free_bytes=start_free_bytes,
            recover_free_bytes=recover_free_bytes,
            check_every_s=check_every_s,
            clock=clock,
            now=now,
            vfs=vfs,
            migrations=migrations,
        )
        self._watch_s = watch_s
        self._writer = Writer(self._options, self._settle)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watching: asyncio.TimerHandle | None = None
        # Who waits for the writer, since which look, with how many bytes.
        self._waiting: dict[asyncio.Future[object], tuple[int, int]] = {}
        self._waiting_bytes = 0
        self._looks = 0
        self._stalled: StoreState | None = None

    @property
    def state(self) -> StoreState:
        """Whether new work is taken, else why not."""
        state = self._writer.state
        if state.ok:
            return self._stalled or (CLOSED if self._thread is None else state)
        return state

    async def open(self) -> None:
        """Open or make the file and start the writer."""
        self._loop = asyncio.get_running_loop()
        self._writer = Writer(self._options, self._settle)
        await asyncio.to_thread(self._writer.open)
        self._thread = threading.Thread(target=self._writer.run, name="rma-store", daemon=True)
        self._thread.start()
        self._watching = self._loop.call_later(self._watch_s, self._watch)

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key."""
        name = (kind.__name__,)
        rows = await self._ask(partial(_rows, LOAD, name))
        return await asyncio.to_thread(lambda: [self._read(kind, str(key), data) for key, data in rows])

    async def pages(self, kind: type[R], size: int) -> AsyncIterator[list[R]]:
        """Give every record of a type, by key, ``size`` at a time."""
        statement, which = FIRST_PAGE, cast("Sequence[str | int]", (kind.__name__, size))
        while True:
            rows = await self._ask(partial(_rows, statement, which))
            if rows:
                yield [self._read(kind, str(key), data) for key, data in rows]
            if len(rows) < size:
                return
            statement, which = PAGE, (kind.__name__, rows[-1][0], size)

    async def get(self, kind: type[R], key: str) -> R | None:
        """Return one record, or None."""
        at = (kind.__name__, key)
        row = await self._ask(lambda connection: connection.execute(GET, at).fetchone())
        return None if row is None else self._read(kind, key, row[0])

    def _read(self, kind: type[R], key: str, data: object) -> R:
        try:
            return msgspec.json.decode(data, type=kind) if isinstance(data, bytes) else msgspec.convert(data, kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            where = f"{self._path} holds a {kind.__name__} ({key}) that cannot be read"
            hints = layout.damaged(self._path, error).hints
            raise StoreFailed(f"{where}: {error}", hints=hints[:1]) from error

    async def commit(self, changes: Iterable[Change], *, urgent: bool = False) -> None:
        """Keep all of the changes or none; returns when they are synced to disk."""
        rows = [encoded(change) for change in changes]
        if not rows:
            return
        state = self.state
        if not (state.ok or (urgent and state.code in TRIED_IN)):
            raise state.error()
        size = 0
        for _, _, data in rows:
            size += len(data or b"")
        done = self._await_writer(size)
        self._writer.put(Commit(rows, urgent, cast("asyncio.Future[None]", done)))
        await done

    async def backup(self, path: Path) -> int:
        """Copy everything to a new file, a megabyte at a time, while commits go on; return its size in bytes."""
        state = self.state
        if state.code not in TRIED_IN:
            raise state.error()
        part = disk.beside(path, ".part")
        try:
            await asyncio.to_thread(self._prepare_backup, path, part)
            try:
                async with asyncio.timeout(BACKUP_WITHIN_S):
                    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._writer.put(Copy(part, done))
                    await done
                return await asyncio.to_thread(self._finish_backup, path, part)
            finally:
                await asyncio.to_thread(part.unlink, missing_ok=True)
        except (OSError, apsw.Error) as error:
            raise StoreFailed(f"no backup was made at {path}: {error}") from error

    async def close(self) -> None:
        """Write what waits, then close the file."""
        if self._watching is not None:
            self._watching.cancel()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._writer.put(None)
        await asyncio.to_thread(thread.join, CLOSE_WITHIN_S)
        if thread.is_alive():
            # The connection is the writer's while it writes; the process ends without it.
            logger.error("%s was not closed: the disk has not answered for %d s", self._path, CLOSE_WITHIN_S)
        elif self._writer.state.code == "dead":
            await asyncio.to_thread(self._writer.release)

    # -- between the loop and the writer ---------------------------------------------------------------------------

    async def _ask(self, question: Callable[[apsw.Connection], A]) -> A:
        state = self.state
        if state.code not in TRIED_IN:
            raise state.error()
        done = self._await_writer(0)
        self._writer.put(Ask(question, done))
        return cast("A", await done)

    def _await_writer(self, size: int) -> asyncio.Future[object]:
        """Return what the writer will settle. Raises StoreFailed when too much waits already."""
        if self._loop is None:
            raise CLOSED.error()
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes + size > max(MAX_WAITING_BYTES, size):
            raise StoreFailed("the disk does not keep up", hints=("try again shortly",))
        done: asyncio.Future[object] = self._loop.create_future()
        self._waiting[done] = self._looks, size
        self._waiting_bytes += size
        return done

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Tell everyone of a group, in one step of the loop. Called in the writer's thread."""
        # A closed loop means the coordinator is gone; nobody waits any more.
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._resolve, outcomes)

    def _resolve(self, outcomes: list[Outcome]) -> None:
        for future, result, failure in outcomes:
            done = cast("asyncio.Future[object]", future)
            _, size = self._waiting.pop(done, (0, 0))
            self._waiting_bytes -= size
            if done.done():
                continue
            if failure is None:
                done.set_result(result)
            else:
                done.set_exception(failure)

    def _watch(self) -> None:
        """See whether the writer gets on; looks are counted, not seconds: a stalled loop is no stalled disk."""
        loop = cast("asyncio.AbstractEventLoop", self._loop)
        self._watching = loop.call_later(self._watch_s, self._watch)
        self._looks += 1
        oldest = next(iter(self._waiting.values()), (self._looks, 0))[0]
        stalled = self._looks - oldest > STALLED_LOOKS
        if stalled and self._stalled is None:
            self._stalled = _stalled(self._path)
            logger.error("%s", self._stalled.reason, extra={"action": "store_ill"})
        elif not stalled and self._stalled is not None:
            self._stalled = None
            logger.info("the disk that holds %s answers again", self._path, extra={"action": "store_well"})
        if stalled:
            self._give_up()

    def _give_up(self) -> None:
        """Let nobody wait for ever; what is given up may still be written, so it still counts as waiting."""
        for done, (since, _) in self._waiting.items():
            if self._looks - since <= GIVEN_UP_LOOKS:
                break
            if not done.done():
                done.set_exception(
                    StoreFailed(f"the disk that holds {self._path} did not answer; it is not known what it has kept")
                )

    # -- backup ----------------------------------------------------------------------------------------------------

    def _prepare_backup(self, path: Path, part: Path) -> None:
        if path.exists():
            raise SettingProblem(f"{path} is there already", hints=("give the backup a new name",))
        if not path.parent.is_dir():
            raise SettingProblem(f"{path.parent} is no folder", hints=("make it, or name another",))
        needed = self._path.stat().st_size + disk.beside(self._path, disk.LOG).stat().st_size
        if path.parent.stat().st_dev == self._path.parent.stat().st_dev:
            # A backup must not be what fills the coordinator's own disk.
            needed += self._options.recover_free_bytes
        if (free := disk.free_bytes(path.parent)) < needed:
            raise OutOfSpace(
                f"{path.parent} has too little space for a backup: {free >> 20} MiB, and {-(-needed >> 20)} are needed",
                hints=("free some space there, or name a folder on another disk",),
            )
        part.unlink(missing_ok=True)
        disk.make_empty(part)

    def _finish_backup(self, path: Path, part: Path) -> int:
        """Look the copy through, put it on disk, and give it its name. Raises apsw.Error, OSError."""
        layout.finish_copy(part)
        if path.exists():
            raise SettingProblem(f"{path} is there already", hints=("give the backup a new name",))
        size = disk.publish(part, path)
        layout.note_backup(self._path, path)
        return size


def _rows(statement: str, which: Sequence[str | int], connection: apsw.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(statement, which).fetchall()


def _stalled(path: Path) -> StoreState:
    return StoreState(
        ok=False,
        code="stalled",
        reason=f"the disk that holds {path} has not answered for seconds",
        hints=("look at the disk and the system's log; work goes on by itself when it answers",),
    )
