"""The real coordinator in a simulated world: its disk, its network, its clocks; one seed replays all of it.

`create_app` is driven through ASGI, without sockets and threads, on the loop of tests/virtual.py. What is random is
drawn from one generator.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from unittest import mock

import msgspec

from rma_coordinator.app import create_app, pool_of
from rma_coordinator.domain import unguessable
from rma_coordinator.domain import webhooks as domain_webhooks
from rma_coordinator.store.base import CLOSED, OK, StoreFailed, StoreState, encoded
from rma_core.host import Plugins
from tests.coordinator_fixtures import CATALOG, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
    from pathlib import Path

    from quart import Quart

    from rma_coordinator.domain.tasks import Attempt
    from rma_coordinator.pool import Pool
    from rma_coordinator.store.base import Change, R, Row
    from tests.virtual import VirtualLoop

T = TypeVar("T")

#: Where the wall clock stands when a simulation begins.
WALL = 1_800_000_000.0
PLUGINS = Plugins.discover(kinds=["policy"], only=frozenset({"threshold"}))
#: A call that is not answered within this is given up by who made it.
CALL_WITHIN_S = 90.0
#: How many bodies come in two parts.
HALVED = 0.2
BROKEN = StoreState(ok=False, code="failed", reason="the disk has failed")


class Broken(Exception):
    """The connection broke; what it was about may have happened or not."""


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


# -- the disk ----------------------------------------------------------------------------------------------------


class Disk:
    """What outlives the coordinator: tables of records as bytes, and whoever looks on at each commit."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, bytes]] = {}
        self.watching: list[Callable[[list[Row]], None]] = []
        #: Until when nothing can be written, and whether what is refused then is kept after all.
        self.fails_until = 0.0
        self.slow_until = 0.0

    def apply(self, rows: list[Row]) -> None:
        for watch in self.watching:
            watch(rows)
        for kind, key, data in rows:
            table = self.tables.setdefault(kind, {})
            if data is None:
                table.pop(key, None)
            else:
                table[key] = data

    def load(self, kind: type[R]) -> list[R]:
        table = self.tables.get(kind.__name__, {})
        return [msgspec.json.decode(table[key], type=kind) for key in sorted(table)]


class SimulatedStore:
    """One life's door to the disk: commits in order, in groups, after a while.

    A crash keeps some of what waits, from its beginning on: all of what was acknowledged, and perhaps more.
    """

    def __init__(self, disk: Disk, world: World) -> None:
        self._disk, self._world, self._open = disk, world, False
        self._waiting: deque[tuple[list[Row], asyncio.Future[None]]] = deque()
        self._writing = False

    @property
    def state(self) -> StoreState:
        if not self._open:
            return CLOSED
        return BROKEN if self._world.loop.time() < self._disk.fails_until else OK

    async def open(self) -> None:
        self._open = True

    async def load(self, kind: type[R]) -> list[R]:
        await self._world.pause(0.001, 0.01)
        return self._disk.load(kind)

    async def pages(self, kind: type[R], size: int) -> AsyncIterator[list[R]]:
        records = await self.load(kind)
        for start in range(0, len(records), size):
            yield records[start : start + size]
            await self._world.pause(0.001, 0.01)

    async def get(self, kind: type[R], key: str) -> R | None:
        await self._world.pause(0.0, 0.003)
        data = self._disk.tables.get(kind.__name__, {}).get(key)
        return None if data is None else msgspec.json.decode(data, type=kind)

    async def commit(self, changes: Iterable[Change], *, urgent: bool = False) -> None:
        rows = [encoded(change) for change in changes]
        if not rows:
            return
        if not self.state.ok:
            raise StoreFailed("the disk has failed", hints=("urgent" if urgent else "not urgent",))
        done: asyncio.Future[None] = self._world.loop.create_future()
        self._waiting.append((rows, done))
        if not self._writing:
            self._writing = True
            self._world.loop.call_later(self._delay(), self._write)
        await done

    def _delay(self) -> float:
        slow = self._world.loop.time() < self._disk.slow_until
        return self._world.random.uniform(0.5, 3.0) if slow else self._world.random.uniform(0.0005, 0.02)

    def _write(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), 16))]
        failed = not self.state.ok
        if not failed:
            for rows, _ in group:
                self._disk.apply(rows)
        # Between what is on the disk and who is told so, a crash may come.
        self._world.loop.call_later(self._world.random.uniform(0.0, 0.01), self._tell, group, failed)

    def _tell(self, group: list[tuple[list[Row], asyncio.Future[None]]], failed: bool) -> None:
        for _, done in group:
            if not done.done():
                if failed:
                    done.set_exception(StoreFailed("the disk has failed"))
                else:
                    done.set_result(None)
        if self._waiting:
            self._world.loop.call_later(self._delay(), self._write)
        else:
            self._writing = False

    def crash(self) -> None:
        """The process is gone: some of what waits gets to the disk still, in order."""
        self._open = False
        if self._world.loop.time() < self._disk.fails_until:
            return
        for rows, _ in list(self._waiting)[: self._world.random.randint(0, len(self._waiting))]:
            self._disk.apply(rows)

    async def backup(self, path: Path) -> int:
        raise NotImplementedError(path)

    async def close(self) -> None:
        self._open = False


