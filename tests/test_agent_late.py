"""The agent when its way to the coordinator breaks: what goes on, what is delivered late, what is stopped, parking."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
import pytest

from rma_core.agent import answers as answers_module
from rma_core.agent import attempts as attempts_module
from rma_core.agent import channel as channel_module
from rma_core.models import channel as frames
from tests.agent_cable import cable_to
from tests.agent_service import PATIENCE_S, eventually
from tests.agent_stand_in import offer
from tests.test_agent_lifecycle import House, open_house

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rma_core.agent.lifecycle import Agent
    from tests.agent_cable import Cable
    from tests.agent_stand_in import Line

RESULT = f"/api/worker/tasks/{offer().task_id}/result"


@pytest.fixture(name="house")
async def a_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(answers_module, "RETRY_BASE_S", 0.05)
    async with open_house(tmp_path, monkeypatch) as found:
        yield found


async def begun(house: House) -> Line:
    """Return the first channel once a task runs whose answer has begun on it."""
    line = await house.serving()
    await line.say(frames.Task(stream=9, offer=offer("/stream")))
    await line.bytes_of(9, 4)
    return line


async def test_an_answer_that_had_begun_when_the_channel_broke_is_read_to_its_end_and_delivered_whole(
    house: House,
) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        line.drop.set()
        again = await house.pool.line(1)
        assert [r.lease_id for r in (await again.frame(frames.Hello)).attempts] == [offer().lease_id]
        await again.frame(frames.Accept, 9)
        house.service.go_on.set()
        await house.pool.until(lambda: house.pool.results)
        arguments, data, _ = house.pool.results[offer().task_id]
        assert (arguments["lease_id"], arguments["status"]) == (offer().lease_id, "200")
        assert data == b"0\n1\n2\n3\n4\n"
        await eventually(lambda: not agent.answers)
        assert 9 not in again.data
        assert len(house.service.requests) == 1


async def test_an_answer_larger_than_what_is_kept_is_lost_with_its_channel(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "MAX_ANSWER_BYTES", 3)
    async with house.agent() as agent:
        line = await begun(house)
        line.drop.set()
        again = await house.pool.line(1)
        assert (await again.frame(frames.Hello)).attempts == ()
        await eventually(lambda: not agent.attempts)
        assert house.pool.results == {}


async def test_an_answer_that_grows_too_large_beside_its_channel_is_lost_and_its_attempt_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "MAX_ANSWER_BYTES", 6)
    async with house.agent() as agent:
        line = await begun(house)
        line.drop.set()
        await house.pool.line(1)
        house.service.go_on.set()
        await eventually(lambda: not agent.attempts)
        assert house.pool.results == {}
        assert agent.answers._room.left == answers_module.MAX_COPIES_BYTES


async def test_an_attempt_whose_request_was_not_here_whole_when_the_channel_broke_is_lost(house: House) -> None:
    async with house.agent() as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/stream", method="POST", body_bytes=9)))
        await line.body(9, b"half", end=False)
        await line.frame(frames.Accept, 9)
        line.drop.set()
        again = await house.pool.line(1)
        assert (await again.frame(frames.Hello)).attempts == ()
        await eventually(lambda: not agent.attempts)


async def test_an_answer_whose_end_may_not_have_arrived_is_delivered_once_more(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CONFIRM_AFTER_S", 60.0)
    async with house.agent() as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/echo", method="POST", body_bytes=4, body=b"once")))
        await line.frame(frames.End, 9)
        await eventually(lambda: not agent.attempts)
        house.pool.fail[RESULT] = (503, {}, b"")
        line.drop.set()
        again = await house.pool.line(1)
        assert [r.lease_id for r in (await again.frame(frames.Hello)).attempts] == [offer().lease_id]
        del house.pool.fail[RESULT]
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer().task_id][1] == b"once"


async def test_an_answer_whose_end_was_read_is_let_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "CONFIRM_AFTER_S", 0.01)
    async with house.agent() as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/echo", method="POST", body_bytes=4, body=b"once")))
        await line.frame(frames.End, 9)
        await eventually(lambda: not agent.attempts and not agent.answers)
        line.drop.set()
        again = await house.pool.line(1)
        assert (await again.frame(frames.Hello)).attempts == ()
        assert house.pool.results == {}


@pytest.mark.parametrize("status", [500, 503, 408, 429, 302, 507])
async def test_a_finished_answer_that_finds_no_way_is_kept_and_delivered_when_there_is_one(
    house: House, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(frames, "RESUME_WITHIN_S", 0.05)
    async with house.agent() as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/wait")))
        await line.frame(frames.Accept, 9)
        house.pool.fail["/api/worker/channel"] = (503, {}, b"")
        house.pool.fail[RESULT] = (status, {}, b"")
        line.drop.set()
        await eventually(lambda: all(stream.detached for stream in agent.channel._streams.values()))
        house.service.go_on.set()
        await eventually(agent.answers.refs)
        await house.pool.until(lambda: house.pool.calls.count(f"POST {RESULT}") >= 2)
        del house.pool.fail["/api/worker/channel"]
        again = await house.pool.line(1)
        assert [r.lease_id for r in (await again.frame(frames.Hello)).attempts] == [offer().lease_id]
        del house.pool.fail[RESULT]
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer().task_id][1] == b"ready"
        await eventually(lambda: not agent.answers)


@pytest.mark.parametrize("status", [404, 409, 413])
async def test_a_late_answer_that_is_refused_is_dropped(house: House, status: int) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        house.pool.fail[RESULT] = (status, {}, b"")
        line.drop.set()
        await house.pool.line(1)
        house.service.go_on.set()
        await eventually(lambda: not agent.attempts and not agent.answers)
        assert house.pool.calls.count(f"POST {RESULT}") == 1


async def test_by_the_plain_way_too_a_finished_answer_is_kept_and_listed_until_it_is_delivered(house: House) -> None:
    house.pool.interval_s = 0.1
    house.pool.fail["/api/worker/task-complete"] = house.pool.fail[RESULT] = (503, {}, b"")
    async with house.agent(use_channel=False) as agent:
        await house.pool.offers.put(offer("/echo", method="POST", body_bytes=4, body=b"kept"))
        await eventually(agent.answers.refs)
        house.pool.beats.clear()
        await house.pool.until(lambda: house.pool.beats)
        assert [r.lease_id for r in house.pool.beats[0].attempts] == [offer().lease_id]
        house.pool.fail.clear()
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer().task_id][1] == b"kept"
        await eventually(lambda: not agent.answers)


async def test_an_agent_that_stops_delivers_what_is_finished_first(house: House) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        house.pool.fail[RESULT] = (503, {}, b"")
        line.drop.set()
        await house.pool.line(1)
        house.service.go_on.set()
        await eventually(agent.answers.refs)
        agent.stop()
        del house.pool.fail[RESULT]
        goodbye = f"DELETE /api/worker/unregister/{agent.client.worker_id}"
        await house.pool.until(lambda: goodbye in house.pool.calls)
        assert house.pool.results[offer().task_id][1] == b"0\n1\n2\n3\n4\n"


async def test_an_assignment_that_cancels_stops_what_runs_and_leaves_what_is_finished_to_its_delivery(
    house: House,
) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        house.pool.fail[RESULT] = (503, {}, b"")
        line.drop.set()
        again = await house.pool.line(1)
        await again.say(frames.Task(stream=10, offer=offer("/wait", number=2)))
        await eventually(lambda: len(house.service.requests) == 2)
        finished = offer().lease_id
        await eventually(lambda: len(agent.held()) == 2)
        house.service.go_on.set()
        await eventually(lambda: [r.lease_id for r in agent.answers.refs()] == [finished])
        house.service.go_on.clear()
        await again.frame(frames.End, 10)
        await again.say(frames.Task(stream=11, offer=offer("/wait", number=3)))
        await eventually(lambda: len(house.service.requests) == 3)
        house.pool.answer_more["cancel"] = agent.held()
        await again.say(frames.Assign(answer=house.pool.answer(1)))
        await eventually(lambda: not agent.attempts)
        assert [r.lease_id for r in agent.answers.refs()] == [finished]
        del house.pool.fail[RESULT]
        await house.pool.until(lambda: house.pool.results)


async def test_a_result_whose_token_is_refused_is_sent_again_with_a_new_one(house: House) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        line.drop.set()
        await house.pool.line(1)
        old = await agent.client.token()
        del house.pool.tokens[old]
        house.service.go_on.set()
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer().task_id][1] == b"0\n1\n2\n3\n4\n"
        assert await agent.client.token() != old


async def test_an_answer_that_finds_no_room_for_its_bytes_ends_after_the_gap(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/flood", gap_s=0.3)))
        error = await line.frame(frames.Error, 9)
        assert (error.fault, error.reason) == ("coordinator", "nobody took more of the answer for 0.3 s")
        assert len(line.data[9]) == frames.WINDOW_BYTES


# The lease, on the agent's own clock.


@contextlib.asynccontextmanager
async def behind_a_cable(house: House, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Agent, Line, Cable]]:
    """An agent with an attempt under a lease of a second, behind a cable that can be pulled out."""
    monkeypatch.setattr(attempts_module, "LEAST_SIGN_S", 0.1)
    monkeypatch.setattr(attempts_module, "SIGNS_PER_LEASE", 30)
    monkeypatch.setattr(attempts_module, "LOOK_S", 0.05)
    async with cable_to(house.pool.url) as cable:
        settings = msgspec.structs.replace(house.settings, coordinator_url=cable.url, drain_s=0)
        async with house.agent(settings=settings) as agent:
            line = await house.serving()
            await line.say(frames.Task(stream=9, offer=offer("/wait", lease_s=3.0)))
            await line.frame(frames.Progress, 9)
            try:
                yield agent, line, cable
            finally:
                cable.plug()
                cable.cut()


async def test_an_attempt_that_is_heard_of_outlives_its_first_lease(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_cable(house, monkeypatch) as (agent, line, _):
        for _ in range(20):
            await line.frame(frames.Progress, 9)
        assert len(agent.attempts) == 1
        house.service.go_on.set()
        assert await line.bytes_of(9, 5) == b"ready"


async def test_a_pulled_cable_ends_an_attempt_before_its_lease_although_the_channel_looks_open(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with behind_a_cable(house, monkeypatch) as (agent, line, cable):
        cable.pull()
        await eventually(lambda: not agent.attempts)
        assert agent.channel.up
        async with asyncio.timeout(PATIENCE_S):
            await house.service.left.wait()
        assert agent.answers.refs() == ()
        assert not line.data


# Parking.


async def test_a_parked_worker_heartbeats_by_http_and_polls_for_nothing_until_it_is_called_back(house: House) -> None:
    async with house.agent() as agent:
        line = await house.serving()
        house.pool.interval_s, house.pool.answer_more["connect"] = 0.1, False
        await line.say(frames.Assign(answer=house.pool.answer(1)))
        async with asyncio.timeout(PATIENCE_S):
            await line.closed.wait()
        await house.pool.until(lambda: len(house.pool.beats) >= 3)
        assert len(house.pool.lines) == 1
        assert "GET /api/worker/tasks" not in house.pool.calls
        house.pool.answer_more["connect"] = True
        again = await house.pool.line(1)
        await again.say(frames.Task(stream=1, offer=offer("/echo", method="POST", body_bytes=2, body=b"hi")))
        assert await again.bytes_of(1, 2) == b"hi"
        assert agent.link.standing == "registered"


async def test_a_worker_with_work_or_undelivered_answers_is_not_parked_until_they_are_gone(house: House) -> None:
    async with house.agent() as agent:
        line = await begun(house)
        house.pool.fail[RESULT] = (503, {}, b"")
        line.drop.set()
        again = await house.pool.line(1)
        house.pool.answer_more["connect"] = False
        for _ in range(2):  # once with the attempt on hand, once with its answer
            agent.assigned(house.pool.answer(1))
            assert not agent._minor
            assert agent.channel.wanted.is_set()
            house.service.go_on.set()
            await eventually(agent.answers.refs)
        assert not again.closed.is_set()
        house.pool.fail.clear()
        await eventually(lambda: not agent.answers)
        await again.say(frames.Assign(answer=house.pool.answer(1)))
        async with asyncio.timeout(PATIENCE_S):
            await again.closed.wait()
        assert house.pool.results[offer().task_id][1] == b"0\n1\n2\n3\n4\n"


async def test_a_worker_that_is_parked_while_its_channel_is_being_opened_is_parked_all_the_same(house: House) -> None:
    async with house.agent() as agent:
        line = await house.serving()
        agent.channel.wanted.clear()
        house.pool.answer_more["connect"] = False
        await line.say(frames.Assign(answer=house.pool.answer(1)))
        async with asyncio.timeout(PATIENCE_S):
            await line.closed.wait()
