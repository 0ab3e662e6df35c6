"""The worker's channel: one outbound WebSocket, kept open across breaks, with many attempts on it.

After a break an attempt goes on, under its old stream number, when none of its answer was on the way. One whose answer
had begun goes on beside the channel, when all of that was kept, and delivers by HTTP; the others are lost at once. So
does an attempt whose channel stays away for RESUME_WITHIN_S. HELLO lists everything that this machine still has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Protocol

from rma_core import http
from rma_core.agent.answers import LinkLostError
from rma_core.agent.outbox import Outbox
from rma_core.agent.streams import ChannelStream
from rma_core.backoff import Backoff
from rma_core.errors import CoordinatorError, NotAuthenticated, NotFound, TryLater, ValidationProblem
from rma_core.models import channel as frames

if TYPE_CHECKING:
    from collections.abc import Callable

    from websockets.asyncio.client import ClientConnection

    from rma_core.agent.answers import Answers
    from rma_core.agent.client import CoordinatorClient
    from rma_core.models.worker import AttemptRef, Heartbeat, HeartbeatAnswer

logger = logging.getLogger(__name__)

#: Seconds to open the channel.
OPEN_TIMEOUT_S = 10.0
#: Seconds between two pings, and to wait for the answer, before a silent channel counts as broken.
PING_EVERY_S = 10.0
PING_TIMEOUT_S = 10.0
#: Seconds after the end of an answer before it is made sure that it was read; one question covers many answers.
CONFIRM_AFTER_S = 1.0
#: Seconds to say goodbye.
CLOSE_TIMEOUT_S = 2.0
#: A broken channel is tried again soon, because attempts wait for it, and later less often.
RETRY_BASE_S, RETRY_CAP_S = 0.5, 60.0
#: Upgrades refused in a row after which the way to the coordinator is taken to have no WebSocket in it.
REFUSALS_TO_GIVE_UP = 3
#: Seconds after which WebSocket is tried again all the same.
GIVE_UP_FOR_S = 600.0
#: What proxies that know no WebSocket answer to an upgrade.
REFUSING = frozenset({400, 403, 405, 426, 501, 502})


class Events(Protocol):
    """What the channel tells the agent; every method returns at once."""

    def slots(self) -> dict[str, int]:
        """Return the slots of each service, free and busy ones."""

    def held(self) -> tuple[AttemptRef, ...]:
        """Return every attempt that this machine still has, running or finished and not delivered."""

    def offered(self, stream: ChannelStream) -> None:
        """Begin a task."""

    def withdrawn(self, stream: ChannelStream, reason: str) -> None:
        """Stop an attempt that nobody wants any more."""

    def lost(self, stream: ChannelStream) -> None:
        """Stop an attempt whose channel is gone: it cannot be delivered."""

    def assigned(self, answer: HeartbeatAnswer) -> None:
        """Do what a heartbeat's answer says."""

    def connected(self) -> None:
        """The channel is open."""

    def disconnected(self, reason: str) -> None:
        """The channel is broken, or could not be opened."""

    def forgotten(self) -> None:
        """The coordinator does not know this worker."""


