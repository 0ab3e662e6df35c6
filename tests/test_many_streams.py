"""Two hundred streams, ten of them never read: the coordinator's memory stays small, and nobody else loses a word."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from rma_core.models import channel as frames
from tests.coordinator_fixtures import until
from tests.coordinator_process import coordinating
from tests.openai_kit import events, text_of
from tests.stub_workers import TOGETHER_BYTES, Answer, Memory, Streamer, head, joined, offered, request, text, unread

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.coordinator_process import Coordinator

#: Streams that are read and those that are not, and the events of each: the latter would be far too much to keep.
READ, UNREAD = 190, 10
EVENTS, ENDLESS = 70, 25_000
WORKERS = 4
#: What the coordinator's memory may grow by with all of them: it is to run in 256 MB, 60 of which it has at rest.
MOST_GROWTH_BYTES = 96 * 1024 * 1024
#: What of an answer nobody reads may have left its worker: a window, and what the kernel takes between.
MOST_SENT_BYTES = 8 * 1024 * 1024
#: Seconds for all of it, on a machine that is busy.
PATIENCE_S = 120.0


async def read(coordinator: Coordinator, name: str) -> str:
    """Ask for a stream, and return its text once it has come to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", coordinator.port, limit=1 << 20)
    try:
        writer.write(head(coordinator, request(name, EVENTS)))
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        body = bytearray()
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        found = events(body.decode())
        assert found[-1] == "[DONE]"
        return text_of(found)
    finally:
        writer.transport.abort()


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("server", ["hypercorn", "uvicorn"])
async def test_two_hundred_streams_of_which_ten_are_never_read(tmp_path: Path, server: str) -> None:
    async with (
        coordinating(tmp_path / "home", server=server) as (coordinator, client),
        joined(coordinator, [Streamer] * WORKERS) as workers,
        asyncio.timeout(PATIENCE_S),
    ):
        await offered(client)
        assert await read(coordinator, "first") == text("first", EVENTS)
        memory = Memory(coordinator)
        with contextlib.ExitStack() as held:
            for number in range(UNREAD):
                held.enter_context(unread(coordinator, request(f"unread-{number}", ENDLESS)))
            stuck = await until(lambda: full(workers))
            alone = memory.look()
            async with memory.watched():
                names = [f"read-{number}" for number in range(READ)]
                texts = await asyncio.gather(*(read(coordinator, name) for name in names))
            assert texts == [text(name, EVENTS) for name in names]
            sent = [one.sent for one in stuck]
            assert max(sent) < MOST_SENT_BYTES, "more than that of what nobody reads has gone somewhere"
        # They have left, if they were not cut before: their workers are told to stop.
        await until(lambda: all(one.cancelled for one in stuck))
        print(  # noqa: T201 - the figures, for who wants them (-s)
            f"{server}: memory grew by {memory.growth / 1e6:.1f} MB, by {alone / 1e6:.1f} with the unread ones alone, "
            f"of each of which {min(sent) / 1e3:.0f} to {max(sent) / 1e3:.0f} KB had come"
        )
        assert memory.growth < MOST_GROWTH_BYTES


def full(workers: Sequence[Streamer]) -> list[Answer]:
    """Return the answers that nobody reads, once as much of each is on its way as may be."""
    found = [one for worker in workers for one in worker.answers.values() if one.name.startswith("unread")]
    return (
        found
        if len(found) == UNREAD and all(one.sent >= frames.WINDOW_BYTES - TOGETHER_BYTES * 2 for one in found)
        else []
    )
