"""Waits of the handlers below Quart: silence that is noticed, and not where nobody could hear."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import pytest

from rma_coordinator.api import waiting
from rma_coordinator.api.waiting import Ahead, Silence
from tests.coordinator_fixtures import PATIENCE_S


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOOK_AGAIN_S", 0.05)


async def test_silence_is_noticed_and_only_once() -> None:
    noticed = asyncio.Event()
    silence = Silence(0.05, noticed.set)
    await asyncio.wait_for(noticed.wait(), PATIENCE_S)
    noticed.clear()
    await asyncio.sleep(0.3)
    assert not noticed.is_set()
    silence.stop()


async def test_who_is_heard_now_and_then_or_has_an_excuse_or_was_told_to_stop_is_not_silent() -> None:
    noticed: list[str] = []
    heard = Silence(0.2, lambda: noticed.append("heard"))
    excused = Silence(0.05, lambda: noticed.append("excused"), lambda: True)
    stopped = Silence(0.05, lambda: noticed.append("stopped"))
    stopped.stop()
    for _ in range(12):
        await asyncio.sleep(0.05)
        heard.heard()
    assert noticed == []
    heard.stop()
    excused.stop()


async def test_what_came_while_the_coordinator_stood_still_is_read_before_anyone_is_called_silent() -> None:
    noticed, came = list[str](), asyncio.Event()
    loop = asyncio.get_running_loop()
    silence = Silence(0.1, lambda: noticed.append("silent"))

    async def read() -> None:
        await came.wait()
        silence.heard()

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    # It is due while the loop stands still; what comes then takes two more rounds of the loop until it is read.
    loop.call_soon(time.sleep, 0.2)
    loop.call_soon(lambda: loop.call_soon(came.set))
    await reading
    await asyncio.sleep(0)
    assert noticed == []
    silence.stop()


@pytest.mark.parametrize("ends", ["closed", "done", "cancelled"])
async def test_who_is_told_of_a_wait_does_not_live_on_with_it(ends: str) -> None:
    class Waiter:
        told = 0

        def __init__(self, what: asyncio.Future[None]) -> None:
            self.ahead = Ahead(what, self.tell)

        def tell(self) -> None:
            type(self).told += 1

    future = asyncio.get_running_loop().create_future()
    waiter = Waiter(future)
    if ends == "closed":
        waiter.ahead.close()
    elif ends == "done":
        future.set_result(None)
    else:
        future.cancel()
    await asyncio.sleep(0)
    assert Waiter.told == (ends != "closed")
    gone = weakref.ref(waiter)
    gc.disable()
    try:
        del waiter, future
        await asyncio.sleep(0)
        assert gone() is None
    finally:
        gc.enable()
