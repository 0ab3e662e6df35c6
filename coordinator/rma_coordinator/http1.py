"""HTTP/1.1 for Hypercorn, in place of its own on h11: what a request costs is a third less.

No answer looks whole that is not. HTTP/2 without TLS is not spoken.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hypercorn.events import Closed, RawData, Updated

from rma_coordinator import server
from rma_coordinator.http1_answer import Answer
from rma_coordinator.http1_parser import Head, Parser, Refused
from rma_coordinator.mailbox import AT_ONCE, Mailbox
from rma_coordinator.websocket import Socket, offer_in

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.config import Config
    from hypercorn.events import Event
    from hypercorn.typing import AppWrapper, ConnectionState, TaskGroup, WorkerContext

    from rma_coordinator.http1_parser import Part
    from rma_coordinator.mailbox import Message

    Receive = Callable[[], Awaitable[Message]]

logger = logging.getLogger(__name__)

FAILED = 500
CONTINUE = b"HTTP/1.1 100 \r\n\r\n"
NO_REQUEST = Head(b"", b"", [], "1.1", keeps_alive=False)


class Cut(Closed):
    """The connection is to break, not to end."""


class Exchange(Mailbox):
    """One request and its answer, as an application sees them."""

    __slots__ = ("_http", "scope")

    def __init__(self, http: Http1, scope: Message) -> None:
        super().__init__({"type": "http.disconnect"})
        self._http, self.scope = http, scope

    async def send(self, message: Message) -> None:
        """Send a part of the answer, to whoever is still there. Raises RuntimeError for what is none."""
        if self.gone:
            # Who goes on without looking must not keep everybody else from their turn.
            await asyncio.sleep(0)
            return
        http, answer, kind = self._http, self._http.answer, message["type"]
        if kind == "http.response.body" and answer.begun:
            data = answer.body(message.get("body", b""))
            last = not message.get("more_body", False)
            if last:
                data += answer.end()
            await http.send(RawData(data))
            if last:
                await http.answered()
        elif kind == "http.response.start" and not answer.begun:
            headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            await http.send(RawData(answer.start(message["status"], headers)))
        else:
            raise RuntimeError(f"{kind} has no place here")

    def piece(self, data: bytes) -> bool:
        """Write a piece of an answer in chunks, as an `AtOnce` does."""
        # Once this one is over, what is there is the next request's answer.
        answer = self._http.answer
        return not self.gone and answer.chunked and self._http.at_once(answer.body(data))

    def whole(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Write a whole answer, as an `AtOnce` does, unless one of its headers could add another."""
        http, answer = self._http, self._http.answer
        if self.gone or answer.begun or self.scope["method"] == "HEAD":
            return False
        try:
            if http.at_once(answer.start(status, headers) + answer.body(body) + answer.end()):
                return True
        except RuntimeError as error:
            logger.debug("an answer goes out by messages: %s", error)
        http.answer = answer.anew()
        return False

    async def run(self) -> None:
        """Let the application answer; for one that fails before it began, say so."""
        await self._http.let(self.scope, self.receive, self.send)
        await self._http.ended(self)


def _never(_: bytes) -> bool:
    """Write nothing: there is no connection yet."""
    return False