# -- the network -------------------------------------------------------------------------------------------------


class Link:
    """One machine's way to the coordinator: delays, and what can go wrong with it."""

    def __init__(self, world: World, slowest_s: float = 0.05) -> None:
        self.world, self.slowest_s = world, slowest_s
        self.held = {"up": False, "down": False}
        self.refused = False
        self.parked: list[tuple[Pipe, Any]] = []
        self.open: list[Connection] = []

    def delay(self) -> float:
        return self.world.random.uniform(0.0002, self.slowest_s)

    def hold(self, *ways: str) -> None:
        """What is sent arrives when the link is healed; nobody is told."""
        for way in ways:
            self.held[way] = True

    def cut(self) -> None:
        """Break every connection; what was on its way is gone."""
        self.parked.clear()
        for connection in list(self.open):
            connection.reset()

    def heal(self) -> None:
        self.held = {"up": False, "down": False}
        self.refused = False
        parked, self.parked = self.parked, []
        for pipe, item in parked:
            pipe.arrive(item)


class Pipe:
    """One direction of one connection: everything in its order, each after a delay."""

    def __init__(self, link: Link, way: str) -> None:
        self._link, self._way = link, way
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last = 0.0
        self.first: Callable[[], None] | None = None
        self.closed = False

    def put(self, item: Any) -> None:
        loop = self._link.world.loop
        # Strictly one after the other: timers of one moment have no order.
        self._last = max(self._last + 1e-6, loop.time() + self._link.delay())
        loop.call_at(self._last, self.arrive, item, context=self._link.world.outside)

    def arrive(self, item: Any) -> None:
        if self.closed:
            return
        if self._link.held[self._way]:
            self._link.parked.append((self, item))
            return
        self.deliver(item)

    def deliver(self, item: Any) -> None:
        self._items.append(item)
        if self.first is not None:
            first, self.first = self.first, None
            first()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Any:
        while not self._items:
            self._waiter = self._link.world.loop.create_future()
            await self._waiter
        return self._items.popleft()


