"""The HTTP service, as raw ASGI: it moves bytes, and leaves documents to the parsers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from rma_notes import __version__
from rma_notes.media import SUPPORTED
from rma_notes.parsers import Answer, Parsers
from rma_notes.problems import (
    Busy,
    MethodNotAllowed,
    NotesProblem,
    NotFound,
    TooLarge,
    TooSlow,
    UnsupportedMediaType,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

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
_METHODS = {"/health": ("GET", "HEAD"), "/notes": ("POST",)}


class Limits(NamedTuple):
    """Limits of a request's body, in bytes and seconds."""

    body_bytes: int = MAX_BODY_BYTES
    chunk_s: float = CHUNK_S
    body_s: float = BODY_S


class ClientGone(Exception):
    """The client has closed the connection."""


class NotesApp:
    """The ASGI application."""

    def __init__(self, parsers: Parsers, *, limits: Limits = Limits(), folder: Path | None = None) -> None:  # noqa: B008 - a tuple never changes
        """Serve with ``parsers``; bodies lie in ``folder`` (the system's temporary one) while they are read."""
        self._parsers = parsers
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
                await self._parsers.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._parsers.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = []
        try:
            answer = await self._routed(scope, receive)
        except ClientGone:
            return
        except NotesProblem as problem:
            answer = Answer(problem.status, "application/problem+json", problem.body())
            headers = _problem_headers(problem, scope["path"])
            if problem.status in (413, 415, 503):
                await _drain(receive)
        with contextlib.suppress(TimeoutError):
            await _send(send, answer, headers, with_body=scope["method"] != "HEAD")

    async def _routed(self, scope: Scope, receive: Receive) -> Answer:
        methods = _METHODS.get(scope["path"])
        if methods is None:
            raise NotFound("there are GET /health and POST /notes")
        if scope["method"] not in methods:
            raise MethodNotAllowed(f"{scope['path']} takes {' and '.join(methods)}")
        if scope["path"] == "/health":
            return self._health()
        return await self._notes(scope, receive)

    def _health(self) -> Answer:
        facts = {
            "status": "ok", "service": "notes", "version": __version__,
            "slots": self._parsers.slots, "busy": self._parsers.busy, "media_types": SUPPORTED,
        }  # fmt: skip
        return Answer(200, "application/json", msgspec.json.encode(facts))

    async def _notes(self, scope: Scope, receive: Receive) -> Answer:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        encoding = headers.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise UnsupportedMediaType(f"a body with Content-Encoding {encoding[:40]} is not read; send it plain")
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        async with self._parsers.admission():
            with self._spool() as path:
                await self._receive(receive, path)
                read = self._parsers.read(
                    path, content_type=headers.get(b"content-type", ""), query=scope["query_string"].decode("latin-1")
                )
                return await _unless_gone(read, receive)

    def _too_large(self) -> TooLarge:
        limit = self._limits.body_bytes
        return TooLarge(f"the limit is {limit:,} bytes", members={"limit_bytes": limit})

    @contextlib.contextmanager
    def _spool(self) -> Iterator[Path]:
        try:
            with tempfile.NamedTemporaryFile(prefix="notes-", dir=self._folder, delete=False) as file:
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


def _problem_headers(problem: NotesProblem, path: str) -> list[tuple[bytes, bytes]]:
    if isinstance(problem, Busy):
        return [(b"retry-after", str(RETRY_AFTER_S).encode())]
    if isinstance(problem, MethodNotAllowed):
        return [(b"allow", ", ".join(_METHODS[path]).encode())]
    return []


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
