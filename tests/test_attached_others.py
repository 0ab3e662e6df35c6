"""What others use of an attached llama.cpp is not offered to the pool, and looking does not keep one awake."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.agent.attach import attached as attached_module
from rma_core.agent.attach.attachable import addresses
from rma_core.agent.attach.attached import AttachedServers
from rma_core.models import channel as frames
from rma_core.models.strict import encode
from tests import tiny_model
from tests.agent_service import PATIENCE_S
from tests.attached_servers import CHAT, LLAMA_CPP, attached, beats, house, listed, running
from tests.model_servers import serving, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from rma_core.agent.attach.attached import AttachedServer
    from tests.model_servers import ModelServer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with serving(tmp_path_factory.mktemp("llama")) as [server]:
        yield server


@contextlib.contextmanager
def someone_at(llama: ModelServer, count: int = 1) -> Iterator[None]:
    """Let somebody on this machine have so many long answers from it; they leave at the end."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            asked = llama.chat("Hello", max_tokens=60_000, stream=True)
            stack.enter_context(contextlib.closing(llama.send(CHAT, asked)))
        until(lambda: llama.busy() == count, what="they are at work")
        yield
    until(lambda: llama.busy() == 0, what="they have left")


@contextlib.asynccontextmanager
async def someone(llama: ModelServer, count: int = 1) -> AsyncIterator[None]:
    at = someone_at(llama, count)
    await asyncio.to_thread(at.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(at.__exit__, None, None, None)


async def ask(one: AttachedServer, llama: ModelServer) -> int:
    """Ask as a task would, with a slot, and return the status of a whole answer."""
    slot = one.place()
    assert slot is not None
    try:
        body = encode(llama.chat("Hello", max_tokens=3))
        headers = (("content-type", "application/json"),)
        answer = await one.client.request("POST", CHAT, headers=headers, body=body, answer_s=PATIENCE_S)
        while await answer.read(65536, within_s=PATIENCE_S):
            pass
        await answer.aclose()
        return answer.status
    finally:
        slot.release()


async def test_slots_that_others_use_are_not_offered_and_come_back(
    llama: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "SLOTS_FRESH_S", 0.0)
    changes: list[int] = []

    def changed() -> None:
        changes.append(one.slots)

    one: AttachedServer
    async with attached(llama.endpoint, changed=changed) as one:
        await one.look()
        assert (one.slots, changes) == (2, [2])
        async with someone(llama):
            # One is left, and has the next task.
            assert await ask(one, llama) == 200
            assert (one.slots, one.free) == (1, 1)
            assert await one.look() < attached_module.LOOK_EVERY_S
            assert (one.reason[-20:], changes[-1]) == ("; 1 in use by others", 1)
        await one.look()
        assert (one.slots, changes[-1]) == (2, 2)
        assert await one.look() == attached_module.LOOK_EVERY_S


async def test_a_task_that_finds_everything_taken_goes_back_and_blames_nobody(
    llama: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, monkeypatch, llama.endpoint) as here:
        async with someone(llama, 2):
            fault, reason = await here.refused(llama.chat("Hello", max_tokens=3))
            assert (fault, reason.endswith("is used by others on this machine just now")) == ("owner", True)
            # The pool is told at once: nothing more comes while that is so.
            await here.line.wait(lambda: beats(here.line)[-1].beat.containers[0].slots == 0)
            assert beats(here.line)[-1].slots == {}
            assert here.agent.offering.busy_share() == 1.0
        await here.line.wait(lambda: beats(here.line)[-1].beat.containers[0].slots == 2)
        await here.line.frame(frames.End, await here.ask(llama.chat("Hello", max_tokens=3)))


async def test_one_answer_right_after_another_is_not_taken_for_somebody_else(
    llama: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached_module, "SLOTS_FRESH_S", 0.0)
    async with attached(llama.endpoint) as one:
        await one.look()
        for _ in range(5):
            assert [*await asyncio.gather(ask(one, llama), ask(one, llama))] == [200, 200]
        assert one.slots == 2


SLOTS: list[dict[str, Any]] = [{"id": 0, "is_processing": True}, {"id": 1, "is_processing": False}]


#: As old ones gave it: with every prompt.
LONG = [{"id": 0, "is_processing": True, "prompt": "a" * 2**20}]


@pytest.mark.parametrize(
    "slots", [None, b"no", {"error": "disabled"}, [{"id": 0}], b"[" * 100_000, LONG],
    ids=["none", "no", "disabled", "half", "deep", "long"],
)  # fmt: skip
async def test_a_server_that_does_not_say_what_its_slots_do_is_believed_to_be_free(slots: object) -> None:
    answers = {**LLAMA_CPP, CHAT: {"choices": []}, **({} if slots is None else {"/slots": slots})}
    async with running(answers) as server, attached(server.url) as one:
        await one.look()
        await asked(one)
        assert (one.slots, server.asked[-2:]) == (4, ["GET /slots", f"POST {CHAT}"])
        # Not every task asks again.
        await asked(one)
        assert server.asked.count("GET /slots") == 1


async def asked(one: AttachedServer) -> None:
    slot = one.place()
    assert slot is not None
    try:
        answer = await one.client.request("POST", CHAT, body=b'{"model": "qwen2.5-7b-q4_k_m.gguf"}')
        await answer.aclose()
    finally:
        slot.release()


async def test_what_the_owner_allows_is_not_lowered_while_there_is_room_for_both() -> None:
    async with running({**LLAMA_CPP, CHAT: {"choices": []}, "/slots": SLOTS}) as server:
        # Four slots there are, two of them are the pool's: one that others use leaves room for both.
        async with attached(server.url + "#slots=2") as one:
            await one.look()
            await asked(one)
            assert (one.others.taken, one.slots) == (1, 2)
        async with attached(server.url + "#slots=4") as one:
            await one.look()
            await asked(one)
            assert (one.others.taken, one.slots) == (1, 3)


async def test_only_at_work_it_is_asked_what_its_slots_do() -> None:
    async with running({**LLAMA_CPP, CHAT: {"choices": []}, "/slots": []}) as server, attached(server.url) as one:
        for _ in range(3):
            await one.look()
        assert "GET /slots" not in server.asked
        slot = one.place()
        assert slot is not None
        await one.look()
        assert server.asked[-1] == "GET /slots"
        slot.release()
        await one.look()
        assert server.asked[-1] != "GET /slots"


async def test_a_server_that_hangs_when_asked_for_its_slots_still_gets_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attached_module, "LOOK_TIMEOUT_S", 0.2)

    async with running({**LLAMA_CPP, CHAT: {"choices": []}}) as server, attached(server.url) as one:
        await one.look()
        server.mute = "/slots"
        await asked(one)
        assert server.asked[-1] == f"POST {CHAT}"