class Channel:
    """The WebSocket to the coordinator; `run` keeps it open until it is cancelled."""

    def __init__(
        self,
        client: CoordinatorClient,
        events: Events,
        answers: Answers,
        *,
        agent_version: str = "",
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client, self._events, self._answers = client, events, answers
        self._version, self._clock = agent_version, clock
        self._backoff = backoff or Backoff(base_s=RETRY_BASE_S, cap_s=RETRY_CAP_S)
        self._streams: dict[int, ChannelStream] = {}
        self._connection: ClientConnection | None = None
        self._outbox: Outbox | None = None
        self._resume: asyncio.TimerHandle | None = None
        self._refusals = 0
        #: The channel is open, and nothing has been heard on it yet.
        self._opened = False
        self._given_up_until = 0.0
        self._hurry = asyncio.Event()
        #: Cleared while the coordinator has parked this worker: it heartbeats by HTTP then.
        self.wanted = asyncio.Event()
        self.wanted.set()

    @property
    def up(self) -> bool:
        """Whether frames can be sent now."""
        return self._connection is not None

    @property
    def given_up(self) -> bool:
        """Whether WebSocket does not get through, so that the plain way is needed."""
        return self._clock() < self._given_up_until

    async def run(self) -> None:
        """Keep the channel open, until cancelled."""
        try:
            while True:
                await self.wanted.wait()
                self._hurry.clear()
                wait_s = await self._once()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), wait_s)
        finally:
            await self.close()
            if self._resume is not None:
                self._resume.cancel()

    def hurry(self) -> None:
        """Try again now: the coordinator has just been heard of."""
        self._backoff.reset()
        self._hurry.set()

    async def close(self) -> None:
        """Close the channel; `run` opens it again unless it is cancelled or the worker is parked."""
        if self._connection is not None:
            await self._connection.close()

    async def park(self) -> None:
        """Close the channel until `wanted` is set, unless attempts are on it."""
        if not self._streams:
            self.wanted.clear()
            await self.close()

    async def beat(self, beat: Heartbeat) -> None:
        """Send a heartbeat; its answer comes as `Events.assigned`. Raises LinkLostError."""
        await self.send(frames.pack(frames.Beat(beat=beat, slots=self._events.slots())))

    async def send(self, frame: str | bytes, *, more: bool = False) -> None:
        """Send a packed frame now, or together with ``more`` that is expected to follow. Raises LinkLostError."""
        if self._outbox is None:
            raise LinkLostError("the channel is down")
        await self._outbox.put(frame, more=more)

    async def sign(self, frame: frames.Frame) -> bool:
        """Send a frame and say whether it was read."""
        try:
            await self.send(frames.pack(frame))
        except LinkLostError:
            return False
        return await self.reached()

    async def confirm(self) -> None:
        """Make sure that the answers that were sent until now have been read."""
        marks = self._answers.marks()
        if marks and await self.reached():
            self._answers.confirm(marks)

    async def reached(self) -> bool:
        """Say whether everything sent until now was read: the other side reads in order, pings too."""
        from websockets.exceptions import ConnectionClosed

        connection, outbox = self._connection, self._outbox
        if connection is None or outbox is None:
            return False
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await outbox.flush()
                await (await connection.ping())
        except (ConnectionClosed, LinkLostError, TimeoutError):
            return False
        return connection is self._connection

    def drop(self, stream: ChannelStream) -> None:
        """Forget an attempt that has ended."""
        if self._streams.get(stream.number) is stream:
            del self._streams[stream.number]

    async def _once(self) -> float:
        """Open the channel and read it to its end; return the seconds to wait before the next time."""
        from websockets.exceptions import InvalidStatus, WebSocketException

        token = ""
        try:
            token = await self._client.token()
            await self._session(token)
            reason, wait_s = "closed", self._broke_off()
        except InvalidStatus as error:
            reason, wait_s = f"refused with {error.response.status_code}", await self._refused(error, token)
        except (NotAuthenticated, NotFound) as error:
            self._events.forgotten()
            reason, wait_s = str(error), self._backoff.next_s()
        except CoordinatorError as error:
            later = error.retry_after_s if isinstance(error, TryLater) else None
            reason, wait_s = str(error), self._backoff.next_s(later)
        except (WebSocketException, OSError, TimeoutError, ValidationProblem) as error:
            reason, wait_s = str(error) or type(error).__name__, self._broke_off()
        self._events.disconnected(reason)
        return wait_s

    async def _refused(self, error: object, token: str) -> float:
        """Return how long to wait after an upgrade was refused with an HTTP status."""
        from websockets.exceptions import InvalidStatus

        assert isinstance(error, InvalidStatus)  # noqa: S101 - narrows the type of a lazily imported exception
        status = error.response.status_code
        if status in (401, 403, 404):
            # A server that cannot answer a refused upgrade in words says 403: the token call tells what is meant.
            try:
                await self._client.token(stale=token)
            except (NotAuthenticated, NotFound):
                self._events.forgotten()
            except CoordinatorError as failure:
                logger.debug("no new token after a refused upgrade: %s", failure)
        if status in REFUSING and self._count_refusal():
            return GIVE_UP_FOR_S
        return self._backoff.next_s(http.retry_after_s(error.response.headers.get("Retry-After")))

    def _broke_off(self) -> float:
        """Return how long to wait after a channel ended; one on which nothing was ever heard counts as refused."""
        opened, self._opened = self._opened, False
        return GIVE_UP_FOR_S if opened and self._count_refusal() else self._backoff.next_s()

    def _count_refusal(self) -> bool:
        self._refusals += 1
        if self._refusals < REFUSALS_TO_GIVE_UP:
            return False
        self._refusals = 0
        self._given_up_until = self._clock() + GIVE_UP_FOR_S
        return True

    async def _session(self, token: str) -> None:
        from websockets.asyncio.client import connect

        class Connect(connect):
            def process_redirect(self, exc: Exception) -> Exception | str:
                # The owner joined this coordinator; it may not send the agent to another address.
                return exc

        base = self._client.base_url
        async with Connect(
            f"ws{base.removeprefix('http')}/api/worker/channel",
            ssl=self._client.context if base.startswith("https:") else None,
            additional_headers={"Authorization": f"Bearer {token}"},
            compression=None,
            max_size=frames.MAX_CONTROL_BYTES,
            open_timeout=OPEN_TIMEOUT_S,
            ping_interval=PING_EVERY_S,
            ping_timeout=PING_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            user_agent_header=None,
            proxy=None if self._client.local else True,
        ) as connection:
            self._opened = True
            outbox = Outbox(functools.partial(_send, connection))
            beside = [
                asyncio.create_task(self._confirm(), name="answers are confirmed"),
                asyncio.create_task(outbox.run(), name="the channel's frames leave"),
            ]
            try:
                await self._open(connection, outbox)
                await self._read(connection)
            finally:
                for task in beside:
                    task.cancel()
                self._broken()
                await asyncio.wait(beside)
        for task in beside:
            if not task.cancelled() and not isinstance(task.exception(), LinkLostError):
                task.result()

    async def _confirm(self) -> None:
        """Let go of answers that were sent, once they have been read."""
        while True:
            await self._answers.unconfirmed.wait()
            await asyncio.sleep(CONFIRM_AFTER_S)
            await self.confirm()

    async def _open(self, connection: ClientConnection, outbox: Outbox) -> None:
        """Say HELLO, which lists what goes on from before the break."""
        hello = frames.Hello(
            worker_id=self._client.worker_id,
            agent_version=self._version,
            slots=self._events.slots(),
            attempts=self._events.held(),
        )
        await connection.send(frames.pack(hello))
        self._connection, self._outbox = connection, outbox
        if self._resume is not None:
            self._resume.cancel()
            self._resume = None
        for stream in list(self._streams.values()):
            stream.go.set()
            # The first one may have been lost, and the coordinator waits for it only for some seconds.
            await self.send(frames.pack(frames.Accept(stream=stream.number)))
        self._events.connected()

    async def _read(self, connection: ClientConnection) -> None:
        heard = False
        async for message in connection:
            if not heard:
                # Only now: a proxy that opens and drops at once must not be tried again without a pause.
                heard = True
                self._opened, self._refusals = False, 0
                self._backoff.reset()
            try:
                for number, kind, content in frames.records(message):
                    if kind == frames.CONTROL:
                        self._control(frames.unpack_down(content))
                    else:
                        self._body(number, content, end=kind == frames.DATA_LAST)
            except ValueError as error:
                logger.warning("the coordinator sent a broken message: %s", error)

    def _body(self, number: int, data: bytes, *, end: bool) -> None:
        stream = self._streams.get(number)
        if stream is not None and not stream.take_body(data, end=end):
            self.drop(stream)
            self._events.withdrawn(stream, "the coordinator sent more than it was allowed to")

    def _control(self, frame: frames.Down) -> None:
        if isinstance(frame, frames.Task):
            self._task(frame)
        elif isinstance(frame, frames.Assign):
            self._events.assigned(frame.answer)
        elif (stream := self._streams.get(frame.stream)) is not None:
            if isinstance(frame, frames.Credit):
                stream.credit(frame.bytes)
            else:
                self._events.withdrawn(stream, frame.reason or "cancelled")

    def _task(self, frame: frames.Task) -> None:
        old = self._streams.pop(frame.stream, None)
        if old is not None:
            # The number is used again, so the coordinator did not take the old attempt up after the break.
            self._events.lost(old)
        stream = ChannelStream(self, self._client, self._answers, frame.stream, frame.offer)
        self._streams[frame.stream] = stream
        self._events.offered(stream)

    def _broken(self) -> None:
        """Sort the attempts: some wait for the channel to come back, some go on without it, the others are lost."""
        self._connection = self._outbox = None
        self._answers.broke()
        for stream in list(self._streams.values()):
            if not stream.broke():
                self._lose(stream)
        if self._streams:
            # They came while the channel was being closed: a worker with work is not parked.
            self.wanted.set()
        if self._resume is None:
            # Counted from the first break, however many tries to mend it break off as well.
            self._resume = asyncio.get_running_loop().call_later(frames.RESUME_WITHIN_S, self._too_late)

    def _too_late(self) -> None:
        """Let attempts that waited for the channel deliver by HTTP."""
        self._resume = None
        for stream in self._streams.values():
            stream.detach()

    def _lose(self, stream: ChannelStream) -> None:
        self.drop(stream)
        stream.detach()
        self._events.lost(stream)


async def _send(connection: ClientConnection, message: str | bytes) -> None:
    """Send one message. Raises LinkLostError."""
    from websockets.exceptions import ConnectionClosed

    try:
        await connection.send(message)
    except ConnectionClosed as error:
        raise LinkLostError(f"the channel broke: {error}") from None
