"""Whole answers under /v1: made right, passed on as refusals, and not lost with a worker."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from rma_coordinator.api import openai_whole
from rma_coordinator.api.openai_jobs import Asked
from rma_coordinator.api.openai_whole import made_right
from rma_coordinator.api.sse import Answer
from rma_core.models import channel as frames
from tests.coordinator_fixtures import PATIENCE_S
from tests.openai_kit import HELLO, JSON, REPLY, ask, attach, check_error, pool_with

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
            assert (answer.headers["rma-worker"], answer.headers["rma-attempt"]) == (second.id, "2")
