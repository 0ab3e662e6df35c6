"""OpenAI's API under /v1: what its SDKs rely on, line by line, against a coordinator with a stand-in worker."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import re
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api import openai_answers
from rma_coordinator.api.openai import MAX_BODY_BYTES, MOST_VALUES
from rma_coordinator.api.openai_answers import Asked, made_right
from rma_coordinator.api.sse import MAX_EVENT_BYTES, Answer, Events, Stream
from rma_coordinator.store import StoreFailed
from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus
from tests.coordinator_fixtures import PATIENCE_S, Line, Running, running, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from httpx2 import Response

CHAT = "/v1/chat/completions"
SSE = (("content-type", "text/event-stream"),)
JSON = (("content-type", "application/json"),)
HELLO = [{"role": "user", "content": "hello"}]
REPLY = {
    "id": "1", "object": "chat.completion", "created": 5, "model": "/models/tiny.gguf",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}, "timings": {"x": 1.5},
}  # fmt: skip


@contextlib.asynccontextmanager
async def pool_with(tmp_path: Path, *models: str, slots: int = 2, **more: Any) -> AsyncIterator[tuple[Running, Line]]:
    """A pool with one worker whose owner has attached models."""
    async with running(tmp_path, **more) as pool:
        machine = await pool.enrol()
        async with machine.channel({"llm": slots}) as line:
            await attach(pool, line, *(models or ("tiny",)), slots=slots)
            yield pool, line


async def attach(pool: Running, line: Line, *models: str, slots: int = 2, state: Any = "loaded") -> None:
    """A worker says that it has models."""
    known = tuple(ModelStatus(name=name, state=state, context=2048) for name in models)
    container = ContainerStatus(
        name="attached", service="llm", state="healthy", runtime=ATTACHED, slots=slots, models=known
    )
    await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=(container,)), slots={"llm": slots}))
    await until(lambda: pool.pool.dispatcher.seats[line.id].models.get("llm") == frozenset(models))


def ask(pool: Running, body: Any = None, path: str = CHAT, **fields: Any) -> asyncio.Task[Response]:
    """Send a request, and let it be answered meanwhile."""
    content = body if isinstance(body, bytes) else json.dumps(body or {"model": "tiny", "messages": HELLO, **fields})
    return asyncio.create_task(pool.client.post(path, content=content))


def states(pool: Running) -> list[str]:
    """Return how the newest attempt of each task stands."""
    return [task.attempt.state if task.attempt else "queued" for task in pool.pool.dispatcher.tasks.values()]


def check_error(answer: Response, status: int, code: str | None, *, param: str | None = None) -> str:
    """Assert that an answer is OpenAI's error object, and return its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch("task-[0-9a-z]{20}", answer.headers["x-request-id"])
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert isinstance(error["type"], str)
    if status in (429, 503):
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    return str(error["message"])


def delta(content: Any = None, *, finish: str | None = None, **more: Any) -> bytes:
    """One event of an engine, with an id and a model of its own."""
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": finish}
    return event({"id": "1", "object": "x", "created": 1, "model": "other", "choices": [choice]})


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


ROLE = delta("", role="assistant")
USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
END = b"data: [DONE]\n\n"


def events(text: str) -> list[Any]:
    """Return the events of a stream, read as strictly as the strictest SDK; the end marker is a string."""
    blocks = [block for block in re.sub(r"(?m)^: rma.*\n", "", text).split("\n\n") if block]
    assert text.endswith("\n\n"), "no event is torn"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def text_of(found: list[Any]) -> str:
    return "".join(c["delta"].get("content") or "" for e in found if e != "[DONE]" for c in e["choices"])


# -- addresses, keys, errors ---------------------------------------------------------------------------------------