async def test_the_load_of_a_machine_counts_what_others_do_there() -> None:
    async with running({**LLAMA_CPP, CHAT: {"choices": []}, "/slots": SLOTS}) as server:
        servers = AttachedServers(addresses([server.url]))
        await servers.look()
        assert servers.busy_share() == 0.0
        await asked(servers.servers[0])
        assert servers.busy_share() == 0.25
        await servers.aclose()


#: llama.cpp's own server as its owner may start it: it lets go of its model after a second without work.
SLEEPY = """
import sys, xllamacpp
told = xllamacpp.CommonParams()
told.model.path, told.hostnames, told.port, told.sleep_idle_seconds = sys.argv[1], ["127.0.0.1"], 0, 1
server = xllamacpp.Server(told)
print("listens at", server.listening_address, flush=True)
sys.stdin.read()
"""


async def test_looking_neither_keeps_a_server_awake_nor_wakes_one_up(tmp_path: Path) -> None:
    file = await asyncio.to_thread(tiny_model.write_chat_model, tmp_path / "my-model.gguf")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SLEEPY, str(file), stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"listens at" not in (line := await process.stdout.readline()):
                assert line, "it has ended"
        async with attached(line.decode().split()[-1]) as one:

            async def state() -> str:
                await one.look()
                return listed(one.status())[0][1]

            assert await state() == "loaded"
            # Much more often than it would take to keep it awake.
            for _ in range(round(PATIENCE_S / 0.1)):
                if await state() == "cold":
                    break
                await asyncio.sleep(0.1)
            assert [await state() for _ in range(5)] == ["cold"] * 5
    finally:
        process.kill()
        await process.wait()
