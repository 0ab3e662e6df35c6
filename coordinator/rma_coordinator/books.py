"""The books: durable tasks with their bodies and answers, idempotency keys and the ledger, kept on disk.

A durable task is written before it is acknowledged, its attempts when they are accepted, and its end, with the answer
and the ledger's entry, in one commit; only then does `Dispatcher.closed` make the end known. What cannot be written now
is tried again until it can be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.dispatch import MAX_ATTEMPTS
from rma_coordinator.domain.records import (
    AttemptRecord,
    IdempotencyRecord,
    LedgerEntry,
    TaskBody,
    TaskRecord,
    TaskResult,
)
from rma_coordinator.domain.tasks import Attempt, Task
from rma_coordinator.domain.webhooks import WebhookRecord, message
from rma_coordinator.ledger import written
from rma_coordinator.relay import Head, Relay
from rma_coordinator.store import Delete, Put
from rma_core.backoff import Backoff
from rma_core.errors import NotFound, OutOfSpace, Refused, RMAError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Container, Coroutine

    from rma_coordinator.domain.dispatch import Dispatcher
    from rma_coordinator.hub import Hub
    from rma_coordinator.ledger import Ledger
    from rma_coordinator.spool import Body, Spools
    from rma_coordinator.store import Change, Store
    from rma_coordinator.webhooks import Webhooks
    from rma_core.models.worker import Fault
    from rma_core.settings import CoordinatorSettings

logger = logging.getLogger(__name__)

#: Bodies and answers up to here are kept in the store itself; larger ones in files.
KEPT_IN_STORE = 64 * 1024
#: What is answered at once is credited so much later, many tasks in one go.
CREDITED_EVERY_S = 0.1
#: A task whose time ran out while the coordinator was away has this long after its return.
LEAST_AFTER_RESTART_S = 60.0
#: A write that failed is tried again after this, and at longest after that.
RETRY_BASE_S, RETRY_CAP_S = 0.5, 30.0
#: Expired results that are removed in one go.
EXPIRED_AT_ONCE = 200


class Answer(NamedTuple):
    """A whole answer that is kept."""

    head: Head
    body: Body


class Books:
    """Everything about tasks that outlives the process. ``clock`` is monotonic seconds, ``wall`` Unix seconds."""

    def __init__(
        self,
        *,
        store: Store,
        spools: Spools,
        dispatcher: Dispatcher,
        hub: Hub,
        webhooks: Webhooks,
        settings: CoordinatorSettings,
        clock: Callable[[], float],
        wall: Callable[[], float],
        ledger: Ledger,
    ) -> None:
        self.ledger = ledger
        self._store, self._spools, self._dispatcher, self._hub = store, spools, dispatcher, hub
        self._webhooks = webhooks
        self._settings, self._clock, self._wall = settings, clock, wall
        self._epoch = 0
        self._bodies: dict[str, Body] = {}
        self._idempotency: dict[str, IdempotencyRecord] = {}
        self._keys: dict[str, str] = {}
        self._making: dict[str, asyncio.Event] = {}
        self._answers: dict[str, Answer] = {}
        self._collecting: dict[str, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._ended: dict[str, asyncio.Event] = {}
        #: Finished tasks by the moment (of ``clock``) until which they are kept, oldest first.
        self._kept: OrderedDict[str, float] = OrderedDict()
        self._noted: set[str] = set()
        self._work = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._writing = asyncio.Lock()

    # -- life --------------------------------------------------------------------------------------------------

    async def open(self, epoch: int) -> None:
        """Take up what the store holds; ``epoch`` is higher than at any start before. Raises StoreFailed."""
        self._epoch = epoch
        await self.ledger.open()
        records = await self._store.load(TaskRecord)
        known = {record.task_id for record in records}
        for one in await self._store.load(IdempotencyRecord):
            if one.task_id in known:
                self._idempotency[one.key] = one
        # A body is of use until its task has ended, an answer from then on; what a crash left over is neither.
        files = {one.task_id if one.ended_at is None else _answer_name(one.task_id) for one in records}
        await asyncio.to_thread(self._spools.sweep, files)
        for task in sorted(records, key=lambda record: record.created_at):
            self._keys[task.task_id] = task.idempotency
            if task.ended_at is None:
                await self._restore(task)
        for task in sorted(records, key=lambda record: record.ended_at or 0):
            if task.ended_at is not None:
                age_s = max(0.0, self._wall() - task.ended_at)
                self._kept[task.task_id] = self._clock() + max(0.0, self._settings.result_ttl_s - age_s)

    async def _restore(self, record: TaskRecord) -> None:
        """Queue a task again that was not finished, or wait for the worker that may still be at it."""
        lived_s = max(0.0, self._wall() - record.created_at)
        left_s = min(record.timeout_s, max(LEAST_AFTER_RESTART_S, record.timeout_s - lived_s))
        task = Task(
            task_id=record.task_id,
            service=record.service,
            model=record.model,
            method=record.method,
            path=record.path,
            headers=record.headers,
            body_bytes=record.body_bytes,
            key_id=record.key_id,
            now=self._clock(),
            timeout_s=left_s,
            durable=True,
            base=(self._epoch - record.epoch) * MAX_ATTEMPTS,
            first_byte_s=record.first_byte_s,
            gap_s=record.gap_s,
            priority=record.priority,
            webhook=record.webhook,
            owner=record.owner,
        )
        task.created_at -= min(lived_s, record.timeout_s)
        task.reasons, task.fault = list(record.reasons), record.fault
        task.attempts = [_attempt(task, one, wall=self._wall(), now=self._clock()) for one in record.attempts]
        given = next((one for one in task.attempts if one.state in ("offered", "running")), None)
        try:
            body = await self._kept_body(record)
        except NotFound as error:
            logger.error("%s: %s", task.id, error, extra={"action": "body_lost", "task": task.id})  # noqa: TRY400 - expected
            body = self._spools.make()
            task.deadline = self._clock()
        self._bodies[task.id] = body
        relay = self._hub.relays[task.id] = Relay(task, body, self._clock)
        self._dispatcher.restore(task, given)
        if given is not None:
            self._collect(task, relay)

    async def _kept_body(self, record: TaskRecord) -> Body:
        kept = await self._store.get(TaskBody, record.task_id)
        if kept is None:
            return self._spools.open(record.task_id) if record.body_bytes else self._spools.make()
        body = self._spools.make()
        # What was acknowledged is taken up again, however little room there is for more.
        await body.write(kept.data, counted=False)
        return body

    async def close(self) -> None:
        """Let go of everything; what has not ended goes on after the next start."""
        if self._soon is not None:
            self._soon.cancel()
        for task in [*self._closing, *self._collecting.values()]:
            task.cancel()
        for task in [*self._closing, *self._collecting.values()]:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.write()
        for body in [*self._bodies.values(), *(answer.body for answer in self._answers.values())]:
            await body.close(keep=True)

    @property
    def known(self) -> Container[str]:
        """The tasks that are kept, whether they run or have ended."""
        return self._keys

    @property
    def coming(self) -> int:
        """How many tasks are being written now, and will be queued then."""
        return len(self._making)

    # -- tasks -------------------------------------------------------------------------------------------------

    def make_body(self, task_id: str) -> Body:
        """Return an empty body for a durable task's request."""
        return self._spools.make(task_id, memory_bytes=KEPT_IN_STORE)

    async def find(self, key: str, fingerprint: str) -> str | None:
        """Return the task made under an idempotency key, if any. Raises Refused when that was another request.

        Nothing waits after the last look, so that whoever finds none may make one.
        """
        while (record := self._idempotency.get(key)) is not None:
            if record.fingerprint != fingerprint:
                raise Refused(
                    "this Idempotency-Key was used for another request", hints=("use a new key for a new request",)
                )
            making = self._making.get(record.task_id)
            if making is None:
                return record.task_id
            await making.wait()
        return None

    async def submit(self, task: Task, body: Body, *, key: str = "", fingerprint: str = "") -> None:
        """Keep a durable task; when this returns it is on disk, queued, and may be acknowledged.

        ``key`` makes it the one task of its idempotency key. Raises StoreFailed, OutOfSpace: then nothing is kept.
        """
        record = IdempotencyRecord(key=key, fingerprint=fingerprint, task_id=task.id) if key else None
        if record is not None:
            # Before anything waits: of two equal requests at once only one makes a task.
            self._idempotency[key] = record
        made = self._making[task.id] = asyncio.Event()
        try:
            await body.sync()
            small = body.small()
            self._keys[task.id] = key
            changes: list[Change] = [Put(task.id, self.written(task))]
            if record is not None:
                changes.append(Put(key, record))
            if small:
                changes.append(Put(task.id, TaskBody(task_id=task.id, data=small)))
            await self._store.commit(changes)
        except BaseException:
            self._keys.pop(task.id, None)
            if record is not None:
                del self._idempotency[key]
            await body.close()
            # A commit that was given up may be kept all the same; nobody was told, so it must not run one day.
            self._spawn(self._insist([Delete(TaskRecord, task.id), Delete(TaskBody, task.id)]), f"{task.id} is undone")
            raise
        finally:
            del self._making[task.id]
            made.set()
        self._bodies[task.id] = body
        self._hub.relays[task.id] = Relay(task, body, self._clock)
        self._dispatcher.submit(task)

    def accepted(self, attempt: Attempt) -> None:
        """An attempt has begun: it is noted on disk soon, so that it can go on after a restart."""
        task = attempt.task
        if task.durable:
            self._noted.add(task.id)
            self._work.set()
            self._collect(task, self._hub.relays[task.id])

    async def wait(self, task_id: str, timeout_s: float) -> bool:
        """Wait until a durable task has ended, for ``timeout_s`` at most; say whether it has."""
        if task_id not in self._dispatcher.tasks:
            return True
        event = self._ended.setdefault(task_id, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
        return task_id not in self._dispatcher.tasks

    async def record(self, task_id: str) -> TaskRecord | None:
        """Return a durable task as it is known to be, running or finished."""
        task = self._dispatcher.tasks.get(task_id)
        if task is not None:
            return self.written(task, decided=False) if task.durable else None
        return await self._store.get(TaskRecord, task_id) if task_id in self._kept else None

    async def result(self, task_id: str) -> TaskResult | None:
        """Return the answer of a finished task."""
        return await self._store.get(TaskResult, task_id)

    def answer_pieces(self, result: TaskResult) -> AsyncIterator[bytes]:
        """Return an answer's bytes. Raises NotFound when its file has gone."""
        return _pieces(self._spools.open(_answer_name(result.task_id))) if result.data is None else _bytes(result.data)

    # -- answers -----------------------------------------------------------------------------------------------

    def _collect(self, task: Task, relay: Relay) -> None:
        if task.id not in self._collecting:
            collecting = asyncio.create_task(self._collecting_of(task, relay), name=f"{task.id} collects")
            self._collecting[task.id] = collecting

    async def _collecting_of(self, task: Task, relay: Relay) -> None:
        """Take a durable task's answer in until one is whole; a lost attempt's is forgotten."""
        try:
            while task.closing is None and not await self._one_answer(task, relay):
                pass
        except Exception:
            # A bug; without this the task would hang until its deadline, and nobody would know why.
            logger.exception("%s: its answer could not be taken in", task.id)
            self._spoil(task, "coordinator", "the coordinator could not take the answer in")
        finally:
            self._collecting.pop(task.id, None)

    async def _one_answer(self, task: Task, relay: Relay) -> bool:
        """Take in the answer of the attempt that feeds; say whether there is nothing more to be taken."""
        body = self._spools.make(_answer_name(task.id), memory_bytes=KEPT_IN_STORE)
        try:
            head = await relay.ready()
            if head is None:
                return True
            starts, attempt = relay.starts, task.holder
            async for piece in relay.pieces():
                if body.size + len(piece) > self._settings.max_result_bytes:
                    self._spoil(task, "request", self._too_large())
                    return False
                await body.write(piece)
            await body.sync()
            if attempt is None or not attempt.open or not attempt.delivered:
                return False
            if relay.starts != starts or not relay.complete:
                return False
            self._answers[task.id] = Answer(head, body)
            task.http_status, task.answer_bytes = head.status, body.size
            self._dispatcher.succeed(attempt)
        except OutOfSpace as error:
            self._spoil(task, "coordinator", error.message)
            return False
        finally:
            kept = self._answers.get(task.id)
            if kept is None or kept.body is not body:
                await body.close()
        return True

    def _spoil(self, task: Task, fault: Fault, reason: str) -> None:
        if task.holder is not None:
            self._dispatcher.spoilt(task.holder, fault, reason)

    def _too_large(self) -> str:
        return f"its answer is larger than the {self._settings.max_result_bytes} bytes that are kept of one"

    # -- ends --------------------------------------------------------------------------------------------------

    def closing(self, task: Task) -> None:
        """The end of a durable task is decided: write it, then make it known."""
        relay = self._hub.relays.get(task.id)
        if relay is not None:
            relay.wake()
        self._spawn(self._close(task), f"{task.id} ends")

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        one = asyncio.create_task(work, name=name)
        self._closing.add(one)
        one.add_done_callback(self._closed)

    def _closed(self, one: asyncio.Task[None]) -> None:
        self._closing.discard(one)
        if not one.cancelled() and one.exception() is not None:
            logger.critical("%s failed; it ends after the next start", one.get_name(), exc_info=one.exception())

    async def _close(self, task: Task) -> None:
        record = self.written(task)
        changes: list[Change] = [Put(task.id, record), Delete(TaskBody, task.id)]
        webhook = self._webhook(record) if task.webhook else None
        if webhook is not None:
            changes.append(Put(task.id, webhook))
        entry = self._entry(task) if task.closing == "succeeded" else None
        answer = self._answers.get(task.id)
        if answer is not None and task.closing == "succeeded":
            changes.append(Put(task.id, _result(task.id, answer)))
        if entry is not None:
            changes.append(Put(task.id, entry))
        await self._insist(changes)
        if entry is not None:
            self.ledger.credited(entry)
        self._kept[task.id] = self._clock() + self._settings.result_ttl_s
        if len(self._kept) > self._settings.kept_tasks:
            self._work.set()
        self._answers.pop(task.id, None)
        body = self._bodies.pop(task.id, None)
        self._dispatcher.closed(task)
        if event := self._ended.pop(task.id, None):
            event.set()
        if webhook is not None:
            self._webhooks.add(webhook)
        if answer is not None:
            await answer.body.close(keep=answer.body.on_disk and task.state == "succeeded")
        if body is not None:
            await body.close()

    def _webhook(self, record: TaskRecord) -> WebhookRecord:
        """Return what is to be told of a task's end."""
        body = message(record, base_url=self._settings.public_url.rstrip("/"))
        return WebhookRecord(
            task_id=record.task_id, key_id=record.key_id, url=record.webhook, body=body, at=self._wall()
        )

    async def _insist(self, changes: list[Change]) -> None:
        """Commit what must not be lost, however long that takes."""
        backoff = Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        while True:
            try:
                await self._store.commit(changes, urgent=True)
            except RMAError as error:
                logger.debug("not written yet: %s", error)
                await asyncio.sleep(backoff.next_s())
            else:
                return

    # -- the ledger and the rest -------------------------------------------------------------------------------

    def credit(self, task: Task) -> None:
        """A request that was answered at once has succeeded: enter it in the ledger soon.

        Its answer does not wait for the disk, which would cost every call that much; the credit does: it counts, and
        is shown, once it is written.
        """
        entry = self._entry(task)
        if entry is not None:
            self.ledger.owe(entry)
            if self._soon is None:
                self._soon = asyncio.get_running_loop().call_later(CREDITED_EVERY_S, self._now)

    def _now(self) -> None:
        self._soon = None
        self._work.set()

    def _entry(self, task: Task) -> LedgerEntry | None:
        attempt = task.holder
        if attempt is None:
            return None
        return LedgerEntry(
            task_id=task.id,
            worker_id=attempt.worker_id,
            attempt=attempt.number,
            service=task.service,
            ended_at=self._wall(),
            seconds=round((task.ended_at or self._clock()) - (attempt.started_at or attempt.offered_at), 4),
            bytes_in=task.body_bytes,
            bytes_out=task.answer_bytes,
        )

    async def run(self) -> None:
        """Write what is noted or owed as it comes, and let go of what is too old. Runs until cancelled."""
        backoff = Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_CAP_S):
                    await self._work.wait()
            try:
                await self.write()
                await self._expire()
                if await self.ledger.fold():
                    # There may be more than one lot: the next round comes at once.
                    self._work.set()
                backoff.reset()
            except RMAError as error:
                logger.debug("the books are written later: %s", error)
                await asyncio.sleep(backoff.next_s())
            except Exception:
                # The books must go on after one bad round; the traceback says what to mend.
                logger.exception("the books could not be written")
                await asyncio.sleep(backoff.next_s())

    async def write(self) -> None:
        """Write what is noted and owed now. Raises StoreFailed, OutOfSpace; then it stays noted and owed."""
        # Two at once would count what they both write twice.
        async with self._writing:
            self._work.clear()
            noted, owed = self._noted, self.ledger.owed()
            self._noted = set()
            tasks = [one for key in noted if (one := self._dispatcher.tasks.get(key)) and one.closing is None]
            changes: list[Change] = [Put(task.id, self.written(task)) for task in tasks]
            changes += map(written, owed)
            if not changes:
                return
            try:
                await self._store.commit(changes, urgent=True)
            except BaseException:
                self._noted |= noted
                raise
            self.ledger.settle(owed)

    async def _expire(self) -> None:
        """Forget finished tasks whose time is over, or that are too many."""
        now, gone = self._clock(), list[str]()
        for task_id, until in self._kept.items():
            over = len(self._kept) - len(gone) > self._settings.kept_tasks
            if len(gone) >= EXPIRED_AT_ONCE or (until > now and not over):
                break
            gone.append(task_id)
        if not gone:
            return
        changes: list[Change] = []
        for task_id in gone:
            changes += [Delete(TaskRecord, task_id), Delete(TaskResult, task_id), *self._webhooks.forget(task_id)]
            if key := self._keys.get(task_id):
                changes.append(Delete(IdempotencyRecord, key))
        await self._store.commit(changes, urgent=True)
        for task_id in gone:
            del self._kept[task_id]
            self._idempotency.pop(self._keys.pop(task_id, ""), None)
        await asyncio.to_thread(self._unlink, [_answer_name(task_id) for task_id in gone])
        self._work.set()

    def _unlink(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self._spools.folder / name).unlink()

    def written(self, task: Task, *, decided: bool = True) -> TaskRecord:
        """Return a task as it is written now, if it is durable; an end that is ``decided`` only is not known yet."""
        wall = self._wall() - self._clock()
        ended_at = task.ended_at if task.closing is not None and decided else None
        return TaskRecord(
            task_id=task.id,
            service=task.service,
            model=task.model,
            method=task.method,
            path=task.path,
            headers=task.headers,
            key_id=task.key_id,
            created_at=wall + task.created_at,
            timeout_s=task.deadline - task.created_at,
            epoch=self._epoch - task.base // MAX_ATTEMPTS,
            body_bytes=task.body_bytes,
            first_byte_s=task.first_byte_s,
            gap_s=task.gap_s,
            priority=task.priority,
            state=(task.closing if decided else None) or task.state,
            ended_at=None if ended_at is None else wall + ended_at,
            attempts=tuple(_attempt_record(one, wall) for one in task.attempts),
            reasons=tuple(task.reasons),
            fault=task.fault,
            http_status=task.http_status,
            answer_bytes=task.answer_bytes,
            late=ended_at is not None and task.late,
            usage=task.usage,
            webhook=task.webhook,
            owner=task.owner,
            idempotency=self._keys.get(task.id, ""),
        )