async def test_every_address_answers_with_and_without_a_slash_and_others_are_an_error_object(tmp_path: Path) -> None:
    async with pool_with(tmp_path, "tiny", "org/name:7b") as (pool, line):
        for path in ("/v1/models", "/v1/models/"):
            found = (await pool.client.get(path)).json()
            assert [model["id"] for model in found["data"]] == ["org/name:7b", "tiny"]
        for name in ("org/name:7b", "org%2Fname%3A7b", "org/name:7b/"):
            assert (await pool.client.get(f"/v1/models/{name}")).json()["id"] == "org/name:7b"
        for path in (CHAT, CHAT + "/"):
            asked = ask(pool, path=path)
            task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            assert (task.offer.path, task.offer.model) == (CHAT, "tiny")
            assert (await asked).status_code == 200
        for path in ("/v1", "/v1/", "/v1/files", "/v1/chat", "/v1//models", "/v1/%ff", "/v1/chat/completions/x"):
            check_error(await pool.client.get(path), 404, "not_found")
        answer = await pool.client.get(CHAT)
        check_error(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"


async def test_a_key_comes_in_any_of_three_headers_and_a_wrong_one_is_401(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        key = await pool.make_key("infer:llm")
        for named in (pool.bearer(key), {"api-key": key}, {"x-api-key": key}):
            answer = await pool.client.get("/v1/models", headers={"authorization": "", **named})
            assert answer.status_code == 200
        for secret in ("", "Bearer", "Basic x", "Bearer sk-123", f"Bearer {key}x", "Bearer \xe4"):
            headers = [(b"authorization", secret.encode("latin-1"))]
            answer = await pool.client.get("/v1/models", headers=headers)
            check_error(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"].startswith("Bearer")
            check_error(await pool.client.post(CHAT, headers=headers), 401, "invalid_api_key")
        other = await pool.make_key("infer:notes")
        for answer in (
            await pool.client.get("/v1/models", headers=pool.bearer(other)),
            await pool.client.post(CHAT, headers=pool.bearer(other), content=b"{}"),
        ):
            assert "infer:llm" in check_error(answer, 403, "permission_denied")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'{"model": "tiny", "messages": [{"role": "user"}], "temperature": NaN}', None),
        (b'{"model": "tiny", "messages": ' + b"[" * 20_000, None),
        (b'{"messages": [{"role": "user"}]}', "model"),
        (b'{"model": "", "messages": [{"role": "user"}]}', "model"),
        (b'{"model": 5, "messages": [{"role": "user"}]}', "model"),
        (b'{"model": "tiny"}', "messages"),
        (b'{"model": "tiny", "messages": []}', "messages"),
        (b'{"model": "tiny", "messages": "hello"}', "messages"),
        (b'{"model": "tiny", "messages": [1]}', "messages[0]"),
        (b'{"model": "tiny", "messages": [{}], "n": 2}', "n"),
        (b'{"model": "tiny", "messages": [{}], "stream": "yes"}', "stream"),
        (b'{"model": "tiny", "messages": [{}], "stream_options": {}}', "stream_options"),
        (b'{"model": "tiny", "messages": [{}], "stream_options": {}, "stream": false}', "stream_options"),
        (b'{"model": "tiny", "messages": [{}], "stream": true, "stream_options": 1}', "stream_options"),
        (b'{"model": "tiny", "messages": [{}], "tools": 1}', "tools"),
    ],
)
async def test_a_request_of_the_wrong_shape_is_400_and_names_the_parameter(
    tmp_path: Path, content: bytes, param: str | None
) -> None:
    async with pool_with(tmp_path) as (pool, _):
        answer = await ask(pool, content)
        check_error(answer, 400, None, param=param)
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert answer.headers["x-should-retry"] == "false"


