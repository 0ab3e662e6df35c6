"""Coordinator and agents as real processes that a test kills, freezes and starts again; with what it looks at then."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rma_coordinator.domain.records import LedgerEntry, TaskRecord, TaskResult
from rma_coordinator.domain.webhooks import WebhookRecord
from rma_coordinator.ledger import entries_of
from rma_coordinator.store import SqliteStore
from rma_core.agent.state import RECORD_FILE
from rma_core.commands.common import read_client
from rma_core.http import open_client
from tests import slow_service
from tests.pools import NO_ENGINE, Running, environment, left_over, rma
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    import httpx2

    from tests.netns import Machine

T = TypeVar("T")

#: Seconds that anything may take here besides what the design gives it: a start, an answer, a look.
PATIENCE_S = 60.0
#: Requests that one copy of the service takes at once.
SLOTS = 8


async def until(true: Callable[[], Any], *, what: str, within_s: float = PATIENCE_S) -> Any:
    """Return the first true value of a condition that nobody announces; fail with ``what`` when none comes."""
    deadline = time.monotonic() + within_s
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.1)
    return value


class Town:
    """A coordinator at one address that outlives its process, agents, and the log of the service that they run."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", **settings: str) -> None:
        self.home, self.agents_home = folder / "c", folder / "a"
        self.catalog, self.sources, self.log = slow_service.write_service(folder / "s", slots=SLOTS)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = rma("coordinator", "--host", host, "--port", str(self.port), "--insecure-http")
        self._env = environment(self.home, {"RMA_CATALOG": str(self.catalog), **settings})
        self.said: list[str] = []
        self.agents: dict[str, Running] = {}
        #: How each agent is started, and what those said that a later one of the same name has followed.
        self._started: dict[str, tuple[list[str], dict[str, str]]] = {}
        self._before: dict[str, list[str]] = {}
        self._process: Running | None = None
        self._begun: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something beside the test; when the town ends, so does it."""
        task = asyncio.create_task(work)
        self._begun.add(task)
        return task

    async def quiet(self) -> None:
        """End what `begin` began."""
        for task in self._begun:
            task.cancel()
        await asyncio.gather(*self._begun, return_exceptions=True)

    # -- the coordinator -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the coordinator's process; `ready` waits for it."""
        self._process = Running(self._command, self._env)

    async def ready(self) -> None:
        """Wait until the coordinator serves."""
        process = self._process
        assert process is not None
        words = "The coordinator answers at"
        await until(lambda: words in process.text or process.process.poll() is not None, what=words)
        assert words in process.text, process.text

    def stop(self, number: signal.Signals = signal.SIGKILL) -> int:
        """End the coordinator, by default at once, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        code = process.stop(number)
        self.said += process.lines
        return code

    @property
    def key(self) -> str:
        """A key that opens everything."""
        found = read_client(self.home)
        assert found is not None
        return found.key

    def client(self, *, timeout_s: float = PATIENCE_S) -> httpx2.AsyncClient:
        """Return a client with a key that opens everything."""
        return open_client(self.url, token=self.key, timeout_s=timeout_s)

    # -- agents --------------------------------------------------------------------------------------------------

    async def token(self, uses: int) -> str:
        """Return a join token."""
        async with self.client() as client:
            answer = await client.post("/api/admin/tokens", json={"uses": uses})
            return str(answer.json()["token"])

    def start_agent(self, name: str, token: str, machine: Machine | None = None, **settings: str) -> Running:
        """Start an agent, on another machine where one is given; with the same name it is the same worker."""
        url = self.url if machine is None else f"http://{machine.host}:{self.port}"
        told = {"RMA_COORDINATOR_URL": url, "RMA_JOIN_TOKEN": token, "RMA_INSECURE_HTTP": "1", "RMA_DRAIN_S": "1"}
        how = {"RMA_RUNTIMES": "process", "RMA_SERVICE_SOURCES": str(self.sources), "RMA_LOG_LEVEL": "info"}
        command = rma("agent") if machine is None else machine.command(*rma("agent"))
        self._started[name] = command, environment(self.agents_home / name, {**NO_ENGINE, **told, **how, **settings})
        return self.agent_again(name)

    def agent_again(self, name: str) -> Running:
        """Start an agent that has ended as it was started before."""
        if name in self.agents:
            self._before.setdefault(name, []).extend([*self.agents[name].lines, "-- and again"])
        agent = self.agents[name] = Running(*self._started[name])
        return agent

    def worker(self, name: str) -> str:
        """Return by which name the pool knows an agent."""
        record = json.loads((self.agents_home / name / RECORD_FILE).read_bytes())
        return str(record["worker_id"])

    async def serving(self, count: int, *, within_s: float = PATIENCE_S) -> None:
        """Wait until so many workers say that they serve."""
        seen: list[dict[str, Any]] = []
        deadline = time.monotonic() + within_s
        async with self.client() as client:
            while sum(map(_serves, seen)) < count:
                assert time.monotonic() < deadline, f"{count} workers serve; there are {seen}\n{self.words()}"
                await asyncio.sleep(0.2)
                seen = (await client.get("/api/admin/workers")).json()["workers"]

    def words(self) -> str:
        """Return everything that was said, for a failure."""
        process = self._process
        said = [*self.said, *(process.lines if process else [])]
        parts = [f"== {name}\n{self.told(name)}" for name in self.agents]
        return "\n".join(["== coordinator", *said[-200:], *parts])

    def told(self, name: str) -> str:
        """Return what an agent has said, however often it was started."""
        return "\n".join([*self._before.get(name, [])[-200:], self.agents[name].text])

    def where(self, request: str) -> list[str]:
        """Return the names of the agents whose copies began a request, in order."""
        starts = [one.where for one in slow_service.noted(self.log) if (one.what, one.id) == ("start", request)]
        return [where.removeprefix(f"{self.agents_home}/").partition("/")[0] for where in starts]

    def close(self) -> None:
        """End everything that is left."""
        for agent in self.agents.values():
            with contextlib.suppress(ProcessLookupError):
                agent.process.send_signal(signal.SIGCONT)
        codes = {name: agent.stop(signal.SIGTERM) for name, agent in self.agents.items()}
        self.stop(signal.SIGTERM)
        assert left_over(self.agents_home) == []
        assert left_over(self.home) == []
        # One that is still starting has no ear for signals yet.
        assert set(codes.values()) <= {0, -signal.SIGKILL, -signal.SIGTERM}, f"{codes}\n{self.words()}"


def _serves(worker: dict[str, Any]) -> bool:
    return worker["status"] == "healthy" and any(one["state"] == "healthy" for one in worker["containers"])


@contextlib.asynccontextmanager
async def town(
    folder: Path,
    machines: Sequence[Machine | None],
    agents: Sequence[Mapping[str, str]] = (),
    /,
    *,
    host: str = "127.0.0.1",
    **settings: str,
) -> AsyncIterator[Town]:
    """A coordinator with agents ``m0``, ``m1`` … that serve; nothing is left of it after.

    ``settings`` are the coordinator's, those of ``agents`` what one agent each has beside the usual ones.
    """
    made = Town(folder, host=host, **settings)
    try:
        made.start()
        await made.ready()
        token = await made.token(len(machines))
        for number, machine in enumerate(machines):
            made.start_agent(f"m{number}", token, machine, **(agents[number] if agents else {}))
        await made.serving(len(machines), within_s=2 * PATIENCE_S)
        yield made
    finally:
        await made.quiet()
        made.close()


# -- what is on disk -----------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What the store of a coordinator that has ended holds about tasks, by their ids."""

    tasks: dict[str, TaskRecord]
    results: dict[str, TaskResult]
    ledger: dict[str, LedgerEntry]
    webhooks: dict[str, WebhookRecord]


