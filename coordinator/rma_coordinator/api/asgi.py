"""Small helpers for the handlers below Quart: bodies with limits and timeouts, answers whose every send is bounded."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import types
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from rma_coordinator.api.problems import HTTPProblem, problem
from rma_coordinator.api.waiting import go_on, within
from rma_coordinator.mailbox import AT_ONCE
from rma_coordinator.relay import BODILESS
from rma_core.errors import NotAuthenticated
from rma_core.models.strict import encode

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Generator,
        Mapping,
        MutableMapping,
        Sequence,
    )

    from rma_coordinator.mailbox import AtOnce
    from rma_core.errors import RMAError

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]

#: A client or worker that sends nothing for this long, or does not take what it asked for, is cut.
PATIENCE_S = 30.0
#: Bodies must arrive at least this fast once they are large, so that a trickle cannot hold a place for hours.
LEAST_BYTES_PER_S = 1000
#: More digits than this is no length of anything.
MOST_DIGITS = 15
#: Seconds for the rest of a body whose call has been answered already.
LINGER_S = 2.0
#: The longest body of a control call (registration, heartbeat).
CONTROL_BYTES = 4 * 1024 * 1024
#: Larger answers go by messages, for which Hypercorn's server waits: what a client does not read stays counted.
AT_ONCE_BYTES = 64 * 1024
#: A body that says it is no longer than this must be whole within PATIENCE_S.
QUICK_BYTES = 64 * 1024
JSON, NO_STORE = (b"content-type", b"application/json"), (b"cache-control", b"no-store")
#: What may not stand in a header's value (RFC 9110, 5.5).
FORBIDDEN = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Gone(Exception):
    """The other side closed the connection, or stopped reading."""


class Lingering:
    """The two ends of one request; an answer given before its body has come is kept open until that is read.

    A connection closed with unread data on it is reset, and the sender never sees the answer that explains why.
    """

    _receive: Receive
    _send: Send
    _over = False
    #: Made when somebody waits for the body's end, which is seldom.
    _end: asyncio.Event | None = None

    async def receive(self) -> Message:
        """Receive, and note the body's end."""
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._over = True
            if self._end is not None:
                self._end.set()
        return message

    async def hand_on(self, message: Message) -> None:
        """Send; the end of an answer waits for the end of the body, for LINGER_S at most."""
        last = message["type"] == "http.response.body" and not message.get("more_body")
        if last and not self._over:
            await self._send({**message, "more_body": True})
            await self._drain()
            await self._end_early()
            return
        await self._send(message)

    async def _end_early(self) -> None:
        """End an answer while its body still comes.

        The server tells us of the end through the queue that the body fills: unless somebody empties it, it waits
        there for ever, and the sender keeps a connection that nothing closes.
        """
        reading = asyncio.create_task(self._throw_away(), name="what follows an answer")
        try:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _drain(self) -> None:
        self._end = asyncio.Event()
        reading = asyncio.create_task(self._throw_away(), name="the rest of a body")
        over = asyncio.create_task(self._end.wait(), name="the end of a body")
        try:
            await asyncio.wait({reading, over}, timeout=LINGER_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, over):
                task.cancel()
            await asyncio.wait({reading, over})

    async def _throw_away(self) -> None:
        # Somebody else may read the body meanwhile, and be given its end.
        while not self._over:
            await self.receive()