def _answer_name(task_id: str) -> str:
    return f"{task_id}.answer"


def _attempt_record(attempt: Attempt, wall: float) -> AttemptRecord:
    def moment(at: float | None) -> float:
        return 0.0 if at is None else wall + at

    return AttemptRecord(
        number=attempt.number,
        worker_id=attempt.worker_id,
        lease_id=attempt.lease_id,
        state=attempt.state,
        reason=attempt.reason,
        offered_at=wall + attempt.offered_at,
        started_at=moment(attempt.started_at),
        first_byte_at=moment(attempt.first_byte_at),
        ended_at=moment(attempt.ended_at),
        answer_bytes=attempt.answer_bytes,
        model_state=attempt.model_state,
    )


def _attempt(task: Task, record: AttemptRecord, *, wall: float, now: float) -> Attempt:
    """Return an attempt of a former life; whatever the wall clock did since, it was within its task's."""

    def moment(at: float) -> float | None:
        return min(now, max(task.created_at, now - (wall - at))) if at else None

    attempt = Attempt(task, record.number, record.worker_id, moment(record.offered_at) or now, lease_id=record.lease_id)
    attempt.state, attempt.reason = record.state, record.reason
    attempt.started_at, attempt.first_byte_at = moment(record.started_at), moment(record.first_byte_at)
    attempt.ended_at = moment(record.ended_at)
    attempt.answer_bytes, attempt.model_state = record.answer_bytes, record.model_state
    return attempt


def _result(task_id: str, answer: Answer) -> TaskResult:
    head, body = answer
    return TaskResult(
        task_id=task_id,
        status=head.status,
        headers=msgspec.convert(head.headers, tuple[tuple[str, str], ...]),
        size=body.size,
        data=body.small(),
    )


async def _bytes(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    try:
        async for piece in body.pieces():
            yield piece
    finally:
        await body.close(keep=True)
