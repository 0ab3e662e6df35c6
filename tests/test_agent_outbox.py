"""What is sent on the channel: in order, all of it, and in few messages."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import outbox as outbox_module
from rma_core.agent.answers import LinkLostError
from rma_core.agent.outbox import FULL_BYTES, Outbox
from rma_core.models import channel as frames
from tests.agent_service import eventually


class Wire:
    """Keeps the messages that are sent, each once it is let through."""

    def __init__(self) -> None:
        self.messages: list[str | bytes] = []
        self.open = asyncio.Event()
        self.open.set()
        self.broken = False

    async def send(self, message: str | bytes) -> None:
        await self.open.wait()
        if self.broken:
            raise LinkLostError("cut")
        self.messages.append(message)

    def frames(self) -> list[tuple[int, int, bytes]]:
        return [record for message in self.messages for record in frames.records(message)]


def sent(frame: str | bytes) -> list[tuple[int, int, bytes]]:
    return list(frames.records(frame))


async def test_frames_that_are_ready_together_leave_in_one_message() -> None:
    wire = Wire()
    outbox = Outbox(wire.send)
    running = asyncio.create_task(outbox.run())
    accept, data = frames.pack(frames.Accept(stream=7)), frames.pack_data(7, b"abc", end=True)
    await outbox.put(accept)
    await outbox.put(data)
    await outbox.flush()
    assert len(wire.messages) == 1
    assert wire.frames() == sent(accept) + sent(data)
    await outbox.put(accept)
    await outbox.flush()
    assert wire.messages[1:] == [accept], "one alone stays as it is"
    running.cancel()


async def test_what_is_followed_by_more_waits_for_it_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "PATIENCE_S", 0.02)
    wire = Wire()
    outbox = Outbox(wire.send)
    running = asyncio.create_task(outbox.run())
    accept = frames.pack(frames.Accept(stream=7))
    await outbox.put(accept, more=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert wire.messages == []
    await eventually(lambda: wire.messages == [accept])
    running.cancel()


async def test_who_sends_much_waits_until_it_leaves() -> None:
    wire = Wire()
    wire.open.clear()
    outbox = Outbox(wire.send)
    running = asyncio.create_task(outbox.run())
    piece = frames.pack_data(1, b"x" * frames.MAX_DATA_BYTES)

    async def sending() -> None:
        for _ in range(3 * FULL_BYTES // len(piece)):
            await outbox.put(piece)

    task = asyncio.create_task(sending())
    await eventually(lambda: outbox._size >= FULL_BYTES)
    assert not task.done()
    assert outbox._size < FULL_BYTES + len(piece)
    wire.open.set()
    await task
    await outbox.flush()
    assert len(wire.frames()) == 3 * FULL_BYTES // len(piece)
    assert max(map(len, wire.messages)) <= frames.BUNDLE_BYTES + 1
    running.cancel()


async def test_a_broken_connection_is_told_to_everyone_who_waits_or_comes() -> None:
    wire = Wire()
    wire.open.clear()
    outbox = Outbox(wire.send)
    running = asyncio.create_task(outbox.run())
    await outbox.put(
        b"".join([frames.pack_data(1, b"x" * frames.MAX_DATA_BYTES)] * (1 + FULL_BYTES // frames.MAX_DATA_BYTES))
    )
    await asyncio.sleep(0)
    await outbox.put(
        b"".join([frames.pack_data(1, b"x" * frames.MAX_DATA_BYTES)] * (1 + FULL_BYTES // frames.MAX_DATA_BYTES))
    )
    waiting = [asyncio.create_task(outbox.put("{}")), asyncio.create_task(outbox.flush())]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    wire.broken = True
    wire.open.set()
    with pytest.raises(LinkLostError):
        await running
    for task in waiting:
        with pytest.raises(LinkLostError):
            await task
    with pytest.raises(LinkLostError):
        await outbox.put("{}")
    with pytest.raises(LinkLostError):
        await outbox.flush()


PACKED = st.one_of(
    st.builds(lambda n: frames.pack(frames.Accept(stream=n)), st.integers(1, 99)),
    st.builds(
        lambda n, data, end: frames.pack_data(n, data, end=end),
        st.integers(1, 2**32 - 1), st.binary(max_size=300), st.booleans(),
    ),
)  # fmt: skip


@given(st.lists(PACKED, min_size=1, max_size=20))
def test_a_bundle_is_its_frames_in_order(packed: list[str | bytes]) -> None:
    assert list(frames.records(frames.bundle(packed))) == [record for one in packed for record in frames.records(one)]


@given(st.lists(PACKED, min_size=2, max_size=6), st.data())
def test_a_message_that_was_cut_is_refused_behind_its_whole_records(
    packed: list[str | bytes], data: st.DataObject
) -> None:
    whole = frames.bundle(packed)
    assert isinstance(whole, bytes)
    ends = {0}
    for one in packed:
        ends.add(max(ends) + len(frames.bundle([one, b""])))
    cut = data.draw(st.integers(1, len(whole) - 1).filter(lambda at: at not in ends))
    found: list[tuple[int, int, bytes]] = []
    with pytest.raises(ValueError, match="record"):
        found.extend(frames.records(whole[:cut]))
    assert found == list(frames.records(whole))[: len(found)]
    assert len(found) < len(packed)


MESSAGE = st.lists(PACKED, min_size=1, max_size=3).map(frames.bundle)


@given(st.one_of(MESSAGE, st.binary(max_size=40), st.tuples(MESSAGE, st.integers(0, 40)).map(lambda m: m[0][: m[1]])))
def test_a_message_is_a_sole_piece_exactly_where_its_records_are_one(message: str | bytes) -> None:
    try:
        found = [] if isinstance(message, str) else list(frames.records(message))
    except ValueError:
        found = []
    sole = len(found) == 1 and found[0][1] == frames.DATA_PART
    assert frames.sole_piece(message) == ((found[0][0], found[0][2]) if sole else None)


@given(st.binary(max_size=200))
def test_hostile_bytes_are_records_or_refused(message: bytes) -> None:
    try:
        found = list(frames.records(message))
    except ValueError:
        return
    assert sum(len(content) + 9 for _, _, content in found) == len(message)