class Connection:
    """One connection to the coordinator: an HTTP request or a WebSocket."""

    def __init__(self, link: Link, scope: dict[str, Any]) -> None:
        self._link, self._scope = link, scope
        self.up, self.down = Pipe(link, "up"), Pipe(link, "down")
        self.up.first = self._serve
        self._gone = {"type": f"{scope['type']}.disconnect", "code": 1006}
        self._served: Life | None = None
        link.open.append(self)

    def _serve(self) -> None:
        life = self._link.world.life
        if life is None or not life.up or self._link.refused:
            self._broken()
            return
        self._served = life
        life.connections[self] = None
        task = life.spawn(self._run(life), "request")
        task.add_done_callback(lambda task: self._over(life, task), context=self._link.world.outside)

    async def _run(self, life: Life) -> None:
        await life.app(self._scope, self.up.get, self._send)  # type: ignore[arg-type]

    async def _send(self, event: Any) -> None:
        self.down.put(event)

    def _over(self, life: Life, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._link.world.errors.append(error)
        life.connections.pop(self, None)
        self.down.put(self._gone)

    def _broken(self) -> None:
        self.down.put(self._gone)

    def crashed(self) -> None:
        """The other side's process is gone, and its system closes what it had open."""
        self.down.put(self._gone)

    def reset(self) -> None:
        """The network breaks it, and both sides see that."""
        for pipe in (self.up, self.down):
            if not pipe.closed:
                pipe.deliver(self._gone)
                pipe.closed = True
        self._forget()

    def leave(self) -> None:
        """This side closes it."""
        self.up.put(self._gone)
        self._forget()

    def _forget(self) -> None:
        if self in self._link.open:
            self._link.open.remove(self)


# -- the coordinator ---------------------------------------------------------------------------------------------


class _InOrder(dict[Any, None]):
    """A set that is gone through in the order in which it was filled."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)


class Life:
    """One process of the coordinator, from its start to its end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.context = world.loop.new_life()
        self.store = SimulatedStore(world.disk, world)
        began = world.loop.time()
        base = world.random.uniform(0, 1e5)
        self.app: Quart = create_app(
            world.settings,
            store=self.store,
            plugins=PLUGINS,
            clock=lambda: base + world.loop.time() - began,
            wall=world.wall,
            catalog=CATALOG,
        )
        self.pool: Pool = pool_of(self.app)
        self.pool.webhooks.send = world.deliver
        self.connections: dict[Connection, None] = {}
        self.up = False
        # Cut in the order in which they came: a set of tasks has none that a seed could replay.
        self.app.extensions["rma_lanes"]._open = _InOrder()
        world.watch_offers(self.pool)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        return self.world.loop.spawn(self.context, work, name)

    async def start(self) -> None:
        await self.spawn(self.app.startup(), "start")
        self.up = True

    async def stop(self) -> None:
        """End as a signal would have it: no new calls, what is open is cut, what is known is written."""
        self.up = False
        self.app.extensions["rma_lanes"].cut()
        await asyncio.sleep(0.1)
        await self.spawn(self.app.shutdown(), "stop")
        self.kill()

    def kill(self) -> None:
        self.up = False
        self.store.crash()
        self.world.loop.kill(self.context)
        for connection in list(self.connections):
            connection.crashed()
        self.connections.clear()


class World:
    """Everything around the coordinator."""

    def __init__(self, loop: VirtualLoop, home: Path, seed: int, **more: Any) -> None:
        self.loop = loop
        self.random = random.Random(seed)
        self.outside = loop.new_life()
        self.settings = settings(home, **{"result_ttl_s": 30 * 86_400.0, "kept_tasks": 1_000_000, **more})
        self.disk = Disk()
        self.life: Life | None = None
        self.wall_ahead_s = 0.0
        #: (task, number, lease, worker) of every attempt that was handed out, in order.
        self.offers: list[tuple[str, int, str, str]] = []
        self.crashes: list[float] = []
        #: What handlers of the coordinator died of: always a bug.
        self.errors: list[BaseException] = []
        #: Whoever is told of the ends of tasks, and whether that may fail.
        self.hearing: list[Callable[[Disk, dict[str, str], bytes], None]] = []
        self.unreliable = True

    def wall(self) -> float:
        return WALL + self.loop.time() + self.wall_ahead_s

    async def pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.random.uniform(least_s, most_s))

    def watch_offers(self, pool: Pool) -> None:
        offer = pool.hub.offer

        def watched(attempt: Attempt) -> bool:
            self.offers.append((attempt.task.id, attempt.number, attempt.lease_id, attempt.worker_id))
            return offer(attempt)

        pool.hub.offer = watched  # type: ignore[method-assign]

    async def deliver(self, url: str, headers: dict[str, str], body: bytes) -> domain_webhooks.Reply:
        """Stand in for the way to a receiver and back: what is sent is lost, or refused, or taken and nobody told."""
        await self.pause(0.001, 0.5)
        luck = self.random.random() if self.unreliable else 1.0
        if luck < 0.1:
            raise domain_webhooks.Unreachable(f"{url} is not there")
        for hear in self.hearing:
            hear(self.disk, headers, body)
        if luck < 0.2:
            await asyncio.sleep(HOOK_HANGS_S)
            raise domain_webhooks.Unreachable("it did not answer")
        return domain_webhooks.Reply(503 if luck < 0.3 else 204)

    async def start(self) -> None:
        """Start the coordinator, again and again while its disk does not let it."""
        while True:
            life = self.life = Life(self)
            try:
                await life.start()
            except StoreFailed:
                life.kill()
                await self.pause(1.0, 3.0)
            else:
                return

    def crash(self) -> None:
        if self.life is not None:
            self.crashes.append(self.loop.time())
            self.life.kill()
            self.life = None

    async def stop(self) -> None:
        if self.life is not None:
            life, self.life = self.life, None
            await life.stop()

    # -- calls -------------------------------------------------------------------------------------------------

    async def call(
        self,
        link: Link,
        method: str,
        path: str,
        *,
        secret: str = "",
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        leave_after_s: float = CALL_WITHIN_S,
    ) -> Reply:
        """Make a request and return its whole answer. Raises Broken; who leaves early does not know what became."""
        connection = Connection(link, scope_of("http", method, path, secret, headers or {}))
        try:
            async with asyncio.timeout(leave_after_s):
                await self._upload(connection, body)
                return await _reply(connection)
        except TimeoutError:
            raise Broken from None
        finally:
            connection.leave()

    async def _upload(self, connection: Connection, body: bytes) -> None:
        """Send a body, now and then in two parts with a pause between them."""
        half = len(body) // 2 if self.random.random() < HALVED else 0
        if half:
            connection.up.put({"type": "http.request", "body": body[:half], "more_body": True})
            await self.pause(0.0, 3.0)
        connection.up.put({"type": "http.request", "body": body[half:], "more_body": False})


