"""Streamed answers under /v1 whose worker is lost: restarted, continued, or ended with an error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.v1 import streams as openai_streams
from rma_core.models import channel as frames
from tests.coordinator_fixtures import until
from tests.openai_kit import (
    END,
    HELLO,
    ROLE,
    SSE,
    USAGE,
    attach,
    begins,
    check_cut,
    delta,
    events,
    holder,
    line_stream,
    pool_with,
    stream,
    taken,
    text_of,
)

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_loss_before_the_first_event_is_invisible_and_after_it_the_stream_says_so(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        second = await pool.enrol()
        async with second.channel({"llm": 1}) as other:
            asked = stream(pool)
            task = await line.task()
            await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
            await line.data(task.stream, ROLE + b"data: {")
            await attach(pool, other, "tiny", slots=1)
            pool.pool.unregister(pool.pool.fleet.get(line.id))
            again = await other.task()
            await other.say(frames.Head(stream=again.stream, status=200, headers=SSE))
            await other.data(again.stream, ROLE + delta("a") + b'data: {"torn')
            await until(lambda: pool.pool.dispatcher.tasks[again.offer.task_id].committed)
            pool.pool.unregister(pool.pool.fleet.get(other.id))
            answer = await asked
            assert answer.headers["x-rma-attempts"] == "2"
            assert text_of(check_cut(answer, "broke off", "worker_lost")) == "a"


async def test_a_cut_answer_goes_on_with_another_worker_in_the_same_stream(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        asked = stream(pool, max_tokens=10, stream_options={"include_usage": True})
        await begins(pool, line, ROLE, delta("Hel"), delta("lo"), b'data: {"torn')
        await attach(pool, other, "tiny", slots=1)
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        again = await other.task()
        body = json.loads(other.bodies[again.stream])
        assert body["messages"] == [*HELLO, {"role": "assistant", "content": "Hello"}]
        assert (body["continue_final_message"], body["add_generation_prompt"], body["max_tokens"]) == (True, False, 8)
        await other.answer(
            again.stream, ROLE, delta(" you"), delta(finish="stop"), USAGE, END,
            headers=SSE,
        )  # fmt: skip
        answer = await asked
        assert ": rma continued\n" in answer.text
        found = events(answer.text)
        assert found.pop() == "[DONE]"
        assert text_of(found) == "Hello you"
        assert len({one["id"] for one in found}) == 1
        roles = [one for one in found if one["choices"] and one["choices"][0]["delta"].get("role")]
        assert len(roles) == 1
        usage = found[-1]["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        await until(lambda: (pool.pool.dispatcher.failed, pool.pool.dispatcher.succeeded) == (1, 1))


async def test_an_answer_that_cannot_be_continued_says_why(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        await attach(pool, other, "tiny", slots=1, state="cold")
        asked = stream(pool, tools=[tool])
        running_on = line if line.id == await holder(pool) else other
        await begins(pool, running_on, ROLE, delta("Hel"))
        pool.pool.unregister(pool.pool.fleet.get(running_on.id))
        assert text_of(check_cut(await asked, "tools were offered", "worker_lost")) == "Hel"


async def test_all_that_was_missing_is_the_end(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool, max_tokens=2)
        await begins(pool, line, ROLE, delta("a"), delta("b"))
        await line.say(frames.Error(stream=line_stream(pool, line), fault="service", reason="it crashed"))
        found = events((await asked).text)
        assert found.pop() == "[DONE]"
        assert (text_of(found), found[-1]["choices"][0]["finish_reason"]) == ("ab", "length")


@pytest.mark.parametrize("usage", [True, False])
async def test_what_is_lost_behind_the_end_of_its_text_is_whole(tmp_path: Path, usage: bool) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool, max_tokens=9, stream_options={"include_usage": usage})
        await begins(pool, line, ROLE, delta("a"), delta("b"), delta(finish="stop"))
        await line.say(frames.Error(stream=line_stream(pool, line), fault="service", reason="it crashed"))
        found = events((await asked).text)
        assert found.pop() == "[DONE]"
        assert (text_of(found), bool(found[-1].get("usage"))) == ("ab", usage)


async def test_a_worker_that_lost_an_answer_gets_it_again_when_there_is_no_other(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        task = await begins(pool, line, ROLE, delta("one "))
        await line.say(frames.Error(stream=task.stream, fault="service", reason="its model server crashed"))
        again = await line.task()
        await line.answer(again.stream, ROLE, delta(" two"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events((await asked).text)[:-1]) == "one two"


async def test_a_worker_that_lost_an_answer_gets_it_again_when_the_other_cannot_go_on(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        asked = stream(pool)
        task = await begins(pool, line, ROLE, delta("one "))
        await attach(pool, other, "tiny", slots=1)
        await line.say(frames.Error(stream=task.stream, fault="service", reason="its model server crashed"))
        lost = await other.task()
        await other.say(frames.Error(stream=lost.stream, fault="service", reason="no connection"))
        again = await line.task()
        await line.answer(again.stream, ROLE, delta(" two"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events((await asked).text)[:-1]) == "one two"


async def test_an_earlier_attempts_whole_answer_takes_the_place_of_a_later_ones_beginning(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line), pool.worker(slots=0) as other:
        asked = stream(pool)
        task = await taken(pool, line)
        await attach(pool, other, "tiny", slots=1)
        await line.ws.close()
        await until(lambda: line.id not in pool.pool.hub.sinks)
        pool.turn(12)
        rival = await other.task()
        await other.say(frames.Head(stream=rival.stream, status=200, headers=SSE))
        await other.data(rival.stream, ROLE[:-9])
        await until(lambda: pool.pool.hub.relays[task.offer.task_id].head is not None)
        body = ROLE + delta("Hel") + delta("lo") + delta(finish="stop") + END
        late = await line.machine.complete(task.offer, http_status=200, headers=SSE, body=body)
        assert late.json() == {"status": "succeeded"}
        found = events((await asked).text)
        assert found.pop() == "[DONE]"
        assert text_of(found) == "Hello"


@pytest.mark.parametrize("torn", [0, 10])
async def test_an_answer_that_a_worker_sends_again_over_a_new_channel_is_no_part_of_the_first(
    tmp_path: Path, torn: int
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        task = await taken(pool, line)
        await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
        await line.data(task.stream, ROLE[:torn])
        await until(lambda: pool.pool.hub.relays[task.offer.task_id].head is not None)
        line.ws.transport.abort()
        await until(lambda: line.id not in pool.pool.hub.sinks)
        async with line.machine.channel({"llm": 2}, hello=False) as again:
            # All of it is there before anybody has looked at the first of it.
            transport, said = again.ws.transport, list[bytes]()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(again.ws, "transport", Gathers(said))
                await again.say(frames.Hello(worker_id=line.id, slots={"llm": 2}, attempts=(line.ref(task),)))
                parts = (ROLE + delta("Hel"), delta("lo"), delta(finish="stop") + END)
                await again.answer(task.stream, *parts, headers=SSE)
            transport.write(b"".join(said))
            found = events((await asked).text)
            assert found.pop() == "[DONE]"
            assert text_of(found) == "Hello"
            assert len([one for one in found if one["choices"][0]["delta"].get("role")]) == 1


class Gathers:
    """Takes what a connection writes, and keeps it."""

    def __init__(self, said: list[bytes]) -> None:
        self.write = said.append

    def __getattr__(self, name: str) -> Any:
        return lambda *_: False


async def test_an_answer_that_is_lost_again_and_again_ends_with_an_error(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        for number in range(openai_streams.MOST_LOSSES + 1):
            task = await begins(pool, line, ROLE, delta(f"{number}"))
            await line.say(frames.Error(stream=task.stream, fault="service", reason="it crashed"))
        assert text_of(check_cut(await asked, "it crashed", "worker_lost")) == "0123"
