"""The agent and the real coordinator on loopback: what one says, the other understands, in both ways of working."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.app import create_app, pool_of
from rma_coordinator.domain import dispatch
from rma_coordinator.server import Listener, make_config, run_server
from rma_coordinator.store import MemoryStore, SqliteStore
from rma_core import http
from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.catalog import CatalogEntry
from rma_core.host import Plugins
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.settings import AgentSettings, CoordinatorSettings
from tests.agent_cable import cable_to
from tests.agent_runtimes import MemoryRuntime
from tests.agent_service import PATIENCE_S, LocalService, eventually, local_service
from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rma_coordinator.pool import Pool
    from rma_coordinator.store import Store

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="16.0GB", storage="1TB"))
CATALOG = (
    CatalogEntry(
        service="notes",
        name="rma-notes",
        image="ghcr.io/rma/notes-worker:latest",
        routes=tuple(f"POST /notes/{what}" for what in ("echo", "big", "stream", "flood", "wait", "breaks", "halves")),
        slots=4,
        tiers=(2,),
    ),
)


async def detect() -> HardwareReport:
    return REPORT


class NotesService(LocalService):
    """The local service behind the routes of the catalog: ``/notes/echo`` is what ``/echo`` is elsewhere."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_notes_"):
            return getattr(self, "do_" + name.removeprefix("do_notes_"))
        raise AttributeError(name)


class Town:
    """A coordinator, an agent and a client."""

    def __init__(self, url: str, key: str, service: LocalService) -> None:
        self.url, self.service = url, service
        self.client = http.open_client(url, token=key, timeout_s=PATIENCE_S)

    async def ask(self, what: str, content: bytes = b"", **headers: str) -> http.Response:
        headers = {"Content-Type": "text/plain", **headers}
        return await self.client.post(f"/api/inference/notes/{what}", content=content, headers=headers)

    async def begin(self, what: str) -> str:
        """Ask for something to be done whoever waits for it; return where its answer will be."""
        answer = await self.ask(what, Prefer="respond-async")
        assert answer.status_code == 202, answer.text
        return str(answer.headers["location"])

    async def end(self, location: str) -> dict[str, Any]:
        """Wait until a task has ended."""
        while True:
            found: dict[str, Any] = (await self.client.get(f"{location}?wait=10")).json()
            if "ended_at" in found and found["status"] not in ("queued", "running"):
                return found


@pytest.fixture(params=[True, False], ids=["channel", "plain way"])
async def town(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Town]:
    async with local_service(NotesService()) as service, running_coordinator(tmp_path, MemoryStore()) as (url, pool):
        found = Town(url, await pool.first_key(), service)
        token = await join_token(pool)
        async with running_agent(tmp_path / "agent", url, token, service, use_channel=request.param) as agent:
            await eventually(agent.reconciler.free)
            yield found
        await found.client.aclose()


async def join_token(pool: Pool) -> str:
    token, _ = await pool.create_token(label="test", uses=9, ttl_s=600)
    return token


