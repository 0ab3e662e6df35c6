"""HTTP/1.1 to a service on this machine, over loopback or a Unix socket, and nothing that this does not need.

No redirects, proxies, cookies, compression, nothing from the environment: what a task asks goes to its service and
nowhere else. The service is read only as fast as its answer is taken.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from rma_core.addresses import is_loopback
from rma_core.agent.connection import Connection, Sending
from rma_core.agent.incoming import EndpointError, Incoming
from rma_core.errors import UsageProblem

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

__all__ = ["Answer", "Client", "Endpoint", "EndpointError", "Reply"]

#: Seconds to reach a service.
ENDPOINT_CONNECT_S = 5.0
#: Connections kept for the next request.
KEPT_CONNECTIONS = 8
#: Seconds a connection is kept: less than the 5 s after which common servers close it, so that no request is sent
#: into a connection that is just being closed.
ENDPOINT_KEEP_S = 2.0
#: Bytes that one read may bring.
READ_BYTES = 64 * 1024
#: Headers that say how a message is framed, or to whom it goes; they are this client's own.
OWN_HEADERS = frozenset({"connection", "content-length", "host", "transfer-encoding", "upgrade"})

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]*")


class Reply(Protocol):
    """What a request is answered with; its body is read piece by piece. An `Answer`, or what was made of one."""

    @property
    def status(self) -> int:
        """The status."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers, with names in small letters."""

    @property
    def over(self) -> bool:
        """Whether all of it has come and been taken."""

    @property
    def ready(self) -> bool:
        """Whether the next `read` returns at once."""

    async def read(self, limit_bytes: int, *, within_s: float | None = None) -> bytes:
        """Return 1 to ``limit_bytes`` bytes as soon as they are there, or none at the end."""

    async def aclose(self) -> None:
        """Let go of it."""


class Client(Protocol):
    """What takes a task's request to its service: an `Endpoint`, or what stands before one."""

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: AsyncGenerator[bytes, None] | bytes | None = None,
        length: int | None = None,
        write_s: float | None = None,
        answer_s: float | None = None,
    ) -> Reply:
        """Send a request and return its answer, as `Endpoint.request` does."""


class Endpoint:
    """The connections to one service, at ``http://127.0.0.1:PORT``, ``http://[::1]:PORT`` or ``unix:/path``.

    Raises UsageProblem for an address that is not on this machine. Close it with `aclose`.
    """

    def __init__(self, address: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._address, self._host = _parsed(address)
        self._clock = clock
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._open: set[Connection] = set()
        self._idle: list[Connection] = []
        self._tidying: asyncio.TimerHandle | None = None
        self._closed = False

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: AsyncGenerator[bytes, None] | bytes | None = None,
        length: int | None = None,
        write_s: float | None = None,
        answer_s: float | None = None,
    ) -> Answer:
        """Send a request and return its answer, whose body is still to be read; close that with `Answer.aclose`.

        ``path`` may have a query. A body from an iterator goes with its ``length``, or in chunks. The service has
        ``write_s`` to take more of the body, and ``answer_s`` from its end to the head of the answer. Raises
        EndpointError, TimeoutError for ``answer_s``, UsageProblem for what must not be sent, and what ``body`` raises.
        """
        if isinstance(body, bytes):
            length = len(body)
        head = _head(method, path, self._host, headers, length, chunked=body is not None and length is None)
        streamed = None if isinstance(body, bytes) else body
        message = head + body if isinstance(body, bytes) else head
        # A streamed body cannot be sent a second time, so it takes no connection that may just be closing.
        connection = self._kept() if streamed is None else None
        if connection is not None:
            try:
                return await self._exchange(connection, Incoming(bodiless=method == "HEAD"), message, answer_s)
            except EndpointError:
                # Nothing came: the service closed it meanwhile. The pool would try the task again as well.
                if connection.begun:
                    raise
        connection = await self._connect()
        sending = None if streamed is None else Sending(streamed, length, write_s)
        return await self._exchange(connection, Incoming(bodiless=method == "HEAD"), message, answer_s, sending)

    async def _exchange(
        self,
        connection: Connection,
        incoming: Incoming,
        message: bytes,
        answer_s: float | None,
        sending: Sending | None = None,
    ) -> Answer:
        connection.begin(incoming, message)
        answer = Answer(self, connection, incoming)
        try:
            if sending is None:
                connection.limit(answer_s)
            else:
                connection.send(sending, answer_s)
            while not incoming.head_whole:
                await connection.news()
        except BaseException:
            await connection.aclose()
            raise
        answer.status, answer.headers = incoming.status, tuple(incoming.headers)
        return answer

    def _kept(self) -> Connection | None:
        """Return a connection that is open and was used a moment ago."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and self._clock() - connection.idle_since < ENDPOINT_KEEP_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        if self._closed:
            raise EndpointError("the service is being stopped")
        loop = asyncio.get_running_loop()

        def made() -> Connection:
            return Connection(self._buffer, self._open)

        try:
            async with asyncio.timeout(ENDPOINT_CONNECT_S):
                if self._path:
                    _, connection = await loop.create_unix_connection(made, self._path)
                else:
                    _, connection = await loop.create_connection(made, *self._address)
        except TimeoutError:
            raise EndpointError(f"no connection within {ENDPOINT_CONNECT_S:g} s") from None
        except OSError as error:
            raise EndpointError(f"no connection: {os.strerror(error.errno) if error.errno else error}") from None
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it."""
        if self._closed or len(self._idle) >= KEPT_CONNECTIONS:
            connection.abort()
            return
        connection.idle_since = self._clock()
        self._idle.append(connection)
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().call_later(ENDPOINT_KEEP_S, self._tidy)

    def _tidy(self) -> None:
        """Close what nobody has used for a while."""
        now = self._clock()
        kept = [c for c in self._idle if c.usable and now - c.idle_since < ENDPOINT_KEEP_S]
        for connection in self._idle:
            if connection not in kept:
                connection.abort()
        self._idle = kept
        again = asyncio.get_running_loop().call_later
        self._tidying = again(ENDPOINT_KEEP_S, self._tidy) if kept else None

    async def aclose(self) -> None:
        """Close every connection; answers that are still being read break off."""
        self._closed = True
        if self._tidying is not None:
            self._tidying.cancel()
        self._idle.clear()
        for connection in list(self._open):
            connection.fail(EndpointError("the service is being stopped"))
            connection.abort()
        # Sockets are closed in the loop's next round.
        await asyncio.sleep(0)


