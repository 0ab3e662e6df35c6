"""An attached Ollama at work: asked in its own words, failing honestly, never loaded anew, its owner first."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_core.agent.attach.others import BACK_WITHIN_S, Others
from rma_core.agent.execute import AttemptFailed
from rma_core.models import channel as frames
from rma_core.models.strict import encode
from tests.agent_service import PATIENCE_S, eventually
from tests.attached_servers import CHAT, attached, beats, house, listed
from tests.model_servers import SOLID, serving
from tests.ollama_stand_in import (
    MODEL,
    Exchange,
    Fronting,
    OllamaStandIn,
    answering,
    breaking_off_behind,
    endless,
    failing_behind,
    lines,
    ollama,
    refusing,
    said,
    silent,
    stopping_behind,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from rma_core.agent.attach.attached import AttachedServer
    from rma_core.agent.endpoint import Reply
    from tests.model_servers import ModelServer
    from tests.ollama_stand_in import Behaviour

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
BEGUN: dict[str, Any] = {
    **HELLO,
    "messages": [*HELLO["messages"], {"role": "assistant", "content": "Well,"}],
    "continue_final_message": True,
    "add_generation_prompt": False,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    with serving(tmp_path_factory.mktemp("llama")) as [server]:
        yield server


class Attached:
    """One attached stand-in, asked as a task would ask it."""

    def __init__(self, server: OllamaStandIn, one: AttachedServer) -> None:
        self.server, self.one = server, one

    async def send(self, body: object, path: str = CHAT) -> Reply:
        return await self.one.client.request("POST", path, body=encode(body), answer_s=PATIENCE_S)

    async def ask(self, body: object, path: str = CHAT) -> tuple[int, bytes]:
        """Return status and body of an answer, with a slot taken as long as it comes."""
        slot = self.one.place()
        assert slot is not None
        try:
            answer = await self.send(body, path)
            try:
                return answer.status, await read(answer)
            finally:
                await answer.aclose()
        finally:
            slot.release()

    async def text(self, **more: Any) -> str:
        status, body = await self.ask({**HELLO, **more})
        assert status == 200, body
        return str(json.loads(body)["choices"][0]["message"]["content"])


async def read(answer: Reply, into: bytearray | None = None) -> bytes:
    body = bytearray() if into is None else into
    while data := await answer.read(65536, within_s=PATIENCE_S):
        body += data
    return bytes(body)


@contextlib.asynccontextmanager
async def served(behaviour: Behaviour | None = None, *, fragment: str = "", **more: Any) -> AsyncIterator[Attached]:
    told = more if behaviour is None else {"behaviour": behaviour, **more}
    async with ollama(**told) as server, attached(server.url + fragment) as one:
        await one.look()
        assert one.state == "healthy", one.reason
        yield Attached(server, one)


def streamed(body: bytes) -> str:
    events = [json.loads(event[6:]) for event in body.split(b"\n\n") if event.startswith(b"data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join((one["delta"].get("content") if "delta" in one else one["text"]) or "" for one in choices)


# -- answers -----------------------------------------------------------------------------------------------------------


async def test_every_call_goes_to_ollamas_own_api() -> None:
    async with served() as here:
        assert await here.text() == "Hello there"
        status, body = await here.ask({**HELLO, "stream": True})
        assert (status, streamed(body), body[-14:]) == (200, "Hello there", b"data: [DONE]\n\n")
        _, body = await here.ask({"model": MODEL, "prompt": "Once"}, COMPLETIONS)
        assert json.loads(body)["choices"][0]["text"] == "Hello there"

        async def embed(_: OllamaStandIn, exchange: Exchange) -> None:
            await exchange.whole(200, {"model": MODEL, "embeddings": [[0.5, 1]], "prompt_eval_count": 3})

        here.server.behaviour = embed
        _, body = await here.ask({"model": MODEL, "input": "a"}, EMBEDDINGS)
        assert json.loads(body)["data"][0]["embedding"] == [0.5, 1]
        assert not [path for path, _ in here.server.asked if path.startswith("/v1")]


async def test_ids_do_not_repeat() -> None:
    async with served() as here:
        ids = {json.loads((await here.ask(HELLO))[1])["id"] for _ in range(3)}
        assert len(ids) == 3
        assert all(one.startswith("chatcmpl-") and len(one) == 33 for one in ids)


async def test_text_of_a_real_model_comes_through_the_translation_as_it_is(llama: ModelServer) -> None:
    async with served(Fronting(llama)) as here:
        for words in SOLID:
            asked = {**HELLO, "messages": [{"role": "user", "content": words}], "max_tokens": 30, "temperature": 0}
            expected = await asyncio.to_thread(llama.text, words, max_tokens=30)
            assert await here.text(**asked) == expected
            _, body = await here.ask({**asked, "stream": True})
            assert streamed(body) == expected
            raw = {"model": MODEL, "prompt": words, "max_tokens": 30, "temperature": 0}
            reply = await asyncio.to_thread(llama.post, COMPLETIONS, {**raw, "model": llama.model})
            _, body = await here.ask(raw, COMPLETIONS)
            told = json.loads(body)
            assert told["choices"][0]["text"] == reply.body["choices"][0]["text"]
            assert told["choices"][0]["finish_reason"] == reply.body["choices"][0]["finish_reason"]
            assert told["usage"]["completion_tokens"] == reply.body["usage"]["completion_tokens"]


async def test_a_begun_answer_of_a_real_model_goes_on(llama: ModelServer) -> None:
    expected = await asyncio.to_thread(llama.text, SOLID[0], max_tokens=40)
    async with served(Fronting(llama)) as here:
        messages = [{"role": "user", "content": SOLID[0]}, {"role": "assistant", "content": expected[:15]}]
        flags = {"continue_final_message": True, "add_generation_prompt": False, "stream": True}
        _, body = await here.ask({"model": MODEL, "messages": messages, "max_tokens": 25, "temperature": 0, **flags})
        assert expected[:15] + streamed(body) == expected


async def test_connections_are_used_again() -> None:
    async with served() as here:
        before = len(here.server.connections)
        for _ in range(3):
            await here.ask(HELLO)
            await here.ask({**HELLO, "stream": True})
        assert len(here.server.connections) == before + 1


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (failing_behind("Hel", "lo"), "an error was encountered while running the model: signal: killed"),
        (failing_behind("Hel", "lo", error="\x1b[31mred\n"), "[31mred"),
        (stopping_behind("Hel", "lo"), "stopped in the middle"),
        (answering("Hel", "lo", reason="load"), "for no reason that an answer has: load"),
        (lines(said("/api/chat", "Hello"), b"<html>"), "not what Ollama sends"),
    ],
)
async def test_an_answer_that_breaks_off_is_a_failure_of_the_service(
    behaviour: Behaviour, words: str, stream: bool
) -> None:
    async with served(behaviour) as here:
        answer = await here.send({**HELLO, "stream": stream})
        gathered = bytearray()
        with pytest.raises(AttemptFailed) as caught:
            await read(answer, gathered)
        come = bytes(gathered)
        assert (caught.value.fault, words in caught.value.reason) == ("service", True)
        assert caught.value.reason.isprintable()
        # What has come before goes on, for another worker to go on from; nothing that looks like an end does.
        assert (streamed(come), b"[DONE]" in come) == ("Hello" if stream else "", False)
        await answer.aclose()


async def test_one_that_dies_in_the_middle_is_seen_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ollama(breaking_off_behind("Hel", "lo")) as server, house(tmp_path, monkeypatch, server.url) as here:
        stream = await here.ask({**HELLO, "stream": True}, model=MODEL)
        error = await here.line.frame(frames.Error, stream)
        assert (error.fault, "broke off in the middle of its answer" in error.reason) == ("service", True)
        assert streamed(bytes(here.line.data[stream])) == "Hello"
        await eventually(lambda: here.agent.offering.free() == 1)


@pytest.mark.parametrize(
    ("status", "error", "fault"),
    [
        (503, "server busy, please try again.  maximum pending requests exceeded", "owner"),
        (404, "model 'tiny:latest' not found", "owner"),
        (500, "llama runner process has terminated: signal: killed", "service"),
        (500, "model requires more system memory (8.4 GiB) than is available (2.1 GiB)", "service"),
    ],
)
async def test_a_refusal_blames_whom_it_should(status: int, error: str, fault: str) -> None:
    async with served(refusing(status, error)) as here:
        with pytest.raises(AttemptFailed) as caught:
            await here.ask(HELLO)
        assert (caught.value.fault, caught.value.reason) == (fault, f"Ollama answered {status}: {error}")


async def test_what_is_wrong_with_a_request_is_answered_to_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "the input length exceeds the context length"
    async with ollama(refusing(400, long)) as server, house(tmp_path, monkeypatch, server.url) as here:
        stream = await here.ask({**HELLO, "stream": True}, model=MODEL)
        assert (await here.line.frame(frames.Head, stream)).status == 400
        await here.line.frame(frames.End, stream)
        error = json.loads(here.line.data[stream])["error"]
        assert (error["message"], error["code"]) == (long, "context_length_exceeded")
        # And what Ollama has nothing for never gets there.
        before = len(server.bodies("/api/chat"))
        stream = await here.ask({**HELLO, "n": 3}, model=MODEL)
        await here.line.frame(frames.End, stream)
        assert json.loads(here.line.data[stream])["error"]["param"] == "n"
        assert len(server.bodies("/api/chat")) == before


@pytest.mark.parametrize("behaviour", [endless, silent])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_is_cancelled_is_closed_at_once(
    behaviour: Behaviour, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ollama(behaviour) as server, house(tmp_path, monkeypatch, server.url) as here:
        number = await here.ask({**HELLO, "stream": stream}, model=MODEL)
        await eventually(lambda: len(server.bodies("/api/chat")) == 1)
        await here.line.say(frames.Cancel(stream=number, reason="the client left"))
        async with asyncio.timeout(PATIENCE_S):
            await server.left.wait()
        await eventually(lambda: here.agent.offering.free() == 1)


async def test_each_line_of_a_whole_answer_is_a_sign_of_life_and_silence_is_none() -> None:
    sent: list[str] = []

    async def slow(_: OllamaStandIn, exchange: Exchange) -> None:
        # In all longer than it may be silent.
        for _n in range(7):
            await exchange.line(said("/api/chat", "a"))
            sent.append("a")
            await asyncio.sleep(0.5)
        await exchange.left()

    async with served(slow) as here:
        answer = await here.send(HELLO)
        with pytest.raises(TimeoutError):
            await answer.read(65536, within_s=3.0)
        assert len(sent) == 7
        await answer.aclose()


async def test_an_answer_without_end_behind_its_end_is_let_go() -> None:
    async def hangs(_: OllamaStandIn, exchange: Exchange) -> None:
        await exchange.line(said("/api/chat", "Hello", done=True, done_reason="stop"))
        await exchange.left()

    async with served(hangs) as here:
        assert await here.text() == "Hello"


# -- nothing is loaded anew --------------------------------------------------------------------------------------------


async def test_a_model_is_never_loaded_anew_for_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rma_core.agent.attach.ollama.LOADED_FRESH_S", 0.0)
    async with served() as here:
        server = here.server
        # Cold: Ollama chooses, as it would for its owner.
        await here.text()
        assert "num_ctx" not in server.bodies("/api/chat")[0].get("options", {})
        assert (server.loads, server.reloads) == (1, 0)
        # Its owner loads it anew with more; from then on that is its size, without a look in between.
        server.loaded[MODEL] = 16384
        await here.text(temperature=0)
        await here.ask({"model": MODEL, "prompt": "Once"}, COMPLETIONS)
        assert server.bodies("/api/chat")[-1]["options"] == {"temperature": 0, "num_ctx": 16384}
        assert server.bodies("/api/generate")[-1]["options"] == {"num_ctx": 16384}
        assert (server.loads, server.reloads) == (1, 0)


async def test_looks_load_nothing_and_ask_for_a_models_file_once() -> None:
    async with served(
        parameters='stop    "<|eot|>"\nnum_ctx    2048\n', capabilities=["completion", "thinking"]
    ) as here:
        for _ in range(3):
            await here.one.look()
        assert (here.server.loads, here.server.loaded) == (0, {})
        assert here.server.bodies("/api/show") == [{"model": MODEL}]
        assert {path for path, _ in here.server.asked if path.startswith("/api")} == {
            "/api/extra/version", "/api/version", "/api/tags", "/api/ps", "/api/show"
        }  # fmt: skip
        assert listed(here.one.status()) == [(MODEL, "cold", 2048)]
        here.server.loaded[MODEL] = 8192
        await here.one.look()
        assert listed(here.one.status()) == [(MODEL, "loaded", 8192)]
        # Another model under the same name is another model.
        here.server.digest = "b" * 64
        await here.one.look()
        assert len(here.server.bodies("/api/show")) == 2


async def test_who_keeps_a_model_loaded_and_how_long_is_the_owners_to_say() -> None:
    async with served(fragment="#keep_alive=30m&slots=2") as here:
        await here.text(keep_alive=-1)
        assert here.server.bodies("/api/chat")[0]["keep_alive"] == "30m"
        assert here.one.slots == 2
    async with served() as here:
        await here.text(keep_alive=-1)
        assert "keep_alive" not in here.server.bodies("/api/chat")[0]


async def test_that_a_model_is_loaded_now_is_told_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ollama() as server, house(tmp_path, monkeypatch, server.url) as here:
        await here.line.wait(lambda: beats(here.line) and beats(here.line)[-1].beat.containers)
        assert beats(here.line)[-1].beat.containers[0].models[0].state == "cold"
        await here.line.frame(frames.End, await here.ask(HELLO, model=MODEL))
        # Long before the next look would have been.
        await here.line.wait(lambda: beats(here.line)[-1].beat.containers[0].models[0].state == "loaded")


async def test_an_ollama_that_does_not_say_what_is_loaded_is_asked_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rma_core.agent.attach.ollama.LOADED_FRESH_S", 0.0)
    monkeypatch.setattr("rma_core.agent.attach.ollama.LOADED_WITHIN_S", 0.2)
    async with served() as here:
        here.server.mute = "/api/ps"
        assert await here.text() == "Hello there"


# -- going on ----------------------------------------------------------------------------------------------------------


async def test_a_begun_answer_goes_on_where_the_model_does_which_is_tried_once() -> None:
    async with served() as here:
        for _ in range(2):
            status, _ = await here.ask(BEGUN)
            assert status == 200
        probe, first, second = here.server.bodies("/api/chat")
        assert (probe["stream"], probe["messages"][-1]["content"]) == (False, "1, 2, 3,")
        assert first == second
        assert first["messages"][-1] == {"role": "assistant", "content": "Well,"}
        # Another version of Ollama, or another model under the name: it is tried again.
        here.server.version = "0.15.0"
        await here.one.look()
        await here.ask(BEGUN)
        here.server.digest = "c" * 64
        await here.one.look()
        await here.ask(BEGUN)
        assert [body["stream"] for body in here.server.bodies("/api/chat")[3:]] == [False, True, False, True]


async def test_where_the_model_begins_a_new_answer_the_client_is_told() -> None:
    async with served(goes_on=False) as here:
        for _ in range(2):
            status, body = await here.ask(BEGUN)
            error = json.loads(body)["error"]
            assert (status, error["code"], error["param"]) == (400, "continue_unsupported", "continue_final_message")
        # Tried once, and never with the answer that was asked for.
        assert [one["messages"][-1]["content"] for one in here.server.bodies("/api/chat")] == ["1, 2, 3,"]
        # What is not continued goes on as ever.
        assert await here.text() == "Hello there"


async def test_two_that_come_together_try_it_once() -> None:
    async with served(fragment="#slots=2") as here:
        await asyncio.gather(here.ask(BEGUN), here.ask(BEGUN))
        assert [one["stream"] for one in here.server.bodies("/api/chat")] == [False, True, True]


async def test_a_try_that_failed_says_nothing_of_the_model() -> None:
    async with served() as here:
        here.server.probe = refusing(503, "server busy")
        with pytest.raises(AttemptFailed) as caught:
            await here.ask(BEGUN)
        assert caught.value.fault == "owner"
        here.server.probe = None
        assert (await here.ask(BEGUN))[0] == 200


# -- the owner first ---------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


async def test_an_owner_who_uses_ollama_has_its_slot_for_a_while() -> None:
    clock = Clock()
    changes: list[int] = []

    def changed() -> None:
        changes.append(one.slots)

    one: AttachedServer
    async with ollama() as server, attached(server.url, clock=clock, changed=changed) as one:
        server.loaded[MODEL] = 4096
        for _ in range(2):
            clock.now += 10
            await one.look()
        assert (one.slots, one.free) == (1, 1)
        # Somebody else has had an answer.
        server.expires += 1
        clock.now += 10
        assert await one.look() < 10
        assert (one.slots, one.free, one.place()) == (0, 0, None)
        assert one.reason.endswith("; 1 in use by others")
        assert (one.state, one.status().slots, changes[-1]) == ("healthy", 0, 0)
        clock.now += BACK_WITHIN_S
        await one.look()
        assert (one.slots, one.free, changes[-1]) == (1, 1, 1)


async def test_what_the_pool_itself_asks_is_not_taken_for_its_owner() -> None:
    clock = Clock()
    async with ollama() as server, attached(server.url, clock=clock) as one:
        await one.look()
        here = Attached(server, one)
        for _ in range(3):
            await here.text()
            # Ollama notes the end of an answer a moment later.
            server.expires += 1
            clock.now += 10
            await one.look()
            assert one.slots == 1


def test_what_moves_while_the_pool_is_at_it_says_nothing_and_what_moves_later_does() -> None:
    clock = Clock()
    others = Others(clock)

    def look(moment: str, ours: int = 0, after_s: float = 10.0) -> int:
        clock.now += after_s
        others.expiries_seen({"m": moment}, ours)
        return others.taken

    assert [look("a"), look("a")] == [0, 0]
    assert look("b", ours=1) == 0
    others.ours()
    assert look("c", after_s=1) == 0
    assert look("d", after_s=1) == 0
    assert [look("d"), look("e")] == [0, 1]
    others.forget()
    assert others.taken == 0
    assert look("f") == 0
