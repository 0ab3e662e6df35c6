"""Requests out of bytes, by llhttp: nearly as strict as h11.

A request without one host, with a body whose length is in doubt, or with a head without end, is refused.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import httptools

from rma_coordinator import server

BAD_REQUEST, UPGRADE_REQUIRED, TOO_LARGE, NOT_IMPLEMENTED = 400, 426, 431, 501
VERSIONS = frozenset({"1.0", "1.1"})
Headers: TypeAlias = list[tuple[bytes, bytes]]


class Head(NamedTuple):
    """A request, up to its body."""

    method: bytes
    target: bytes
    headers: Headers
    version: str
    keeps_alive: bool
    upgrades: bool = False
    expects: bool = False


class Refused(Exception):
    """What came is no request that could be answered; ``status`` and ``headers`` are what it is told."""

    def __init__(self, status: int = BAD_REQUEST, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(status)
        self.status, self.headers = status, headers


#: A request up to its body, a part of that, its end, or that what came is none.
Part: TypeAlias = Head | bytes | Refused | None


class Parser:
    """Bytes in, and out of them the parts of requests: a `Head`, the bytes of its body, then None for its end."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._found: list[Head | bytes | None] = []
        self._url, self._headers = b"", list[tuple[bytes, bytes]]()
        self._keeps_alive = True
        #: Whether the last request is whole.
        self._ended = True
        #: Bytes since something came out of them.
        self._kept = 0
        #: What a request that would change the protocol says of its body, which llhttp does not read.
        self._framing: bytes | None = None
        self._in_head = self._resumes = False
        #: What follows the head of a WebSocket.
        self.rest: bytes | None = None

    def feed(self, data: bytes) -> list[Head | bytes | None]:
        """Return the parts that are whole now. Raises Refused, with what came before it in ``found``."""
        found: list[Head | bytes | None] = []
        self._found = found
        self._kept += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserCallbackError as error:
            raise error.__context__ if isinstance(error.__context__, Refused) else Refused from None
        except httptools.HttpParserError:
            # What follows a request after which the connection is closed is nobody's.
            if self._keeps_alive or not self._ended:
                raise Refused from None
        if found:
            self._kept = 0
        elif self._kept > server.MAX_HEAD_BYTES:
            raise Refused(TOO_LARGE)
        return found

    @property
    def found(self) -> list[Head | bytes | None]:
        """The parts that were whole before one was refused."""
        return self._found

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                if self._framing is None:
                    self.rest = data
                    return
                self._resume()
            else:
                return

    def _resume(self) -> None:
        """Read on in a request that would have changed the protocol: it is answered as it is."""
        if self._framing:
            self._resumes = True
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % self._framing)
        self._framing = None

    # -- called by llhttp ----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head, self._ended = not self._resumes, False
        self._url, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those after a body say nothing to us."""
        if self._in_head:
            self._headers.append((name.lower(), value.strip()))

    def on_headers_complete(self) -> None:
        """The head is whole. Raises Refused."""
        if not self._in_head:
            return
        self._in_head = False
        parser, version = self._parser, self._parser.get_http_version()
        framing, upgrade, expects, closes = _facts(self._headers, version)
        method = parser.get_method()
        websocket = upgrade == b"websocket" and method == b"GET" and parser.should_upgrade()
        if parser.should_upgrade() and not websocket:
            self._framing = framing
        self._keeps_alive = version == "1.1" and not closes
        self._found.append(
            Head(
                method, self._url, self._headers, version, self._keeps_alive, websocket,
                expects=expects and bool(framing) and version == "1.1",
            )
        )  # fmt: skip

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._found.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self._framing:
            self._resumes, self._ended = False, True
            self._found.append(None)


def _facts(headers: Headers, version: str) -> tuple[bytes, bytes, bool, bool]:
    """Return what a request says of the length of its body, the protocol it wants, whether it waits, and closes.

    Raises Refused.
    """
    hosts, framing, upgrade, expects, closes = 0, b"", b"", False, False
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"content-length":
            framing = b"content-length: %b\r\n" % value if value.strip(b"0") else b""
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise Refused(NOT_IMPLEMENTED)
            framing = b"transfer-encoding: chunked\r\n"
        elif name == b"connection":
            closes = closes or b"close" in [token.strip() for token in value.lower().split(b",")]
        elif name == b"upgrade":
            upgrade = value.lower()
        elif name == b"expect":
            expects = value.lower() == b"100-continue"
    if version not in VERSIONS or hosts > 1 or (not hosts and version == "1.1"):
        raise Refused
    return framing, upgrade, expects, closes
