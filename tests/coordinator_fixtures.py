"""A real coordinator on loopback, clients for it, and stand-in workers that speak its contracts.

Tests open them themselves: ``async with running(tmp_path) as pool, pool.worker() as line: …``.
Nothing here is imported by conftest.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from rma_coordinator import server
from rma_coordinator.app import create_app, pool_of
from rma_coordinator.domain.credentials import SCOPES
from rma_coordinator.store import SqliteStore
from rma_core import Capabilities, CatalogEntry, Needs
from rma_core.agent.keys import DeviceKey
from rma_core.host import Plugins
from rma_core.http import AsyncClient, open_client
from rma_core.models import channel as frames
from rma_core.models.worker import AttemptRef, ContainerStatus, Heartbeat, RegisterRequest, TaskOffer
from rma_core.settings import CoordinatorSettings
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from httpx2 import Response
    from quart import Quart
    from websockets.asyncio.client import ClientConnection

    from rma_coordinator.pool import Pool
    from rma_coordinator.store import Store

F = TypeVar("F")

#: Everything a test waits for comes within this, or the test fails.
PATIENCE_S = 15.0
MACHINE = Capabilities(cpu_cores=8, ram="32GB", storage="200GB")


def entry(service: str, *routes: str, wanted: int = 8, slots: int = 8) -> CatalogEntry:
    return CatalogEntry(
        service=service,
        name=f"{service}-worker",
        image=f"ghcr.io/rma/{service}-worker:1",
        routes=routes or (f"POST /{service}",),
        tiers=(2, 3),
        wanted=wanted,
        slots=slots,
        needs=Needs(cpu_cores=0.1),
    )


#: What serves the coordinators of tests, where it is not the default.
SERVER = "RMA_TEST_SERVER"
CATALOG = (entry("notes", "POST /notes", "POST /notes/outline"), entry("ner"))


class TurnedClock:
    """A clock that runs as always, and can be turned ahead."""

    def __init__(self, base: Callable[[], float] = time.monotonic) -> None:
        self._base = base
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return self._base() + self.ahead_s


async def until(what: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """Wait until ``what`` gives something, and return it."""
    async with asyncio.timeout(within_s):
        while not (found := what()):  # noqa: ASYNC110 - what is waited for is not ours to signal
            await asyncio.sleep(0.01)
    return found


async def soon(what: Awaitable[F], *, within_s: float = PATIENCE_S) -> F:
    return await asyncio.wait_for(what, within_s)


class Running:
    """A coordinator that serves."""

    def __init__(self, app: Quart, url: str, clock: TurnedClock, served_by: server.Server) -> None:
        self.app, self.url, self.clock, self.server = app, url, clock, served_by
        self.key = ""
        self.stop = asyncio.Event()
        self.client: AsyncClient

    @property
    def pool(self) -> Pool:
        return pool_of(self.app)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def bearer(self, secret: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {secret}"}

    async def make_key(self, *scopes: str, kind: str = "client") -> str:
        secret, _ = await self.pool.create_key(kind=kind, label="test", scopes=scopes, ttl_s=3600)
        return secret

    async def join_token(self, uses: int = 1) -> str:
        secret, _ = await self.pool.create_token(label="test", uses=uses, ttl_s=3600)
        return secret

    async def registration(self, key: DeviceKey, join_token: str, **facts: Any) -> RegisterRequest:
        """Return a registration that is signed over a fresh nonce."""
        found = (await self.client.get("/api/worker/nonce")).json()
        proof = key.proof(issuer=found["issuer"], nonce=found["nonce"], join_token=join_token)
        request = RegisterRequest(capabilities=MACHINE, public_key=key.public_key, proof=proof)
        return msgspec.structs.replace(request, **facts)

    async def register(self, key: DeviceKey, join_token: str, **facts: Any) -> Response:
        request = await self.registration(key, join_token, **facts)
        return await self.client.post(
            "/api/worker/register", content=msgspec.json.encode(request), headers=self.bearer(join_token)
        )

    async def enrol(self, key: DeviceKey | None = None, **facts: Any) -> StandIn:
        """Return a machine that has joined; it has no connection yet."""
        key = key or DeviceKey.generate()
        answer = await self.register(key, await self.join_token(), **facts)
        assert answer.status_code in (200, 201), answer.text
        return StandIn(self, key, answer.json())

    @contextlib.asynccontextmanager
    async def worker(self, *, slots: int = 4, service: str = "notes", **facts: Any) -> AsyncIterator[Line]:
        """A machine that has joined and offers slots for a service on its channel."""
        machine = await self.enrol(**facts)
        async with machine.channel({service: slots}) as line:
            yield line

    def turn(self, seconds: float) -> None:
        """Turn the clock as if time had passed with everyone awake: in steps, with workers that send heartbeats."""
        while seconds > 0:
            step = min(1.0, seconds)
            self.clock.ahead_s += step
            seconds -= step
            self.pool.dispatcher.tick()
            for worker_id in self.pool.hub.sinks:
                self.pool.fleet.touch(self.pool.fleet.get(worker_id))
            self.pool.sweep()

    async def infer(self, content: bytes = b"", path: str = "notes", **more: Any) -> Response:
        return await self.client.post(f"/api/inference/{path}", content=content, **more)


class StandIn:
    """An enrolled machine, without a connection."""

    def __init__(self, running: Running, key: DeviceKey, answer: dict[str, Any]) -> None:
        self.running, self.key, self.answer = running, key, answer
        self.id: str = answer["worker_id"]
        self.token: str = answer["access_token"]

    @property
    def headers(self) -> dict[str, str]:
        return self.running.bearer(self.token)

    @contextlib.asynccontextmanager
    async def channel(
        self, slots: dict[str, int], *, attempts: tuple[AttemptRef, ...] = (), hello: bool = True
    ) -> AsyncIterator[Line]:
        """The channel; only the first HELLO is said by itself."""
        address = f"ws{self.running.url.removeprefix('http')}/api/worker/channel"
        async with connect(
            address, additional_headers=self.headers, compression=None, max_size=None, proxy=None, close_timeout=0.5
        ) as ws:
            line = Line(self, ws)
            if hello:
                await line.say(frames.Hello(worker_id=self.id, slots=slots, attempts=attempts))
                await line.frame(frames.Assign)
            yield line

    async def beat(self, *refs: AttemptRef, service: str = "notes", slots: int = 4, **facts: Any) -> Response:
        """Send a heartbeat by HTTP, with one healthy container."""
        container = ContainerStatus(name=f"{service}-worker", service=service, state="healthy", slots=slots)
        beat = Heartbeat(worker_id=self.id, containers=(container,), attempts=refs)
        content = msgspec.json.encode(msgspec.structs.replace(beat, **facts))
        return await self.running.client.post("/api/worker/heartbeat", content=content, headers=self.headers)

    async def poll(self, *, wait: float = 10, most: int = 1) -> Response:
        query = urlencode({"wait": wait, "max": most})
        return await self.running.client.get(f"/api/worker/tasks?{query}", headers=self.headers)

    async def work(self, **more: Any) -> TaskOffer:
        """Poll until there is a task."""
        answer = await self.poll(**more)
        assert answer.status_code == 200, answer.text
        return msgspec.convert(answer.json()["tasks"][0], TaskOffer)

    async def result(self, offer: TaskOffer, content: Any, **query: Any) -> Response:
        named = {"attempt": offer.attempt, "lease_id": offer.lease_id, **query}
        headers = {**self.headers, "RMA-Answer-Headers": json.dumps([["content-type", "text/plain"]])}
        url = f"/api/worker/tasks/{offer.task_id}/result?{urlencode(named)}"
        return await self.running.client.post(url, content=content, headers=headers)

    async def complete(self, offer: TaskOffer, **facts: Any) -> Response:
        done = {**ref_of(offer), "status": "succeeded", **facts}
        content = msgspec.json.encode(done)
        return await self.running.client.post("/api/worker/task-complete", content=content, headers=self.headers)


def ref_of(offer: TaskOffer) -> dict[str, Any]:
    return {"task_id": offer.task_id, "attempt": offer.attempt, "lease_id": offer.lease_id}


class Line:
    """One open channel, from the worker's side. Frames wait in order until a test takes them."""

    def __init__(self, machine: StandIn, ws: ClientConnection) -> None:
        self.machine, self.ws, self.id = machine, ws, machine.id
        self._waiting: list[frames.Down] = []
        self.bodies: dict[int, bytes] = {}

    async def say(self, frame: frames.Frame) -> None:
        await self.ws.send(frames.pack(frame))

    async def data(self, stream: int, data: bytes) -> None:
        await self.ws.send(frames.pack_data(stream, data))

    async def frame(self, kind: type[F], *, within_s: float = PATIENCE_S) -> F:
        """Return the next frame of a kind; others wait."""
        async with asyncio.timeout(within_s):
            while True:
                for index, frame in enumerate(self._waiting):
                    if isinstance(frame, kind):
                        del self._waiting[index]
                        return frame
                await self._read()

    async def _read(self) -> None:
        for stream, kind, content in frames.records(await self.ws.recv()):
            if kind == frames.CONTROL:
                self._waiting.append(frames.unpack_down(content))
            else:
                self.bodies[stream] = self.bodies.get(stream, b"") + content

    async def task(self, *, accept: bool = True) -> frames.Task:
        """Return the next task, with its body in ``bodies``."""
        task = await self.frame(frames.Task)
        async with asyncio.timeout(PATIENCE_S):
            while task.offer.body_url is None and len(self.bodies.get(task.stream, b"")) < task.offer.body_bytes:
                await self._read()
        if accept:
            await self.say(frames.Accept(stream=task.stream))
        return task

    async def answer(self, stream: int, *parts: bytes, status: int = 200, headers: Any = ()) -> None:
        """Send a whole answer, in so many pieces."""
        await self.say(frames.Head(stream=stream, status=status, headers=headers))
        for part in parts:
            await self.data(stream, part)
        await self.say(frames.End(stream=stream, usage={"tokens": float(len(parts))}))

    async def serve(self, *parts: bytes, **more: Any) -> frames.Task:
        """Take the next task and answer it."""
        task = await self.task()
        await self.answer(task.stream, *parts, **more)
        return task

    async def closed(self) -> int | None:
        """Wait until the coordinator has closed the channel, and return the code it gave."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.ws.recv()
        return self.ws.close_code

    def ref(self, task: frames.Task) -> AttemptRef:
        return AttemptRef(task_id=task.offer.task_id, attempt=task.offer.attempt, lease_id=task.offer.lease_id)


def settings(home: Path, **more: Any) -> CoordinatorSettings:
    return msgspec.structs.replace(CoordinatorSettings(home=str(home)), **more)


def make_app(
    home: Path,
    *,
    store: Store | None = None,
    clock: Callable[[], float] = time.monotonic,
    entries: Sequence[CatalogEntry] = CATALOG,
    **more: Any,
) -> Quart:
    config = settings(home, **more)
    rules: dict[str, Any] = {"only": frozenset({"threshold"})}
    if config.only_plugins:
        rules = dict(config.plugin_rules())
    return create_app(
        config,
        store=store or SqliteStore(home / "coordinator.db"),
        plugins=Plugins.discover(kinds=["policy"], **rules),
        clock=clock,
        catalog=tuple(entries),
    )


def make_config(plain: server.Listener | None, secure: server.Listener | None) -> server.Server:
    """Return the server that the tests run with."""
    return server.make_config(plain, secure, server=os.environ.get(SERVER, "hypercorn"))


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a port of this machine, for as long as anything here is waited for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def running(home: Path, **more: Any) -> AsyncIterator[Running]:
    """A coordinator on a free port of loopback, with a client that holds a key with every scope."""
    clock = TurnedClock()
    listener = server.Listener("127.0.0.1", free_port())
    app = make_app(home, clock=clock, **more)
    config = make_config(listener, None)
    found = Running(app, listener.url, clock, config)

    async def told() -> None:
        await found.stop.wait()

    serving = asyncio.create_task(server.run_server(app, config, until=told))
    try:
        await _answering(listener.port, serving)
        found.key = await found.make_key(*SCOPES, kind="admin")
        async with open_client(listener.url, token=found.key, timeout_s=PATIENCE_S) as found.client:
            yield found
    finally:
        found.stop.set()
        await asyncio.wait_for(serving, PATIENCE_S)


async def _answering(port: int, serving: asyncio.Task[None]) -> None:
    """Wait until the port takes connections, or the server has failed."""
    async with asyncio.timeout(PATIENCE_S):
        while not serving.done():
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            await writer.wait_closed()
            return
    await serving
