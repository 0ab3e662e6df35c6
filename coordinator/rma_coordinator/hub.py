"""The hub: connects dispatch with the workers that can be reached now and the clients that wait for answers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Protocol

from rma_core.models.channel import BUNDLE_BYTES, MAX_DATA_BYTES, Assign, Cancel, Credit, Task, bundle, pack, pack_data
from rma_core.models.worker import INLINE_BODY_BYTES, TaskOffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_coordinator.domain.tasks import Attempt
    from rma_coordinator.domain.tasks import Task as DispatchTask
    from rma_coordinator.relay import Relay
    from rma_core.models.worker import HeartbeatAnswer

logger = logging.getLogger(__name__)

#: Frames that may wait for one worker's connection; a worker that does not read is cut.
MAX_OUTBOUND = 256
#: Of these, kept free for what must be said about attempts that run: credit, cancellation.
KEPT_OUTBOUND = 64
#: A reason is cut here on its way to a worker.
MAX_REASON = 500


class Sink(Protocol):
    """A way to one worker: its channel, or an open long poll."""

    @property
    def ready(self) -> bool:
        """Whether it can take an attempt now."""

    def offer(self, attempt: Attempt, relay: Relay) -> bool:
        """Hand an attempt over without waiting; ``False`` when that cannot be done."""

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """Tell the worker to stop an attempt."""

    def forget(self, attempt: Attempt) -> None:
        """An attempt has ended; nothing more is said about it."""

    def close(self) -> None:
        """End this way."""


def make_offer(attempt: Attempt, relay: Relay, *, inline: bool, now: float) -> TaskOffer:
    """Return an attempt as it is handed to its worker; ``inline`` puts a small body into the record itself."""
    task, body = attempt.task, relay.body
    small = body.small() if body.size <= INLINE_BODY_BYTES else None
    left = max(1.0, task.deadline - now)
    return TaskOffer(
        task_id=task.id,
        attempt=attempt.number,
        lease_id=attempt.lease_id,
        service=task.service,
        model=task.model,
        method=task.method,
        path=task.path,
        headers=task.headers,
        body_bytes=body.size,
        body=small if inline else None,
        body_url=f"/api/worker/tasks/{task.id}/body" if small is None else None,
        lease_s=attempt.lease_s,
        first_byte_s=left if attempt.first_byte_s is None else min(left, attempt.first_byte_s),
        gap_s=task.gap_s,
        total_s=left,
    )


class Channel:
    """One worker's WebSocket as the coordinator writes to it: a bounded queue that a sender task empties."""

    def __init__(self, worker_id: str, *, clock: Callable[[], float]) -> None:
        self.worker_id = worker_id
        self._outbound: deque[str | bytes] = deque()
        self._news = asyncio.Event()
        self.streams: dict[int, tuple[Attempt, Relay]] = {}
        #: Set when the connection is to end now, whatever waits.
        self.closing = asyncio.Event()
        #: Whether that is set; asked for each message.
        self.closed = False
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether the worker reads what it is sent, so that more may follow."""
        return len(self._outbound) < MAX_OUTBOUND - KEPT_OUTBOUND and not self.closed

    def say(self, *frames: str | bytes) -> bool:
        """Queue packed frames, all or none; ``False`` when the worker does not read, and then it is cut."""
        if len(self._outbound) + len(frames) > MAX_OUTBOUND:
            self.close()
            return False
        self._outbound.extend(frames)
        self._news.set()
        return True

    async def message(self) -> str | bytes:
        """Wait for something to send, and return as much of it as leaves together."""
        waiting = self._outbound
        while not waiting:
            self._news.clear()
            await self._news.wait()
        frames, size = [waiting.popleft()], 0
        while waiting and (size := size + len(frames[-1])) + len(waiting[0]) <= BUNDLE_BYTES:
            frames.append(waiting.popleft())
        return bundle(frames)

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        self.closing.set()

    def offer(self, attempt: Attempt, relay: Relay) -> bool:
        """Send TASK and, for a small body, its BODY frames."""
        stream = stream_of(attempt)
        if stream in self.streams or not self.ready:
            return False
        offer = make_offer(attempt, relay, inline=False, now=self._clock())
        self.streams[stream] = (attempt, relay)
        return self.say(pack(Task(stream=stream, offer=offer)), *_body_frames(stream, offer, relay))

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """Send CANCEL for an attempt that this channel has."""
        stream = stream_of(attempt)
        if self._has(attempt):
            self.done(stream)
            self.say(pack(Cancel(stream=stream, reason=reason[:MAX_REASON])))

    def forget(self, attempt: Attempt) -> None:
        """Forget an attempt's stream, if it has one here."""
        if self._has(attempt):
            self.done(stream_of(attempt))

    def _has(self, attempt: Attempt) -> bool:
        found = self.streams.get(stream_of(attempt))
        return found is not None and found[0] is attempt

    def assign(self, answer: HeartbeatAnswer) -> None:
        """Send ASSIGN."""
        self.say(pack(Assign(answer=answer)))

    def credit(self, stream: int, taken: int) -> None:
        """Give room back for bytes that the client has read."""
        if stream in self.streams:
            self.say(pack(Credit(stream=stream, bytes=taken)))

    def done(self, stream: int) -> None:
        """Forget a stream that has ended."""
        self.streams.pop(stream, None)


