"""WebSocket for both servers, in place of their libraries: those cost up to a tenth of all that a request does.

The server sends no pings: the agent does.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from rma_coordinator.http1_parser import BAD_REQUEST, UPGRADE_REQUIRED, Refused
from rma_coordinator.mailbox import HAND_OVER, Mailbox
from rma_coordinator.websocket_frames import (
    ABNORMAL,
    BINARY,
    CLOSE,
    FAILED,
    GOING_AWAY,
    NORMAL,
    PONG,
    TEXT,
    End,
    Frames,
    Ping,
    closing,
    frame,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rma_coordinator.http1_answer import Answer
    from rma_coordinator.http1_parser import Head
    from rma_coordinator.mailbox import Message

#: What stands behind a client's key in what the answer proves (RFC 6455, 1.3), and the length of the key itself.
GUID, KEY_BYTES = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 16
VERSION = b"13"
#: Bytes of a first message.
FIRST_BYTES = 256 * 1024
#: Headers that announce a body.
BODY = (b"content-length", b"transfer-encoding")
SWITCHING, FORBIDDEN, BROKEN = 101, 403, 500


class Offer(NamedTuple):
    """What a client's handshake says: its key, and the subprotocols that it speaks."""

    key: bytes
    subprotocols: list[str]


def offer_in(head: Head) -> Offer:
    """Return what a handshake says. Raises Refused."""
    if head.method != b"GET" or head.version != "1.1":
        raise Refused
    headers = head.headers
    if any(name in BODY and value.strip(b"0 ") for name, value in headers):
        # It would be read as frames.
        raise Refused
    keys = [value for name, value in headers if name == b"sec-websocket-key"]
    versions = [value for name, value in headers if name == b"sec-websocket-version"]
    if versions != [VERSION]:
        raise Refused(UPGRADE_REQUIRED if versions else BAD_REQUEST, (b"sec-websocket-version", VERSION))
    try:
        good = len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == KEY_BYTES
    except binascii.Error:
        good = False
    if not good:
        raise Refused
    spoken = b",".join([value for name, value in headers if name == b"sec-websocket-protocol"]).decode("latin-1")
    return Offer(keys[0], [one.strip() for one in spoken.split(",") if one.strip()])


class Line(Protocol):
    """A connection that has become a WebSocket's, as a server gives it."""

    #: What it serves; none once that is over.
    stream: Any
    #: The answer to its handshake.
    answer: Answer

    async def let(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]], /
    ) -> None:
        """Let the application do its work; what it raises is logged."""

    async def say(self, data: bytes) -> None:
        """Send, while anybody may hear it."""

    async def answered(self) -> None:
        """End it."""


