"""The HTTP service, as raw ASGI: it moves bytes, and leaves documents to the parsers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_service.problems import (
    Busy,
    MethodNotAllowed,
    NotFound,
    ServiceProblem,
    TooLarge,
    TooSlow,
    UnsupportedMediaType,
)
from rma_service.processes import Answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from rma_service.processes import Processes

    Receive = Callable[[], Awaitable[dict[str, Any]]]
    Send = Callable[[dict[str, Any]], Awaitable[None]]
    Scope = dict[str, Any]

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 50 * 1000 * 1000
#: A body may pause for so long, and take so long in all.
CHUNK_S, BODY_S = 30.0, 300.0
#: A client that does not read its answer is left after so many seconds without progress.
SEND_S = 60.0
#: Of a body that is refused, this much is taken and dropped, so that the client gets to read why.
DRAIN_BYTES, DRAIN_S = 4 * MAX_BODY_BYTES, 15.0
RETRY_AFTER_S = 2
_SEND_CHUNK = 1 << 18


class Limits(NamedTuple):
    """Limits of a request's body, in bytes and seconds."""

    body_bytes: int = MAX_BODY_BYTES
    chunk_s: float = CHUNK_S
    body_s: float = BODY_S


class ClientGone(Exception):
    """The client has closed the connection."""


class ServiceApp:
    """The ASGI application."""

    def __init__(
        self, name: str, processes: Processes, *, facts: Mapping[str, object], limits: Limits = Limits(),  # noqa: B008 - a tuple never changes
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        """Serve ``POST /name`` with ``processes``, and ``GET /health`` with ``facts``.

        Bodies lie in ``folder`` (the system's temporary one) while they are read.
        """
        self._name = name
        self._methods = {"/health": ("GET", "HEAD"), f"/{name}": ("POST",)}
        self._processes = processes
        self._facts = facts
        self._limits = limits
        self._folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's scope."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._processes.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._processes.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = []
        try:
            answer = await self._routed(scope, receive)
        except ClientGone:
            return
        except ServiceProblem as problem:
            answer = Answer(problem.status, "application/problem+json", problem.body())
            headers = self._problem_headers(problem, scope["path"])
            if problem.status in (413, 415, 503):
                await _drain(receive)
        with contextlib.suppress(TimeoutError):
            await _send(send, answer, headers, with_body=scope["method"] != "HEAD")

    async def _routed(self, scope: Scope, receive: Receive) -> Answer:
        methods = self._methods.get(scope["path"])
        if methods is None:
            raise NotFound(f"there are GET /health and POST /{self._name}")
        if scope["method"] not in methods:
            raise MethodNotAllowed(f"{scope['path']} takes {' and '.join(methods)}")
        if scope["path"] == "/health":
            return self._health()
        return await self._answer(scope, receive)

    def _problem_headers(self, problem: ServiceProblem, path: str) -> list[tuple[bytes, bytes]]:
        if isinstance(problem, Busy):
            return [(b"retry-after", str(RETRY_AFTER_S).encode())]
        if isinstance(problem, MethodNotAllowed):
            return [(b"allow", ", ".join(self._methods[path]).encode())]
        return []

    def _health(self) -> Answer:
        state = {"status": "ok", "service": self._name, "slots": self._processes.slots, "busy": self._processes.busy}
        return Answer(200, "application/json", msgspec.json.encode({**state, **self._facts}))

    async def _answer(self, scope: Scope, receive: Receive) -> Answer:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        encoding = headers.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(f"a body with Content-Encoding {encoding[:40]} is not read; send it plain")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        async with self._processes.admission():
            with self._spool() as path:
                await self._receive(receive, path)
                read = self._processes.read(
                    path, content_type=headers.get(b"content-type", ""), query=scope["query_string"].decode("latin-1")
                )
                return await _unless_gone(read, receive)

    def _too_large(self) -> TooLarge:
        limit = self._limits.body_bytes
        return TooLarge(f"the limit is {limit:,} bytes", members={"limit_bytes": limit})

    @contextlib.contextmanager
    def _spool(self) -> Iterator[Path]:
        try:
            with tempfile.NamedTemporaryFile(prefix=f"{self._name}-", dir=self._folder, delete=False) as file:
                path = Path(file.name)
        except OSError as error:
            raise Busy(f"there is no room for the document: {error.strerror}; try again in a moment") from error
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def _receive(self, receive: Receive, path: Path) -> None:
        """Write the body to ``path`` as it comes."""
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                with path.open("wb") as file:
                    while (message := await self._next(receive))["type"] == "http.request":
                        size += len(message.get("body", b""))
                        if size > self._limits.body_bytes:
                            raise self._too_large()
                        file.write(message.get("body", b""))
                        if not message.get("more_body", False):
                            return
        except TimeoutError:
            raise TooSlow("the body did not arrive in time; send it again") from None
        except OSError as error:
            raise Busy(f"there is no room for the document: {error.strerror}; try again in a moment") from error
        raise ClientGone

    async def _next(self, receive: Receive) -> dict[str, Any]:
        async with asyncio.timeout(self._limits.chunk_s):
            return await receive()


async def _unless_gone(read: Awaitable[Answer], receive: Receive) -> Answer:
    """Return what ``read`` does; cancel it when the client goes."""
    reading = asyncio.ensure_future(read)
    listening = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((reading, listening), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientGone
        return reading.result()
    finally:
        for task in (reading, listening):
            task.cancel()
        await asyncio.gather(reading, listening, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _drain(receive: Receive) -> None:
    """Take and drop what is left of a refused body: one that is cut off would hide the answer from the client."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while size < DRAIN_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


async def _send(send: Send, answer: Answer, headers: list[tuple[bytes, bytes]], *, with_body: bool) -> None:
    own = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", str(len(answer.body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    await _in_time(send({"type": "http.response.start", "status": answer.status, "headers": own + headers}))
    body = memoryview(answer.body if with_body else b"")
    for start in range(0, len(body), _SEND_CHUNK):
        piece = bytes(body[start : start + _SEND_CHUNK])
        await _in_time(send({"type": "http.response.body", "body": piece, "more_body": True}))
    await _in_time(send({"type": "http.response.body", "body": b"", "more_body": False}))


async def _in_time(sending: Awaitable[None]) -> None:
    async with asyncio.timeout(SEND_S):
        await sending
