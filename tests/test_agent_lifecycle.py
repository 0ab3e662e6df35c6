"""The whole agent against a stand-in coordinator, a real HTTP service and a runtime in memory."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import stat
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_core import http, tls
from rma_core.agent import channel as channel_module
from rma_core.agent import heart as heart_module
from rma_core.agent import news
from rma_core.agent.control import ask
from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened, run_agent
from rma_core.backoff import Backoff
from rma_core.errors import AgentAbsent, SettingProblem, UsageProblem
from rma_core.models import channel as frames
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import Heartbeat, PluginReport
from rma_core.settings import AgentSettings
from tests.agent_runtimes import MemoryRuntime
from tests.agent_service import PATIENCE_S, LocalService, local_service
from tests.agent_stand_in import Line, StandIn, offer, stand_in
from tests.test_agent_client import make_certificate
from tests.test_agent_reconcile import wanted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REPORT = HardwareReport(capabilities=Capabilities(cpu_cores=4, ram="8.0GB"))


async def detect() -> HardwareReport:
    return REPORT


class House:
    """A pool, a service, a runtime, and agents that come and go."""

    def __init__(self, pool: StandIn, service: LocalService, home: Path) -> None:
        self.pool, self.service, self.home = pool, service, home
        self.runtime = MemoryRuntime(endpoint=service.url)
        self.settings = AgentSettings(
            home=str(home), coordinator_url=pool.url, join_token=pool.token, runtimes=["memory"], drain_s=5
        )

    @contextlib.asynccontextmanager
    async def agent(self, **more: Any) -> AsyncIterator[Agent]:
        settings = more.pop("settings", self.settings)
        async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
            runtimes = {"memory": self.runtime}
            agent = Agent(settings, folder, record, key, report=report, runtimes=runtimes, **more)
            running = asyncio.create_task(agent.run())
            try:
                yield agent
            finally:
                agent.stop()
                agent.stop()
                async with asyncio.timeout(PATIENCE_S):
                    await running

    async def serving(self, number: int = 0) -> Line:
        """Wait until the newest channel says that notes can be served."""
        line = await self.pool.line(number)
        await line.wait(lambda: any(slots(f).get("notes") for f in line.control))
        return line


def slots(frame: frames.Up) -> dict[str, int]:
    return frame.slots if isinstance(frame, frames.Hello | frames.Beat) else {}


@contextlib.asynccontextmanager
async def open_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr("rma_core.agent.membership.Backoff", lambda: Backoff(base_s=0.05, cap_s=0.2))
    monkeypatch.setattr(heart_module, "GATHER_HTTP_S", 0.05)
    monkeypatch.setattr(channel_module, "RETRY_BASE_S", 0.02)
    async with stand_in() as pool, local_service() as service:
        pool.assignments = (wanted(slots=2),)
        yield House(pool, service, tmp_path / "home")


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    async with open_house(tmp_path, monkeypatch) as found:
        yield found


async def test_a_machine_enrols_runs_its_container_and_serves_a_task(house: House) -> None:
    async with house.agent() as agent:
        line = await house.serving()
        hello = await line.frame(frames.Hello)
        assert hello.worker_id == agent.client.worker_id
        await line.say(frames.Task(stream=7, offer=offer("/echo", method="POST", body_bytes=5)))
        await line.frame(frames.Accept, 7)
        await line.body(7, b"he", end=False)
        await line.body(7, b"llo")
        head = await line.frame(frames.Head, 7)
        assert (head.status, dict(head.headers)["content-type"]) == (200, "x/y")
        assert await line.bytes_of(7, 5) == b"hello"
        end = await line.frame(frames.End, 7)
        assert end.timings["total"] >= end.timings["first_byte"] > 0


async def test_the_answer_stops_at_the_window_and_goes_on_with_credit(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=1, offer=offer("/flood")))
        await line.say(frames.Task(stream=2, offer=offer("/echo", number=2)))
        await line.frame(frames.End, 2)  # one slow reader does not hold the others
        await line.bytes_of(1, frames.WINDOW_BYTES)
        await asyncio.sleep(0.2)
        assert len(line.data[1]) == frames.WINDOW_BYTES
        await line.say(frames.Credit(stream=1, bytes=1000))
        await line.bytes_of(1, frames.WINDOW_BYTES + 1000)
        await line.say(frames.Cancel(stream=1, reason="the client left"))
        async with asyncio.timeout(PATIENCE_S):
            await house.service.left.wait()


async def test_a_request_body_beyond_the_window_waits_for_the_agents_credit(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        size = 3 * frames.WINDOW_BYTES
        await line.say(frames.Task(stream=3, offer=offer("/echo", method="POST", body_bytes=size)))
        sent, allowed = 0, frames.WINDOW_BYTES
        while sent < size:
            if sent == allowed:
                allowed += (await line.frame(frames.Credit, 3)).bytes
                continue
            piece = min(frames.MAX_DATA_BYTES, allowed - sent, size - sent)
            sent += piece
            await line.body(3, b"z" * piece, end=sent == size)
        for part in range(1, 4):
            await line.bytes_of(3, part * frames.WINDOW_BYTES)
            await line.say(frames.Credit(stream=3, bytes=frames.WINDOW_BYTES))
        assert await line.bytes_of(3, size) == b"z" * size


async def test_a_coordinator_that_sends_more_than_its_window_loses_the_attempt_not_the_channel(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=4, offer=offer("/wait", method="POST", body_bytes=10)))
        await line.body(4, b"x" * 11)
        await line.say(frames.Task(stream=5, offer=offer("/echo", number=2)))
        await line.frame(frames.End, 5)
        assert not line.closed.is_set()


async def test_a_large_answer_takes_a_request_of_its_own(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=8, offer=offer("/big")))
        await line.frame(frames.End, 8)
        arguments, data, headers = house.pool.results[offer().task_id]
        assert (arguments["status"], arguments["lease_id"]) == ("201", offer().lease_id)
        assert len(data) == 3 * 2**20
        assert '["x-name","gr\\u00fc\\u00dfe"]' in headers
        assert 8 not in line.data


async def test_a_broken_channel_is_mended_and_what_was_being_worked_on_goes_on(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/wait")))
        await line.frame(frames.Accept, 9)
        await line.say(frames.Task(stream=10, offer=offer("/stream", number=2)))
        await line.bytes_of(10, 4)
        line.drop.set()
        again = await house.pool.line(1)
        hello = await again.frame(frames.Hello)
        assert {ref.lease_id for ref in hello.attempts} == {offer().lease_id, offer(number=2).lease_id}
        await again.frame(frames.Accept, 9)
        house.service.go_on.set()
        await again.frame(frames.Head, 9)
        assert await again.bytes_of(9, 5) == b"ready"
        await again.frame(frames.End, 9)
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer(number=2).task_id][1] == b"0\n1\n2\n3\n4\n"
        assert 10 not in again.data


async def test_an_answer_whose_channel_stays_away_is_delivered_by_http(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "RESUME_WITHIN_S", 0.1)
    async with house.agent():
        line = await house.serving()
        await line.say(frames.Task(stream=9, offer=offer("/wait")))
        await line.frame(frames.Accept, 9)
        house.pool.fail["/api/worker/channel"] = (503, {"Retry-After": "60"}, b"")
        line.drop.set()
        await asyncio.sleep(0.3)
        house.service.go_on.set()
        await house.pool.until(lambda: house.pool.results)
        assert house.pool.results[offer().task_id][1] == b"ready"


@pytest.mark.parametrize("text", ["9" * 400, "1e300", "nan", "-5", "Wed, 21 Oct 2026 07:28:00 GMT"])
async def test_whatever_a_refused_upgrade_asks_to_wait_the_agent_waits_a_bounded_time(
    house: House, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    waits: list[float] = []

    class Noting(Backoff):
        def next_s(self, retry_after_s: float | None = None) -> float:
            waits.append(wait_s := super().next_s(retry_after_s))
            return wait_s

    monkeypatch.setattr(channel_module, "Backoff", Noting)
    house.pool.fail["/api/worker/channel"] = (503, {"Retry-After": text}, b"")
    async with house.agent():
        await house.pool.until(lambda: waits)
    assert 0 < waits[0] <= 1.1 * http.MAX_RETRY_AFTER_S


async def test_a_runtime_that_cannot_be_closed_does_not_keep_the_agent_from_ending(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks() -> None:
        raise ValueError("a bug in the plugin")

    monkeypatch.setattr(house.runtime, "aclose", breaks)
    async with house.agent() as agent:
        await house.serving()
    assert agent.client._http.is_closed


async def test_new_generations_arrive_over_the_channel_and_slots_are_told_at_once(house: House) -> None:
    async with house.agent():
        line = await house.serving()
        house.pool.generation, house.pool.assignments = 2, (wanted("ner"),)
        await line.say(frames.Assign(answer=house.pool.answer(1)))
        await line.wait(lambda: any(slots(f) == {"ner": 1} for f in line.control))
        await house.pool.until(lambda: house.runtime.running() == {"rma-ner"})


@pytest.mark.parametrize("use_channel", [True, False], ids=["channel", "plain way"])
async def test_another_process_of_the_coordinator_is_told_everything_once_more_and_the_same_one_is_not(
    house: House, monkeypatch: pytest.MonkeyPatch, *, use_channel: bool
) -> None:
    monkeypatch.setattr(news, "AGAIN_S", 0.01)
    plugins = (PluginReport(name="host", kind="detector", state="active"),)

    def beats() -> list[Heartbeat]:
        lines = house.pool.lines if use_channel else []
        return [*house.pool.beats, *(f.beat for line in lines for f in line.control if isinstance(f, frames.Beat))]

    def has_told(times: int) -> bool:
        return sum(None not in (beat.report, beat.runtimes, beat.plugins) for beat in beats()) == times

    def has_beaten(times: int) -> bool:
        return len(beats()) >= times

    house.pool.interval_s = 0.1
    house.pool.answer_more["process"] = "first"
    async with house.agent(use_channel=use_channel, plugins=lambda: plugins):
        if use_channel:
            await house.serving()
        else:
            await house.pool.until(beats)
        # The first one has it by the registration.
        for number, process in enumerate(("first", "second", "third")):
            house.pool.answer_more["process"] = process
            for line in house.pool.lines:
                await line.say(frames.Assign(answer=house.pool.answer(1)))
            await house.pool.until(functools.partial(has_told, number))
            # What was told is not told again and again.
            await house.pool.until(functools.partial(has_beaten, len(beats()) + 5))
            assert has_told(number)


async def test_an_attempt_that_a_heartbeats_answer_cancels_ends(house: House) -> None:
    async with house.agent() as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=1, offer=offer("/wait")))
        await line.frame(frames.Accept, 1)
        house.pool.answer_more["cancel"] = agent.attempts.refs()
        await line.say(frames.Assign(answer=house.pool.answer(1)))
        async with asyncio.timeout(PATIENCE_S):
            await house.service.left.wait()


async def test_a_forgotten_worker_registers_again_with_its_join_token_under_the_same_name(house: House) -> None:
    async with house.agent() as agent:
        name = agent.client.worker_id
        line = await house.serving()
        house.pool.forget()
        line.drop.set()
        await house.pool.line(1)
        assert list(house.pool.workers) == [name]
        assert house.runtime.calls.count("start") == 1  # the container did not notice


async def test_a_forgotten_worker_without_a_token_says_what_to_do(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    async with house.agent():
        await house.serving()
    house.pool.forget()
    caplog.clear()
    settings = AgentSettings(home=str(house.home), runtimes=["memory"])
    async with house.agent(settings=settings) as agent:
        await house.pool.until(lambda: agent.link.standing == "unknown")
        await asyncio.sleep(0.5)
        assert "rma join" in agent.link.reason
    assert sum("does not know this machine" in r.message for r in caplog.records) == 1


async def test_an_unreachable_coordinator_is_said_once_and_once_when_it_is_back(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with house.agent() as agent:
        line = await house.serving()
        for path in ("channel", "heartbeat", "register", "token", "nonce"):
            house.pool.fail[f"/api/worker/{path}"] = (503, {}, b"")
        line.drop.set()
        await house.pool.until(lambda: agent.link.standing == "unreachable")
        await asyncio.sleep(0.3)
        house.pool.fail.clear()
        await house.pool.line(1)
        await house.pool.until(lambda: agent.link.standing == "registered")
    said = [r.message for r in caplog.records if r.name == "rma_core.agent.membership"]
    assert [("trying again" in text, "registered" in text) for text in said] == [
        (False, True),
        (True, False),
        (False, True),
    ]


async def test_where_no_websocket_gets_through_the_agent_polls(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    house.pool.fail["/api/worker/channel"] = (502, {}, b"")
    async with house.agent() as agent:
        await house.pool.until(lambda: agent.status().connection == "polling")
        await house.pool.until(lambda: any(c.state == "healthy" for b in house.pool.beats for c in b.containers))
        house.pool.bodies[offer().task_id] = b"from afar"
        url = f"/api/worker/tasks/{offer().task_id}/body"
        await house.pool.offers.put(offer("/echo", method="POST", body_bytes=9, body_url=url))
        done = (await house.pool.until(lambda: house.pool.completed))[0]
        assert (done.status, done.http_status, done.body) == ("succeeded", 200, b"from afar")
        await house.pool.offers.put(offer("/big", number=2))
        await house.pool.until(lambda: house.pool.results)
        await house.pool.offers.put(offer("/breaks", number=3))
        await house.pool.until(lambda: len(house.pool.completed) == 2)
        assert (house.pool.completed[1].status, house.pool.completed[1].fault) == ("failed", "service")
        assert house.pool.calls.count("WS /api/worker/channel") == 3
        assert any(b.attempts for b in house.pool.beats)
    assert sum("polling instead" in r.message for r in caplog.records) == 1


async def test_a_proxy_that_opens_channels_and_drops_them_makes_the_agent_poll(house: House) -> None:
    house.pool.drops_channels = True
    async with house.agent() as agent:
        await house.pool.until(lambda: agent.status().connection == "polling")
        await house.pool.offers.put(offer("/echo", method="POST", body_bytes=2, body=b"hi"))
        done = (await house.pool.until(lambda: house.pool.completed))[0]
        assert done.body == b"hi"


async def test_the_plain_way_can_be_chosen(house: House) -> None:
    async with house.agent(use_channel=False):
        await house.pool.offers.put(offer("/echo", method="POST", body_bytes=2, body=b"hi"))
        done = (await house.pool.until(lambda: house.pool.completed))[0]
        assert done.body == b"hi"
        assert house.pool.lines == []


async def test_the_channel_and_its_results_go_over_tls_with_the_pinned_certificate(tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "pool")
    async with stand_in(certificate=certificate) as pool, local_service() as service:
        pool.assignments = (wanted(slots=2),)
        house = House(pool, service, tmp_path / "home")
        pin = tls.certificate_pin(certificate[0].read_text())
        settings = msgspec.structs.replace(house.settings, join_token=f"{pool.token}.{pin}")
        async with house.agent(settings=settings):
            line = await house.serving()
            await line.say(frames.Task(stream=1, offer=offer("/big")))
            await line.frame(frames.End, 1)
            assert len(pool.results[offer().task_id][1]) == 3 * 2**20


async def test_heartbeats_go_on_while_every_slot_is_busy(house: House) -> None:
    house.pool.interval_s = 0.1
    async with house.agent():
        line = await house.serving()
        for number in (1, 2):
            await line.say(frames.Task(stream=number, offer=offer("/flood", number=number)))
        for _ in range(5):
            beat = await line.frame(frames.Beat)
            await line.wait(lambda: any(isinstance(f, frames.Beat) for f in line.control))
        assert beat.beat.current_load > 0


async def test_stopping_finishes_what_runs_returns_the_rest_and_leaves(house: House) -> None:
    async with house.agent(
        settings=AgentSettings(
            home=str(house.home),
            coordinator_url=house.pool.url,
            join_token=house.pool.token,
            runtimes=["memory"],
            drain_s=3,
        )
    ) as agent:
        line = await house.serving()
        await line.say(frames.Task(stream=1, offer=offer("/stream")))
        await line.say(frames.Task(stream=2, offer=offer("/wait", number=2)))
        await line.bytes_of(1, 4)
        await line.frame(frames.Accept, 2)
        agent.stop()
        await line.wait(
            lambda: any(isinstance(f, frames.Beat) and f.beat.draining and not f.slots for f in line.control)
        )
        await line.say(frames.Task(stream=3, offer=offer("/echo", number=3)))
        refused = await line.frame(frames.Error, 3)
        assert refused.fault == "owner"
        await line.frame(frames.Error, 2)
        # `/stream` waits for the same sign as `/wait`, so both are returned, unblamed.
        await house.pool.until(lambda: any(c.startswith("DELETE /api/worker/unregister/") for c in house.pool.calls))
    assert house.runtime.containers == {}
    assert not (house.home / "control.json").exists()


async def test_an_agent_that_was_killed_takes_its_containers_up_again(house: House) -> None:
    async with opened(house.settings, detect, consent=EVERYTHING) as (folder, record, key, report):
        agent = Agent(house.settings, folder, record, key, report=report, runtimes={"memory": house.runtime})
        running = asyncio.create_task(agent._work())
        agent.reconciler.start()
        await house.serving()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await agent.reconciler.close(stop=False)
        await agent.client.aclose()
    assert house.runtime.running() == {"rma-notes"}
    async with house.agent():
        await house.serving(1)
        assert house.runtime.calls.count("start") == 1


async def test_the_control_socket_answers_its_owner(house: House) -> None:
    async with house.agent() as agent:
        await house.serving()
        found = await ask(house.home, "status")
        assert found["worker_id"] == agent.client.worker_id
        assert (found["connection"], found["tier"], found["standing"]) == ("channel", 2, "registered")
        assert found["containers"][0]["state"] == "healthy"
        socket = house.home / "agent.sock"
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        with pytest.raises(UsageProblem, match="knows no call"):
            await ask(house.home, "dance")
        assert await ask(house.home, "drain") == {"running": 0}
    with pytest.raises(AgentAbsent, match="no agent runs"):
        await ask(house.home, "status")


async def test_a_second_agent_on_the_same_folder_is_refused(house: House) -> None:
    async with house.agent():
        with pytest.raises(SettingProblem, match="another agent"):
            async with opened(house.settings, detect):
                pass


async def test_a_lost_key_is_made_anew_with_a_join_token_and_named_without_one(house: House) -> None:
    async with house.agent():
        await house.serving()
    (house.home / "device.key").unlink()
    with pytest.raises(UsageProblem, match="has not joined"):
        async with opened(AgentSettings(home=str(house.home)), detect):
            pass
    async with house.agent():
        await house.serving(1)
        assert len(house.pool.workers) == 2


async def test_a_machine_without_a_pool_says_how_to_join_one(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem) as found:
        async with opened(AgentSettings(home=str(tmp_path / "home")), detect):
            pass
    assert found.value.hints[0] == "rma join URL TOKEN"


async def test_run_agent_with_the_real_detectors_and_sigterm(house: House) -> None:
    agents: list[Agent] = []
    before = os.umask(0o022)
    running = asyncio.create_task(run_agent(house.settings, ready=agents.append))
    try:
        await house.pool.until(lambda: house.pool.lines or running.done())
        assert house.pool.registrations[-1].report is not None
        assert house.pool.registrations[-1].capabilities.cpu_cores > 0
        assert agents[0].status().containers[0].state in ("failed", "pending")  # nobody provides `memory`
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        os.umask(before)
    assert any(c.startswith("DELETE ") for c in house.pool.calls)
