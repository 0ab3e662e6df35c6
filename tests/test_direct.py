"""What comes on a connection is handled at once and in its order, whatever has to wait and however it ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rma_coordinator.direct import MOST, Direct

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Wire(asyncio.Transport):
    """A transport without a socket, that notes whether it is read from."""

    def __init__(self, stream: asyncio.Protocol) -> None:
        super().__init__()
        self.protocol: asyncio.BaseProtocol = stream
        self.reading, self.closed = True, False
        stream.connection_made(self)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


class Served:
    """A connection that is served directly, from the moment that `serve` is called."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader()
        self.wire = Wire(asyncio.StreamReaderProtocol(self.reader))

    def serve(self, take: Callable[[bytes], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.create_task(Direct(self.reader, self.wire, take).run())

    @property
    def side(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", self.wire.protocol)


class Taker:
    """Takes pieces, some of which let it wait for some turns of the loop; never two at a time."""

    def __init__(self, waits: list[int]) -> None:
        self.taken, self.busy, self._waits = b"", False, iter(waits)

    async def __call__(self, data: bytes) -> None:
        assert not self.busy, "the one before is not handled yet"
        self.busy = True
        for _ in range(next(self._waits, 0)):
            await asyncio.sleep(0)
        self.taken += data
        self.busy = False


@given(
    before=st.binary(max_size=5),
    steps=st.lists(st.one_of(st.integers(0, 3), st.binary(min_size=1, max_size=5))),
    waits=st.lists(st.integers(0, 4)),
    end=st.sampled_from(["eof", "closed", "broken"]),
)
@example(before=b"", steps=[1, b"x"], waits=[], end="broken")
@example(before=b"", steps=[1, b"x"], waits=[], end="eof")
def test_everything_is_handled_in_its_order_and_the_end_is_seen(
    before: bytes, steps: list[int | bytes], waits: list[int], end: str
) -> None:
    async def run() -> None:
        served, taker = Served(), Taker(waits)
        if before:
            served.side.data_received(before)
        serving = served.serve(taker)
        for step in steps:
            if isinstance(step, bytes):
                served.side.data_received(step)
            else:
                for _ in range(step):
                    await asyncio.sleep(0)
        sent = before + b"".join(step for step in steps if isinstance(step, bytes))
        if end == "eof":
            served.side.eof_received()
        else:
            served.side.connection_lost(ConnectionResetError() if end == "broken" else None)
        async with asyncio.timeout(10):
            await serving
        # Who broke the connection may not be heard to the end.
        assert taker.taken == sent if end != "broken" else sent.startswith(taker.taken)

    asyncio.run(run())


async def test_a_piece_that_need_not_wait_is_handled_before_anything_else_runs() -> None:
    served, taker = Served(), Taker([])
    serving = served.serve(taker)
    await asyncio.sleep(0)
    served.side.data_received(b"first ")
    for _ in range(3):
        await asyncio.sleep(0)
    served.side.data_received(b"second")
    assert taker.taken == b"first second"
    served.side.eof_received()
    await serving


async def test_who_sends_without_end_lets_others_have_their_turn() -> None:
    served, taken, turns = Served(), list[int](), 0

    async def take(data: bytes) -> None:
        taken.append(len(data))

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    serving, beside = served.serve(take), asyncio.create_task(others())
    for _ in range(5):
        await asyncio.sleep(0)
    # All of one turn of the loop: no more of it is handled before others are than the bound.
    before, sent = turns, 0
    while served.wire.reading:
        served.side.data_received(b"x" * 4096)
        sent += 4096
        assert sum(taken) <= MOST
    assert (turns, sent > MOST) == (before, True)
    while sum(taken) < sent:  # noqa: ASYNC110 - it is the turns that are counted
        await asyncio.sleep(0)
    assert turns > before
    served.side.eof_received()
    await asyncio.wait_for(serving, 5)
    beside.cancel()


async def test_what_comes_while_one_waits_is_kept_within_bounds() -> None:
    room, taken = asyncio.Event(), list[bytes]()

    async def take(data: bytes) -> None:
        await room.wait()
        taken.append(data)

    served = Served()
    serving = served.serve(take)
    sent = 0
    for _ in range(20):
        await asyncio.sleep(0)
        if served.wire.reading:
            served.side.data_received(b"x" * 20_000)
            sent += 20_000
    assert sent < 20 * 20_000, "it is read on and on"
    room.set()
    for _ in range(100):
        await asyncio.sleep(0)
    assert sum(map(len, taken)) == sent
    assert served.wire.reading
    assert max(map(len, taken)) <= MOST
    served.side.connection_lost(None)
    await serving


@pytest.mark.parametrize("turns", [0, 2])
async def test_what_goes_wrong_with_a_piece_ends_the_connection(turns: int) -> None:
    async def take(data: bytes) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        if data == b"bad":
            raise ValueError("it is bad")

    served = Served()
    serving = served.serve(take)
    await asyncio.sleep(0)
    served.side.data_received(b"good")
    for _ in range(5):
        await asyncio.sleep(0)
    try:
        served.side.data_received(b"bad")
    except ValueError as error:
        # As transports do with what a protocol raises.
        served.side.connection_lost(error)
    with pytest.raises(ValueError, match="bad"):
        await serving


async def test_who_writes_waits_as_long_as_the_other_side_takes_nothing() -> None:
    served = Served()
    stream = cast("asyncio.StreamReaderProtocol", served.side)
    writer = asyncio.StreamWriter(served.wire, stream, served.reader, asyncio.get_running_loop())
    serving = served.serve(Taker([]))
    await asyncio.sleep(0)
    served.side.pause_writing()
    draining = asyncio.create_task(writer.drain())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not draining.done()
    served.side.resume_writing()
    await draining
    writer.close()
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