class Answer:
    """A service's answer: `status`, `headers` (names in small letters), and a body to be read piece by piece."""

    def __init__(self, endpoint: Endpoint, connection: Connection, incoming: Incoming) -> None:
        self.status = 0
        self.headers: tuple[tuple[str, str], ...] = ()
        self._endpoint, self._incoming = endpoint, incoming
        self._connection: Connection | None = connection

    @property
    def over(self) -> bool:
        """Whether all of it has come and been taken."""
        return self._incoming.whole and not self._incoming.body

    @property
    def ready(self) -> bool:
        """Whether the next `read` returns at once."""
        return self._incoming.whole or bool(self._incoming.body)

    async def read(self, limit_bytes: int, *, within_s: float | None = None) -> bytes:
        """Return 1 to ``limit_bytes`` bytes of the body as soon as they are there, or none at its end.

        Raises EndpointError when it breaks off, TimeoutError, and what the request's body raised.
        """
        incoming, connection = self._incoming, self._connection
        assert connection is not None  # noqa: S101 - a closed answer is not read
        if not incoming.body and not incoming.whole:
            connection.limit(within_s)
            while not incoming.body and not incoming.whole:
                await connection.news()
        data = bytes(incoming.body[:limit_bytes])
        del incoming.body[:limit_bytes]
        connection.taken()
        return data

    async def aclose(self) -> None:
        """Close the connection, or keep it when the whole answer has come."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._incoming.whole and self._incoming.reusable and connection.usable and connection.sent:
            connection.rest()
            self._endpoint.give_back(connection)
        else:
            await connection.aclose()


def _parsed(address: str) -> tuple[str, tuple[str, int], str]:
    """Return the Unix socket's path or the TCP address, and the Host header's value. Raises UsageProblem."""
    if address.startswith("unix:/"):
        return address.removeprefix("unix:"), ("", 0), "localhost"
    elsewhere = UsageProblem(f"a service's endpoint is on this machine; {address!r} is not")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", 80 if parts.port is None else parts.port
    except ValueError:
        raise elsewhere from None
    if parts.scheme != "http" or not is_loopback(host) or "@" in parts.netloc:
        raise elsewhere
    return "", (host, port), parts.netloc


def _head(
    method: str, path: str, host: str, headers: Iterable[tuple[str, str]], length: int | None, *, chunked: bool
) -> bytes:
    """Return a request's first lines. Raises UsageProblem for a path or a header that would change what they mean."""
    # Only a path: "@elsewhere/" or "//elsewhere" mean nothing else here, and a space would end it.
    if not path.startswith("/") or not path.isascii() or not path.isprintable() or " " in path:
        raise UsageProblem("a task's path begins with / and has no spaces or unprintable characters")
    if not _TOKEN.fullmatch(method):
        raise UsageProblem(f"{method!r} is no method")
    lines = [f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n"]
    for name, value in headers:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value) or name.lower() in OWN_HEADERS:
            raise UsageProblem(f"the header {name!r} cannot be passed on")
        lines.append(f"{name}: {value}\r\n")
    if length is not None:
        lines.append(f"Content-Length: {length}\r\n")
    elif chunked:
        lines.append("Transfer-Encoding: chunked\r\n")
    lines.append("\r\n")
    return "".join(lines).encode()
