"""Model servers that their owner attached, at work: shared within limits, and the pool is not trusted with them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_core.agent.attach import attached as attached_module
from rma_core.agent.attach import guarded
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.attach.attached import AttachedServers
from rma_core.agent.lifecycle import Agent
from rma_core.agent.start import EVERYTHING, opened
from rma_core.errors import UsageProblem
from rma_core.models import channel as frames
from rma_core.models.strict import encode
from rma_core.settings import AgentSettings
from tests.agent_service import PATIENCE_S, eventually
from tests.agent_stand_in import offer, stand_in
from tests.attached_servers import (
    CHAT,
    LLAMA_CPP,
    LOADING,
    OLLAMA,
    VLLM,
    Refusing,
    Server,
    attached,
    beats,
    house,
    listed,
    running,
)
from tests.model_servers import serving
from tests.model_servers import stop as stop_server
from tests.pools import NO_ENGINE, Running, environment, pool, rma, until
from tests.test_agent_lifecycle import detect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from pathlib import Path

    from tests.model_servers import ModelServer
    from tests.pools import Pool


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with serving(tmp_path_factory.mktemp("llama")) as [server]:
        yield server


# -- placing -----------------------------------------------------------------------------------------------------------


async def test_an_offer_takes_the_least_busy_server_that_has_its_model() -> None:
    other = {"/v1/models": {"data": [{"id": "facebook/opt-125m"}, {"id": "other"}]}}
    async with running(VLLM) as one, running(other) as two:
        servers = AttachedServers(addresses([f"{one.url}#slots=1", f"{two.url}#slots=2"]))
        assert "is pending" in str(servers.place("other"))
        await servers.look()
        assert (servers.slots(), servers.free(), servers.busy_share(), servers.healthy) == (3, 3, 0.0, True)
        taken = [servers.place("facebook/opt-125m") for _ in range(3)]
        assert [slot.owner for slot in taken if not isinstance(slot, str)].count(servers.servers[1]) == 2
        assert servers.place("facebook/opt-125m") == "facebook/opt-125m is busy"
        assert servers.place("none") == "this machine has no model 'none'; it has: facebook/opt-125m, other"
        assert servers.busy_share() == 1.0
        for slot in taken:
            assert not isinstance(slot, str)
            slot.release()
        assert servers.free() == 3
        await servers.aclose()


async def test_all_servers_of_a_machine_share_64_slots() -> None:
    many = {**LLAMA_CPP, "/props": {"total_slots": 200}}
    async with running(many) as one, running(many) as two:
        servers = AttachedServers(addresses([one.url, two.url]))
        await servers.look()
        assert servers.slots() == 64
        await servers.aclose()


# -- the whole agent ---------------------------------------------------------------------------------------------------


async def test_the_pool_is_told_of_it_and_an_offer_is_answered_whole_and_streamed(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        beat = (await here.line.wait(lambda: [b for b in beats(here.line) if b.slots]))[0]
        assert beat.slots == {"llm": 2}
        [status] = beat.beat.containers
        assert (status.runtime, status.state, listed(status)) == ("attached", "healthy", [("tiny", "loaded", 2048)])
        assert here.agent.status().containers == (status,)
        assert beat.beat.status == "healthy"

        stream = await here.ask(llama.chat("Hello", max_tokens=20))
        head = await here.line.frame(frames.Head, stream)
        assert head.status == 200
        await here.line.frame(frames.End, stream)
        whole = json.loads(here.line.data[stream])["choices"][0]["message"]["content"]
        assert len(whole) == 20

        stream = await here.ask(llama.chat("Hello", max_tokens=20, stream=True))
        assert dict((await here.line.frame(frames.Head, stream)).headers)["content-type"].startswith(
            "text/event-stream"
        )
        await here.line.frame(frames.End, stream)
        events = bytes(here.line.data[stream]).decode().strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        data = [json.loads(event[5:]) for event in events[:-1] if event.startswith("data:")]
        text = "".join(choice["delta"].get("content") or "" for one in data for choice in one["choices"])
        assert text == whole
        assert here.agent.offering.free() == 2


async def test_a_streamed_request_that_is_cancelled_frees_the_servers_slot(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        stream = await here.ask(llama.chat("Hello", max_tokens=60_000, stream=True))
        await here.line.bytes_of(stream, 1)
        assert here.agent.offering.free() == 1
        await here.line.say(frames.Cancel(stream=stream, reason="the client left"))
        await eventually(lambda: here.agent.offering.free() == 2)
        await asyncio.to_thread(lambda: until(lambda: llama.busy() == 0, within_s=20, what="the slot is free"))


async def test_what_is_not_shared_is_refused_by_the_agent_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(OLLAMA) as server, house(tmp_path, monkeypatch, server.url) as here:
        server.asked.clear()
        good: dict[str, Any] = {"model": "gemma3:4b", "messages": []}
        gemma = {"model": "gemma3:4b"}
        for method, path in [
            ("DELETE", "/api/delete"),
            ("POST", "/api/pull"),
            ("POST", "/api/generate"),
            ("GET", CHAT),
            ("POST", CHAT + "/control"),
            ("POST", CHAT + "?a=b"),
            ("POST", "/v1/../api/delete"),
            ("POST", "/v1/chat%2fcompletions"),
            ("POST", "//v1/chat/completions"),
            ("GET", "/slots"),
        ]:
            fault, reason = await here.refused(good, path=path, method=method, **gemma)
            assert (fault, "is not open" in reason) == ("request", True), path
        # One that its owner's account pays for elsewhere; names that only some servers would read.
        for body in [
            {**good, "model": "gpt-oss:120b-cloud"},
            {**good, "Model": "gpt-oss:120b-cloud"},
            {"MODEL": "gpt-oss:120b-cloud"},
            {**good, "model": ["gemma3:4b"]},
            b'{"model": "gemma3:4b"} {"model": "gpt-oss:120b-cloud"}',
            b"[]",
            b"no",
            b"",
        ]:
            fault, _ = await here.refused(body, **gemma)
            assert fault == "request"
        assert not [call for call in server.asked if not call.startswith("GET /api/")]
        assert here.agent.offering.free() == 1


async def test_of_a_large_request_no_more_is_read_than_may_be_sent() -> None:
    given = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 65536
            yield b" " * 65536

    async with running(VLLM) as server, attached(server.url) as one:
        await one.look()
        with pytest.raises(UsageProblem, match="8388608 bytes at most"):
            await one.client.request("POST", CHAT, body=body(), length=10**9)  # type: ignore[arg-type]  # a generator
        assert given <= guarded.MAX_BODY_BYTES + 65536
        assert "POST" not in "".join(server.asked)


async def test_a_model_that_is_not_there_is_given_back_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(OLLAMA) as server, house(tmp_path, monkeypatch, server.url) as here:
        fault, reason = await here.refused({}, model="nothing")
        assert fault == "owner"
        assert reason == "this machine has no model 'nothing'; it has: gemma3:4b, llama3.2:latest"
        fault, reason = await here.refused({}, service="notes")
        assert reason == "this machine does not run notes"


async def test_hardly_any_header_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("POST"):
            seen.append(head.lower())
            await reader.readexactly(2)
        body = encode(VLLM["/v1/models"]) if "GET /v1/models" in head else b"{}"
        status = "200 OK" if "/v1/" in head else "404 No"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    names = ["content-type", "User-Agent", "Accept", "X-Conversation-Id", "Authorization", "Cookie", "X-Other"]
    async with server, house(tmp_path, monkeypatch, url) as here:
        headers = [[name, "value"] for name in names]
        stream = await here.ask(b"{}", model="facebook/opt-125m", headers=headers)
        await here.line.frame(frames.End, stream)
    [head] = seen
    sent = {line.partition(":")[0] for line in head.split("\r\n")[1:] if line}
    assert sent == {"host", "content-length", "content-type", "user-agent", "accept", "accept-encoding"}


async def test_a_server_that_dies_fails_its_attempts_and_is_seen_to_be_gone_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(VLLM)
    await server.open()
    async with house(tmp_path, monkeypatch, server.url) as here:
        await server.close()
        fault, reason = await here.refused({"model": "facebook/opt-125m"}, model="facebook/opt-125m")
        assert (fault, "broke off before it answered" in reason) == ("service", True)
        # Long before the next look would have been.
        await here.line.wait(lambda: any(beat.beat.containers[0].state == "unhealthy" for beat in beats(here.line)))
        beat = beats(here.line)[-1]
        [status] = beat.beat.containers
        assert (beat.slots, status.state, status.models) == ({}, "unhealthy", ())
        fault, reason = await here.refused({}, model="facebook/opt-125m")
        assert (fault, reason[:34]) == ("owner", f"{status.name} is unhealthy: no conne"[:34])


@pytest.mark.parametrize(
    ("status", "body", "fault"),
    [
        (502, {"error": {"message": "llama.cpp broke off"}}, "service"),
        (504, b"", "service"),
        (503, LOADING.body, "owner"),
        (500, {"error": {"message": "a template that fails"}}, ""),
    ],
)
async def test_a_server_that_says_that_its_engine_is_not_there_has_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: Any, fault: str
) -> None:
    """Another worker may; what is said of the request itself is for the client."""
    model = "facebook/opt-125m"
    async with (
        running({**VLLM, CHAT: Refusing(status, body)}) as server,
        house(tmp_path, monkeypatch, server.url) as here,
    ):
        if fault:
            found, reason = await here.refused({"model": model}, model=model)
            said = body["error"]["message"] if body else "without a reason"
            assert (found, f"answered {status}: " in reason, said in reason) == (fault, True, True)
        else:
            stream = await here.ask({"model": model}, model=model)
            assert (await here.line.frame(frames.Head, stream)).status == status
            await here.line.frame(frames.End, stream)


async def test_while_draining_nothing_is_offered(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        here.agent.draining = True
        assert here.agent.slots() == {}


async def test_without_a_channel_the_plain_way_serves_it_too(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "LOOK_EVERY_S", 0.1)
    async with stand_in() as pool:
        settings = AgentSettings(
            home=str(tmp_path / "home"), coordinator_url=pool.url, join_token=pool.token, runtimes=[], drain_s=5,
            attach=[llama.endpoint],
        )  # fmt: skip
        async with opened(settings, detect, consent=EVERYTHING) as (folder, record, key, report):
            agent = Agent(settings, folder, record, key, report=report, runtimes={}, use_channel=False)
            task = asyncio.create_task(agent.run())
            body = encode(llama.chat("Hello", max_tokens=5))
            told: dict[str, Any] = {
                "service": "llm",
                "model": "tiny",
                "method": "POST",
                "headers": [["content-type", "application/json"]],
            }
            pool.offers.put_nowait(msgspec.structs.replace(offer(CHAT, body_bytes=len(body), **told), body=body))
            try:
                [done] = await pool.until(lambda: pool.completed)
                assert (done.status, done.http_status) == ("succeeded", 200)
                assert any(beat.containers for beat in pool.beats)
            finally:
                agent.stop()
                async with asyncio.timeout(PATIENCE_S):
                    await task


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_volunteer_joins_with_a_server_and_everybody_sees_it_come_and_go(tmp_path: Path) -> None:
    with (
        pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made,
        serving(tmp_path / "served", unix=True) as [server],
    ):
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        joined = Running(rma("join", made.url, token, "--yes", "--attach", server.endpoint), env)
        try:
            joined.wait_for(rf"attached {server.endpoint}: llama.cpp, 1 model \(tiny\), 2 slots")
            name = joined.wait_for(r"This machine is (worker-\w+)")[1]
            joined.wait_for("the channel to the coordinator is open")
            [status] = [one for one in until_told(made, name, "healthy") if one["service"] == "llm"]
            assert (status["runtime"], status["slots"]) == ("attached", 2)
            assert re.search(r"llm +healthy +attached-s +llama.cpp, 1 model \(tiny\), 2 slots", told(env, "status"))
            assert "llama.cpp, 1 model (tiny), 2 slots" in made.ask("workers", name).stdout
            stop_server(server)
            until_told(made, name, "unhealthy")
            assert re.search(r"llm +unhealthy +attached-s +no connection", told(env, "status"))
        finally:
            joined.stop()


def until_told(made: Pool, name: str, state: str) -> list[dict[str, Any]]:
    """Wait until the pool knows the state of what a worker attached; return all that it runs."""

    def look() -> list[dict[str, Any]]:
        containers: list[dict[str, Any]] = made.json("workers", name)["containers"]
        return containers if [one for one in containers if one["state"] == state] else []

    found: list[dict[str, Any]] = until(look, within_s=60, what=f"{name} has something {state}")
    return found


def told(env: Mapping[str, str], *arguments: str) -> str:
    return subprocess.run(rma(*arguments), env=env, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_machine_that_only_enrols_is_told_how_to_start_with_its_server(tmp_path: Path) -> None:
    with pool(tmp_path / "pool", "--port", "0", "--no-agent", env=NO_ENGINE) as made:
        token = made.json("tokens", "create")["token"]
        env = environment(tmp_path / "rma", NO_ENGINE)
        command = rma("join", made.url, token, "--yes", "--enrol-only", "--attach", "http://127.0.0.1:9#slots=2")
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
        assert "attached http://127.0.0.1:9: unhealthy: no connection" in done.stdout
        assert "rma agent --attach 'http://127.0.0.1:9#slots=2'" in done.stderr
