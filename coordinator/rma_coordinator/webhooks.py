"""Webhooks on their way: what the store holds of them is sent, and sent again, until its receiver has taken it.

What is to be told of a task's end is written with that end, in one commit, so that it is told at least once whatever
dies; its id stays the same, so that a receiver can tell a repetition.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rma_coordinator.domain.webhooks import MOST_REASON, Unreachable, WebhookRecord, left_s, signed, wait_s
from rma_coordinator.store import Delete, Put
from rma_core.backoff import Backoff
from rma_core.errors import RMAError, TryLater

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Container, Sequence

    from rma_coordinator.domain.addresses import Network
    from rma_coordinator.domain.keyring import Keyring
    from rma_coordinator.domain.webhooks import Reply
    from rma_coordinator.store import Change, Store

    Send = Callable[[str, dict[str, str], bytes], Awaitable[Reply]]

logger = logging.getLogger(__name__)

#: Webhooks that may wait, about 200 bytes each in memory.
MOST_WAITING = 10_000
#: How many are sent at once, and of them for one key: a receiver that hangs must not hold up the others.
AT_ONCE, AT_ONCE_PER_KEY = 32, 4
#: A write that failed is tried again after this, and at longest after that.
RETRY_BASE_S, RETRY_CAP_S = 0.5, 30.0
#: After a start, what is due is sent over so many seconds.
SPREAD_S = 5.0
#: Statuses of a receiver that has taken it; that of one that wants no more.
TAKEN, GONE = range(200, 300), 410
USER_AGENT = "rma-coordinator"


class Due(NamedTuple):
    """When (of the monotonic clock) a task's webhook is sent, for which key, and how often it was tried."""

    at: float
    task_id: str
    key_id: str
    tries: int