async def test_a_large_request_of_the_wrong_shape_names_its_parameter_too(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        content = json.dumps({"model": "tiny", "messages": [{}] * 100_000, "n": 2})
        check_error(await ask(pool, content.encode()), 400, None, param="n")


async def test_a_body_that_is_too_large_or_encoded_is_refused(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        check_error(await ask(pool, b" " * (MAX_BODY_BYTES + 1)), 413, "request_too_large")
        answer = await pool.client.post(CHAT, content=b"x", headers={"Content-Encoding": "zstd"})
        check_error(answer, 415, "unsupported_encoding")
        pool.pool.settings = pool.pool.settings.__class__(max_body_bytes=2000)
        check_error(await ask(pool, b" " * 2001), 413, "request_too_large")


async def test_a_request_that_would_fill_the_memory_is_refused_before_it_is_taken_apart(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        for many in (b"[],", b"{},", b"1,"):
            body = b'{"model":"m","messages":[' + many * MOST_VALUES + b"{}]}"
            assert "at most 300000 values" in check_error(await ask(pool, body), 400, None)


def test_an_answer_that_would_fill_the_memory_is_none() -> None:
    asked = Asked(Answer(id="", created=0, model="m"), stream=False, base64=False, patience_s=None)
    small = b'{"data":[{"embedding":[1.5]}]}'
    assert made_right(small, asked) is not None
    assert made_right(small[:-1] + b',"x":[' + b"[]," * openai_answers.MOST_VALUES + b"1]}", asked) is None


async def test_a_model_never_seen_is_404_and_one_that_left_is_503_but_still_listed(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        for answer in (await ask(pool, model="gone", messages=HELLO), await pool.client.get("/v1/models/gone")):
            assert "tiny" in check_error(answer, 404, "model_not_found", param="model")
            assert answer.headers["x-should-retry"] == "false"
        pool.pool.unregister(pool.pool.fleet.get(line.id))
        answer = await ask(pool)
        check_error(answer, 503, "no_worker_available", param="model")
        assert "x-should-retry" not in answer.headers
        listed = (await pool.client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["x_rma"]) for model in listed] == [("tiny", {"state": "away", "workers": 0})]
        assert (await pool.client.get("/v1/models/tiny")).status_code == 200


async def test_models_are_listed_as_the_sdk_reads_them(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        answer = await pool.client.get("/v1/models")
        assert answer.headers["x-request-id"]
        found = answer.json()
        (one,) = found["data"]
        assert (found["object"], one["id"], one["object"], one["owned_by"]) == ("list", "tiny", "model", "rma")
        assert isinstance(one["created"], int)
        assert (one["context_length"], one["x_rma"]) == (2048, {"state": "loaded", "workers": 1})


async def test_a_full_queue_is_429_with_a_time_to_come_back(tmp_path: Path) -> None:
    async with pool_with(tmp_path, slots=1, max_queued_tasks=1) as (pool, line):
        first = ask(pool)
        task = await line.task()
        second = ask(pool)
        await until(lambda: len(pool.pool.dispatcher.tasks) == 2)
        answer = await ask(pool)
        check_error(answer, 429, "rate_limit_exceeded")
        assert "x-should-retry" not in answer.headers
        await line.answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert {(await one).status_code for one in (first, second)} == {200}


async def test_a_store_that_takes_nothing_is_503_and_a_bug_is_500(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool_with(tmp_path) as (pool, _):

        def broken(model: str) -> None:
            raise ValueError("a bug in here")

        monkeypatch.setattr(pool.pool, "check_model", broken)
        assert "bug in here" not in check_error(await ask(pool), 500, "internal_error")
        monkeypatch.undo()

        def full() -> None:
            raise StoreFailed("no new work is taken now: the coordinator's disk is full", hints=("try again later",))

        monkeypatch.setattr(pool.pool, "check_store", full)
        assert "try again later" in check_error(await ask(pool), 503, "service_unavailable")


async def test_a_task_that_every_worker_fails_is_502_with_every_reason_and_one_too_late_504(tmp_path: Path) -> None:
    async with pool_with(tmp_path, task_timeout_s=30.0) as (pool, line):
        asked = ask(pool)
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="worker", reason="the model server crashed"))
        answer = await asked
        assert "the model server crashed" in check_error(answer, 502, "worker_failed")
        assert answer.headers["x-request-id"] in answer.text
        asked = ask(pool)
        await line.task()
        await until(lambda: states(pool) == ["running"])
        pool.turn(31)
        answer = await asked
        check_error(answer, 504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false", "the same deadline would pass again"


class Refusal(NamedTuple):
    """What a model server says, and what the client is told."""

    status: int
    body: Any
    seen: int
    code: str | None
    message: str


TOO_LONG = {"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}
BAD_STOP = {"error": {"message": "bad stop", "type": "x", "param": None, "code": "bad_stop"}}


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(400, TOO_LONG, 400, "context_length_exceeded", "too long"),
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


# -- whole answers -------------------------------------------------------------------------------------------------


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
            assert answer.headers["x-request-id"] == answer.headers["rma-task-id"]
            assert (answer.headers["rma-worker"], answer.headers["rma-attempt"]) == (line.id, "1")
            assert answer.headers["x-rma-model-state"] == "loaded"
            assert int(answer.headers["openai-processing-ms"]) >= int(answer.headers["x-rma-queue-ms"]) >= 0
        assert len(ids) == 2


async def test_what_need_not_change_reaches_the_model_server_byte_for_byte(tmp_path: Path) -> None:
    fields = '"user": "u", "x_unknown" : [1.50, {"a":null}],  "seed":10000000000000000001, "tools": [{"type":"x"}]'
    sent = f'{{ "model": "tiny","messages":[{{"role":"developer", "content":"\\u00e9"}}],{fields}}}'.encode()
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, sent)
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert line.bodies[task.stream] == sent
        assert task.offer.headers == (("content-type", "application/json"),), "no credential goes on"
        assert (await asked).status_code == 200


async def test_an_empty_list_of_tools_is_left_out_and_nothing_else_changes(tmp_path: Path) -> None:
    sent = b'{"model":"tiny","messages":[{"role":"user"}],"tools":[],"tool_choice":"auto","x":1.50}'
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, sent)
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert line.bodies[task.stream] == b'{"model":"tiny","messages":[{"role":"user"}],"x":1.50}'
        assert (await asked).status_code == 200


async def test_completions_and_embeddings_have_their_own_shapes(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, {"model": "tiny", "prompt": "a"}, "/v1/completions")
        reply = {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}], "model": "x", "id": "1"}
        await line.serve(json.dumps(reply).encode(), headers=JSON)
        found = (await asked).json()
        assert (found["object"], found["model"], found["choices"]) == ("text_completion", "tiny", reply["choices"])
        assert found["id"].startswith("cmpl-")
        numbers = [0.5, -1.25, 3.0]
        reply = {"object": "list", "model": "x", "data": [{"object": "embedding", "index": 0, "embedding": numbers}]}
        for form in ("float", "base64"):
            asked = ask(pool, {"model": "tiny", "input": ["a"], "encoding_format": form}, "/v1/embeddings")
            await line.serve(json.dumps(reply).encode(), headers=JSON)
            found = (await asked).json()
            got = found["data"][0]["embedding"]
            assert found["model"] == "tiny"
            assert (got if form == "float" else list(struct.unpack("<3f", base64.b64decode(got)))) == numbers


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b'{"choices": NaN}', b'{"choices": 1}'])
async def test_what_is_no_answer_is_502(tmp_path: Path, content: bytes) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool)
        await line.serve(content, headers=JSON)
        check_error(await asked, 502, "worker_failed")


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
            assert (answer.headers["rma-worker"], answer.headers["rma-attempt"]) == (second.id, "2")


