"""The worker's channel, below Quart: one WebSocket with many attempts on it, frame by frame."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from rma_coordinator import enrolment
from rma_coordinator.api.asgi import Gone, bearer, client_address
from rma_coordinator.api.problems import HTTPProblem, problem
from rma_coordinator.api.waiting import Silence, within
from rma_coordinator.hub import Channel, stream_of
from rma_coordinator.mailbox import HAND_OVER
from rma_coordinator.relay import Head, Overrun
from rma_core.errors import RMAError
from rma_core.models import channel as frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from rma_coordinator.api.asgi import Message, Receive, Send
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.domain.tasks import Attempt
    from rma_coordinator.pool import Pool
    from rma_coordinator.relay import Relay

    #: Has messages handed over the moment they come, those of one read together.
    HandOver = Callable[[Callable[[Sequence[str | bytes]], None]], None]
    AttemptFrame = frames.Accept | frames.Head | frames.Progress | frames.End | frames.Error

logger = logging.getLogger(__name__)

#: The first frame must come this soon after the handshake.
HELLO_WITHIN_S = 10.0
#: A frame must leave within this, or the worker does not read.
SEND_WITHIN_S = 20.0
#: Seconds to say goodbye.
CLOSE_WITHIN_S = 1.0
#: Intervals of heartbeats without a word after which a channel is closed.
SILENT_BEATS = 3
#: Credit is given back in steps of this, so that it costs few frames.
CREDIT_STEP = frames.WINDOW_BYTES // 4
#: Why a channel is closed, in the range that RFC 6455 leaves to applications.
CLOSED_PROTOCOL, CLOSED_UNAUTHENTICATED, CLOSED_SILENT = 4400, 4401, 4408


async def serve_channel(pool: Pool, scope: Message, receive: Receive, send: Send) -> None:
    """Serve a worker's WebSocket from its handshake to its end."""
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    await receive()  # websocket.connect
    try:
        worker = enrolment.worker_of(pool, bearer(headers.get("authorization", "")))
    except RMAError as error:
        await _deny(scope, send, error)
        return
    ip_address = client_address(scope.get("client"), headers.get("x-forwarded-for", ""), pool.settings.trusted_proxies)
    session = Session(pool, worker, ip_address)
    hand_over = scope.get("extensions", {}).get(HAND_OVER)
    try:
        await _say(send, {"type": "websocket.accept"}, SEND_WITHIN_S)
        await _run(session, receive, send, hand_over)
        await _say(send, {"type": "websocket.close", "code": session.close_code}, CLOSE_WITHIN_S)
    except Gone:
        logger.debug("%s was gone before its channel was closed", worker.id)


async def _run(session: Session, receive: Receive, send: Send, hand_over: HandOver | None) -> None:
    """Read, write and wait to be told to end: whichever ends first ends the others."""
    name = f"channel of {session.worker.id}"
    tasks = [
        asyncio.create_task(session.read(receive, hand_over), name=f"{name} reads"),
        asyncio.create_task(_send_all(session.channel, send), name=f"{name} writes"),
        asyncio.create_task(_closing(session.channel), name=f"{name} waits"),
    ]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        session.end()
        await _reap(tasks)


async def _reap(tasks: Iterable[asyncio.Task[None]]) -> None:
    """End tasks and log what they died of, unless they simply ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        try:
            await task
        except (asyncio.CancelledError, Gone):
            continue
        except Exception:
            logger.exception("%s failed", task.get_name())


async def _closing(channel: Channel) -> None:
    await channel.closing.wait()


async def _say(send: Send, event: Message, within_s: float) -> None:
    """Send one event in a limited time. Raises Gone."""
    try:
        await within(within_s, send(event))
    except (TimeoutError, OSError):
        raise Gone from None


async def _deny(scope: Message, send: Send, error: RMAError) -> None:
    """Refuse the handshake with a problem where the server can, else with a plain close."""
    events: list[Message] = [{"type": "websocket.close", "code": CLOSED_UNAUTHENTICATED}]
    if "websocket.http.response" in scope.get("extensions", {}):
        status, headers, body = problem(error)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        events = [
            {"type": "websocket.http.response.start", "status": status, "headers": raw},
            {"type": "websocket.http.response.body", "body": body},
        ]
    for event in events:
        await _say(send, event, SEND_WITHIN_S)


async def _send_all(channel: Channel, send: Send) -> None:
    """Empty the channel's queue into the connection; ends when the worker does not read."""
    while True:
        message = await channel.message()
        event: dict[str, Any] = {"type": "websocket.send", "bytes": None, "text": None}
        event["text" if isinstance(message, str) else "bytes"] = message
        try:
            await _say(send, event, SEND_WITHIN_S)
        except Gone:
            about = {"action": "channel_stuck", "worker": channel.worker_id}
            logger.info("%s does not read; its channel is closed", channel.worker_id, extra=about)
            return


