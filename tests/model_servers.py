"""Real model servers for tests: the service `llm` with tiny models, as processes that can be asked, left and killed."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import psutil

from tests import tiny_model
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

#: Seconds until anything that is waited for has happened.
PATIENCE_S = 30.0
#: Tokens a server of `serving` gives each slot unless told otherwise.
CONTEXT = 2048
#: What the tiny model answers at length with no two tokens nearly as good as each other: elsewhere rounding, which is
#: not the same for a token computed alone and for one of many, would decide what a continued answer says.
SOLID = ("Hello", "hello 9", "hello 31", "hello 8", "hello 29")
SOLID_PROMPT = "Hello 24"
SOLID_TOKENS = 120


class Reply(NamedTuple):
    """A whole response; ``body`` is its JSON."""

    status: int
    headers: dict[str, str]
    body: Any


class ModelServer(NamedTuple):
    """One running service: ``endpoint`` as a runtime gives it, ``log`` the file of all it said."""

    process: subprocess.Popen[bytes]
    endpoint: str
    model: str
    log: Path
    #: How it was started, where it can be started again.
    command: Sequence[str] = ()
    env: Mapping[str, str] = MappingProxyType({})
    #: The only processor it may use, if there is one.
    processor: int | None = None

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection, on which nothing was asked yet."""
        return connect(self.endpoint)

    def send(self, path: str, body: object, **headers: str) -> http.client.HTTPConnection:
        """Send a request and leave its answer to be read; closing the connection is leaving."""
        connection = self.connect()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.ExitStack() as unless_sent:
            unless_sent.callback(connection.close)
            connection.request("POST", path, data, {"Content-Type": "application/json", **named})
            unless_sent.pop_all()
        return connection

    def post(self, path: str, body: object, **headers: str) -> Reply:
        """Ask, and read the whole answer."""
        with contextlib.closing(self.send(path, body, **headers)) as connection:
            return _reply(connection)

    def get(self, path: str, method: str = "GET") -> Reply:
        """Ask for something without a body."""
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path)
            return _reply(connection)

    def chat(self, said: str, *, begin: str = "", max_tokens: int = 40, **options: object) -> dict[str, Any]:
        """Return a request for a chat at temperature 0, which goes on from ``begin``."""
        messages = [{"role": "user", "content": said}, *([{"role": "assistant", "content": begin}] if begin else [])]
        return {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **options}

    def text(self, said: str, **options: Any) -> str:
        """Return what the model answers, whole."""
        reply = self.post("/v1/chat/completions", self.chat(said, **options))
        assert reply.status == 200, reply.body
        return str(reply.body["choices"][0]["message"]["content"])

    def stream(self, said: str, **options: Any) -> Iterator[str]:
        """Give the pieces of an answer as they come; ends without error only behind the end marker."""
        connection = self.send("/v1/chat/completions", self.chat(said, stream=True, **options))
        with contextlib.closing(connection):
            for data in events(connection.getresponse()):
                for choice in data["choices"]:
                    yield choice["delta"].get("content") or ""

    def busy(self) -> int:
        """Return how many slots are at work."""
        return sum(slot["is_processing"] for slot in self.get("/slots").body)

    def engines(self) -> list[psutil.Process]:
        """Return the processes that hold a model."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Another child only asks it which devices there are.
                    if child.cmdline()[-2:] == ["-m", "rma_llama_cpp.engine"]:
                        found.append(child)
        return found

    def kill_engine(self) -> None:
        """Kill the process that holds the model, as if memory had run out."""
        for engine in self.engines():
            engine.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        """Kill the whole service, as if its machine had taken all of it back."""
        engines = self.engines()
        self.process.kill()
        for engine in engines:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.kill()
        self.process.wait(PATIENCE_S)

    def again(self) -> ModelServer:
        """Start it once more at the same address, when it has ended; waits for nothing."""
        self.process.wait(PATIENCE_S)
        return self._replace(process=_run(self.command, self.env, self.log, self.processor))

    def said(self) -> str:
        """Return all it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Brake:
    """Lets the engines of servers work for a moment now and then, as on a machine with too much to do.

    A tiny model says all of an answer before anybody has read the first word of it; braked, it is at work for a second.
    The list of ``servers`` may change meanwhile.
    """

    def __init__(self, servers: Sequence[ModelServer], *, works_s: float = 0.002, rests_s: float = 0.01) -> None:
        self._servers, self._works_s, self._rests_s = servers, works_s, rests_s
        self._known: dict[int, list[psutil.Process]] = {}
        self._over = threading.Event()
        self._held, self._still = threading.Event(), threading.Event()
        #: How often they still work before they are held; none of that below 1.
        self._times = 0
        self._thread = threading.Thread(target=self._run, name="brake", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)
        self._all(signal.SIGCONT)

    def hold(self) -> None:
        """Let nobody work at all."""
        self._still.clear()
        self._held.set()
        assert self._still.wait(PATIENCE_S)

    def let_go(self) -> None:
        """Let them work now and then again."""
        self._held.clear()

    def work(self, times: int) -> None:
        """Let them work so many times, then not at all."""
        self._still.clear()
        self._times = times
        self._held.clear()
        assert self._still.wait(PATIENCE_S)

    def _run(self) -> None:
        while not self._over.is_set():
            if not self._held.is_set():
                self._all(signal.SIGCONT)
                time.sleep(self._works_s)
                self._times -= 1
                if self._times == 0:
                    self._held.set()
            self._all(signal.SIGSTOP)
            if self._held.is_set():
                self._still.set()
            self._over.wait(self._rests_s)

    def _all(self, number: signal.Signals) -> None:
        for server in list(self._servers):
            pid = server.process.pid
            if not self._known.get(pid) and server.process.returncode is None:
                self._known[pid] = server.engines()
            for engine in self._known.get(pid, ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    engine.send_signal(number)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(self._path)


def connect(endpoint: str) -> http.client.HTTPConnection:
    """Return a connection to an endpoint as a runtime names it."""
    if endpoint.startswith("unix:"):
        return _UnixConnection(endpoint.removeprefix("unix:"))
    return http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=PATIENCE_S)


