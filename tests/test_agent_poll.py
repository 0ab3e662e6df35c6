"""The plain way's long polls, against a coordinator that holds them open and one that does not."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from rma_core.agent.answers import Answers
from rma_core.agent.attempts import Attempts
from rma_core.agent.client import CoordinatorClient
from rma_core.agent.endpoint import Endpoint
from rma_core.agent.join import registration
from rma_core.agent.keys import DeviceKey
from rma_core.agent.poll import Poller
from rma_core.backoff import Backoff
from rma_core.models.hardware import Capabilities, HardwareReport
from tests.agent_service import eventually, local_service
from tests.agent_stand_in import StandIn, offer, stand_in
from tests.test_agent_execute import OnePlace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=4, ram="8.0GB"))
TASKS = "GET /api/worker/tasks"


@pytest.fixture
async def pool() -> AsyncIterator[StandIn]:
    async with stand_in() as found:
        yield found


@pytest.fixture
async def client(pool: StandIn) -> AsyncIterator[CoordinatorClient]:
    made = CoordinatorClient(pool.url, DeviceKey.generate())
    await made.register(registration(REPORT), join_token=pool.token)
    yield made
    await made.aclose()


class Pauses:
    """Counts the pauses that a poller makes, each of which lasts ``seconds`` or more."""

    def __init__(self, seconds: float) -> None:
        self.count, self.backoff = 0, Backoff(base_s=seconds, uniform=self._uniform)

    def _uniform(self, low: float, high: float) -> float:
        self.count += 1
        return high


async def beat() -> bool:
    return True


def poller(
    client: CoordinatorClient, attempts: Attempts, pauses: Pauses, clock: Callable[[], float] = lambda: 0.0
) -> Poller:
    def forgotten() -> None:
        pytest.fail("the coordinator knows this worker")

    return Poller(
        client,
        attempts,
        Answers(client),
        room=lambda: 1,
        beat=beat,
        forgotten=forgotten,
        idle=pauses.backoff,
        clock=clock,
    )


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_coordinator_that_answers_at_once_that_there_is_nothing_is_not_asked_without_pause(
    pool: StandIn, client: CoordinatorClient
) -> None:
    pool.fail["/api/worker/tasks"] = (204, {}, b"")
    pauses = Pauses(300.0)
    running = asyncio.create_task(poller(client, Attempts(lambda _: "none"), pauses).run())
    await eventually(lambda: pauses.count)
    assert pool.calls.count(TASKS) == 1
    await end(running)


async def test_a_poll_that_was_held_open_is_followed_by_the_next_at_once(
    pool: StandIn, client: CoordinatorClient
) -> None:
    pool.fail["/api/worker/tasks"] = (204, {}, b"")
    pauses, ticks = Pauses(300.0), itertools.count(0.0, 25.0)
    running = asyncio.create_task(poller(client, Attempts(lambda _: "none"), pauses, clock=lambda: next(ticks)).run())
    await eventually(lambda: pool.calls.count(TASKS) >= 3)
    assert pauses.count == 0
    await end(running)


async def test_tasks_that_cannot_be_begun_do_not_make_the_agent_poll_without_pause(
    pool: StandIn, client: CoordinatorClient
) -> None:
    pauses = Pauses(300.0)
    for number in (1, 2):
        await pool.offers.put(offer("/echo", number=number))
    running = asyncio.create_task(poller(client, Attempts(lambda _: "notes is busy"), pauses).run())
    await eventually(lambda: pauses.count and pool.completed)
    assert (pool.completed[0].status, pool.completed[0].reason) == ("returned", "notes is busy")
    assert pool.calls.count(TASKS) == 1
    await end(running)


async def test_a_task_that_runs_already_and_is_polled_again_goes_on_and_is_not_given_back(
    pool: StandIn, client: CoordinatorClient
) -> None:
    async with local_service() as service:
        endpoint = Endpoint(service.url)
        attempts = Attempts(lambda _: OnePlace(endpoint))
        pauses = Pauses(300.0)
        for _ in range(2):
            await pool.offers.put(offer("/wait"))
        running = asyncio.create_task(poller(client, attempts, pauses).run())
        await eventually(lambda: pauses.count)
        service.go_on.set()
        await eventually(lambda: not len(attempts))
        assert [done.status for done in pool.completed] == ["succeeded"]
        await end(running)
        await endpoint.aclose()