# -- streams -------------------------------------------------------------------------------------------------------


def stream(pool: Running, **fields: Any) -> asyncio.Task[Response]:
    return ask(pool, model="tiny", messages=HELLO, stream=True, **fields)


async def test_a_stream_is_one_answer_with_one_id_its_role_once_and_its_end_once(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        parts = (
            b": ping\n\n",
            ROLE,
            ROLE,
            delta("he"),
            delta("llo", role="assistant"),
            delta(finish="stop"),
            USAGE,
            END,
            END,
        )
        await line.serve(*parts, headers=SSE)
        answer = await asked
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        assert not {"content-length", "content-encoding"} & set(answer.headers)
        assert (answer.headers["rma-worker"], answer.headers["x-request-id"][:5]) == (line.id, "task-")
        found = events(answer.text)
        assert found.pop() == "[DONE]"
        assert len({(one["id"], one["created"], one["model"], one["object"]) for one in found}) == 1
        assert found[0]["id"].startswith("chatcmpl-")
        assert (found[0]["model"], found[0]["object"]) == ("tiny", "chat.completion.chunk")
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in one["choices"][0]["delta"] for one in found[1:])
        assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, None, "stop"]
        assert all(one["choices"][0]["index"] == 0 for one in found)
        assert not any("usage" in one for one in found), "nobody asked for it"
        assert text_of(found) == "hello"


