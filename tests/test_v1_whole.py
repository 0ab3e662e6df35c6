"""Whole answers under /v1: made right, passed on as refusals, and not lost with a worker."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import struct
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from httpx2 import RemoteProtocolError

from rma_coordinator.api.v1 import answers as openai_answers
from rma_coordinator.api.v1 import whole as openai_whole
from rma_coordinator.api.v1.jobs import MAX_REFUSAL_BYTES, Asked
from rma_coordinator.api.v1.requests import Manner
from rma_coordinator.api.v1.runs import Run
from rma_coordinator.api.v1.sse import Answer
from rma_coordinator.api.v1.whole import made_right
from rma_core.models import channel as frames
from tests.coordinator_fixtures import PATIENCE_S, Line, Running, soon, until
from tests.openai_kit import CHAT, HELLO, JSON, REPLY, ask, attach, check_error, pool_with, sdk, taken

if TYPE_CHECKING:
    from pathlib import Path


class Refusal(NamedTuple):
    """What a model server says, and what the client is told."""

    status: int
    body: Any
    seen: int
    code: str | None
    message: str


TOO_LONG = {"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}
VLLM = {"message": "This model's maximum context length is 8 tokens", "type": "BadRequestError", "code": 400}
BAD_STOP = {"error": {"message": "bad stop", "type": "x", "param": None, "code": "bad_stop"}}


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(400, TOO_LONG, 400, "context_length_exceeded", "too long"),
        Refusal(400, {"object": "error", **VLLM}, 400, "context_length_exceeded", "maximum context length"),
        Refusal(400, BAD_STOP, 400, "bad_stop", "bad stop"),
        Refusal(404, {"error": "model not found"}, 404, "not_found", "model not found"),
        Refusal(422, {"detail": [{"loc": ["body"], "msg": "no"}]}, 422, None, '"msg":"no"'),
        Refusal(501, {"error": {"message": "no embeddings here"}}, 400, None, "no embeddings here"),
        Refusal(401, {"error": "its own key"}, 502, "worker_failed", "its own key"),
        Refusal(409, {"error": "a state"}, 502, "worker_failed", "a state"),
        Refusal(500, "<html>", 502, "worker_failed", "<html>"),
        Refusal(302, "", 502, "worker_failed", "302"),
    ],
    ids=lambda refusal: f"{refusal.status} {refusal.message}",
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refusal_of_the_model_server_is_passed_on_in_one_form(
    tmp_path: Path, refusal: Refusal, streamed: bool
) -> None:
    body = refusal.body
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, model="tiny", messages=HELLO, stream=streamed)
        content = body.encode() if isinstance(body, str) else json.dumps(body, separators=(",", ":")).encode()
        await line.serve(content, status=refusal.status, headers=JSON)
        assert refusal.message in check_error(await asked, refusal.seen, refusal.code)


async def test_a_whole_answer_has_our_id_and_the_clients_name_and_says_who_gave_it(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        ids = set()
        for _ in range(2):
            asked = ask(pool)
            await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            answer = await asked
            found = answer.json()
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
            assert found["id"].startswith("chatcmpl-")
            ids.add(found["id"])
            assert isinstance(found["created"], int)
            assert (found["model"], found["object"]) == ("tiny", "chat.completion")
            assert (found["choices"], found["usage"], found["timings"]) == (
                REPLY["choices"],
                REPLY["usage"],
                REPLY["timings"],
            )
            assert answer.headers["x-request-id"].startswith("task-")
            assert (answer.headers["x-rma-worker"], answer.headers["x-rma-attempts"]) == (line.id, "1")
            assert answer.headers["x-rma-model-state"] == "loaded"
            queue, first, total = (
                int(answer.headers[name]) for name in ("x-rma-queue-ms", "x-rma-first-byte-ms", "openai-processing-ms")
            )
            assert 0 <= queue <= first <= total
        assert len(ids) == 2


async def test_completions_and_embeddings_have_their_own_shapes(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, {"model": "tiny", "prompt": "a"}, "/v1/completions")
        text = {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}], "model": "x", "id": "1"}
        await line.serve(json.dumps(text).encode(), headers=JSON)
        found = (await asked).json()
        assert (found["object"], found["model"], found["choices"]) == ("text_completion", "tiny", text["choices"])
        assert found["id"].startswith("cmpl-")
        numbers = [0.5, -1.25, 3.0]
        vector = {"object": "embedding", "index": 0, "embedding": numbers}
        for form in ("float", "base64"):
            asked = ask(pool, {"model": "tiny", "input": ["a"], "encoding_format": form}, "/v1/embeddings")
            await line.serve(json.dumps({"model": "x", "data": [vector]}).encode(), headers=JSON)
            found = (await asked).json()
            got = found["data"][0]["embedding"]
            assert found["model"] == "tiny"
            assert (got if form == "float" else list(struct.unpack("<3f", base64.b64decode(got)))) == numbers


def reply(*choices: Any, **more: Any) -> bytes:
    return json.dumps({**REPLY, "choices": list(choices), **more}).encode()


def choice(finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": "hi", **message}, "finish_reason": finish}


async def answered(pool: Running, line: Line, content: bytes, **fields: Any) -> Any:
    """Return what the client gets for what a model server answered."""
    asked = ask(pool, **fields)
    await line.serve(content, headers=JSON)
    answer = await asked
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_an_answers_end_is_said_in_words_that_clients_know(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        same = [(said, said) for said in ("stop", "length", "content_filter", "tool_calls")]
        for said, heard in (*same, ("eos", "stop"), (None, "stop")):
            found = await answered(pool, line, reply(choice(said)))
            assert found["choices"][0]["finish_reason"] == heard
        found = await answered(pool, line, reply({"message": {"content": "hi"}}))
        assert found["choices"] == [choice()]
        for broken in ("abort", "error", "load", "unload"):
            asked = ask(pool)
            await line.serve(reply(choice(broken)), headers=JSON)
            check_error(await asked, 502, "worker_failed")


async def test_calls_of_tools_are_whole_and_their_arguments_are_text(tmp_path: Path) -> None:
    """Ollama gives arguments as what they mean, and no id; SDKs parse the text, and answer to the id."""
    good = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    bare = {"function": {"name": "add", "arguments": {"a": [1]}}}
    async with pool_with(tmp_path) as (pool, line):
        found = await answered(pool, line, reply(choice("tool_calls", content=None, tool_calls=[good, bare])))
        message = found["choices"][0]["message"]
        assert (message["content"], message["tool_calls"][0]) == (None, good)
        mended = message["tool_calls"][1]
        assert mended.pop("id").startswith("call_")
        assert mended == {"type": "function", "function": {"name": "add", "arguments": '{"a":[1]}'}}
        found = await answered(pool, line, reply(choice(tool_calls=[])))
        assert "tool_calls" not in found["choices"][0]["message"]


async def test_usage_is_told_of_every_whole_answer_in_whole_numbers_and_marked_where_it_is_guessed(
    tmp_path: Path,
) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 1}}
    async with pool_with(tmp_path) as (pool, line):
        told = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99, **details}
        found = await answered(pool, line, reply(choice(), usage=told, x_rma={"worker": "me"}))
        assert found["usage"] == {**told, "total_tokens": 7}
        assert "x_rma" not in found, "what a worker says in our name is not passed on"
        for usage in (None, {}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": 1.5}, "much"):
            found = await answered(pool, line, reply(choice(content="x" * 41), usage=usage))
            assert found["x_rma"] == {"estimated": True}
            assert found["usage"]["completion_tokens"] == 11, "four characters of the text make a token"
            assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + 11
        vectors = json.dumps({"data": [{"index": 0, "embedding": [0.5]}]}).encode()
        asked = ask(pool, {"model": "tiny", "input": "a" * 400}, "/v1/embeddings")
        await line.serve(vectors, headers=JSON)
        found = (await asked).json()
        assert (found["object"], found["x_rma"]) == ("list", {"estimated": True})
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 100
        assert "completion_tokens" not in found["usage"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": NaN}',
        b'{"choices": 1}',
        b'{"choices": []}',
        b'{"choices": [1]}',
        b'{"choices": [{}]}',
    ],
)
async def test_what_is_no_answer_is_502(tmp_path: Path, content: bytes) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool)
        await line.serve(content, headers=JSON)
        check_error(await asked, 502, "worker_failed")


@pytest.mark.parametrize("good", [True, False])
async def test_nothing_of_an_answer_is_left_in_memory_once_it_has_gone_out(
    tmp_path: Path, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[weakref.ref[Run]] = []
    gather = Run.gather

    def noted(run: Run) -> None:
        begun.append(weakref.ref(run))
        gather(run)

    monkeypatch.setattr(Run, "gather", noted)
    async with pool_with(tmp_path) as (pool, line):
        # What only the collector of cycles would find has 32 MB each, and it seldom looks.
        gc.disable()
        try:
            for number in range(3):
                asked = ask(pool, seed=number)
                await line.serve(json.dumps(REPLY).encode() if good else b"[1", headers=JSON)
                assert (await asked).status_code == (200 if good else 502)
            await until(lambda: all(one() is None for one in begun))
        finally:
            gc.enable()
        assert len(begun) == 3
        assert pool.pool.repeats.gathered_bytes == 0


async def test_a_refusal_that_never_ends_is_cut(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool)
        task = await taken(pool, line)
        await line.say(frames.Head(stream=task.stream, status=400, headers=JSON))
        relay = pool.pool.hub.relays[task.offer.task_id]
        for _ in range(20):
            await line.data(task.stream, b"[]," * 10_000)
            await until(lambda: not relay.crowded)
        await line.say(frames.End(stream=task.stream))
        assert len((await asked).content) < 2 * MAX_REFUSAL_BYTES


async def sent(pool: Running, line: Line, answer: bytes, *, until_over: asyncio.Task[Any]) -> frames.Task:
    """Send all of an answer but its end, as fast as it is taken, until its client has another one."""
    task = await taken(pool, line)
    repeats = pool.pool.repeats
    begun = repeats.gathered_bytes
    await line.say(frames.Head(stream=task.stream, status=200, headers=JSON))
    for start in range(0, len(answer), frames.MAX_DATA_BYTES):
        await line.data(task.stream, answer[start : start + frames.MAX_DATA_BYTES])
        most = start + frames.MAX_DATA_BYTES - frames.WINDOW_BYTES // 2
        await until(lambda most=most: until_over.done() or repeats.gathered_bytes - begun >= most)  # type: ignore[misc]
        if until_over.done():
            break
    return task


async def test_large_answers_on_their_way_are_bounded_together_and_small_ones_are_not_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_whole, "MOST_GATHERED_BYTES", 3_000_000)
    large = json.dumps({**REPLY, "filler": "x" * 2_000_000}).encode()
    async with pool_with(tmp_path, slots=3) as (pool, line):
        repeats = pool.pool.repeats
        first = ask(pool, seed=1)
        held = await sent(pool, line, large, until_over=first)
        assert repeats.gathered_bytes > 1_500_000
        second = ask(pool, seed=2)
        await sent(pool, line, large, until_over=second)
        assert "may take" in check_error(await second, 503, "service_unavailable")
        small = ask(pool, seed=3)
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert (await small).status_code == 200
        await line.say(frames.End(stream=held.stream))
        assert len((await first).content) > 2_000_000
        await until(lambda: repeats.gathered_bytes == 0)


def test_an_answer_that_would_fill_the_memory_is_none() -> None:
    asked = Asked(Answer(id="", created=0, model="m"), stream=False, base64=False)
    small = b'{"data":[{"embedding":[1.5]}]}'
    assert made_right(small, asked) is not None
    assert made_right(small[:-1] + b',"x":[' + b"[]," * openai_whole.MOST_VALUES + b"1]}", asked) is None


async def test_a_whole_answer_outlives_its_worker(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        second = await pool.enrol()
        async with second.channel({"llm": 1}) as other:
            asked = ask(pool)
            waiting = [asyncio.create_task(one.task()) for one in (line, other)]
            done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
            assert done == {waiting[0]}, "only the first has the model"
            task = waiting[0].result()
            await line.say(frames.Head(stream=task.stream, status=200, headers=JSON))
            await line.data(task.stream, b'{"choices": [')
            for one in rest:
                one.cancel()
            await asyncio.wait(rest)
            await attach(pool, other, "tiny", slots=1)
            pool.pool.unregister(pool.pool.fleet.get(line.id))
            await other.serve(json.dumps(REPLY).encode(), headers=JSON)
            answer = await asked
            assert answer.json()["choices"] == REPLY["choices"]
            assert (answer.headers["x-rma-worker"], answer.headers["x-rma-attempts"]) == (second.id, "2")


# -- kept alive ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everyone is kept alive at once."""
    for name in ("KEPT_ALIVE_AFTER_S", "LONG_WAIT_S", "BLANK_EVERY_S"):
        monkeypatch.setattr(openai_answers, name, 0.03)


