"""The services `notes` and `ocr` as the tests use them: the real process, asked over HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds until a started server answers, and until anything else that is waited for has happened.
PATIENCE_S = 30.0
#: Seconds until an answer is there; a page that is recognised takes many where others use the machine too.
READ_S = 100.0

T = TypeVar("T")


class Reply(NamedTuple):
    """A response with its JSON."""

    status: int
    headers: dict[str, str]
    json: Any


class Server(NamedTuple):
    """A running service."""

    process: subprocess.Popen[bytes]
    port: int

    def request(self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READ_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=named)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, json.load(response))

    def notes(self, body: bytes, content_type: str = "", query: str = "") -> Reply:
        return self.request("POST", f"/notes?{query}", body, content_type=content_type)

    def ocr(self, body: bytes, content_type: str = "", query: str = "") -> Reply:
        return self.request("POST", f"/ocr?{query}", body, content_type=content_type)

    def health(self) -> Any:
        return self.request("GET", "/health").json

    def parsers(self) -> list[psutil.Process]:
        return [child for child in self.children() if any(".child" in word for word in _command(child))]

    def children(self, name: str = "", word: str = "") -> list[psutil.Process]:
        """Return what it has started and still runs; those of a name, and with a word, where one is given."""
        commands = ((child, _command(child)) for child in psutil.Process(self.process.pid).children(recursive=True))
        return [child for child, words in commands if words and words[0].endswith(name) and (not word or word in words)]


def _command(process: psutil.Process) -> list[str]:
    """Return a process's command line; nothing for one that has ended, whoever has not taken note of that yet."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def until(condition: Callable[[], T], *, what: str) -> T:
    """Return the first true value of a condition; fails when none comes within PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def running(*options: str, module: str = "rma_notes") -> Iterator[Server]:
    """Start the service on a free port, and end it with all that it started."""
    port = free_port()
    command = [sys.executable, "-m", module, "--port", str(port), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    server = Server(process, port)
    try:
        until(lambda: process.poll() is not None or answers(server), what="the service answers")
        assert process.poll() is None, "the service ended at its start"
        yield server
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def answers(server: Server) -> bool:
    """Whether anything listens on the server's port."""
    with contextlib.suppress(OSError):
        return bool(server.health()["status"] == "ok")
    return False
