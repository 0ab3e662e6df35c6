"""What is written to the channel: in order, all of it, and in fewer pieces."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_core.agent import gathered as gathered_module
from rma_core.agent.gathered import GATHERED_BYTES, Gathered
from tests.agent_service import eventually


class Recorder:
    """A transport that keeps what is written to it, and in which pieces."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def write_eof(self) -> None:
        self.calls.append("eof")


def around(recorder: Any) -> Gathered:
    return Gathered(recorder)


def put(way: Gathered, data: bytes, *, patient: bool) -> None:
    way.patient = patient
    way.write(data)


async def test_what_is_followed_by_more_leaves_with_it_in_one_piece() -> None:
    transport = Recorder()
    way = around(transport)
    put(way, b"head", patient=True)
    put(way, b"data", patient=True)
    assert transport.pieces == []
    put(way, b"end", patient=False)
    way.write(b"next")
    assert transport.pieces == [b"headdataend", b"next"]


async def test_what_nothing_follows_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered_module, "PATIENCE_S", 0.02)
    transport = Recorder()
    put(around(transport), b"accept", patient=True)
    await eventually(lambda: transport.pieces == [b"accept"])


async def test_much_does_not_wait_for_more() -> None:
    transport = Recorder()
    put(around(transport), b"x" * GATHERED_BYTES, patient=True)
    assert transport.pieces == [b"x" * GATHERED_BYTES]


@pytest.mark.parametrize("ending", ["close", "write_eof"])
async def test_an_ending_comes_behind_what_waits(ending: str) -> None:
    transport = Recorder()
    way = around(transport)
    put(way, b"last", patient=True)
    getattr(way, ending)()
    assert (transport.pieces, len(transport.calls)) == ([b"last"], 1)


async def test_an_abort_drops_what_waits() -> None:
    transport = Recorder()
    way = around(transport)
    put(way, b"last", patient=True)
    way.abort()
    await asyncio.sleep(2 * gathered_module.PATIENCE_S)
    assert (transport.pieces, transport.calls) == ([], ["abort"])


@given(st.lists(st.tuples(st.binary(max_size=GATHERED_BYTES // 3), st.booleans()), max_size=12))
def test_all_of_it_leaves_in_order(writes: list[tuple[bytes, bool]]) -> None:
    transport = Recorder()

    async def run() -> None:
        way = around(transport)
        for data, patient in writes:
            put(way, data, patient=patient)
            assert way._size < GATHERED_BYTES
        way.close()

    asyncio.run(run())
    assert b"".join(transport.pieces) == b"".join(data for data, _ in writes)