def _body_frames(stream: int, offer: TaskOffer, relay: Relay) -> list[bytes]:
    """Return a small request body as BODY frames; none when the worker reads it by HTTP."""
    if offer.body_url is not None:
        return []
    data = relay.body.small() or b""
    starts = range(0, max(1, len(data)), MAX_DATA_BYTES)
    return [pack_data(stream, data[start : start + MAX_DATA_BYTES], end=start == starts[-1]) for start in starts]


def stream_of(attempt: Attempt) -> int:
    """Return an attempt's number on its worker's channel: from its random lease, so that it survives a reconnect."""
    return int(attempt.lease_id[:8], 16) or 1


class Poll:
    """One open long poll: takes up to ``most`` attempts, then answers."""

    def __init__(self, worker_id: str, most: int, *, clock: Callable[[], float]) -> None:
        self.worker_id = worker_id
        self.offers: list[TaskOffer] = []
        self.filled = asyncio.Event()
        self._most = most
        self._closed = False
        self._clock = clock

    @property
    def ready(self) -> bool:
        """Whether it takes more."""
        return not self._closed and len(self.offers) < self._most

    def offer(self, attempt: Attempt, relay: Relay) -> bool:
        """Put the attempt into the poll's answer."""
        if not self.ready:
            return False
        self.offers.append(make_offer(attempt, relay, inline=True, now=self._clock()))
        self.filled.set()
        return True

    def withdraw(self, attempt: Attempt, reason: str) -> None:  # noqa: ARG002 - a worker that polls hears it in its heartbeat's answer
        """Take it out again when it has not been answered yet."""
        self.forget(attempt)

    def forget(self, attempt: Attempt) -> None:
        """Take it out again when it has not been answered yet."""
        self.offers[:] = [offer for offer in self.offers if offer.lease_id != attempt.lease_id]

    def close(self) -> None:
        """Answer with what there is."""
        self._closed = True
        self.filled.set()


class Hub:
    """Who can be reached now, and who waits for which answer; the dispatcher's effects."""

    def __init__(
        self,
        *,
        on_accepted: Callable[[Attempt], None],
        on_closing: Callable[[DispatchTask], None],
        on_finished: Callable[[DispatchTask], None],
    ) -> None:
        self.sinks: dict[str, Sink] = {}
        self.relays: dict[str, Relay] = {}
        self._on_accepted, self._on_closing, self._on_finished = on_accepted, on_closing, on_finished

    def attach(self, worker_id: str, sink: Sink) -> None:
        """Take a worker's new way in; the former one ends."""
        self.close(worker_id)
        self.sinks[worker_id] = sink

    def detach(self, worker_id: str, sink: Sink) -> bool:
        """A worker's way has ended; say whether it still was the one in use."""
        if self.sinks.get(worker_id) is not sink:
            return False
        del self.sinks[worker_id]
        return True

    @property
    def channels(self) -> int:
        """How many channels are open."""
        return sum(isinstance(sink, Channel) for sink in self.sinks.values())

    def close(self, worker_id: str) -> None:
        """End the way to one worker, if there is one."""
        sink = self.sinks.get(worker_id)
        if sink is not None:
            sink.close()

    def close_all(self) -> None:
        """End every worker's way: the coordinator stops."""
        for sink in list(self.sinks.values()):
            sink.close()

    def ready(self, worker_id: str) -> bool:
        """Say whether an attempt can be handed to a worker now."""
        sink = self.sinks.get(worker_id)
        return sink is not None and sink.ready

    def offer(self, attempt: Attempt) -> bool:
        """Hand an attempt to its worker."""
        sink, relay = self.sinks.get(attempt.worker_id), self.relays.get(attempt.task.id)
        return sink is not None and relay is not None and sink.offer(attempt, relay)

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """Tell the worker that nobody wants this attempt's answer any more."""
        sink = self.sinks.get(attempt.worker_id)
        if sink:
            sink.withdraw(attempt, reason)

    def accepted(self, attempt: Attempt) -> None:
        """The worker has begun."""
        self._on_accepted(attempt)

    def closing(self, task: DispatchTask) -> None:
        """The end of a durable task is decided."""
        self._on_closing(task)

    def restarted(self, task: DispatchTask) -> None:
        """Forget what the lost attempt sent."""
        relay = self.relays.get(task.id)
        if relay:
            relay.restart()

    def finished(self, task: DispatchTask) -> None:
        """Count the task, forget its stream and wake whoever waits for its answer."""
        self._on_finished(task)
        if task.attempt and (sink := self.sinks.get(task.attempt.worker_id)):
            sink.forget(task.attempt)
        relay = self.relays.pop(task.id, None)
        if relay:
            relay.wake()
