"""The one thread that holds the SQLite file: writes what waits in groups, reads in between, mends what it can."""

from __future__ import annotations

import logging
import queue
import secrets
from typing import TYPE_CHECKING, NamedTuple

import apsw

from rma_coordinator.store import copying, disk, layout
from rma_coordinator.store.base import CLOSED, OK, StoreFailed, StoreState
from rma_coordinator.store.copying import Copy, Copying
from rma_core.errors import RMAError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from rma_coordinator.store.base import Row

logger = logging.getLogger(__name__)

#: Commits written in one transaction at most.
MAX_GROUP = 512
#: Pages in the log after which they are moved into the file.
CHECKPOINT_PAGES = 1000
#: The record that tells this file from any other that may appear in its place while it is closed.
MARK = ("_opened", "mark")

PUT = "INSERT OR REPLACE INTO records (kind, key, data) VALUES (?, ?, ?)"
DELETE = "DELETE FROM records WHERE kind = ? AND key = ?"
GET = "SELECT data FROM records WHERE kind = ? AND key = ?"


class Options(NamedTuple):
    """What a SqliteStore was given; see there."""

    path: Path
    reserve_bytes: int
    start_free_bytes: int
    recover_free_bytes: int
    check_every_s: float
    clock: Callable[[], float]
    now: Callable[[], float]
    vfs: str | None
    migrations: Sequence[Sequence[str]]


class Commit(NamedTuple):
    """Changes that wait to be written; ``done`` gets None or the failure."""

    rows: list[Row]
    urgent: bool
    done: asyncio.Future[None]


class Ask(NamedTuple):
    """A question to the file; ``done`` gets the answer or the failure."""

    question: Callable[[apsw.Connection], object]
    done: asyncio.Future[object]


Job = Commit | Ask | Copy | None
Outcome = tuple["asyncio.Future[object] | asyncio.Future[None]", object, BaseException | None]