async def _reply(connection: Connection) -> Reply:
    status, headers, parts = 0, {}, list[bytes]()
    while True:
        event = await connection.down.get()
        if event["type"] == "http.response.start":
            status = event["status"]
            headers = {name.decode().lower(): value.decode("latin-1") for name, value in event["headers"]}
        elif event["type"] == "http.response.body":
            parts.append(event.get("body", b""))
            if not event.get("more_body"):
                return Reply(status, headers, b"".join(parts))
        else:
            raise Broken


def scope_of(kind: str, method: str, path: str, secret: str, headers: dict[str, str]) -> dict[str, Any]:
    bare, _, query = path.partition("?")
    named = {"host": "pool", **headers} | ({"authorization": f"Bearer {secret}"} if secret else {})
    return {
        "type": kind,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http" if kind == "http" else "ws",
        "path": bare,
        "raw_path": bare.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "client": ("192.0.2.1", 1),
        "server": ("192.0.2.2", 80),
        "subprotocols": [],
        "extensions": {},
    }


#: Seconds after which nobody waits for a receiver any more.
HOOK_HANGS_S = 15.0
#: Webhooks are tried more often here than in earnest, and longer than any trouble lasts.
HOOK_WAITS_S = (1.0, 2.0, 5.0, 10.0, *[20.0] * 100)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make what the coordinator draws by itself come from the seed: names of tasks and leases, and jitter."""
    random.seed(seed)
    with (
        mock.patch.object(unguessable, "source", unguessable.Source(random.Random(seed + 1).randbytes)),
        mock.patch.object(domain_webhooks, "WAITS_S", HOOK_WAITS_S),
    ):
        yield