class Http1:
    """One connection, between Hypercorn's `TCPServer` and the application; in place of its ``ProtocolWrapper``."""

    def __init__(  # noqa: PLR0917 - as Hypercorn calls it
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        task_group: TaskGroup,
        connection_state: ConnectionState,
        ssl: bool,  # noqa: FBT001 - the same
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        send: Callable[[Event], Awaitable[None]],
        alpn_protocol: str | None = None,
    ) -> None:
        del alpn_protocol  # no other is offered
        self.app, self.config, self.context, self.task_group = app, config, context, task_group
        self.connection_state, self.ssl, self.client, self.server = connection_state, ssl, client, server
        self.send = send
        #: Writes what nothing holds up; where it says ``False``, nothing was written.
        self.at_once: Callable[[bytes], bool] = _never
        self.stream: Exchange | Socket | None = None
        self.answer: Answer
        self._parser = Parser()
        #: Parts, and then bytes, that came before the answer to what was there before them.
        self._waiting: list[Part] = []
        self._later = b""
        self._catching_up = False
        self._caught_up = asyncio.Event()
        #: Whether the request is all here.
        self._whole = self._closed = False

    async def initiate(self) -> None:
        """Nothing: a client begins."""

    async def handle(self, event: Event) -> None:
        """Take what came, or the end of the connection."""
        if isinstance(event, Closed):
            self._over()
            self._close_stream()
        elif isinstance(event, RawData) and event.data and not self._closed:
            if self._waiting or self._catching_up:
                await self._keep(event.data)
            elif self._parser.rest is None:
                await self._received(event.data)
            else:
                await self._frames(event.data)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _received(self, data: bytes) -> None:
        refused: list[Refused] = []
        try:
            found = self._parser.feed(data)
        except Refused as error:
            found, refused = self._parser.found, [error]
        await self._take([*found, *refused])

    async def _take(self, parts: Sequence[Part]) -> None:
        """Hand parts on, but for what follows a request that is not answered yet: that waits."""
        for index, part in enumerate(parts):
            # What is refused may be the next request, or this one's body.
            if self.stream is not None and (isinstance(part, Head) or (isinstance(part, Refused) and self._whole)):
                self._waiting += parts[index:]
                return
            await self._part(part)
            if self._closed:
                return
        if rest := self._parser.rest:
            await self._frames(rest)

    async def _keep(self, data: bytes) -> None:
        """Keep what came before its turn, so that the end of the connection is seen meanwhile."""
        self._later += data
        while len(self._later) > server.MAX_HEAD_BYTES and not self._closed:
            self._caught_up.clear()
            await self._caught_up.wait()

    async def _catch_up(self) -> None:
        """Go on with what waited for the end of an answer."""
        waited = self._waiting.copy()
        self._waiting.clear()
        await self._take(waited)
        while self._later and not self._waiting and not self._closed:
            data, self._later = self._later, b""
            await (self._received(data) if self._parser.rest is None else self._frames(data))
        self._catching_up = False
        self._caught_up.set()

    async def _frames(self, data: bytes) -> None:
        if isinstance(self.stream, Socket):
            await self.stream.take(data)

    async def _part(self, part: Part) -> None:
        if isinstance(part, Head):
            await self._begin(part)
        elif isinstance(part, Refused):
            await self._refuse(part)
        else:
            self._whole = part is None
            if isinstance(self.stream, Exchange):
                await self.stream.put({"type": "http.request", "body": part or b"", "more_body": part is not None})

    async def _begin(self, head: Head) -> None:
        await self.send(Updated(idle=False))
        if self._closed:
            return
        self._whole, self.answer = False, Answer(head, self.config)
        path, _, query = head.target.partition(b"?")
        scope = {
            "type": "http",
            "http_version": head.version,
            "asgi": {"spec_version": "2.1", "version": "3.0"},
            "method": head.method.decode("ascii"),
            "scheme": "https" if self.ssl else "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": self.config.root_path,
            "headers": head.headers,
            "client": self.client,
            "server": self.server,
            "state": self.connection_state.copy(),
            "extensions": {},
        }
        if head.upgrades:
            try:
                offer = offer_in(head)
            except Refused as refused:
                await self._refuse(refused)
                return
            self.stream = Socket(self, scope, offer, most=self.config.websocket_max_message_size)
        else:
            self.stream = Exchange(self, scope)
            # Whoever takes a call up takes it out: both would live on in each other.
            scope["extensions"] = {AT_ONCE: self.stream}
        self.task_group.spawn(self.stream.run)
        if head.expects:
            await self.send(RawData(CONTINUE))

    async def let(self, scope: Message, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """Let the application do its work; what it raises is logged."""
        try:
            await self.app(scope, receive, send, None, None)  # type: ignore[arg-type]
        except Exception:  # noqa: BLE001 - the application's own, whatever it is
            await self.config.log.exception("Error in ASGI Framework")

    # -- answers -------------------------------------------------------------------------------------------------------

    async def say(self, data: bytes) -> None:
        """Send what a WebSocket has to say, while anybody may hear it."""
        if not self._closed:
            await self.send(RawData(data))

    async def ended(self, exchange: Exchange) -> None:
        """The application has nothing more to say, whether it has answered or not."""
        if self.stream is exchange and not exchange.gone:
            if not self.answer.begun:
                await self.send(RawData(self.answer.short(FAILED)))
            await self.answered()

    async def answered(self) -> None:
        """Wait for the next request, or close the connection where that cannot be."""
        answer, goes_on = self.answer, self._whole and not self._closed and not self.context.terminated.is_set()
        self._close_stream()
        if goes_on and answer.done and answer.keeps_alive:
            if self._waiting:
                self._catching_up = True
                self.task_group.spawn(self._catch_up)
            else:
                await self.send(Updated(idle=True))
        else:
            self._over()
            # Of one that lasts until the end of the connection only that end could say that it was cut.
            cut = answer.begun and not answer.done and answer.left is None
            await self.send(Cut() if cut else Closed())

    async def _refuse(self, refused: Refused) -> None:
        """Say that what came is no request, unless an answer has begun, and close."""
        if self._closed:
            return
        if self.stream is None:
            self.answer = Answer(NO_REQUEST, self.config)
        said = b"" if self.answer.begun else self.answer.short(refused.status, *refused.headers)
        self._over()
        self._close_stream()
        await self.send(RawData(said))
        await self.send(Closed())

    def _over(self) -> None:
        self._closed = True
        self._caught_up.set()

    def _close_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.leave()
