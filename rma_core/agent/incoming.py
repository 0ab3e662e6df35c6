"""One HTTP/1.1 answer as it comes from a service: bytes in, status, headers and body out, with limits and no I/O.

llhttp (by httptools) parses, strictly; it holds no limits of its own, so they are here.
"""

from __future__ import annotations

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpResponseParser

from rma_core.errors import RMAError

#: Bytes that may come without any of the body among them: a head, the line of a chunk's size, trailers.
MAX_HEAD_BYTES = 64 * 1024
#: Headers of one answer, trailers among them.
MAX_HEADERS = 256
#: Interim answers (1xx) before the real one.
MAX_INTERIM = 16
#: Statuses of real answers; the channel knows no others.
FIRST_STATUS, LAST_STATUS = 200, 599
SWITCHING_PROTOCOLS = 101
#: What a header costs beside its name and value.
_HEADER_BYTES = 4


class EndpointError(RMAError):
    """A service on this machine could not be reached, broke off, or does not speak HTTP."""

    code = "endpoint"


class NotNowError(EndpointError):
    """A service has no room for a request now; nobody is to blame."""


class Incoming:
    """One answer, its body as far as it has come and not been taken; `bodiless` for the answer to HEAD."""

    def __init__(self, *, bodiless: bool = False) -> None:
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.body = bytearray()
        #: Something has come; status and headers are there; all of it has come.
        self.begun = self.head_whole = self.whole = False
        #: The connection may carry another request.
        self.reusable = False
        self._bodiless = bodiless
        self._until_closed = False
        self._interim = self._since_body = 0
        self._room = MAX_HEAD_BYTES
        self._wrong = ""
        self._parser: HttpResponseParser | None = HttpResponseParser(self)

    def feed(self, data: bytes | memoryview) -> None:
        """Take what has come. Raises EndpointError when that is no answer, or one beyond the limits."""
        if self._parser is None:
            self.reusable = False
            return
        self.begun = True
        before = (self.head_whole, len(self.body))
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._refuse("it wants to speak another protocol")
        except HttpParserError as error:
            if isinstance(error, HttpParserCallbackError) and not isinstance(error.__context__, HttpParserError):
                # A bug in what the parser calls below.
                raise
            self._refuse(f"it does not speak HTTP as it should: {error}")
        self._count(len(data), progress=before != (self.head_whole, len(self.body)))
        if self.whole or self._wrong:
            # It refers back to this object: without it that is freed at once.
            self._parser = None
        if self._wrong:
            raise EndpointError(self._wrong)

    def closed(self) -> None:
        """Take that nothing follows. Raises EndpointError when something had to."""
        self.reusable, self._parser = False, None
        if self.head_whole and self._until_closed:
            self.whole = True
        if not self.whole:
            raise EndpointError("it closed the connection")

    def _count(self, size: int, *, progress: bool) -> None:
        self._since_body = 0 if progress else self._since_body + size
        if self._since_body > MAX_HEAD_BYTES:
            self._refuse(f"more than {MAX_HEAD_BYTES} bytes of its answer hold nothing")

    def _refuse(self, reason: str) -> None:
        """Keep the first thing that is wrong; behind a whole answer it only spoils the connection."""
        self.reusable = False
        if not self.whole:
            self._wrong = self._wrong or reason

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Note an answer that nobody asked for."""
        if self.whole:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; of trailers only their size counts."""
        self._room -= len(name) + len(value) + _HEADER_BYTES
        if self._room < 0 or len(self.headers) >= MAX_HEADERS:
            self._refuse("the headers of its answer are too large, or too many")
        elif not self.head_whole:
            self.headers.append((name.decode("latin-1").lower(), _text(value)))

    def on_headers_complete(self) -> None:
        """See what kind of answer this is."""
        assert self._parser is not None  # noqa: S101 - it is calling
        self.status = self._parser.get_status_code()
        if self._parser.get_http_version() not in ("1.0", "1.1"):
            self._refuse("its answer is of another version of HTTP")
        if self.status == SWITCHING_PROTOCOLS:
            self._refuse("it wants to speak another protocol")
        if self.status < FIRST_STATUS:
            return
        codings = [value.strip().lower() for name, value in self.headers if name == "transfer-encoding"]
        if self.status > LAST_STATUS:
            self._refuse(f"there is no status {self.status}")
        if codings and codings != ["chunked"]:
            self._refuse("its answer has a transfer coding that nobody asked for")
        sized = bool(codings) or any(name == "content-length" for name, _ in self.headers)
        self._until_closed = not sized and not self._bodiless
        self.head_whole = True
        if self._bodiless:
            self.on_message_complete()

    def on_body(self, data: bytes) -> None:
        """Keep a piece of the body."""
        if self.whole:
            self.reusable = False
        else:
            self.body += data

    def on_message_complete(self) -> None:
        """End the answer, or skip an interim one."""
        if self.whole:
            return
        if self.head_whole:
            assert self._parser is not None  # noqa: S101 - it is calling
            self.whole, self.reusable = True, not self._wrong and self._parser.should_keep_alive()
            return
        self._interim += 1
        if self._interim > MAX_INTERIM or self.status < 100:  # noqa: PLR2004 - the least status there is
            self._refuse("it sends interim answers without end")
        self.headers.clear()
        self._room = MAX_HEAD_BYTES


def _text(value: bytes) -> str:
    """Return a header's value: UTF-8 where it is that, else the Latin-1 of old."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
