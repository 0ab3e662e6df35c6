"""One HTTP/1.1 connection to a service on this machine: flow control both ways, limits of time, early answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
from typing import TYPE_CHECKING, cast

from rma_core.agent.incoming import EndpointError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from rma_core.agent.incoming import Incoming

#: Bytes of an answer that wait to be taken; then the service is held back. What one read may bring comes on top.
BUFFER_BYTES = 64 * 1024


class Connection(asyncio.BufferedProtocol):
    """One connection, for one request and answer at a time."""

    def __init__(self, buffer: memoryview, everyone: set[Connection]) -> None:
        self.idle_since = 0.0
        #: Set while the service takes what is written, and when nobody will any more.
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._loop = asyncio.get_running_loop()
        self._buffer, self._everyone = buffer, everyone
        self._transport: asyncio.Transport | None = None
        self._incoming: Incoming | None = None
        self._failure: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._held_back = False
        self._sender: asyncio.Task[None] | None = None
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether it is open, as far as that is known here."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def begun(self) -> bool:
        """Whether anything of an answer has come."""
        return self._incoming is not None and self._incoming.begun

    @property
    def sent(self) -> bool:
        """Whether the whole request has left this process."""
        left = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._sender is None and not left

    def begin(self, incoming: Incoming, message: bytes) -> None:
        """Send the beginning of a request, often all of it, whose answer goes to ``incoming``."""
        self._incoming = incoming
        self.write(message)

    def write(self, data: bytes) -> None:
        """Send bytes; see `has_room`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def send(self, sending: Sending, answer_s: float | None) -> None:
        """Send a request's body beside everything else; from its end on the answer has ``answer_s``."""
        self.limit(None)
        self._sender = self._loop.create_task(sending.run(self))

        def done(task: asyncio.Task[None]) -> None:
            error = None if task.cancelled() else task.exception()
            if task.cancelled() or self._sender is not task:
                return
            if error is not None:
                self.fail(error)
                self.abort()
            else:
                self._sender = None
                if self._incoming is not None and not self._incoming.head_whole:
                    self.limit(answer_s)

        self._sender.add_done_callback(done)

    async def news(self) -> None:
        """Wait until something has come, within the limit. Raises what broke the connection, or TimeoutError."""
        if self._failure is not None:
            raise self._failure
        if self._timer is None and self._deadline < math.inf:
            self._timer = self._loop.call_at(self._deadline, self._look)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def limit(self, within_s: float | None) -> None:
        """Set how long `news` may wait in all from now on.

        The timer of an earlier limit is left to run out first: setting one for every piece would cost more than the
        piece.
        """
        self._deadline = math.inf if within_s is None else self._loop.time() + within_s
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Look whether somebody has waited for too long; who waits later sets the timer again."""
        self._timer = None
        if self._waiter is None or self._waiter.done() or self._deadline == math.inf:
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._look)
        else:
            self._waiter.set_exception(TimeoutError())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def taken(self) -> None:
        """Let the service go on when there is room again."""
        if self._held_back and self._incoming is not None and len(self._incoming.body) < BUFFER_BYTES:
            self._held_back = False
            if self.usable and self._transport is not None:
                self._transport.resume_reading()

    def rest(self) -> None:
        """Forget the answer: the connection is kept for another."""
        if self._incoming is not None:
            self._incoming.body.clear()
        self.taken()
        self._incoming = None
        self._deadline = math.inf

    def fail(self, error: BaseException) -> None:
        """Break the answer off behind what has come of it; the first reason counts."""
        if self._failure is None:
            self._failure = error
        self._wake()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    async def aclose(self) -> None:
        """Close the connection at once, and end the sending of a body."""
        self.abort()
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.cancel()
            # Whatever it raised has been told by `fail`.
            await asyncio.wait({sender})

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # Not asserted: uvloop, which `rma up` runs on, has transports of its own.
        self._transport = cast("asyncio.Transport", transport)
        self._everyone.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        """Return where bytes go: all connections share it, because they are parsed before anything else happens."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what has come; bytes that nobody asked for end the connection."""
        self._feed(self._buffer[:nbytes])

    def _feed(self, data: memoryview) -> None:
        incoming = self._incoming
        if incoming is None:
            self.abort()
            return
        try:
            incoming.feed(data)
        except EndpointError as error:
            self.fail(error)
            self.abort()
            return
        if len(incoming.body) >= BUFFER_BYTES and not self._held_back and self.usable and self._transport is not None:
            self._held_back = True
            self._transport.pause_reading()
        if incoming.head_whole:
            self._wake()

    def eof_received(self) -> None:
        """Take the end of what the service sends; it need not hear more of the request either."""
        self._ended()
        self.abort()

    def _ended(self) -> None:
        if self._incoming is not None:
            try:
                self._incoming.closed()
            except EndpointError as error:
                self.fail(error)
        self._wake()

    def pause_writing(self) -> None:
        """Hold the request's body back."""
        self.has_room.clear()

    def resume_writing(self) -> None:
        """Let the request's body go on."""
        self.has_room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the connection."""
        self._everyone.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if exc is not None:
            self._last_look()
            if self._incoming is not None and not self._incoming.whole:
                self.fail(EndpointError(f"it broke the connection: {exc}"))
        else:
            self.fail(EndpointError("it closed the connection"))
        self.has_room.set()
        self._wake()

    def _last_look(self) -> None:
        """Take an early answer: it lies unread where writing the rest of a request failed first."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        if sock is not None and self._incoming is not None:
            with contextlib.suppress(OSError), socket.fromfd(sock.fileno(), sock.family, sock.type) as again:
                again.setblocking(False)  # noqa: FBT003 - the standard library's signature
                self._read_out(again, self._incoming)

    def _read_out(self, sock: socket.socket, incoming: Incoming) -> None:
        while self._failure is None and not incoming.whole and len(incoming.body) < BUFFER_BYTES:
            count = sock.recv_into(self._buffer)
            if not count:
                # A reset looks like a clean end when asked a second time.
                return
            self._feed(self._buffer[:count])


class Sending:
    """A request's body on its way: ``length`` bytes, or chunks until it ends."""

    def __init__(self, body: AsyncGenerator[bytes, None], length: int | None, write_s: float | None) -> None:
        self._body, self._left, self._write_s = body, length, write_s

    async def run(self, connection: Connection) -> None:
        """Send it, as fast as the service takes it. Raises EndpointError, and what the body raises."""
        async with contextlib.aclosing(self._body) as chunks:
            async for chunk in chunks:
                if not connection.usable:
                    # Why that is so, the reading side says: perhaps there is an answer.
                    return
                if chunk:
                    connection.write(self._framed(chunk))
                    await self._drained(connection)
        if self._left:
            raise EndpointError("the request's body is shorter than announced")
        if self._left is None:
            connection.write(b"0\r\n\r\n")

    def _framed(self, chunk: bytes) -> bytes:
        if self._left is None:
            return b"%x\r\n%b\r\n" % (len(chunk), chunk)
        self._left -= len(chunk)
        if self._left < 0:
            raise EndpointError("the request's body is longer than announced")
        return chunk

    async def _drained(self, connection: Connection) -> None:
        if connection.has_room.is_set():
            return
        try:
            async with asyncio.timeout(self._write_s):
                await connection.has_room.wait()
        except TimeoutError:
            raise EndpointError(f"nothing more of the request was taken for {self._write_s:g} s") from None