@contextlib.asynccontextmanager
async def running_coordinator(tmp_path: Path, store: Store, port: int = 0) -> AsyncIterator[tuple[str, Pool]]:
    """Run the real coordinator on a port, a free one unless it is named."""
    port = port or free_port()
    settings = CoordinatorSettings(home=str(tmp_path / "coordinator"), memory_body_bytes=64 * 1024)
    app = create_app(settings, store=store, plugins=Plugins.discover(kinds=["policy"]), catalog=CATALOG)
    ready, stop = asyncio.Event(), asyncio.Event()

    async def announce() -> None:
        ready.set()

    async def until() -> None:
        await stop.wait()

    server = asyncio.create_task(
        run_server(app, make_config(Listener("127.0.0.1", port), None), until=until, ready=announce)
    )
    try:
        await asyncio.wait({server, asyncio.ensure_future(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
        await eventually_listens(port)
        yield f"http://127.0.0.1:{port}", pool_of(app)
    finally:
        stop.set()
        await asyncio.wait_for(server, PATIENCE_S)


async def eventually_listens(port: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await writer.wait_closed()
                return
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running_agent(
    home: Path, url: str, token: str, service: LocalService, *, use_channel: bool
) -> AsyncIterator[Agent]:
    settings = AgentSettings(home=str(home), coordinator_url=url, join_token=token, runtimes=["memory"], drain_s=2)
    async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
        runtimes = {"memory": MemoryRuntime(endpoint=service.url)}
        agent = Agent(settings, folder, record, key, report=report, runtimes=runtimes, use_channel=use_channel)
        running = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            await asyncio.wait_for(running, PATIENCE_S)


async def test_small_and_large_bodies_pass_both_ways(town: Town) -> None:
    for size in (0, 5, 70_000, 600_000, 3_000_000):
        content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        answer = await town.ask("echo", content)
        assert (answer.status_code, answer.content == content) == (200, True), size
    answer = await town.ask("big")
    assert (answer.status_code, len(answer.content)) == (201, 3 * 2**20)


async def test_an_answer_reaches_the_client_while_the_service_still_works(town: Town) -> None:
    request = town.client.build_request("POST", "/api/inference/notes/stream")
    response = await town.client.send(request, stream=True)
    chunks = response.aiter_raw()
    seen = b""
    async with asyncio.timeout(PATIENCE_S):
        while seen != b"0\n1\n":
            seen += await anext(chunks)
        town.service.go_on.set()
        async for chunk in chunks:
            seen += chunk
    assert seen == b"0\n1\n2\n3\n4\n"
    await response.aclose()


async def test_a_client_that_leaves_frees_the_service(town: Town, request: pytest.FixtureRequest) -> None:
    asking = asyncio.create_task(town.ask("flood"))
    await eventually(lambda: town.service.sent_bytes)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await eventually(town.service.left.is_set)


async def test_a_service_that_takes_its_time_is_waited_for(town: Town) -> None:
    asking = asyncio.create_task(town.ask("wait"))
    await asyncio.sleep(7)  # longer than a task may wait to be accepted
    town.service.go_on.set()
    answer = await asking
    assert (answer.status_code, answer.content) == (200, b"ready")


async def test_many_requests_at_once_all_get_their_own_answer(town: Town) -> None:
    answers = await asyncio.gather(*(town.ask("echo", str(n).encode()) for n in range(40)))
    assert [answer.content for answer in answers] == [str(n).encode() for n in range(40)]


async def test_a_service_that_breaks_off_is_told_to_the_client(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    try:
        answer = await town.ask("breaks")
    except http.HTTPError:
        return  # broken off as the service did, which is honest too
    assert answer.status_code >= 500
    assert "broke off" in answer.text


# The way between them breaks.


async def has_begun(pool: Pool) -> None:
    """Wait until the coordinator has the beginning of an answer."""
    await eventually(lambda: any(relay.head is not None for relay in pool.hub.relays.values()))


async def test_a_channel_that_is_cut_in_the_middle_of_an_answer_costs_the_client_nothing(tmp_path: Path) -> None:
    async with (
        local_service(NotesService()) as service,
        running_coordinator(tmp_path, MemoryStore()) as (url, pool),
        cable_to(url) as cable,
        running_agent(tmp_path / "agent", cable.url, await join_token(pool), service, use_channel=True) as agent,
    ):
        town = Town(url, await pool.first_key(), service)
        await eventually(lambda: agent.reconciler.free() and agent.channel.up)
        asking = asyncio.create_task(town.ask("halves"))
        await has_begun(pool)
        cable.cut()
        await eventually(lambda: not agent.channel.up)
        await eventually(lambda: agent.channel.up)
        service.go_on.set()
        answer = await asking
        assert (answer.status_code, answer.content, len(service.requests)) == (200, b"first+half", 1)
        assert answer.headers["rma-attempt"] == "1"
        await eventually(lambda: not agent.answers)
        await town.client.aclose()


async def test_what_is_finished_while_the_coordinator_is_gone_is_delivered_once_it_is_back(tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    async with local_service(NotesService()) as service, contextlib.AsyncExitStack() as agents:
        async with running_coordinator(tmp_path, SqliteStore(store)) as (url, pool):
            key = await pool.first_key()
            agent = await agents.enter_async_context(
                running_agent(tmp_path / "agent", url, await join_token(pool), service, use_channel=True)
            )
            await eventually(lambda: agent.reconciler.free() and agent.channel.up)
            town = Town(url, key, service)
            location = await town.begin("halves")
            await has_begun(pool)
        await eventually(lambda: not agent.channel.up)
        service.go_on.set()
        await eventually(agent.answers.refs)
        port = int(url.rpartition(":")[2])
        async with running_coordinator(tmp_path, SqliteStore(store), port) as (_, pool):
            found = await town.end(location)
            answer = await town.client.get(found["result_url"])
            assert (found["status"], len(found["attempts"]), answer.content) == ("succeeded", 1, b"first+half")
            assert len(service.requests) == 1
            await eventually(lambda: not agent.answers)
            await town.client.aclose()
            await agents.aclose()


async def test_a_late_answer_to_what_another_worker_has_answered_is_refused_and_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "RESUME_WITHIN_S", 0.3)
    async with (
        local_service(NotesService()) as slow,
        local_service(NotesService()) as quick,
        running_coordinator(tmp_path, MemoryStore()) as (url, pool),
        cable_to(url) as cable,
        running_agent(tmp_path / "first", cable.url, await join_token(pool), slow, use_channel=True) as first,
    ):
        town = Town(url, await pool.first_key(), slow)
        await eventually(lambda: first.reconciler.free() and first.channel.up)
        location = await town.begin("halves")
        await has_begun(pool)
        quick.go_on.set()
        async with running_agent(tmp_path / "second", url, await join_token(pool), quick, use_channel=True) as second:
            await eventually(lambda: second.reconciler.free() and pool.dispatcher.seat(second.client.worker_id).slots)
            cable.unplug()
            found = await town.end(location)
            assert [a["status"] for a in found["attempts"]][-1] == "succeeded"
            assert [a["worker_id"] for a in found["attempts"]] == [first.client.worker_id, second.client.worker_id]
            slow.go_on.set()
            await eventually(first.answers.refs)
            cable.plug()
            first.channel.hurry()
            await eventually(lambda: not first.answers)
            assert (await town.client.get(location)).json()["attempts"] == found["attempts"]
            assert pool.dispatcher.succeeded == 1
            await town.client.aclose()
