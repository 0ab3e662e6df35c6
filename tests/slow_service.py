"""A service that takes a chosen time and logs each start and each end of a request; stdlib only, as a wheel."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.tiny_service import write_wheel

if TYPE_CHECKING:
    from pathlib import Path

MODULE = "rma_slow"

SOURCE = r"""
import argparse, hashlib, http.server, json, os, signal, socketserver, sys, time


def note(what, name):
    line = json.dumps({"at": time.time(), "what": what, "id": name, "where": os.getcwd()}) + "\n"
    log = os.open(os.environ["SLOW_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(log, line.encode())
    os.close(log)


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.say({"Content-Length": "2"}, b"ok")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        ask = json.loads(body)
        note("start", ask["id"])
        answer = {"id": ask["id"], "digest": hashlib.sha256(body).hexdigest(), "filling": "x" * ask["filling"]}
        data = json.dumps(answer).encode()
        time.sleep(ask["before_s"])
        if ask["pieces"]:
            self.say({"Transfer-Encoding": "chunked"})
            size = -(-len(data) // ask["pieces"])
            for start in range(0, len(data), size):
                piece = data[start : start + size]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                time.sleep(ask["during_s"] / ask["pieces"])
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.say({"Content-Length": str(len(data))}, data)
        note("end", ask["id"])

    def say(self, headers, body=b""):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

    def address_string(self):
        return "somebody"


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds")
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    here = UnixServer(options.uds, Answer) if options.uds else None
    (here or http.server.ThreadingHTTPServer((options.host, options.port), Answer)).serve_forever()


if __name__ == "__main__":
    main()
"""

ENTRY = """
service = "slow"
name = "rma-slow-worker"
image = "ghcr.io/rma/slow-worker:1.0"
routes = ["POST /slow"]
slots = {slots}
tiers = [1, 2, 3]

[env]
SLOW_LOG = "{log}"

[needs]
cpu_cores = 0.1
memory = "16MB"

[limits]
memory = "1GB"

[process]
distribution = "rma-slow"
module = "rma_slow"
"""


class Noted(NamedTuple):
    """A line of the service's log: when, ``start`` or ``end``, which request, and in whose folder."""

    at: float
    what: str
    id: str
    where: str


def write_service(folder: Path, *, slots: int) -> tuple[Path, Path, Path]:
    """Write the service's catalog and wheel; return the folders of both, and the file of its log."""
    catalog, sources, log = folder / "catalog", folder / "sources", folder / "requests"
    catalog.mkdir(parents=True)
    (catalog / "slow.toml").write_text(ENTRY.format(slots=slots, log=log), encoding="utf-8")
    write_wheel(sources, module=MODULE, source=SOURCE)
    return catalog, sources, log


def noted(log: Path) -> list[Noted]:
    """Return what the service's copies have logged together."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [Noted(**json.loads(line)) for line in text.splitlines()]


def request(
    name: str,
    *,
    before_s: float = 0,
    during_s: float = 0,
    pieces: int = 0,
    filling: int = 0,
    ballast: int = 0,
) -> bytes:
    """Return a request's body: what is to be answered, how slowly, in how many ``pieces`` (0: with its length)."""
    ask = {"id": name, "before_s": before_s, "during_s": during_s, "pieces": pieces, "filling": filling}
    return json.dumps({**ask, "ballast": "b" * ballast}).encode()


def answers(body: bytes, found: Any) -> bool:
    """Say whether ``found`` is the answer to the request with this body."""
    ask = json.loads(body)
    right = {"id": ask["id"], "digest": hashlib.sha256(body).hexdigest(), "filling": "x" * ask["filling"]}
    return bool(found == right)