def _reply(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    return Reply(response.status, {k.lower(): v for k, v in response.headers.items()}, json.loads(response.read()))


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """Give the events of a stream; raises EOFError when it ends without its end marker."""
    assert response.status == 200, response.read()
    with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
        while line := response.readline():
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(line[5:])
    raise EOFError("the stream has no end")


def until(condition: Callable[[], object], *, what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until the condition holds; fails when it does not in time."""
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)


def start(
    folder: Path, file: Path, *, model: str = "tiny", unix: bool = False, env: Mapping[str, str] | None = None,
    processor: int | None = None,
) -> ModelServer:  # fmt: skip
    """Start the service for ``file``, with its log and its socket in ``folder``; waits for nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    if unix:
        path = folder / "s"
        endpoint, where = f"unix:{path}", ["--uds", str(path)]
    else:
        port = str(free_port())
        endpoint, where = f"http://127.0.0.1:{port}", ["--host", "127.0.0.1", "--port", port]
    told = {
        "MODEL": model,
        "MODEL_FILE": str(file),
        "CONTEXT": str(CONTEXT),
        "SLOTS": "2",
        "TMPDIR": str(folder),
        **(env or {}),
    }
    log, command = folder / "log", [sys.executable, "-I", "-u", "-m", "rma_llama_cpp", *where]
    return ModelServer(_run(command, told, log, processor), endpoint, model, log, command, told, processor)


def _run(
    command: Sequence[str], env: Mapping[str, str], log: Path, processor: int | None = None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    if processor is not None:
        # It counts its processors only once it has loaded what it needs.
        psutil.Process(process.pid).cpu_affinity([processor])
    return process


def processors() -> list[int]:
    """Return the processors that there are to give each server one: threads that wait for each other cost two."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def is_ready(server: ModelServer) -> bool:
    """Whether the model is loaded; fails where the service has ended."""
    assert server.process.poll() is None, server.said()
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        return server.get("/health").status == 200
    return False


def stop(server: ModelServer) -> None:
    """End the service with all it started, whatever state it is in."""
    with contextlib.suppress(psutil.NoSuchProcess):
        engines = server.engines()
        server.process.terminate()
        try:
            server.process.wait(PATIENCE_S)
        finally:
            server.process.kill()
            for engine in engines:
                with contextlib.suppress(psutil.NoSuchProcess):
                    engine.kill()


@contextlib.contextmanager
def serving(
    folder: Path, *, count: int = 1, file: Path | None = None, unix: bool = False, model: str = "tiny",
    env: Mapping[str, str] | None = None, on: Sequence[int] = (),
) -> Iterator[list[ModelServer]]:  # fmt: skip
    """Start ``count`` servers of one file (a new tiny chat model where none is named), and wait until all are ready.

    Each has one of the processors ``on`` to itself, or all where none is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    served = file or tiny_model.write_chat_model(folder / "chat.gguf")
    its = [on[n % len(on)] if on else None for n in range(count)]
    servers = [
        start(folder / str(n), served, unix=unix, model=model, env=env, processor=processor)
        for n, processor in enumerate(its)
    ]
    try:
        for server in servers:
            until(lambda server=server: is_ready(server), what="the model is loaded")  # type: ignore[misc]  # bound now
        yield servers
    finally:
        for server in servers:
            stop(server)
