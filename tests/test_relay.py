"""The relay: a window between worker and client, small answers held until whole, bodies in memory or on disk."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest

from rma_coordinator.domain.tasks import Attempt, Task
from rma_coordinator.relay import HOLD_BYTES, Behind, Head, Overrun, Relay, Waits
from rma_coordinator.spool import PIECE_BYTES, Spools
from rma_core.models.channel import WINDOW_BYTES
from tests.coordinator_fixtures import soon

if TYPE_CHECKING:
    from pathlib import Path

OK = Head(200, ())


def small(length: int) -> Head:
    return Head(200, (("Content-Length", str(length)),))


@pytest.fixture
def relay(tmp_path: Path) -> Relay:
    task = Task(service="notes", method="POST", path="/", headers=(), body_bytes=0, key_id="k", now=0, timeout_s=60)
    return Relay(task, Spools(tmp_path, memory_bytes=10, total_memory_bytes=100, disk_bytes=10**9).make())


async def still_waiting(task: asyncio.Task[object]) -> bool:
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


async def test_an_answer_of_unknown_size_goes_on_as_soon_as_its_head_is_there(relay: Relay) -> None:
    ready = asyncio.create_task(relay.ready())
    assert await still_waiting(ready)
    relay.put_head(OK)
    assert await soon(ready) == OK
    assert relay.whole is None


@pytest.mark.parametrize("head", [small(3), Head(204, ()), Head(304, (("content-length", "9"),))])
async def test_a_small_answer_is_held_until_it_is_whole(relay: Relay, head: Head) -> None:
    ready = asyncio.create_task(relay.ready())
    relay.put_head(head)
    assert await still_waiting(ready)
    if head.length:
        relay.put(b"abc")
        assert await still_waiting(ready)
    relay.end()
    assert await soon(ready) == head
    assert relay.whole == (b"abc" if head.length else b"")


@pytest.mark.parametrize("length", [str(HOLD_BYTES + 1), "", "-1", "1e3", "²", "9" * 30])
async def test_an_answer_that_is_not_announced_as_small_is_not_held(relay: Relay, length: str) -> None:
    relay.put_head(Head(200, (("content-length", length),)))
    assert await soon(relay.ready()) is not None


async def test_a_lost_attempt_leaves_no_trace_in_what_the_client_gets(relay: Relay) -> None:
    ready = asyncio.create_task(relay.ready())
    relay.put_head(small(8))
    relay.put(b"half")
    relay.restart()
    assert await still_waiting(ready)
    relay.put_head(small(5))
    relay.put(b"whole")
    relay.end()
    assert await soon(ready) == small(5)
    assert relay.whole == b"whole"


async def test_a_task_that_failed_has_no_head(relay: Relay) -> None:
    ready = asyncio.create_task(relay.ready())
    assert await still_waiting(ready)
    relay.task.state = "failed"
    relay.wake()
    assert await soon(ready) is None


async def test_never_more_than_a_window_waits_and_room_is_made_by_reading(relay: Relay) -> None:
    relay.put_head(OK)
    taken: list[int] = []
    relay.begin(Attempt(relay.task, 1, "w", 0), object(), taken.append)
    for _ in range(WINDOW_BYTES // PIECE_BYTES):
        relay.put(b"x" * PIECE_BYTES)
    with pytest.raises(Overrun, match="without credit"):
        relay.put(b"x")
    room = asyncio.create_task(relay.room(PIECE_BYTES))
    assert await still_waiting(room)
    pieces = relay.pieces()
    await anext(pieces)
    assert await still_waiting(room), "the piece is still on its way to the client"
    await anext(pieces)
    await soon(room)
    assert taken == [PIECE_BYTES]
    relay.put(b"x" * PIECE_BYTES)


async def test_waiting_for_room_ends_with_the_task(relay: Relay) -> None:
    relay.put_head(OK)
    relay.put(b"x" * WINDOW_BYTES)
    room = asyncio.create_task(relay.room(1))
    assert await still_waiting(room)
    relay.task.state = "cancelled"
    relay.wake()
    await soon(room)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_reading_ends_early_when_the_task_does_and_the_answer_is_not_complete(relay: Relay, state: str) -> None:
    relay.put_head(OK)
    relay.put(b"a")
    got: list[bytes] = []

    async def read() -> None:
        got.extend([piece async for piece in relay.pieces()])

    reading = asyncio.create_task(read())
    assert await still_waiting(reading)
    relay.task.state = state  # type: ignore[assignment]
    relay.wake()
    await soon(reading)
    assert (got, relay.complete) == ([b"a"], False)


async def test_what_came_before_the_end_is_read_although_the_task_has_ended(relay: Relay) -> None:
    relay.put_head(OK)
    relay.put(b"a")
    relay.put(b"b")
    relay.end()
    relay.task.state = "succeeded"
    assert [piece async for piece in relay.pieces()] == [b"a", b"b"]


def test_what_cannot_be_an_answer_is_refused(relay: Relay) -> None:
    with pytest.raises(Overrun, match="begins with its head"):
        relay.put(b"x")
    with pytest.raises(Overrun, match="begins with its head"):
        relay.end()
    with pytest.raises(Overrun, match="status is not 100"):
        relay.put_head(Head(100, ()))
    relay.put_head(small(3))
    with pytest.raises(Overrun, match="one head"):
        relay.put_head(OK)
    with pytest.raises(Overrun, match="announced 3 bytes and has 0"):
        relay.end()
    with pytest.raises(Overrun, match="longer than the 3 bytes"):
        relay.put(b"four")
    relay.put(b"abc")
    relay.end()
    with pytest.raises(Overrun, match="follows the end"):
        relay.put(b"")


# -- bodies --------------------------------------------------------------------------------------------------------


async def test_a_wait_that_nobody_has_begun_can_be_let_be(relay: Relay) -> None:
    async def inner() -> None:
        await asyncio.Event().wait()

    async def outer(waits: Waits) -> None:
        await waits

    # What is never awaited is warned of, and warnings are errors here.
    pours = asyncio.create_task(relay.pour(lambda _: around(inner()), lambda: False))

    def around(waits: Waits) -> Waits:
        return Behind(outer(waits), waits)

    relay.begin(Attempt(relay.task, 1, "w", 0.0), None, lambda _: None)
    relay.put_head(Head(200, ()))
    await asyncio.sleep(0)
    relay.put(b"x")
    pours.cancel()
    await asyncio.wait({pours})
    assert pours.cancelled()
    gc.collect()
