"""Parked workers: beyond `max_channels` a worker heartbeats by HTTP, and is called back when it is needed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus
from tests.coordinator_fixtures import Line, running, soon, until

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def one_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rma_coordinator.parking.SPARE_SEATS", 1)


async def beat(line: Line) -> bool:
    """Heartbeat over the channel, and return whether the worker is to keep it."""
    await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id), slots={"notes": 1}))
    return (await line.frame(frames.Assign)).answer.connect


async def test_workers_that_are_not_needed_are_parked_and_called_back_when_tasks_wait(tmp_path: Path) -> None:
    async with running(tmp_path, max_channels=2) as pool:
        machines = [await pool.enrol() for _ in range(4)]
        lines = [machine.channel({"notes": 1}) for machine in machines]
        opened = [await line.__aenter__() for line in lines]
        pool.pool.parking.count()
        keeps = [await beat(line) for line in opened]
        assert keeps.count(False) == 2, "two channels may stay open"
        parked = [index for index, kept in enumerate(keeps) if not kept]
        for index in parked:
            await lines[index].__aexit__(None, None, None)
        await until(lambda: pool.pool.hub.channels == 2)
        pool.pool.parking.count()
        answers = [(await machines[index].beat()).json() for index in parked]
        assert [answer.get("connect", True) for answer in answers] == [False, False]
        held = [asyncio.create_task(pool.infer()) for _ in range(2)]
        tasks = [await opened[index].task() for index, kept in enumerate(keeps) if kept]
        waiting = asyncio.create_task(pool.infer())
        await until(lambda: pool.pool.dispatcher.queued == 1)
        pool.pool.parking.count()
        assert (await machines[parked[0]].beat()).json().get("connect", True)
        async with machines[parked[0]].channel({"notes": 1}) as line:
            await line.serve(b"called back")
            assert (await soon(waiting)).text == "called back"
        for task, index in zip(tasks, [i for i, kept in enumerate(keeps) if kept], strict=True):
            await opened[index].answer(task.stream, b"done")
            await lines[index].__aexit__(None, None, None)
        assert {answer.text for answer in await asyncio.gather(*held)} == {"done"}


async def test_a_worker_with_a_task_is_never_parked(tmp_path: Path) -> None:
    async with running(tmp_path, max_channels=1) as pool, pool.worker() as one, pool.worker() as two:
        asking = [asyncio.create_task(pool.infer()) for _ in range(2)]
        tasks = [await one.task(), await two.task()]
        pool.pool.parking.count()
        assert [await beat(one), await beat(two)] == [True, True]
        for line, task in zip((one, two), tasks, strict=True):
            await line.answer(task.stream, b"done")
        assert {answer.text for answer in await asyncio.gather(*asking)} == {"done"}


async def test_nobody_is_parked_while_there_is_room(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as one, pool.worker() as two:
        pool.pool.parking.count()
        assert [await beat(one), await beat(two)] == [True, True]


async def test_a_worker_whose_model_nobody_else_has_is_not_parked(tmp_path: Path) -> None:
    async with running(tmp_path, max_channels=2) as pool, contextlib.AsyncExitStack() as lines:
        opened = [await lines.enter_async_context((await pool.enrol()).channel({})) for _ in range(4)]

        async def beats(line: Line, model: str) -> bool:
            models = (ModelStatus(name=model),)
            server = ContainerStatus(
                name="attached-1", service="llm", state="healthy", runtime=ATTACHED, models=models, slots=1
            )
            heartbeat = Heartbeat(worker_id=line.id, containers=(server,))
            await line.say(frames.Beat(beat=heartbeat, slots={"llm": 1}))
            return (await line.frame(frames.Assign)).answer.connect

        common = ["common"] * 3
        for line, model in zip(opened, [*common, "rare"], strict=True):
            await beats(line, model)
        pool.pool.parking.count()
        assert await beats(opened[3], "rare"), "it is the only one"
        assert [await beats(line, "common") for line in opened[:3]].count(False) == 2
        await until(lambda: pool.pool.dispatcher.can_serve("llm", "rare"))


async def test_a_parked_worker_is_called_back_by_the_answer_to_what_only_it_has(tmp_path: Path) -> None:
    async with running(tmp_path, max_channels=1) as pool, pool.worker(), pool.worker():
        parked = await pool.enrol()
        pool.pool.parking.count()
        answer = await parked.beat()
        assert not answer.json()["connect"]
        assert answer.headers["connection"] == "close", "it is silent for long now"
        server = ContainerStatus(
            name="attached-1",
            service="llm",
            state="healthy",
            runtime=ATTACHED,
            slots=1,
            models=(ModelStatus(name="new"),),
        )
        answer = await parked.beat(containers=(server,))
        assert answer.json().get("connect", True), "not with the next one, half a minute later"
        assert "connection" not in answer.headers
