"""A real https server for tests of downloads: ranges, cut connections, redirects, and servers that do it wrong."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.certificate import own_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: Bytes that are sent at once.
PIECE = 65_536


class Asked(NamedTuple):
    """One request: its path, and the range that was asked for (empty: all of it)."""

    path: str
    range: str


class FileServer:
    """What the server has and does; tests change it between requests."""

    def __init__(self, certificate: Path) -> None:
        self.certificate = certificate
        self.port = 0
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        #: Bytes after which the next connections are cut, one each; then no more.
        self.cuts: list[int] = []
        #: Statuses of the next answers instead of the file.
        self.statuses: list[int] = []
        self.ranges = True
        self.lengths = True
        #: Seconds between two pieces.
        self.pause_s = 0.0
        #: Is called with the bytes that were sent before each piece.
        self.before_piece: Callable[[int], None] = lambda _: None
        self.asked: list[Asked] = []
        self.sent_bytes = 0

    @property
    def place(self) -> str:
        """Return host and port, as an owner names them."""
        return f"localhost:{self.port}"

    def url(self, path: str) -> str:
        return f"https://{self.place}{path}"

    def context(self) -> ssl.SSLContext:
        """Return what trusts this server and nobody else."""
        return ssl.create_default_context(cafile=str(self.certificate))


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """Serve until the end of the block."""
    pair = own_pair(folder / "tls", names=["localhost"])
    made = FileServer(pair.cert)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            serve(made, self)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    # The handshake is made in the connection's own thread.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    made.port = server.server_port
    running = threading.Thread(target=server.serve_forever, daemon=True)
    running.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        running.join(10)


def serve(server: FileServer, request: BaseHTTPRequestHandler) -> None:
    asked = request.headers.get("range", "")
    server.asked.append(Asked(request.path, asked))
    request.close_connection = True
    with contextlib.suppress(OSError):
        if server.statuses:
            _short(request, server.statuses.pop(0))
        elif request.path in server.redirects:
            _short(request, 302, location=server.redirects[request.path])
        elif request.path not in server.files:
            _short(request, 404)
        else:
            _file(server, request, server.files[request.path], asked)


def _short(request: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    request.send_response(status)
    for name, value in {**headers, "content-length": "0", "connection": "close"}.items():
        request.send_header(name, value)
    request.end_headers()


def _file(server: FileServer, request: BaseHTTPRequestHandler, data: bytes, asked: str) -> None:
    begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
    if begin >= len(data):
        _short(request, 416)
        return
    request.send_response(206 if begin else 200)
    if begin:
        request.send_header("content-range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
    if server.lengths:
        request.send_header("content-length", str(len(data) - begin))
    request.send_header("connection", "close")
    request.end_headers()
    end = min(len(data), begin + server.cuts.pop(0)) if server.cuts else len(data)
    for start in range(begin, end, PIECE):
        server.before_piece(start)
        piece = data[start : min(start + PIECE, end)]
        request.wfile.write(piece)
        server.sent_bytes += len(piece)
        if server.pause_s:
            time.sleep(server.pause_s)