class Webhooks:
    """All webhooks that wait, and those being sent. ``clock`` is monotonic seconds, ``wall`` Unix seconds."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Callable[[], float],
        wall: Callable[[], float],
        allowed: Sequence[Network] = (),
    ) -> None:
        self._store, self._clock, self._wall = store, clock, wall
        self._allowed = allowed
        self._context: ssl.SSLContext | None = None
        self._keyring: Keyring | None = None
        self._closed = False
        self._heap: list[Due] = []
        self._blocked: dict[str, deque[Due]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._of_key: Counter[str] = Counter()
        #: Those that neither were taken nor were given up; what became of a task's is only forgotten after that.
        self._waiting: set[str] = set()
        #: Tasks that are not kept any more, while their webhook still waits.
        self._outlived: set[str] = set()
        #: How a call is made; another one stands in for the network in tests.
        self.send: Send = self._post

    # -- life ----------------------------------------------------------------------------------------------------------

    async def open(self, keyring: Keyring, *, kept: Container[str]) -> None:
        """Take up what the store holds; ``kept`` are the tasks that it still has. Raises StoreFailed."""
        self._keyring = keyring
        gone: list[Change] = []
        for one in await self._store.load(WebhookRecord):
            if one.state == "waiting":
                spread_s = SPREAD_S * random.random()  # noqa: S311 - when, is no secret
                self._schedule(one, left_s(one, self._wall()) + spread_s)
                if one.task_id not in kept:
                    self._outlived.add(one.task_id)
            elif one.task_id not in kept:
                gone.append(Delete(WebhookRecord, one.task_id))
        if gone:
            await self._store.commit(gone)

    async def close(self) -> None:
        """Stop sending; what was not taken is sent after the next start."""
        self._closed = True
        for one in list(self._sending):
            one.cancel()
        for one in list(self._sending):
            with contextlib.suppress(asyncio.CancelledError):
                await one

    # -- from outside --------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """How many were neither taken nor given up."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Raise TryLater when as many wait as may."""
        if len(self._waiting) >= MOST_WAITING:
            raise TryLater(f"{len(self._waiting)} webhooks wait for their receivers already", retry_after_s=60)

    def add(self, record: WebhookRecord) -> None:
        """Send a webhook that has just been written."""
        self._schedule(record, 0.0)
        self.tick()

    async def record(self, task_id: str) -> WebhookRecord | None:
        """Return how a task's webhook stands, if it has one and has ended."""
        return await self._store.get(WebhookRecord, task_id)

    def forget(self, task_id: str) -> list[Change]:
        """Return what is to be written when a task is not kept any more; a webhook that waits is still sent."""
        if task_id in self._waiting:
            self._outlived.add(task_id)
            return []
        return [Delete(WebhookRecord, task_id)]

    def tick(self) -> None:
        """Send what is due. Call it about twice a second."""
        now = self._clock()
        while not self._closed and self._heap and self._heap[0].at <= now and len(self._sending) < AT_ONCE:
            due = heapq.heappop(self._heap)
            if self._of_key[due.key_id] >= AT_ONCE_PER_KEY:
                self._blocked.setdefault(due.key_id, deque()).append(due)
            else:
                self._begin(due)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _schedule(self, record: WebhookRecord, in_s: float) -> None:
        self._waiting.add(record.task_id)
        heapq.heappush(self._heap, Due(self._clock() + in_s, record.task_id, record.key_id, record.tries))

    def _begin(self, due: Due) -> None:
        self._of_key[due.key_id] += 1
        one = asyncio.create_task(self._try(due), name=f"the webhook of {due.task_id}")
        self._sending.add(one)
        one.add_done_callback(lambda done: self._ended(done, due))

    def _ended(self, done: asyncio.Task[None], due: Due) -> None:
        self._sending.discard(done)
        self._of_key[due.key_id] -= 1
        if not self._of_key[due.key_id]:
            del self._of_key[due.key_id]
        if not done.cancelled() and done.exception() is not None:
            logger.critical("%s failed; it is sent after the next start", done.get_name(), exc_info=done.exception())
        if done.cancelled():
            return
        blocked = self._blocked.get(due.key_id)
        if blocked:
            # It was due before; the heap decides between it and those of other keys.
            heapq.heappush(self._heap, blocked.popleft())
            if not blocked:
                del self._blocked[due.key_id]
        self.tick()

    async def _try(self, due: Due) -> None:
        """Send a task's webhook once, and write down what came of it."""
        record = await self._loaded(due.task_id)
        if record is None:
            self._waiting.discard(due.task_id)
            return
        reply, reason = await self._sent(record)
        tried = msgspec.structs.replace(record, tries=due.tries + 1, reason=reason[:MOST_REASON])
        if reply is not None and reply.status in TAKEN:
            await self._over(msgspec.structs.replace(tried, state="delivered", at=self._wall(), reason=""))
            return
        asked_s = reply.retry_after_s if reply is not None else None
        next_s = wait_s(tried.tries, part=random.random(), asked_s=asked_s)  # noqa: S311 - when, is no secret
        if next_s is None or (reply is not None and reply.status == GONE):
            await self._over(msgspec.structs.replace(tried, state="given_up", at=self._wall()))
            return
        # How often it was tried is worth a try to write, and no waiting: the worst of it is one try more.
        with contextlib.suppress(RMAError):
            await self._store.commit([Put(due.task_id, msgspec.structs.replace(tried, at=self._wall() + next_s))])
        self._schedule(tried, next_s)

    async def _sent(self, record: WebhookRecord) -> tuple[Reply | None, str]:
        """Make the call; return the answer, and what was wrong with it."""
        keys = self._keyring.webhook_secrets(record.key_id.removeprefix("key:")) if self._keyring else []
        proof = signed(record.message_id, record.body, now=self._wall(), keys=keys)
        headers = {"Content-Type": "application/json", "User-Agent": USER_AGENT, **proof}
        try:
            reply = await self.send(record.url, headers, record.body)
        except Unreachable as error:
            return None, error.message
        except Exception:
            # A bug, or a library's new way to fail; the traceback says which, and the next try may go well.
            logger.exception("the webhook of %s could not be sent", record.task_id)
            return None, "the coordinator could not make the call"
        return reply, f"it answered {reply.status}"

    async def _post(self, url: str, headers: dict[str, str], body: bytes) -> Reply:
        if self._context is None:
            self._context = await asyncio.to_thread(_trusted)
        from rma_coordinator import outbound

        return await outbound.post(url, headers=headers, body=body, context=self._context, allowed=self._allowed)

    async def _loaded(self, task_id: str) -> WebhookRecord | None:
        backoff = Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        while True:
            try:
                return await self._store.get(WebhookRecord, task_id)
            except RMAError as error:
                logger.debug("the webhook of %s cannot be read now: %s", task_id, error)
                await asyncio.sleep(backoff.next_s())

    async def _over(self, record: WebhookRecord) -> None:
        """A webhook was taken or given up: write that, however long it takes; until then it counts as waiting."""
        _log(record)
        backoff = Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        while True:
            outlived = record.task_id in self._outlived
            change: Change = Delete(WebhookRecord, record.task_id) if outlived else Put(record.task_id, record)
            try:
                await self._store.commit([change], urgent=True)
            except RMAError as error:
                logger.debug("what became of the webhook of %s is written later: %s", record.task_id, error)
                await asyncio.sleep(backoff.next_s())
                continue
            if outlived == (record.task_id in self._outlived):
                break
        self._waiting.discard(record.task_id)
        self._outlived.discard(record.task_id)


def _trusted() -> ssl.SSLContext:
    """Return whom this machine trusts. In a thread: the client library is imported here, which takes a while."""
    from rma_coordinator import outbound  # noqa: F401 - the first call needs it
    from rma_core.http import tls_context

    return tls_context()


def _log(record: WebhookRecord) -> None:
    given_up = record.state == "given_up"
    about = {"action": f"webhook_{record.state}", "task": record.task_id, "key": record.key_id.removeprefix("key:")}
    logger.log(
        logging.INFO if given_up else logging.DEBUG,
        "the webhook of %s was %s after %d tries%s",
        record.task_id,
        "given up" if given_up else "delivered",
        record.tries,
        f": {record.reason}" if given_up else "",
        extra=about,
    )