class Socket(Mailbox):
    """One WebSocket, from its handshake to its end, as an application sees it.

    ``scope`` is that of the request that it began as; a message may have ``most`` bytes, the first one FIRST_BYTES.
    """

    __slots__ = ("_frames", "_hears", "_line", "_offer", "_scope", "_state")

    def __init__(self, line: Line, scope: Message, offer: Offer, *, most: int) -> None:
        super().__init__({"type": "websocket.disconnect", "code": ABNORMAL})
        self._line, self._offer = line, offer
        self._scope = scope | {
            "type": "websocket",
            "asgi": {"spec_version": "2.3", "version": "3.0"},
            "scheme": "wss" if scope["scheme"] == "https" else "ws",
            "subprotocols": offer.subprotocols,
            "extensions": {"websocket.http.response": {}, HAND_OVER: self.hand_over},
        }
        del self._scope["method"]
        # Nobody knows yet who that is: the first message says so, and is short.
        self._frames = Frames(most, first=min(most, FIRST_BYTES))
        self._state: Literal["asked", "open", "refused", "over"] = "asked"
        self._told.append({"type": "websocket.connect"})
        #: What takes messages at once, where the application has given it.
        self._hears: Callable[[Sequence[str | bytes]], None] | None = None

    async def run(self) -> None:
        """Let the application have it; where that ends before the other side knows, say so."""
        # What both hold would live on in each other.
        scope, self._scope = self._scope, {}
        await self._line.let(scope, self.receive, self.send)
        self._hears = None
        # An application that was told of the end first did not bring it about.
        code = GOING_AWAY if self.gone else FAILED
        self.leave()
        if self._state == "asked":
            await self._refuse(BROKEN)
        elif self._state == "open":
            await self._close(closing(code))
        await self._finish()

    # -- what comes ----------------------------------------------------------------------------------------------------

    def hand_over(self, hears: Callable[[Sequence[str | bytes]], None]) -> None:
        """Hand messages to ``hears`` the moment they come, those of one read together; it is quick and raises nothing.

        Those before are received, as is the end. A task's turn for each message costs a twelfth of what a token does.
        """
        self._hears = hears

    async def take(self, data: bytes) -> None:
        """Take what came; who speaks before being let in is not."""
        if self._state == "asked":
            await self._refuse(BAD_REQUEST)
            return
        ping: Ping | None = None
        end: End | None = None
        messages: list[str | bytes] = []
        for found in self._frames.feed(data) if self._state == "open" else ():
            if type(found) is bytes or type(found) is str:
                messages.append(found)
            elif isinstance(found, Ping):
                # The last of several is answered (RFC 6455, 5.5.3): each answer is a write.
                ping = found
            elif isinstance(found, End):
                end = found
        if messages and self._hears is not None and not self._told and not self.gone:
            self._hears(messages)
        else:
            for message in messages:
                await self.put(_received(message))
        if ping is not None and self._state == "open":
            await self._line.say(frame(PONG, ping.payload))
        if end is not None:
            await self._ended(end)

    async def _ended(self, end: End) -> None:
        self.leave({"type": "websocket.disconnect", "code": end.code})
        if self._state == "open":
            await self._close(frame(CLOSE, end.answer))
        await self._finish()

    # -- what is said --------------------------------------------------------------------------------------------------

    async def send(self, message: Message) -> None:
        """Send, to whoever is still there. Raises RuntimeError for what has no place here."""
        if self.gone:
            # Who goes on without looking must not keep everybody else from their turn.
            await asyncio.sleep(0)
            return
        kind, state = message["type"], self._state
        if state == "open" and kind == "websocket.send":
            data: bytes | None = message.get("bytes")
            await self._line.say(frame(TEXT, message["text"].encode()) if data is None else frame(BINARY, data))
        elif state == "open" and kind == "websocket.close":
            await self._close(closing(int(message.get("code", NORMAL)), message.get("reason") or ""))
        elif state == "asked" and kind == "websocket.accept":
            await self._accept(message)
        elif state == "asked" and kind == "websocket.close":
            await self._refuse(FORBIDDEN)
        elif state == "asked" and kind == "websocket.http.response.start":
            self._state = "refused"
            await self._line.say(self._line.answer.start(message["status"], message.get("headers", ())))
        elif state == "refused" and kind == "websocket.http.response.body":
            await self._explain(message)
        else:
            raise RuntimeError(f"{kind} has no place here")

    async def _accept(self, message: Message) -> None:
        headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
        # No secret: it shows that the answer is one to this very handshake.
        proof = hashlib.sha1(self._offer.key + GUID, usedforsecurity=False).digest()
        headers.append((b"sec-websocket-accept", base64.b64encode(proof)))
        spoken: Any = message.get("subprotocol")
        if spoken is not None:
            if spoken not in self._offer.subprotocols:
                raise RuntimeError(f"the client does not speak {spoken}")
            headers.append((b"sec-websocket-protocol", spoken.encode()))
        said = self._line.answer.start(SWITCHING, [*headers, *message.get("headers", ())])
        self._state = "open"
        await self._line.say(said)

    async def _explain(self, message: Message) -> None:
        """Send a part of what an application answers instead of letting somebody in."""
        data, last = self._line.answer.body(message.get("body", b"")), not message.get("more_body", False)
        if last:
            data += self._line.answer.end()
            self._state = "over"
        await self._line.say(data)
        if last:
            await self._finish()

    async def _refuse(self, status: int) -> None:
        self.leave()
        self._state = "over"
        await self._line.say(self._line.answer.short(status))
        await self._finish()

    async def _close(self, last: bytes) -> None:
        self._state = "over"
        await self._line.say(last)

    async def _finish(self) -> None:
        if self._line.stream is self:
            await self._line.answered()


def _received(message: str | bytes) -> Message:
    text, content = (message, None) if isinstance(message, str) else (None, message)
    return {"type": "websocket.receive", "bytes": content, "text": text}