KEEP = {"x-rma-keepalive": "1"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("headers", [KEEP, sdk()], ids=["asked for it", "an SDK that waits for long"])
async def test_a_whole_answer_that_takes_long_is_kept_alive_with_blank_lines(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        content = json.dumps({"model": "tiny", "messages": HELLO})
        async with pool.client.stream("POST", CHAT, content=content, headers=headers) as answer:
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
            assert "content-length" not in answer.headers
            pieces = answer.aiter_text()
            text = await soon(anext(pieces)) + await soon(anext(pieces))
            assert text.strip("\n") == ""
            await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            text += "".join([piece async for piece in pieces])
        assert json.loads(text)["choices"] == REPLY["choices"]


@pytest.mark.usefixtures("quick")
async def test_an_error_behind_blank_lines_is_in_the_body_and_breaks_off_for_who_did_not_ask_for_them(
    tmp_path: Path,
) -> None:
    async with pool_with(tmp_path) as (pool, line):
        for headers in (KEEP, sdk()):
            content, text = json.dumps({"model": "tiny", "messages": HELLO}), ""
            async with pool.client.stream("POST", CHAT, content=content, headers=headers) as answer:
                pieces = answer.aiter_text()
                text += await soon(anext(pieces))
                await line.serve(b'{"error": "no room"}', status=500, headers=JSON)
                with pytest.raises(RemoteProtocolError) if headers is not KEEP else contextlib.nullcontext():
                    async for piece in pieces:
                        text += piece
            assert "no room" in json.loads(text)["error"]["message"]


def test_blank_lines_come_within_a_third_of_what_the_client_waits() -> None:
    for how, quiet in (
        (Manner(keep_alive=True), (20, 15)),
        (Manner(keep_alive=True, patience_s=30), (10, 10)),
        (Manner(sdk=True, patience_s=600), (50, 15)),
    ):
        found = openai_answers._whole_quiet(how)
        assert found is not None
        assert found[:2] == quiet
    assert openai_answers._whole_quiet(Manner()) is None
