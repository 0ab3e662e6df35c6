"""The agent and the real coordinator on loopback: what one says, the other understands, in both ways of working."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.app import create_app, pool_of
from rma_coordinator.server import Listener, make_config, run_server
from rma_coordinator.store import MemoryStore
from rma_core import http
from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.catalog import CatalogEntry
from rma_core.host import Plugins
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.settings import AgentSettings, CoordinatorSettings
from tests.agent_runtimes import MemoryRuntime
from tests.agent_service import PATIENCE_S, LocalService, eventually, local_service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="16.0GB", storage="1TB"))
CATALOG = (
    CatalogEntry(
        service="notes",
        name="rma-notes",
        image="ghcr.io/rma/notes-worker:latest",
        routes=tuple(f"POST /notes/{what}" for what in ("echo", "big", "stream", "flood", "wait", "breaks")),
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

    async def ask(self, what: str, content: bytes = b"") -> http.Response:
        return await self.client.post(
            f"/api/inference/notes/{what}", content=content, headers={"Content-Type": "text/plain"}
        )


@pytest.fixture(params=[True, False], ids=["channel", "plain way"])
async def town(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Town]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = CoordinatorSettings(home=str(tmp_path / "coordinator"), memory_body_bytes=64 * 1024)
    plugins = Plugins.discover(kinds=["policy"])
    app = create_app(settings, store=MemoryStore(), plugins=plugins, catalog=CATALOG)
    ready, stop = asyncio.Event(), asyncio.Event()

    async def announce() -> None:
        ready.set()

    async def until() -> None:
        await stop.wait()

    server = asyncio.create_task(
        run_server(app, make_config(Listener("127.0.0.1", port), None), until=until, ready=announce)
    )
    url = f"http://127.0.0.1:{port}"
    async with local_service(NotesService()) as service:
        try:
            await asyncio.wait({server, asyncio.ensure_future(ready.wait())}, return_when=asyncio.FIRST_COMPLETED)
            await eventually_listens(port)
            pool = pool_of(app)
            token, _ = await pool.create_token(label="test", uses=1, ttl_s=600)
            found = Town(url, await pool.first_key(), service)
            async with running_agent(tmp_path / "agent", url, token, service, use_channel=request.param) as agent:
                await eventually(agent.reconciler.free)
                yield found
            await found.client.aclose()
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
