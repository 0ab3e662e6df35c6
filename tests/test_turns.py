"""Turns at a real coordinator: counted by the order in which workers on the channel are given what was asked for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from rma_coordinator.domain.queues import SHARES
from tests.coordinator_fixtures import running, until
from tests.openai_kit import CHAT, HELLO, JSON, REPLY, attach

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from httpx2 import Response

    from rma_core.models import channel as frames
    from tests.coordinator_fixtures import Line, Running

#: Requests of the key that asks for most.
MANY = 1000
SLOTS = 2


class Way(NamedTuple):
    """How requests come: an address, what goes there, and headers."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    status: int


V1 = Way(CHAT, {"model": "tiny", "messages": HELLO}, {}, 200)
LATER = Way("/api/inference/notes", {}, {"prefer": "respond-async"}, 202)
WAYS = pytest.mark.parametrize("way", [V1, LATER], ids=["v1", "later"])


class Turns:
    """A pool with one worker, that answers what it is given when it is told to."""

    def __init__(self, pool: Running, line: Line, way: Way) -> None:
        self.pool, self.line, self.way = pool, line, way
        self._names: dict[str, str] = {}
        self._asked: list[asyncio.Task[Response]] = []
        self._has: list[frames.Task] = []

    async def key(self, name: str, *scopes: str) -> str:
        """Make a key, by whose name its requests are counted."""
        secret = await self.pool.make_key("infer:*", *scopes)
        self._names[self.pool.pool.keyring.principal(secret).id] = name
        return secret

    async def ask(self, key: str, count: int = 1, priority: str = "normal") -> None:
        """Send so many requests, and wait until they wait."""
        dispatcher = self.pool.pool.dispatcher
        before = len(dispatcher.tasks)
        headers = {**self.pool.bearer(key), **self.way.headers, "rma-priority": priority}
        contents = [json.dumps({**self.way.body, "user": f"{before} {number}"}) for number in range(count)]
        calls = [self.pool.client.post(self.way.path, content=one, headers=headers) for one in contents]
        asked = list(map(asyncio.create_task, calls))
        self._asked += asked
        if self.way is LATER:
            await asyncio.gather(*asked)
        else:
            await until(lambda: len(dispatcher.tasks) == before + count, within_s=60)

    async def given(self, count: int, *, by: str = "key") -> list[str]:
        """Answer until so many more have come to the worker; return whose they are, or of which class, in order."""
        names: list[str] = []
        for _ in range(count):
            if len(self._has) == SLOTS:
                await self.line.answer(self._has.pop(0).stream, json.dumps(REPLY).encode(), headers=JSON)
            self._has.append(task := await self.line.task())
            found = self.pool.pool.dispatcher.find(task.offer.task_id)
            names.append(self._names[found.key_id] if by == "key" else found.priority)
        return names

    async def end(self) -> None:
        """Let every request end, and see that none failed."""
        for task in list(self.pool.pool.dispatcher.tasks.values()):
            self.pool.pool.dispatcher.cancel(task, "enough")
        answers = await asyncio.gather(*self._asked)
        assert set(answers_of(answers)) <= {self.way.status, 502}, answers_of(answers)


def answers_of(answers: Iterable[Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


@contextlib.asynccontextmanager
async def turns(home: Path, way: Way) -> AsyncIterator[Turns]:
    async with running(home, max_queued_tasks=2 * MANY) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": SLOTS}) as line:
            if way is V1:
                await attach(pool, line, "tiny", slots=SLOTS)
            made = Turns(pool, line, way)
            yield made
            await made.end()


@WAYS
async def test_a_thousand_requests_of_one_key_delay_anothers_by_one_turn(tmp_path: Path, way: Way) -> None:
    async with turns(tmp_path, way) as pool:
        greedy, modest = await pool.key("greedy"), await pool.key("modest")
        await pool.ask(greedy, MANY + SLOTS)
        assert pool.pool.pool.dispatcher.queued == MANY
        assert set(await pool.given(SLOTS + 5)) == {"greedy"}
        for _ in range(10):
            await pool.ask(modest)
            assert "modest" in await pool.given(2)
        await pool.ask(modest, 10)
        assert Counter(await pool.given(20))["modest"] in (9, 10), "while both wait, each gets every other turn"
        assert pool.pool.pool.dispatcher.queued > MANY - 100


@WAYS
async def test_what_is_not_urgent_still_moves_under_a_flood_of_what_is(tmp_path: Path, way: Way) -> None:
    async with turns(tmp_path, way) as pool:
        urgent, other = await pool.key("urgent", "priority:high"), await pool.key("other")
        await pool.ask(urgent, 300, "high")
        await pool.given(SLOTS)
        await pool.ask(other, 60, "low")
        await pool.ask(other, 60)
        rounds = 5
        served = Counter(await pool.given(rounds * int(sum(SHARES.values())), by="class"))
        for name, share in SHARES.items():
            assert abs(served[name] - rounds * share) <= 1, served
