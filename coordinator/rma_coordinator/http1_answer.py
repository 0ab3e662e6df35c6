"""Answers of HTTP/1.1 as bytes: none looks whole that is not, and none has more headers than it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rma_coordinator.relay import BODILESS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rma_coordinator.http1_parser import Head, Headers

#: The first status that is an answer and no word on the way to one.
FINAL = 200


class Config(Protocol):
    """A server's configuration."""

    def response_headers(self, protocol: str) -> Headers:
        """Return the headers of every answer."""


class Answer:
    """How an answer is written: its head, then its body by the length that it said, in chunks, or until the end."""

    __slots__ = ("_config", "_head", "begun", "done", "keeps_alive", "left", "silent")

    def __init__(self, head: Head, config: Config) -> None:
        self._head, self._config = head, config
        self.begun = self.done = self.silent = False
        self.keeps_alive = head.keeps_alive and not head.upgrades
        #: Bytes that are left of one that said its length; -1 for one in chunks, ``None`` for one until the end.
        self.left: int | None = -1

    def anew(self) -> Answer:
        """Return what it was before it began."""
        return Answer(self._head, self._config)

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the head. Raises RuntimeError for one that would be more than that."""
        written = [*headers, *self._config.response_headers("h11")]
        if status >= FINAL:
            self._settle(status, written)
        lines = [b"HTTP/1.1 %d " % status, *[b"%b: %b" % header for header in written], b"", b""]
        text = b"\r\n".join(lines)
        if text.count(b"\n") != len(lines) - 1 or text.count(b"\r") != len(lines) - 1 or b"\0" in text:
            raise RuntimeError("a header of an answer has a line of its own")
        self.begun = status >= FINAL
        return text

    def short(self, status: int, *more: tuple[bytes, bytes]) -> bytes:
        """Return an answer that is its status and perhaps some headers, the last on its connection."""
        return self.start(status, [*more, (b"content-length", b"0"), (b"connection", b"close")])

    def _settle(self, status: int, headers: Headers) -> None:
        """Decide how the body is written, and whether another request may follow."""
        closes = False
        for name, value in headers:
            if name == b"content-length":
                self.left = int(value)
            elif name == b"connection":
                closes = value.lower() == b"close"
        if closes:
            self.keeps_alive = False
        elif not self.keeps_alive:
            headers.append((b"connection", b"close"))
        if status in BODILESS or self._head.method == b"HEAD":
            self.left, self.silent = 0, True
        elif self.left == -1 and self._head.version == "1.1":
            headers.append((b"transfer-encoding", b"chunked"))
        elif self.left == -1:
            self.left = None

    @property
    def chunked(self) -> bool:
        """Whether its body is on its way in chunks."""
        return self.left == -1 and self.begun and not self.done

    def body(self, data: bytes) -> bytes:
        """Return a part of the body. Raises RuntimeError where there is more than was said."""
        if self.silent:
            return b""
        if not data or self.left is None:
            return data
        if self.left == -1:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if len(data) > self.left:
            raise RuntimeError("an answer is longer than it said")
        self.left -= len(data)
        return data

    def end(self) -> bytes:
        """Return what ends the body. Raises RuntimeError where there is less than was said."""
        if self.left is not None and self.left > 0:
            raise RuntimeError("an answer is shorter than it said")
        self.done = True
        return b"0\r\n\r\n" if self.left == -1 else b""