class Call(Lingering):
    """One HTTP request below Quart: its scope in convenient form, and bounded ways to read and answer."""

    #: What stands in the path where the route has names; set by whoever found the route.
    parts: Mapping[str, str] = types.MappingProxyType({})
    started = False
    #: Seconds for the whole call from its first wait on; ``None`` when each of its waits has a bound of its own.
    bound_s: float | None = None

    def __init__(self, scope: Message, receive: Receive, send: Send, *, proxies: Sequence[str] = ()) -> None:
        self._receive = receive
        self._send = send
        extensions = scope.get("extensions")
        self._at_once: AtOnce | None = extensions.pop(AT_ONCE, None) if extensions else None
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        #: The headers as they came; servers hand their names over in lower case.
        self.raw: dict[bytes, bytes] = dict(scope["headers"])
        self._proxies = proxies

    def mark(self, extra: list[tuple[bytes, bytes]]) -> None:
        """Give the answer further headers, whatever it becomes."""
        send = self._send

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        self._send, self._at_once = marked, None

    @functools.cached_property
    def headers(self) -> dict[str, str]:
        """The headers, their names in lower case; of one that is there twice, the last."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw.items()}

    @functools.cached_property
    def query(self) -> dict[str, str]:
        """The query; of a name that is there twice, the last value."""
        text = self.scope.get("query_string", b"").decode("latin-1")
        return {name: values[-1] for name, values in parse_qs(text).items()}

    def _header(self, name: bytes) -> str:
        return self.raw.get(name, b"").decode("latin-1")

    @property
    def ip_address(self) -> str:
        """The caller's address; forwarding headers are believed from configured proxies only."""
        client = self.scope.get("client")
        if client and b"x-forwarded-for" not in self.raw:
            return str(client[0])
        return client_address(self.scope.get("client"), self._header(b"x-forwarded-for"), self._proxies)

    @property
    def bearer(self) -> str:
        """The credential of the request. Raises NotAuthenticated."""
        return bearer(self._header(b"authorization"))

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """Return a number from the query. Raises HTTPProblem (400)."""
        text = self.query.get(name)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise HTTPProblem(400, f"{name} is a number from {least:g} to {most:g}, not {text!r}", code="query")
        return value

    def check_body(self, limit: int) -> int:
        """Refuse, before reading, a body that is too large or encoded; return its length, 0 when it says none.

        Raises HTTPProblem.
        """
        if b"content-encoding" in self.raw:
            check_encoding(self._header(b"content-encoding"))
        text = self.raw.get(b"content-length", b"0")
        if not text.isdigit() or len(text) > MOST_DIGITS or (length := int(text)) > limit:
            raise too_large(limit)
        return length

    async def chunks(
        self, limit: int, *, patience_s: float = PATIENCE_S, least_bytes_per_s: float = LEAST_BYTES_PER_S
    ) -> AsyncIterator[bytes]:
        """Yield the body as it comes; ``least_bytes_per_s`` of 0 takes it as slowly as it comes.

        Raises HTTPProblem (408, 413), Gone when the sender leaves before its end.
        """
        loop, total = asyncio.get_running_loop(), 0
        began = loop.time()
        while True:
            try:
                message = await within(patience_s, self.receive())
            except TimeoutError:
                raise HTTPProblem(408, f"nothing of the body came for {patience_s:.0f} s") from None
            if message["type"] == "http.disconnect":
                raise Gone
            total += len(message.get("body", b""))
            if total > limit:
                raise too_large(limit)
            if least_bytes_per_s and loop.time() - began > patience_s + total / least_bytes_per_s:
                raise HTTPProblem(408, f"the body comes slower than {least_bytes_per_s:g} bytes a second")
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body"):
                return

    async def body(self, limit: int = CONTROL_BYTES) -> bytes:
        """Return the whole body of a control call."""
        # The server holds the sender to the length that it says.
        if 0 < self.check_body(limit) <= QUICK_BYTES:
            try:
                return await within(PATIENCE_S, self._whole())
            except TimeoutError:
                raise too_slow(PATIENCE_S) from None
        return b"".join([chunk async for chunk in self.chunks(limit)])

    def short_body(self) -> Awaitable[bytes]:
        """Return what gives the whole body of the hottest call; a short one sets one bound for all waits of the call.

        Raises HTTPProblem.
        """
        if 0 < self.check_body(CONTROL_BYTES) <= QUICK_BYTES:
            self.bound_s = PATIENCE_S
            return self._whole()
        return self.body()

    async def _whole(self) -> bytes:
        body, more = b"", True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        # Nobody else can wait for the end of it: the handler that reads it has not answered.
        self._over = True
        return body

    async def send(self, message: Message, *, patience_s: float = PATIENCE_S) -> None:
        """Send, or give up on one who does not read. Raises Gone."""
        try:
            await within(patience_s, self.hand_on(message))
        except (TimeoutError, OSError):
            raise Gone from None

    def push(self, data: bytes) -> Coroutine[Any, Any, None] | None:
        """Send a piece of the answer at once, which is not its end. Raises Gone.

        Returns what is to be awaited first where the connection takes no more now; that raises Gone too, and may be
        closed instead of awaited.
        """
        if self._at_once is not None and self._at_once.piece(data):
            return None
        steps = self._send({"type": "http.response.body", "body": data, "more_body": True}).__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            return None
        except OSError:
            raise Gone from None
        return _bounded(steps, waits_for)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Begin an answer; headers that HTTP cannot carry are left out."""
        await self.begin(status, raw(headers))

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin an answer with headers that are as they must be."""
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece of the answer; ``more=False`` ends it."""
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Send a whole answer; statuses that have no body say no length either."""
        length = {} if status in BODILESS else {"content-length": str(len(body))}
        await self.start(status, {**headers, **length})
        await self.write(b"" if status in BODILESS else body, more=False)

    async def json(self, value: object, status: int = 200, *, headers: Mapping[str, str] | None = None) -> None:
        """Send a record or plain data as JSON."""
        body = encode(value)
        # What answers a POST is kept by nobody who was not told to.
        more = [] if self.method == "POST" else [NO_STORE]
        if headers:
            more += raw(headers)
        last = {"type": "http.response.body", "body": body, "more_body": False}
        try:
            await within(PATIENCE_S, self.both(json_head(len(body), status, more), last))
        except TimeoutError:
            raise Gone from None

    async def give(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Send a whole answer whose headers are as they must be, but for its length. Raises Gone."""
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        small = self._over and len(body) <= AT_ONCE_BYTES
        if small and self._at_once is not None and self._at_once.whole(status, headers, body):
            self.started = True
            return
        first = {"type": "http.response.start", "status": status, "headers": headers}
        last = {"type": "http.response.body", "body": body, "more_body": False}
        try:
            await within(PATIENCE_S, self.both(first, last))
        except TimeoutError:
            raise Gone from None

    async def both(self, first: Message, last: Message) -> None:
        """Send the two messages of a whole answer; whoever awaits it bounds its time. Raises Gone."""
        self.started = True
        try:
            await self._send(first)
            await (self._send(last) if self._over else self.hand_on(last))
        except OSError:
            raise Gone from None

    async def problem(self, error: RMAError, **more: object) -> None:
        """Send an expected failure."""
        await self.answer(*problem(error, **more))

    async def left(self) -> None:
        """Return when the client has gone; further parts of its request are thrown away."""
        while (await self.receive())["type"] != "http.disconnect":
            pass


async def _bounded(steps: Generator[Any, Any, None], waits_for: object) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            await go_on(steps, waits_for)
    except (TimeoutError, OSError):
        raise Gone from None


def json_head(length: int, status: int = 200, more: Sequence[tuple[bytes, bytes]] = ()) -> Message:
    """Return the message that begins an answer in JSON, with ``more`` headers."""
    headers = [JSON, (b"content-length", b"%d" % length), *more]
    return {"type": "http.response.start", "status": status, "headers": headers}


def raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as ASGI has them, without those that HTTP cannot carry."""
    return [(name.encode(), data) for name, value in headers.items() if (data := header_value(value)) is not None]


def header_value(text: str) -> bytes | None:
    """Return a header's value as bytes, or ``None`` for one with control characters, which HTTP cannot carry."""
    try:
        data = text.strip().encode("latin-1")
    except UnicodeEncodeError:
        # What is beyond Latin-1 was UTF-8 on its way here, and goes on as such.
        data = text.strip().encode("utf-8", "replace")
    return None if FORBIDDEN.search(data) else data


def check_encoding(encoding: str) -> None:
    """Refuse a body with a Content-Encoding, whose size nobody knows. Raises HTTPProblem (415)."""
    if encoding.strip().lower() not in ("", "identity"):
        raise HTTPProblem(415, f"a body with Content-Encoding {encoding!r} is not taken", hints=("send it unencoded",))


def too_slow(seconds: float) -> HTTPProblem:
    """Return the refusal of a body that took longer than ``seconds``."""
    return HTTPProblem(408, f"the body was not whole within {seconds:.0f} s")


def too_large(limit: int) -> HTTPProblem:
    """Return the refusal of a body over ``limit`` bytes."""
    return HTTPProblem(413, f"a body may have at most {limit} bytes")


def bearer(header: str) -> str:
    """Return the credential in an Authorization header. Raises NotAuthenticated."""
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise NotAuthenticated("a credential is needed: Authorization: Bearer …", hints=("keys: `rma keys create`",))
    return secret.strip()


def client_address(peer: Sequence[Any] | None, forwarded: str, proxies: Sequence[str]) -> str:
    """Return who calls: the peer, or what a trusted proxy says of it (the last address that is no proxy itself)."""
    address = str(peer[0]) if peer else ""
    if not forwarded:
        return address
    for hop in reversed([part.strip() for part in forwarded.split(",") if part.strip()]):
        if not _trusted(address, proxies) or not _is_address(hop):
            break
        address = hop
    return address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _trusted(address: str, proxies: Sequence[str]) -> bool:
    try:
        ip = ipaddress.ip_address(address)
        return any(ip in ipaddress.ip_network(network, strict=False) for network in proxies)
    except ValueError:
        return False