async def kept(home: Path) -> Kept:
    """Read the store's file; nobody else may have it open."""
    store = SqliteStore(home / "coordinator.db")
    await store.open()
    try:
        tasks, results = await store.load(TaskRecord), await store.load(TaskResult)
        return Kept(
            {one.task_id: one for one in tasks},
            {one.task_id: one for one in results},
            {one.task_id: one for one in await entries_of(store)},
            {one.task_id: one for one in await store.load(WebhookRecord)},
        )
    finally:
        await store.close()


def spooled(home: Path) -> set[str]:
    """Return the names of the files in the spool."""
    return {path.name for path in (home / "spool").glob("*")}


def check_ends(found: Kept, home: Path) -> None:
    """Assert that every kept task has ended, once and for all, and that no file is left that nothing names."""
    assert {one.state for one in found.tasks.values()} <= {"succeeded", "failed", "cancelled"}
    assert all(one.ended_at is not None for one in found.tasks.values())
    succeeded = {name for name, one in found.tasks.items() if one.state == "succeeded"}
    assert set(found.results) == succeeded
    assert set(found.ledger) & set(found.tasks) == succeeded
    for task in found.tasks.values():
        numbers = [attempt.number for attempt in task.attempts]
        assert numbers == sorted(set(numbers)), task
        assert sum(attempt.state == "succeeded" for attempt in task.attempts) == (task.state == "succeeded"), task
        assert all(attempt.state not in ("offered", "running") for attempt in task.attempts), task
    assert spooled(home) == {f"{one.task_id}.answer" for one in found.results.values() if one.data is None}
