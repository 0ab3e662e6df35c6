"""The server in this very process: HTTP/1.1, with limits of our own and an end that cannot hang.

`hypercorn_server` serves it by default, `uvicorn_server` in large pools.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

from rma_coordinator.app import pool_of
from rma_core.errors import SettingProblem

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from quart import Quart

    from rma_coordinator.app import ASGI, Lanes

logger = logging.getLogger(__name__)

#: Seconds that open requests get when the coordinator is told to stop.
GRACE_S = 3.0
#: A server can fail to stop (Hypercorn does while an application no longer reads); so long after the grace we stop
#: without it.
HARD_STOP_S = 5.0
#: Seconds for what is left once the server itself is cancelled.
LAST_STOP_S = 1.0
#: A connection that has not finished its request's header by then is closed.
KEEP_ALIVE_S = 75.0
HANDSHAKE_S = 10.0
#: The longest head of a request, and the longest message of a channel.
MAX_HEAD_BYTES, MAX_WEBSOCKET_BYTES = 64 * 1024, 2 * 1024 * 1024
#: Connections that wait to be accepted.
BACKLOG = 1024
#: A connection whose other side takes nothing of what waits for it is closed after this.
UNREAD_S = 60.0
#: A coordinator that was full says it is again only after so large a share of its connections was free for others.
RELIEF = 0.1


#: New objects after which young ones are searched for cycles: with Python's 700, a thousand workers that join made it
#: search everything every few seconds, 130 ms at a time.
GC_YOUNG = 10_000
#: File descriptors that are not for connections: the store, bodies on disk, libraries, and those just being closed.
KEPT_DESCRIPTORS = 256
#: Asked for where the system names no limit; macOS refuses more.
MOST_DESCRIPTORS = 10_240


class Places:
    """How many connections are open, and how many there may be; says once that it is full, and once that it is over."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, 0
        self._refused = 0

    def take(self) -> bool:
        """Take a place, and say whether there was one."""
        if self.taken >= self.limit:
            if not self._refused:
                logger.warning(
                    "%d connections are open, as many as there may be: more are closed at once (max_connections)",
                    self.taken,
                    extra={"action": "full"},
                )
            self._refused += 1
            return False
        self.taken += 1
        return True

    def give(self) -> None:
        """Give a place back."""
        self.taken -= 1
        if self._refused and self.taken < self.limit * (1 - RELIEF):
            logger.info("there is room for connections again; %d were closed", self._refused, extra={"action": "room"})
            self._refused = 0


class Together:
    """Writes the head of an answer together with the beginning of its body, where that follows in the same turn.

    Servers write each by itself: one more call of the system, and of whoever reads, for every answer.
    """

    HEAD = b"HTTP/1.1 "

    def __init__(self, to: Writing, loop: asyncio.AbstractEventLoop) -> None:
        self.to, self._loop = to, loop
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write, or keep a head until the next write, or the end of this turn of the loop."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(self.HEAD):
            self._head = data
            self._loop.call_soon(self.flush)
            return
        self.to.write(data)

    @property
    def keeps(self) -> bool:
        """Whether there is a head that waits."""
        return bool(self._head)

    def flush(self) -> None:
        """Write what is kept; whoever has left is found out by reading."""
        if self._head:
            data, self._head = self._head, b""
            with contextlib.suppress(OSError, RuntimeError):
                self.to.write(data)

    def close(self) -> None:
        """Write what is kept, then close."""
        self.flush()
        self.to.close()


class Listener(NamedTuple):
    """An address to listen on, with its socket where that listens already; with a certificate it speaks https."""

    host: str
    port: int
    cert: Path | None = None
    key: Path | None = None
    socket: socket.socket | None = None

    def close(self) -> None:
        """Let go of the address, if it is held; once more is no error."""
        if self.socket is not None:
            self.socket.close()

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"{'https' if self.cert else 'http'}://{self.address}"

    @property
    def address(self) -> str:
        """Host and port, as they stand in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def listen(host: str, port: int, *, cert: Path | None = None, key: Path | None = None) -> Listener:
    """Return a listener that listens already, on ``port`` or a free one for 0: nobody else gets it before it is served.

    Raises SettingProblem when it is in use or may not be used.
    """
    try:
        found = _open(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        hints = ("choose another with --port (0 takes a free one)",)
        raise SettingProblem(f"cannot listen on {host}:{port}: {reason}", hints=hints) from None
    return Listener(host, int(found.getsockname()[1]), cert, key, found)


class Writing(Protocol):
    """What bytes are written to."""

    def write(self, data: bytes) -> None:
        """Write, at once or later."""

    def close(self) -> None:
        """Write nothing more."""


class Server(Protocol):
    """What serves an application, and can be made to stop."""

    places: Places

    async def serve(self, app: ASGI, stop: asyncio.Event) -> None:
        """Serve ``app``, its lifespan included, until ``stop`` is set. Raises OSError for an address in use."""

    async def cut(self, serving: asyncio.Task[None]) -> None:
        """Cancel a `serve` that cannot stop, and its connections: they wait for clients that take nothing any more."""


def make_config(plain: Listener | None, secure: Listener | None, *, server: str = "hypercorn") -> Server:
    """Return a server for a plain and/or a TLS listener. Raises SettingProblem for one that is not installed."""
    if server == "hypercorn":
        from rma_coordinator.hypercorn_server import make_config as made

        return made(plain, secure)
    try:
        from rma_coordinator.uvicorn_server import UvicornServer
    except ImportError:
        hints = ("pip install 'rma-coordinator[uvicorn]'", "or leave the setting `server` as it is")
        raise SettingProblem("uvicorn is not installed here", hints=hints) from None
    return UvicornServer(plain, secure)


def listening(listener: Listener) -> socket.socket:
    """Return its listening socket. Raises OSError."""
    return listener.socket or _open(listener.host, listener.port)


def _open(host: str, port: int) -> socket.socket:
    """Return a listening socket that gives up on clients which take nothing for UNREAD_S. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        patient(found)
        found.bind((host, port))
        # Before the application starts: once it says that it answers, it must.
        found.listen(BACKLOG)
    except OSError:
        found.close()
        raise
    found.setblocking(False)  # noqa: FBT003 - the standard library takes it so
    return found


