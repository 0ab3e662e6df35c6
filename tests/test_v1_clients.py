"""Several clients of one run under /v1: whoever comes, leaves or stops reading, all others have the same answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rma_coordinator.api.asgi import Call, Gone
from rma_coordinator.api.v1 import clients as openai_clients
from rma_coordinator.api.v1.clients import Client
from rma_coordinator.api.v1.requests import Manner
from rma_coordinator.api.v1.runs import Run
from rma_coordinator.api.v1.sse import Answer, Stream
from rma_coordinator.domain.repeats import Key, Repeats
from tests.openai_kit import delta, events, text_of

if TYPE_CHECKING:
    from rma_coordinator.api.v1.jobs import Job

#: What happens, in order: a piece of the answer comes, a client joins, or one of those that are there does something.
STEPS = st.lists(
    st.sampled_from(["piece", "pieces", "join"])
    | st.tuples(st.sampled_from(["stall", "stall", "resume", "leave"]), st.integers(0, 3)),
    min_size=4,
    max_size=16,
)
#: Seconds until what waits for nobody has happened.
SOON_S = 10.0


class StallingCall(Call):
    """A connection whose other side reads, stops reading, or closes it, as it is told.

    Whoever sends waits until there is room again: after what is sent, as Hypercorn does, or before it, as uvicorn does.
    """

    def __init__(self, *, late: bool) -> None:
        super().__init__({"method": "POST", "path": "/", "headers": ()}, self._receives, self._takes)
        self._over = True
        self._late = late
        self.data = b""
        self.reads = asyncio.Event()
        self.reads.set()
        self.closed = asyncio.Event()

    async def _receives(self) -> dict[str, Any]:
        await self.closed.wait()
        return {"type": "http.disconnect"}

    async def _takes(self, message: Any) -> None:
        if self._late:
            await self.reads.wait()
        if self.closed.is_set():
            raise ConnectionError
        self.data += message.get("body", b"")
        if not self._late:
            await self.reads.wait()


class Pool:
    """A run with its clients, each followed to its end."""

    def __init__(self, name: str, *, late: bool) -> None:
        self.text = ""
        self.late = late
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        pool = SimpleNamespace(repeats=Repeats(lambda: 0.0), clock=lambda: 0.0)
        task = SimpleNamespace(id="task-1", created_at=0.0, attempts=[], attempt=None, holder=None)
        relay, origin = SimpleNamespace(complete=True, watch=None), SimpleNamespace(drop=lambda: None)
        job = SimpleNamespace(pool=pool, task=task, relay=relay, origin=origin)
        # A name keeps it going when nobody is there.
        self.run = Run(cast("Job", job), Key("key", b"x"), name=name)
        self.calls: list[StallingCall] = []
        self.following: list[asyncio.Task[None]] = []
        self.cut: set[int] = set()
        self.run.start(self._work())
        self.join()

    async def _work(self) -> None:
        stream = Stream(Answer("chatcmpl-1", 1, "tiny"))
        while (piece := await self.pieces.get()) is not None:
            data = stream.feed(delta(piece))
            self.run.stream = stream
            await self.run.give(data)
        stream.feed(delta(finish="stop"))
        await self.run.end(stream.end())

    def join(self) -> None:
        call = StallingCall(late=self.late)
        self.calls.append(call)
        self.following.append(asyncio.create_task(self._follow(call, len(self.calls) - 1)))

    async def _follow(self, call: StallingCall, number: int) -> None:
        begun = self.run.replay()
        assert begun is not None
        client = Client(call, Manner(), opening=list, quiet=None, clock=lambda: 0.0, asked_at=0.0)
        self.run.join(client)
        try:
            if begun:
                await client.send(begun)
            await client.over
            if client.cut:
                self.cut.add(number)
            elif self.run.done and not self.calls[number].closed.is_set():
                await client.flush()
        except Gone:
            self.cut.add(number)
        finally:
            client.close()
            self.run.leave(client)

    def piece(self) -> None:
        self.text += chr(ord("a") + len(self.text) % 26)
        self.pieces.put_nowait(self.text[-1])

    def act(self, what: str, number: int) -> None:
        call = self.calls[number % len(self.calls)]
        if what == "leave":
            # What is on its way to it may hang there.
            call.closed.set()
        elif what == "stall":
            call.reads.clear()
        else:
            call.reads.set()


async def rest() -> None:
    """Let everything happen that waits for nothing."""
    for _ in range(60):
        await asyncio.sleep(0)


async def played(steps: list[Any], name: str, *, late: bool) -> Pool:
    """Play the steps to their end, at which everyone reads again."""
    pool = Pool(name, late=late)
    await rest()
    for step in steps:
        if step in ("piece", "pieces"):
            for _ in range(1 if step == "piece" else 8):
                pool.piece()
        elif step != "join":
            pool.act(*step)
        elif not pool.run.done:
            pool.join()
        await rest()
    pool.pieces.put_nowait(None)
    await rest()
    check_readers(pool)
    for call in pool.calls:
        call.reads.set()
    async with asyncio.timeout(SOON_S):
        await asyncio.wait(pool.following)
        await asyncio.wait({pool.run.work})
    return pool


def said(call: StallingCall) -> tuple[str, bool]:
    """Return what a client has of the text, and whether it has its end."""
    found = events(call.data.decode()) if call.data else []
    whole = found[-1:] == ["[DONE]"]
    return text_of(found[:-1] if whole else found), whole


def check_readers(pool: Pool) -> None:
    """Assert that whoever reads has everything, whatever the others do."""
    for number, call in enumerate(pool.calls):
        if call.reads.is_set() and not call.closed.is_set() and number not in pool.cut:
            assert said(call) == (pool.text, True)


@settings(max_examples=400)
@given(steps=STEPS, name=st.sampled_from(["", "n"]), late=st.booleans())
@example(steps=[("stall", 0), "piece", ("leave", 0), "join", "piece"], name="n", late=False)
@example(steps=[("stall", 0), "piece", "join", "piece"], name="", late=False)
@example(steps=["join", ("leave", 0), ("stall", 1), "pieces", "join"], name="n", late=False)
def test_who_stays_and_reads_has_all_of_it_once_and_who_is_cut_has_no_end_of_it(
    steps: list[Any], name: str, *, late: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Room for a few events only.
        patch.setattr(openai_clients, "MOST_BEHIND", 1200)
        pool = asyncio.run(played(steps, name, late=late))
    stayed = [number for number, call in enumerate(pool.calls) if not call.closed.is_set()]
    for number, call in enumerate(pool.calls):
        text, whole = said(call)
        assert pool.text.startswith(text), "nothing is missing in the middle, and nothing comes twice"
        assert whole or number not in stayed or number in pool.cut
        assert not whole or text == pool.text
    if len(stayed) == len(pool.calls):
        assert any(said(call)[1] for call in pool.calls), "the quickest has all of it"
    if not any(step[0] == "stall" for step in steps):
        assert not pool.cut, "whoever reads is never cut"
