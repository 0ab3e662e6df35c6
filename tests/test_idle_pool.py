"""Many idle workers, most of them parked: each service finds one all the same, and a burst calls all of them back."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING

import pytest

from bench._idle import LLM, Idler, request
from rma_core.models import channel as frames
from tests.coordinator_fixtures import until
from tests.coordinator_process import coordinating
from tests.stub_workers import joined

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from websockets.asyncio.client import ClientConnection

    from rma_core.http import AsyncClient
    from rma_core.models.hardware import HardwareReport

#: Workers, the models that most of them have, one that a single worker has, and the channels that may stay open.
WORKERS, MODELS, RARE, CHANNELS = 90, ("a", "b"), "rare", 10
#: More than stay on their channels with these: eight with room for each model, some for the service, and the rare one.
MOST_OPEN = 40
#: Seconds between heartbeats, so that nobody is called back late.
INTERVAL_S = 1.0
#: Seconds for all of it, on a machine that is busy.
PATIENCE_S = 100.0

CATALOG = """
service = "notes"
name = "rma-notes-worker"
image = "ghcr.io/rma/notes-worker:1"
routes = ["POST /notes"]
tiers = [1, 2, 3]
wanted = 3
[needs]
cpu_cores = 0.1
"""


class Held(Idler):
    """A worker whose model's answers wait until it is ``free``."""

    def __init__(self, url: str, report: HardwareReport, *, model: str) -> None:
        super().__init__(url, report, models=[model])
        self.free = asyncio.Event()
        self.free.set()

    async def _serve(self, socket: ClientConnection, task: frames.Task) -> None:
        await socket.send(frames.pack(frames.Accept(stream=task.stream)))
        if task.offer.service == LLM:
            await self.free.wait()
        await super()._serve(socket, task)


@contextlib.asynccontextmanager
async def idle_pool(folder: Path) -> AsyncIterator[tuple[AsyncClient, Sequence[Held]]]:
    """A pool of such workers, most of which are parked."""
    catalog = folder / "catalog"
    catalog.mkdir()
    (catalog / "notes.toml").write_text(CATALOG, encoding="utf-8")
    models = [*(MODELS[number % len(MODELS)] for number in range(WORKERS - 1)), RARE]
    async with (
        coordinating(folder / "home", catalog=catalog, max_channels=CHANNELS, heartbeat_interval_s=INTERVAL_S) as (
            coordinator,
            client,
        ),
        joined(coordinator, [partial(Held, model=model) for model in models]) as workers,
        asyncio.timeout(PATIENCE_S),
    ):
        # The first answer is to HELLO, the second to what they offer.
        await until(lambda: all(worker.heard > 1 for worker in workers), within_s=PATIENCE_S)
        await until(lambda: open_of(workers) <= MOST_OPEN, within_s=PATIENCE_S)
        yield client, workers


def open_of(workers: Sequence[Held]) -> int:
    return sum(worker.open for worker in workers)


async def ask(client: AsyncClient, lane: str) -> int:
    path, content = request(lane)
    return (await client.post(path, content=content, timeout=PATIENCE_S)).status_code


@pytest.mark.timeout(2 * PATIENCE_S)
async def test_each_service_and_model_finds_a_worker_while_most_are_parked(tmp_path: Path) -> None:
    async with idle_pool(tmp_path) as (client, workers):
        lanes = ["notes", *(f"{LLM} {model}" for model in (*MODELS, RARE))]
        for lane in lanes * 10:
            assert await ask(client, lane) == 200, lane
        assert open_of(workers) <= MOST_OPEN
        assert workers[-1].open, "the only one that has its model is not parked"
        assert workers[-1].given >= 10
        # What comes new has its workers too: nobody had it before.
        parked = next(worker for worker in workers if not worker.open)
        parked.share("new")
        await until(lambda: parked.open, within_s=PATIENCE_S)
        while (status := await ask(client, f"{LLM} new")) == 404:  # noqa: ASYNC110 - it is the coordinator that knows
            await asyncio.sleep(0.05)
        assert (status, parked.open) == (200, True)


@pytest.mark.timeout(2 * PATIENCE_S)
async def test_a_burst_calls_all_parked_workers_back_and_they_are_parked_again(tmp_path: Path) -> None:
    async with idle_pool(tmp_path) as (client, workers):
        have = [worker for worker in workers if MODELS[0] in worker.models]
        assert open_of(have) <= MOST_OPEN < len(have), "some are to be called back"
        before = [worker.given for worker in have]
        for worker in have:
            worker.free.clear()
        # None of these ends before each worker has one.
        asking = [asyncio.create_task(ask(client, f"{LLM} {MODELS[0]}")) for _ in have]
        await until(
            lambda: [worker.given - given for worker, given in zip(have, before, strict=True)] == [1] * len(have),
            within_s=PATIENCE_S,
        )
        # Others are served meanwhile.
        assert [await ask(client, lane) for lane in ("notes", f"{LLM} {MODELS[1]}", f"{LLM} {RARE}")] == [200] * 3
        for worker in have:
            worker.free.set()
        assert await asyncio.gather(*asking) == [200] * len(have)
        await until(lambda: open_of(workers) <= MOST_OPEN, within_s=PATIENCE_S)