class Writer:
    """Owns the connection. Everything but ``open``, ``put`` and ``state`` happens in its thread.

    ``settle`` is called in that thread with the outcomes of a group, all at once.
    """

    def __init__(self, options: Options, settle: Callable[[list[Outcome]], None]) -> None:
        self.options = options
        self.state: StoreState = CLOSED
        self._settle = settle
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._connection: apsw.Connection | None = None
        self._lock: int | None = None
        self._mark = b""
        # Pages of the log that hold what was acknowledged; None while that is all of it.
        self._frames: int | None = None
        self._page_bytes = 4096
        self._check_at = 0.0
        self._copying: Copying | None = None
        self._jobs: list[Job] = []

    # -- from any thread -------------------------------------------------------------------------------------------

    def put(self, job: Job) -> None:
        """Hand the thread something to do; None ends it."""
        self._queue.put(job)

    def open(self) -> None:
        """Lock, check and open the file. Raises RMAError, and then leaves everything as it was."""
        path = self.options.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            disk.check_place(path.parent)
            self._lock = disk.lock(disk.beside(path, disk.LOCK))
            had = self.options.reserve_bytes if disk.has_reserve(self._reserve, self.options.reserve_bytes) else 0
            disk.check_space(path, needed_bytes=self.options.start_free_bytes, had_bytes=had)
            self._connection = self._opened(create=True)
            disk.make_reserve(self._reserve, self.options.reserve_bytes)
        except (apsw.Error, OSError, RMAError) as error:
            self.release()
            refusal = layout.refusal(error, path)
            self.state = layout.ill(error, path, 0) or StoreState(ok=False, code="failed", reason=refusal.message)
            raise refusal from error
        self.state = OK

    def release(self) -> None:
        """Close the file and give up the lock."""
        self._end_copy(StoreFailed("the store was closed"))
        connection, self._connection = self._connection, None
        if connection is not None and self.state.ok:
            try:
                connection.close()
            except apsw.Error as error:
                # Nothing is lost: the log has everything, and the next start reads it.
                words = "%s was not closed in order (%s); the next start reads what is beside it"
                logger.warning(words, self.options.path, error, extra={"action": "store_unclean"})
        elif connection is not None:
            layout.let_go(connection)
        lock, self._lock = self._lock, None
        disk.unlock(lock)
        self.state = CLOSED

    # -- opening ---------------------------------------------------------------------------------------------------

    @property
    def _reserve(self) -> Path:
        return disk.beside(self.options.path, disk.RESERVE)

    def _opened(self, *, create: bool) -> apsw.Connection:
        """Return a connection to a file that was looked at, whose log is empty and that can be written."""
        options, path = self.options, self.options.path
        if self._lock is not None:
            layout.renew_log(path, self._frames, self._page_bytes)
        connection = layout.connect(path, create=create, vfs=options.vfs)
        try:
            if not create or path.stat().st_size <= layout.LOOKED_THROUGH_BYTES:
                layout.look_through(connection)
            if not create and connection.execute(GET, MARK).fetchone() != (self._mark,):
                raise StoreFailed(f"{path} is no longer the file it was", hints=("stop the coordinator, put it back",))
            layout.empty_log(connection)
            self._frames = 0
            connection.set_wal_hook(self._logged)
            layout.migrate(connection, path, migrations=options.migrations, now=options.now())
            # The one write of every opening: a disk that can only be read is found out here.
            self._mark = self._mark or secrets.token_bytes(16)
            connection.execute(PUT, (*MARK, self._mark))
            self._page_bytes = connection.pragma("page_size")
        except BaseException:
            layout.let_go(connection)
            raise
        return connection

    def _logged(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._frames = pages
        return apsw.SQLITE_OK

    # -- the thread ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until told to end; whatever ends it otherwise is said by the state, and nobody waits on for ever."""
        try:
            while self._round():
                pass
            self.release()
            self.refuse_rest()
        except BaseException as error:
            logger.exception("the store's writer stopped", extra={"action": "store_dead"})
            reason = f"the store's writer stopped: {error!r}"
            self.state = StoreState(ok=False, code="dead", reason=reason, hints=("restart the coordinator",))
            self._end_copy(self.state.error())
            self.refuse_rest()

    def refuse_rest(self) -> None:
        """Tell everyone whose job is still waiting that it will not be done."""
        while True:
            try:
                self._jobs.append(self._queue.get_nowait())
            except queue.Empty:
                break
        self._settle([(job.done, None, self.state.error()) for job in self._jobs if job is not None])

    def _round(self) -> bool:
        """Do what waits, as one group; say whether to go on."""
        self._jobs = self._take()
        commits = [job for job in self._jobs if type(job) is Commit]
        if commits:
            self._settle(self._written(commits))
        asks = [job for job in self._jobs if type(job) is Ask]
        if asks:
            self._settle([self._answered(ask) for ask in asks])
        for job in self._jobs:
            if type(job) is Copy:
                self._begin_copy(job)
        ended = None in self._jobs
        self._jobs = []
        self._upkeep()
        return not ended

    def _take(self) -> list[Job]:
        """Return what waits, up to a group of it; wait for the first as long as there is nothing else to do."""
        jobs: list[Job] = []
        try:
            jobs.append(self._queue.get(timeout=self._patience_s()))
            while len(jobs) < MAX_GROUP and jobs[-1] is not None:
                jobs.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return jobs

    def _patience_s(self) -> float | None:
        if self._copying is not None:
            return 0
        return None if self.state.ok else max(0.0, self._check_at - self.options.clock())

    # -- writing ---------------------------------------------------------------------------------------------------

    def _written(self, commits: list[Commit]) -> list[Outcome]:
        """Write commits, and return how each ended."""
        if self.state.ok:
            return [(commit.done, None, failure) for commit, failure in self._tried(commits)]
        refused = self.state.error()
        tried = self._tried([commit for commit in commits if commit.urgent])
        return [
            *((commit.done, None, failure) for commit, failure in tried),
            *((commit.done, None, refused) for commit in commits if not commit.urgent),
        ]

    def _tried(self, commits: list[Commit]) -> list[tuple[Commit, BaseException | None]]:
        """Write commits as one; when one of them is at fault each on its own, so that it costs no other."""
        failure = self._transaction(commits) if commits else None
        if failure is None:
            return [(commit, None) for commit in commits]
        state = layout.ill(failure, self.options.path, self.options.check_every_s)
        if state is not None:
            self._enter(state)
            if state.code == "full":
                return self._tried_when_full(commits)
            failure = state.error()
        elif len(commits) > 1:
            return self._each(commits)
        elif not isinstance(failure, RMAError):
            failure = StoreFailed(f"{self.options.path} did not take a commit: {failure}")
        return [(commit, failure) for commit in commits]

    def _tried_when_full(self, commits: list[Commit]) -> list[tuple[Commit, BaseException | None]]:
        """Give the reserve up for what is urgent; without one, what is small may still fit."""
        urgent = [commit for commit in commits if commit.urgent]
        refused = [(commit, self.state.error()) for commit in commits if not commit.urgent or len(urgent) == 1]
        if urgent and disk.drop_reserve(self._reserve):
            logger.warning("the reserve beside %s is used up", self.options.path, extra={"action": "store_reserve"})
            return [*((commit, failure) for commit, failure in refused if not commit.urgent), *self._tried(urgent)]
        return [*refused, *(self._each(urgent) if len(urgent) > 1 else ())]

    def _each(self, commits: list[Commit]) -> list[tuple[Commit, BaseException | None]]:
        return [outcome for commit in commits for outcome in self._tried([commit])]

    def _transaction(self, commits: list[Commit]) -> BaseException | None:
        if self._connection is None:
            return self.state.error()
        # Of several changes to one record within a group only the last can ever be seen.
        last: dict[tuple[str, str], bytes | None] = {}
        for commit in commits:
            for kind, key, data in commit.rows:
                last[kind, key] = data
        try:
            with layout.transaction(self._connection):
                self._connection.executemany(PUT, [(*at, data) for at, data in last.items() if data is not None])
                self._connection.executemany(DELETE, [at for at, data in last.items() if data is None])
        except apsw.Error as error:
            return error
        except Exception as error:
            # The writer must outlive any commit: without it every later one would wait for ever.
            logger.exception("a commit failed")
            return error
        return None

    def _answered(self, ask: Ask) -> Outcome:
        if self._connection is None:
            return ask.done, None, self.state.error()
        try:
            return ask.done, ask.question(self._connection), None
        except apsw.Error as error:
            state = layout.ill(error, self.options.path, self.options.check_every_s)
            if state is None:
                return ask.done, None, StoreFailed(f"{self.options.path} did not answer: {error}")
            self._enter(state)
            return ask.done, None, state.error()
        except UnicodeDecodeError as error:
            hints = layout.damaged(self.options.path, error).hints[:1]
            return ask.done, None, StoreFailed(f"{self.options.path} holds text that is none: {error}", hints=hints)
        except Exception as error:  # noqa: BLE001 - whoever asked gets it; the writer must outlive any question
            return ask.done, None, error

    # -- states ----------------------------------------------------------------------------------------------------

    def _enter(self, state: StoreState) -> None:
        """Change the state, and say so once; only with a full disk the connection is still worth something."""
        before, self.state = self.state, state
        self._check_at = self.options.clock() + self.options.check_every_s
        if state.ok:
            logger.info("%s can be written again", self.options.path, extra={"action": "store_well"})
        elif before.code != state.code:
            logger.error("%s (%s)", state.reason, "; ".join(state.hints), extra={"action": "store_ill"})
        if state.ok or state.code == "full":
            return
        connection, self._connection = self._connection, None
        self._end_copy(state.error())
        if connection is not None:
            layout.let_go(connection)

    def _upkeep(self) -> None:
        if self._connection is not None and (self._frames or 0) >= CHECKPOINT_PAGES:
            self._checkpoint(self._connection)
        if self._copying is not None:
            self._step_copy(self._copying)
        if not self.state.ok and self.options.clock() >= self._check_at:
            self._check_at = self.options.clock() + self.options.check_every_s
            self._mend()

    def _checkpoint(self, connection: apsw.Connection) -> None:
        try:
            pages, moved = connection.wal_checkpoint("main", apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            self._enter(self._ill(error))
        else:
            if pages == moved:
                self._frames = 0

    def _mend(self) -> None:
        """Look whether what was wrong is over; a damaged file needs a person."""
        if self._connection is None and self.state.code in {"failed", "read_only"}:
            try:
                self._connection = self._opened(create=False)
            except (apsw.Error, OSError, RMAError) as error:
                state = self._ill(error)
                self._enter(self._failed(error) if state.code == "full" else state)
                return
        if self._connection is not None:
            self._enter(OK if self._has_space() else layout.full(self.options.path))

    def _has_space(self) -> bool:
        """Say whether enough is free, the reserve made anew included."""
        options = self.options
        missing = 0 if disk.has_reserve(self._reserve, options.reserve_bytes) else options.reserve_bytes
        try:
            if self.state.code == "full" or missing:
                if disk.free_bytes(options.path.parent) < options.recover_free_bytes + missing:
                    return False
                disk.make_reserve(self._reserve, options.reserve_bytes)
        except OSError:
            return False
        return True

    def _ill(self, error: Exception) -> StoreState:
        return layout.ill(error, self.options.path, self.options.check_every_s) or self._failed(error)

    def _failed(self, error: Exception) -> StoreState:
        return layout.failed(self.options.path, error, self.options.check_every_s)

    # -- backup ----------------------------------------------------------------------------------------------------

    def _begin_copy(self, copy: Copy) -> None:
        failure: RMAError
        if self._connection is None:
            failure = self.state.error()
        elif self._copying is not None:
            failure = StoreFailed("another backup is being made", hints=("wait for it",))
        else:
            try:
                self._copying = copying.begin(copy, self._connection)
                return
            except RMAError as error:
                failure = error
        self._settle([(copy.done, None, failure)])

    def _step_copy(self, underway: Copying) -> None:
        try:
            if copying.step(underway):
                self._copying = None
                self._settle([(underway.copy.done, None, None)])
        except RMAError as error:
            self._end_copy(error)

    def _end_copy(self, failure: BaseException) -> None:
        underway, self._copying = self._copying, None
        if underway is not None:
            copying.end(underway)
            self._settle([(underway.copy.done, None, failure)])
