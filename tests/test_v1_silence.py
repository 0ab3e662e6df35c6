"""Engines that fall silent in the middle of an answer, and what is learnt of those that do not."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api import waiting
from rma_coordinator.domain import timings
from rma_core.models import channel as frames
from tests.coordinator_fixtures import Line, Running, until
from tests.openai_kit import (
    END,
    JSON,
    REPLY,
    ROLE,
    SSE,
    ask,
    attach,
    begins,
    delta,
    event,
    events,
    pool_with,
    stream,
    taken,
    text_of,
)

if TYPE_CHECKING:
    from pathlib import Path

LANE = "llm tiny"
TIMINGS = {"prompt_n": 50, "prompt_ms": 10.0, "predicted_n": 20, "predicted_ms": 40.0}
COMMENT = b": still here\n\n"
#: A token for each of its letters at most: no more are believed.
WORDS = "one two three four five six"
MESSAGE = {"role": "assistant", "content": WORDS}
SPOKEN = {**REPLY, "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is known to be fast is given up after a moment."""
    monkeypatch.setattr(timings, "LEAST_SILENCE_S", 0.4)
    monkeypatch.setattr(waiting, "LOOK_AGAIN_S", 0.1)


async def known(pool: Running, line: Line) -> None:
    """Let a worker show how fast its engine is."""
    asked = ask(pool)
    await line.serve(json.dumps({**SPOKEN, "timings": TIMINGS}).encode(), headers=JSON)
    assert (await asked).status_code == 200
    await until(lambda: pool.pool.dispatcher.speeds.per_token(line.id, LANE)[1] > 0)


async def chatter(line: Line, number: int) -> None:
    """Send comments, as an engine does that lives and does nothing."""
    while True:
        await line.data(number, COMMENT)
        await asyncio.sleep(0.02)


@pytest.mark.usefixtures("quick")
async def test_an_engine_that_sends_nothing_but_comments_is_given_up_and_another_goes_on(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        await known(pool, line)
        asked = stream(pool, max_tokens=10)
        task = await begins(pool, line, ROLE, delta("Hel"), delta("lo"))
        await attach(pool, other, "tiny", slots=1)
        chat = asyncio.create_task(chatter(line, task.stream))
        again = await other.task()
        chat.cancel()
        await other.answer(again.stream, ROLE, delta(" you"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events((await asked).text)[:-1]) == "Hello you"
        lost = pool.pool.dispatcher.find(task.offer.task_id)
        assert "went silent" in lost.reasons[0]
        assert (await line.frame(frames.Cancel)).stream == task.stream, "its slot is to come free"


@pytest.mark.usefixtures("quick")
async def test_an_engine_of_which_nothing_is_known_and_one_that_gathers_calls_of_tools_are_waited_for(
    tmp_path: Path,
) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    async with pool_with(tmp_path) as (pool, line):
        for more in ({}, {"tools": [tool]}):
            asked = stream(pool, **more)
            task = await begins(pool, line, ROLE, delta("a"))
            (attempt,) = pool.pool.dispatcher.find(task.offer.task_id).attempts
            await asyncio.sleep(3 * timings.LEAST_SILENCE_S)
            assert attempt.state == "running"
            await line.data(task.stream, delta("b") + delta(finish="stop") + END)
            await line.say(frames.End(stream=task.stream))
            assert text_of(events((await asked).text)[:-1]) == "ab"
            await known(pool, line)


@pytest.mark.usefixtures("quick")
async def test_a_slow_engine_that_goes_on_is_not_given_up(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        await known(pool, line)
        asked = stream(pool)
        task = await begins(pool, line, ROLE, delta("a"))
        for _ in range(12):
            await asyncio.sleep(0.1)
            await line.data(task.stream, delta("a"))
        await line.data(task.stream, delta(finish="stop") + END)
        await line.say(frames.End(stream=task.stream))
        assert text_of(events((await asked).text)[:-1]) == "a" * 13


@pytest.mark.parametrize("streamed", [False, True])
async def test_speeds_are_the_engines_own_and_the_next_answers_length_the_last_ones(
    tmp_path: Path, streamed: bool
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        speeds, usage = (
            pool.pool.dispatcher.speeds,
            {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70},
        )
        asked = stream(pool) if streamed else ask(pool)
        task = await taken(pool, line)
        await asyncio.sleep(0.1)
        if streamed:
            last: Any = {"choices": [], "usage": usage, "timings": TIMINGS}
            await line.answer(task.stream, ROLE, delta(WORDS), delta(finish="stop"), event(last), END, headers=SSE)
        else:
            body = json.dumps({**SPOKEN, "usage": usage, "timings": TIMINGS}).encode()
            await line.answer(task.stream, body, headers=JSON)
        assert (await asked).status_code == 200
        await until(lambda: speeds.per_token(line.id, LANE)[1] > 0)
        reading, answering = speeds.per_token(line.id, LANE)
        assert answering == pytest.approx(10 * reading), "as its engine says"
        assert 50 * reading + 20 * answering >= 0.05, "but no faster than could be seen"
        found = next(iter(pool.pool.dispatcher.finished.values()))
        assert speeds.length(found.key_id, LANE) == 20
        assert speeds.length(found.key_id, LANE, 5) == 5
        again = ask(pool, max_tokens=5)
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        await again
        work = pool.pool.dispatcher.find(task.offer.task_id).work
        assert (work.answer, work.prompt) == pytest.approx((5.0, task.offer.body_bytes / 4))


async def test_an_engine_without_timings_is_as_fast_as_its_pieces_come(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 20, "total_tokens": 70}
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        task = await taken(pool, line)
        await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
        await asyncio.sleep(0.05)
        await line.data(task.stream, ROLE + delta("a"))
        await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].committed)
        await asyncio.sleep(0.2)
        await line.data(task.stream, delta(WORDS) + delta(finish="stop") + event({"choices": [], "usage": usage}) + END)
        await line.say(frames.End(stream=task.stream))
        await asked
        speeds = pool.pool.dispatcher.speeds
        await until(lambda: speeds.per_token(line.id, LANE)[1] > 0)
        reading, answering = speeds.per_token(line.id, LANE)
        assert (reading >= 0.05 / 50, answering >= 0.2 / 20) == (True, True)