async def test_usage_is_always_asked_of_the_engine_and_comes_last_to_those_who_asked(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool, stream_options={"include_usage": True, "x": 1})
        task = await line.serve(ROLE, delta("a"), USAGE, delta(finish="stop"), END, headers=SSE)
        assert json.loads(line.bodies[task.stream])["stream_options"] == {"include_usage": True, "x": 1}
        found = events((await asked).text)
        assert found[-1] == "[DONE]"
        assert (found[-2]["choices"], found[-2]["usage"]["total_tokens"]) == ([], 5)
        assert not any(one.get("usage") for one in found[:-2])
        asked = stream(pool)
        so_far = json.loads(delta("a")[6:]) | {"usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}}
        task = await line.serve(event(so_far), delta(finish="stop"), USAGE, END, headers=SSE)
        assert json.loads(line.bodies[task.stream])["stream_options"] == {"include_usage": True}
        assert "usage" not in (await asked).text


async def test_a_malformed_event_is_left_out_and_a_torn_one_never_sent(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        parts = (delta("a"), b"data: {oops\n\n", b"data:\n\n", b"event: x\nid: 5\n\n", delta("b"), delta(finish="stop"))
        await line.serve(*parts, b'data: {"choi', headers=SSE)
        found = events((await asked).text)
        assert text_of(found) == "ab"
        assert found[-1] == "[DONE]", "it had its finish_reason, so it is whole although the engine said no end"


@pytest.mark.parametrize("begun", [False, True])
async def test_an_answer_without_a_finish_reason_is_not_whole(tmp_path: Path, begun: bool) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        await line.serve(ROLE, *([delta("a")] if begun else []), END, headers=SSE)
        answer = await asked
        if begun:
            check_cut(answer, "finish_reason")
        else:
            check_error(answer, 502, "worker_failed")


def check_cut(answer: Response, reason: str, code: str = "worker_failed") -> list[Any]:
    """Assert that a stream ends as one that is not whole, and return what came before."""
    found = events(answer.text)
    last = found.pop()
    assert "[DONE]" not in answer.text
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert (last["error"]["code"], last["error"]["type"]) == (code, "server_error")
    assert reason in last["error"]["message"]
    assert last["id"] == found[0]["id"]
    return found


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
            assert answer.headers["rma-attempt"] == "2"
            assert text_of(check_cut(answer, "broke off", "worker_lost")) == "a"


async def begins(pool: Running, line: Line, *pieces: bytes) -> frames.Task:
    """Begin to answer, and wait until the client has some of it."""
    task = await line.task()
    await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
    for piece in pieces:
        await line.data(task.stream, piece)
    await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].committed)
    return task


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


async def holder(pool: Running) -> str:
    """Return the worker that is given the one request there is."""
    tasks = await until(lambda: [task for task in pool.pool.dispatcher.tasks.values() if task.attempt])
    return str(tasks[0].attempt.worker_id)


async def test_all_that_was_missing_is_the_end(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool, max_tokens=2)
        await begins(pool, line, ROLE, delta("a"), delta("b"))
        await line.say(frames.Error(stream=line_stream(pool, line), fault="service", reason="it crashed"))
        found = events((await asked).text)
        assert found.pop() == "[DONE]"
        assert (text_of(found), found[-1]["choices"][0]["finish_reason"]) == ("ab", "length")


def line_stream(pool: Running, line: Line) -> int:
    """Return the number of the one stream on a worker's channel."""
    (number,) = pool.pool.hub.sinks[line.id].streams  # type: ignore[attr-defined]  # it is a channel
    return int(number)


async def test_a_worker_that_lost_an_answer_gets_it_again_when_there_is_no_other(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        task = await begins(pool, line, ROLE, delta("one "))
        await line.say(frames.Error(stream=task.stream, fault="service", reason="its model server crashed"))
        again = await line.task()
        await line.answer(again.stream, ROLE, delta(" two"), delta(finish="stop"), END, headers=SSE)
        assert text_of(events((await asked).text)[:-1]) == "one two"


async def test_an_answer_that_is_lost_again_and_again_ends_with_an_error(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        for number in range(openai_answers.MOST_LOSSES + 1):
            task = await begins(pool, line, ROLE, delta(f"{number}"))
            await line.say(frames.Error(stream=task.stream, fault="service", reason="it crashed"))
        assert text_of(check_cut(await asked, "it crashed", "worker_lost")) == "0123"


async def test_an_engine_that_fails_in_its_stream_is_a_status_before_the_first_event_and_a_frame_after_it(
    tmp_path: Path,
) -> None:
    failure = event({"error": {"code": 400, "message": "the prompt is too long", "type": "exceed_context_size_error"}})
    crash = event({"error": {"code": 500, "message": "out of memory", "type": "server_error"}})
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        await line.serve(ROLE, failure, headers=SSE)
        assert "too long" in check_error(await asked, 400, "context_length_exceeded")
        asked = stream(pool)
        await line.serve(ROLE, delta("a"), crash, END, headers=SSE)
        assert text_of(check_cut(await asked, "out of memory")) == "a"
        asked = stream(pool)
        await line.serve(delta("a"), delta(finish="abort"), END, headers=SSE)
        check_cut(await asked, "abort")
        asked = stream(pool)
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert "did not stream" in check_error(await asked, 502, "worker_failed")


async def test_tools_are_told_in_fragments_that_clients_can_glue(tmp_path: Path) -> None:
    def call(**fields: Any) -> bytes:
        return delta(tool_calls=[fields])

    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool)
        first = call(index=0, id="c1", type="function", function={"name": "add", "arguments": ""})
        more = call(index=0, id="c1", type="function", function={"name": "add", "arguments": '{"a":'})
        whole = call(id="c2", type="function", function={"name": "b", "arguments": {"x": 1}}, index=1)
        await line.serve(ROLE, first, more, whole, delta(finish="tool_calls"), END, headers=SSE)
        found = events((await asked).text)
        assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
        calls = [one["choices"][0]["delta"]["tool_calls"][0] for one in found[1:4]]
        assert calls[1] == {"index": 0, "function": {"arguments": '{"a":'}}
        assert calls[2]["function"]["arguments"] == '{"x":1}'
        assert found[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_silent_stream_is_kept_alive_from_the_start_and_its_loss_is_still_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_answers, "SILENCE_S", 0.05)
    async with pool_with(tmp_path) as (pool, line):
        content = json.dumps({"model": "tiny", "messages": HELLO, "stream": True})
        async with pool.client.stream("POST", CHAT, content=content) as answer:
            assert answer.status_code == 200
            pieces = answer.aiter_text()
            text = await soon(anext(pieces))
            assert set(text.split("\n")) == {": rma", ""}, "single newlines: an empty event would break clients"
            task = await line.task()
            await line.say(frames.Error(stream=task.stream, fault="coordinator", reason="a slip"))
            task = await line.task()
            await line.say(frames.Head(stream=task.stream, status=200, headers=SSE))
            await line.data(task.stream, delta("a"))
            while not text.endswith(": rma\n") or "data" not in text:
                text += await soon(anext(pieces))
            await line.data(task.stream, delta(finish="stop") + END)
            await line.say(frames.End(stream=task.stream, usage={}))
            async with asyncio.timeout(PATIENCE_S):
                text += "".join([piece async for piece in pieces])
        assert text_of(events(text)) == "a"
        assert "error" not in text


async def test_a_failure_after_the_status_went_out_is_a_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_answers, "SILENCE_S", 0.05)
    async with pool_with(tmp_path) as (pool, line):
        content = json.dumps({"model": "tiny", "messages": HELLO, "stream": True})
        async with pool.client.stream("POST", CHAT, content=content) as answer:
            pieces = answer.aiter_text()
            text = await soon(anext(pieces))
            await line.serve(b'{"error": "no room"}', status=400, headers=JSON)
            async with asyncio.timeout(PATIENCE_S):
                text += "".join([piece async for piece in pieces])
    (last,) = events(text)
    assert last["error"]["message"] == "no room"
    assert last["choices"][0]["finish_reason"] == "error"


def test_a_client_with_little_patience_is_kept_alive_more_often() -> None:
    answer = Answer("x", 1, "m")
    for patience_s, silence_s in ((None, 10), (600.0, 10), (6.0, 2), (0.1, 1), (float("nan"), 10), (-1.0, 10)):
        asked = openai_answers.Asked(answer, stream=True, base64=False, patience_s=patience_s)
        assert asked.silence_s == silence_s


WHOLE = b"".join(
    [
        b": ping\n\n", ROLE, delta("h\u00e9\U0001f600"), delta("l\n\n"), b"data: {oops\r\n\r\n", event({"x": 1}),
        b"id: 7\ndata: " + delta("o")[6:], delta(finish="stop"), USAGE, END,
    ]
)  # fmt: skip


def fed(*parts: bytes) -> tuple[list[Any], Stream]:
    made = Stream(Answer("chatcmpl-1", 1, "tiny", usage=True))
    text = "".join(made.feed(part).decode() for part in parts)
    return events(text) if text else [], made


@given(cuts=st.lists(st.integers(0, len(WHOLE))))
def test_a_stream_is_the_same_however_it_was_cut(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(WHOLE)]
    found, made = fed(*(WHOLE[a:b] for a, b in itertools.pairwise(places)))
    assert text_of(found) == "h\u00e9\U0001f600l\n\no"
    assert (made.skipped, made.whole, made.done) == (2, True, True)
    assert events(made.end().decode())[0]["usage"]["total_tokens"] == 5


@given(end=st.integers(0, len(WHOLE)))
def test_what_was_cut_off_anywhere_gives_whole_events_and_is_whole_only_with_its_finish_reason(end: int) -> None:
    found, made = fed(WHOLE[:end])
    assert made.whole == any(choice["finish_reason"] for one in found for choice in one["choices"])
    assert "h\u00e9\U0001f600l\n\no".startswith(text_of(found))


#: JSON of any shape, among it what is nearly an event.
ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "index",
                    "finish_reason",
                    "tool_calls",
                    "function",
                    "arguments",
                    "usage",
                    "role",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(values=st.lists(ODD, max_size=6), choices=st.lists(ODD, max_size=3))
def test_no_event_of_an_engine_breaks_the_stream_or_those_after_it(values: list[Any], choices: list[Any]) -> None:
    found, made = fed(*map(event, values), event({"choices": choices}), delta("a"), delta(finish="stop"))
    for one in found:
        assert {"id", "created", "model", "choices"} <= set(one)
        assert all(isinstance(choice["index"], int) and "finish_reason" in choice for choice in one["choices"])
    events(made.end().decode())


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_events_give_nothing(data: bytes) -> None:
    made = Stream(Answer("x", 1, "m"))
    assert made.feed(data) == b""
    assert not made.whole


def test_an_event_without_end_is_bounded() -> None:
    made = Stream(Answer("x", 1, "m"))
    assert made.feed(b"data: " + b"x" * MAX_EVENT_BYTES) == b""
    assert made.broken is not None
    cut = Events()
    assert list(cut.feed(b"data: 1\r\n\r")) == []
    assert list(cut.feed(b"\n")) == [b"1"]


def test_an_end_is_said_once_and_in_words_that_clients_know() -> None:
    found, made = fed(delta("a"), delta(finish="eos"), delta("b", finish="length"))
    assert [one["choices"][0]["finish_reason"] for one in found] == [None, None, "stop"]
    assert made.whole


# -- clients that leave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("phase", ["queued", "leased", "answering"])
async def test_a_client_that_leaves_ends_its_task_at_once(tmp_path: Path, phase: str, streamed: bool) -> None:
    async with pool_with(tmp_path, slots=1) as (pool, line):
        first = ask(pool) if phase == "queued" else None
        if first is not None:
            await line.task()
        asked = stream(pool) if streamed else ask(pool)
        await until(lambda: len(pool.pool.dispatcher.tasks) == (2 if first else 1))
        task = list(pool.pool.dispatcher.tasks.values())[-1]
        if phase != "queued":
            given = await line.task()
            if phase == "answering":
                await line.say(frames.Head(stream=given.stream, status=200, headers=SSE if streamed else JSON))
                await line.data(given.stream, delta("a") if streamed else b'{"choices"')
        asked.cancel()
        await until(lambda: task.state == "cancelled")
        if phase != "queued":
            cancelled = await line.frame(frames.Cancel)
            assert cancelled.stream == given.stream
        if first is not None:
            first.cancel()
        await until(lambda: not pool.pool.dispatcher.tasks)