class Session:
    """What one connection of a worker says, frame by frame."""

    def __init__(self, pool: Pool, worker: Worker, ip_address: str) -> None:
        self.pool = pool
        self.worker = worker
        self.ip_address = ip_address
        self.channel = Channel(worker.id, clock=pool.clock)
        self.close_code = 1000
        self._silence: Silence | None = None

    async def read(self, receive: Receive, hand_over: HandOver | None = None) -> None:
        """Take frames until the worker leaves, falls silent, breaks the protocol, or opens another channel."""
        try:
            self._hello(await self._first(receive))
        except TimeoutError:
            self.close_code = CLOSED_SILENT
            return
        except (RMAError, ValueError) as error:
            self._broken(error)
            return
        self._silence = Silence(self.pool.fleet.interval_s * SILENT_BEATS, self._silent)
        if hand_over is not None:
            hand_over(self._hear)
        while not self.channel.closed:
            message = await receive()
            if message["type"] != "websocket.receive":
                return
            found = message.get("bytes")
            self._hear([message.get("text") or "" if found is None else found])

    def _hear(self, messages: Sequence[str | bytes]) -> None:
        """Take messages, until the channel is over."""
        if self._silence is not None:
            self._silence.heard()
        try:
            for message in messages:
                # What an older connection still brings is no longer this worker's word.
                if self.channel.closed:
                    return
                if (piece := frames.sole_piece(message)) is not None:
                    self._data(*piece)
                else:
                    self._take(message)
        except (RMAError, ValueError) as error:
            self._broken(error)
        except Exception:
            logger.exception("channel of %s reads failed", self.worker.id, extra={"action": "bug"})
            self.channel.close()

    def _broken(self, error: Exception) -> None:
        """Close a channel on which something came that is none of its frames."""
        self.close_code = CLOSED_PROTOCOL
        about = {"action": "channel_protocol", "worker": self.worker.id}
        logger.warning("%s broke the channel's protocol: %s", self.worker.id, error, extra=about)
        self.channel.close()

    def _silent(self) -> None:
        """Close a channel on which nothing has come for too long."""
        self.close_code = CLOSED_SILENT
        self.channel.close()

    async def _first(self, receive: Receive) -> frames.Hello:
        async with asyncio.timeout(HELLO_WITHIN_S):
            message = await receive()
        text = message.get("text")
        hello = frames.unpack_up(text) if isinstance(text, str) else None
        if not isinstance(hello, frames.Hello) or hello.worker_id != self.worker.id:
            raise HTTPProblem(400, "the first frame is HELLO, with the worker's own id")
        return hello

    def _hello(self, hello: frames.Hello) -> None:
        pool, worker = self.pool, self.worker
        about = {"action": "channel_open", "worker": worker.id}
        logger.debug("%s: its channel is open; attempts on it: %d", worker.id, len(hello.attempts), extra=about)
        pool.hub.attach(worker.id, self.channel)
        pool.fleet.touch(worker)
        for attempt in pool.dispatcher.arrived(worker.id, keeps=hello.attempts):
            self._resume(attempt)
        self.channel.assign(pool.answer(worker, -1, cancel=pool.unwanted(worker, hello.attempts)))
        pool.offers(worker, hello.slots)

    def _resume(self, attempt: Attempt) -> None:
        """Go on with an attempt of the former connection; what was on the way then comes once more, whole."""
        relay = self.pool.hub.relays.get(attempt.task.id)
        if relay is None:
            return
        apart = relay.way_of(attempt) is not None and not isinstance(relay.way_of(attempt), Channel)
        if relay.head is not None and not apart and not attempt.delivered:
            if attempt.task.committed:
                reason = "the connection broke while the answer was on its way"
                self.pool.dispatcher.fail(attempt, "coordinator", reason)
                return
            relay.restart()
        stream = stream_of(attempt)
        self.channel.streams[stream] = (attempt, relay)
        if not apart and not attempt.delivered:
            self._feed(stream, attempt, relay)

    def _feed(self, stream: int, attempt: Attempt, relay: Relay) -> None:
        relay.begin(attempt, self.channel, lambda taken: self.channel.credit(stream, taken), CREDIT_STEP)

    def _take(self, message: str | bytes) -> None:
        for stream, kind, content in frames.records(message):
            if kind == frames.CONTROL:
                self._control(content)
            else:
                self._data(stream, content, end=kind == frames.DATA_LAST)

    def _control(self, text: bytes) -> None:
        if len(text) > frames.MAX_CONTROL_BYTES:
            raise HTTPProblem(400, "a control frame is too large")
        frame = frames.unpack_up(text)
        if isinstance(frame, frames.Beat):
            self._beat(frame)
        elif isinstance(frame, frames.Hello):
            raise HTTPProblem(400, "HELLO comes once")
        elif not isinstance(frame, frames.Credit):
            self._about(frame)

    def _beat(self, frame: frames.Beat) -> None:
        if frame.beat.worker_id != self.worker.id:
            raise HTTPProblem(400, "this channel is another worker's")
        answer = self.pool.heartbeat(self.worker, frame.beat, ip_address=self.ip_address)
        self.pool.offers(self.worker, frame.slots)
        self.channel.assign(answer)

    def _stream(self, number: int) -> tuple[Attempt, Relay] | None:
        """Return what a stream is about; frames of attempts that have ended are late, not wrong."""
        found = self.channel.streams.get(number)
        if found is not None and not found[0].open:
            self.channel.done(number)
            return None
        return found

    def _about(self, frame: AttemptFrame) -> None:
        """Take a control frame of an attempt."""
        found = self._stream(frame.stream)
        if found is None:
            return
        attempt, relay = found
        try:
            self._step(frame, attempt, relay)
        except Overrun as error:
            self._broke(frame.stream, attempt, error)

    def _step(self, frame: AttemptFrame, attempt: Attempt, relay: Relay) -> None:
        dispatcher = self.pool.dispatcher
        if isinstance(frame, frames.Error):
            self.channel.done(frame.stream)
            dispatcher.fail(attempt, frame.fault, frame.reason)
            return
        # Whatever a worker says of an attempt, it has begun.
        dispatcher.accept(attempt)
        if relay.way_of(attempt) is None:
            self._feed(frame.stream, attempt, relay)
        if relay.way_of(attempt) is not self.channel:
            # Its answer comes by a request of its own, which says by itself when it is whole.
            return
        if isinstance(frame, frames.Head):
            relay.put_head(Head(frame.status, frame.headers))
        elif isinstance(frame, frames.End):
            self._end(frame.stream, attempt, relay, frame.usage)

    def _end(self, stream: int, attempt: Attempt, relay: Relay, usage: dict[str, float]) -> None:
        relay.end()
        self.channel.done(stream)
        self.pool.dispatcher.delivered(attempt, usage=usage)

    def _data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        found = self.channel.streams.get(stream)
        if found is None:
            return
        attempt, relay = found
        # Nearly all are running; whether one is open costs a call.
        if attempt.state != "running" and not attempt.open:
            self.channel.done(stream)
            return
        source = relay.source
        try:
            if len(data) > frames.MAX_DATA_BYTES:
                raise Overrun(f"a data frame has at most {frames.MAX_DATA_BYTES} bytes")
            if source is not None and source[0] is attempt and source[1] is not self.channel:
                raise Overrun("its answer comes by a request of its own")
            relay.put(data)
            self.pool.dispatcher.accept(attempt)
            if end:
                self._end(stream, attempt, relay, {})
        except Overrun as error:
            self._broke(stream, attempt, error)

    def _broke(self, stream: int, attempt: Attempt, error: Overrun) -> None:
        """Charge a worker that sends what cannot be an answer, and end only that attempt."""
        self.channel.done(stream)
        self.channel.say(frames.pack(frames.Cancel(stream=stream, reason=error.message)))
        self.pool.dispatcher.fail(attempt, "worker", error.message)

    def end(self) -> None:
        """The connection is over; its attempts wait a moment for the worker to come back."""
        # What may still be handed over comes too late.
        self.channel.close()
        if self._silence is not None:
            self._silence.stop()
        if self.pool.hub.detach(self.worker.id, self.channel):
            self.pool.dispatcher.departed(self.worker.id)