def patient(listening: socket.socket) -> None:
    """Let what is accepted here end when its client takes nothing of what waits for it, for UNREAD_S."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux
    if option is not None:
        listening.setsockopt(socket.IPPROTO_TCP, option, int(UNREAD_S * 1000))


async def run_server(
    app: Quart,
    config: Server,
    *,
    until: Callable[[], Awaitable[None]],
    ready: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until ``until`` returns or raises; never hangs on the way out.

    ``ready`` is awaited once the application has started. Raises what ``until`` or ``ready`` or the application's
    start raised, and SettingProblem when an address was taken meanwhile.
    """
    pool = pool_of(app)
    lanes: Lanes = app.extensions["rma_lanes"]
    config.places.limit = connections_for(pool.settings.max_connections, raise_descriptors())
    # Before the lifespan, which would turn a refusal into a traceback and lose its hints.
    await pool.start()
    failures: list[Exception] = []
    if ready is not None:
        app.while_serving(functools.partial(_announce, ready, failures))
    stop = asyncio.Event()
    trigger = asyncio.create_task(_until(until, stop), name="stop")
    # Quart would only hand each call on to them.
    server = asyncio.create_task(config.serve(lanes, stop), name="server")
    try:
        await asyncio.wait({server, trigger}, return_when=asyncio.FIRST_COMPLETED)
        cut = not await _end(app, config, server)
    finally:
        trigger.cancel()
        server.cancel()
        await asyncio.wait({trigger, server}, timeout=LAST_STOP_S)
        # A server that stopped as it should has done this already.
        await pool.stop()
    _raise(server, trigger, failures, cut=cut)


async def _end(app: Quart, config: Server, server: asyncio.Task[None]) -> bool:
    """Let the server finish what it has within the grace, then end it; say whether it ended by itself."""
    lanes: Lanes = app.extensions["rma_lanes"]
    pool_of(app).hub.close_all()
    await asyncio.wait({server}, timeout=GRACE_S)
    lanes.cut()
    await asyncio.wait({server}, timeout=HARD_STOP_S)
    if server.done():
        return True
    logger.warning("some connections did not end within %.0f s and are cut", GRACE_S + HARD_STOP_S)
    await config.cut(server)
    return False


def _raise(server: asyncio.Task[None], trigger: asyncio.Task[None], failures: list[Exception], *, cut: bool) -> None:
    """Raise what ended the server, if it was not told to end."""
    for failure in failures:
        raise failure
    if not trigger.cancelled() and (reason := trigger.exception()) is not None:
        raise reason
    if cut or server.cancelled():
        return
    error = server.exception()
    if isinstance(error, OSError):
        raise SettingProblem(
            f"cannot listen: {error.strerror or error}", hints=("choose another with --port (0 takes a free one)",)
        ) from error
    if error is not None:
        raise error


async def _announce(ready: Callable[[], Awaitable[None]], failures: list[Exception]) -> AsyncGenerator[None, None]:
    try:
        await ready()
    except Exception as error:
        # The server makes a sentence of it; whoever runs the server needs the thing itself.
        failures.append(error)
        raise
    yield


async def _until(until: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    try:
        await until()
    finally:
        stop.set()


def raise_descriptors() -> int:
    """Take as many file descriptors as this process may have; return how many that is, 0 where nobody counts them."""
    if sys.platform == "win32":
        return 0
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        # macOS says "no limit" and refuses more than its kernel's own.
        resource.setrlimit(resource.RLIMIT_NOFILE, (_most(hard), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft


def _most(hard: int) -> int:
    import resource

    return MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard


def connections_for(wanted: int, descriptors: int) -> int:
    """Return how many connections there may be: as many as are wanted, while enough descriptors stay for the rest."""
    if not descriptors:
        return wanted
    fit = max(1, descriptors - min(KEPT_DESCRIPTORS, descriptors // 2))
    if fit < wanted:
        logger.warning(
            "%d file descriptors are enough for %d connections, not for %d: raise the limit (ulimit -n, LimitNOFILE=)",
            descriptors,
            fit,
            wanted,
            extra={"action": "few_descriptors"},
        )
    return min(wanted, fit)


def spare_pauses() -> None:
    """Search for garbage seldom, and never again in what is there now; for a process that is a coordinator."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG)


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine on the fastest event loop there is."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop
