"""Streamed answers under /v1: one answer in whole events, never silent, and never whole in looks alone."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.v1 import answers as openai_answers
from rma_core.models import channel as frames
from tests.coordinator_fixtures import PATIENCE_S, soon
from tests.openai_kit import (
    CHAT,
    END,
    HELLO,
    JSON,
    REPLY,
    ROLE,
    SSE,
    USAGE,
    check_cut,
    check_error,
    delta,
    event,
    events,
    pool_with,
    stream,
    text_of,
)

if TYPE_CHECKING:
    from pathlib import Path


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
        assert (answer.headers["x-rma-worker"], answer.headers["x-request-id"][:5]) == (line.id, "task-")
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


async def test_the_last_event_of_a_stream_tells_what_its_headers_could_not_yet(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        for usage in (False, True):
            asked = stream(pool, stream_options={"include_usage": usage})
            forged = json.loads(delta("a")[6:]) | {"x_rma": {"worker": "me"}}
            await line.serve(event(forged), delta(finish="stop"), USAGE, END, headers=SSE)
            answer = await asked
            found = events(answer.text)[:-1]
            facts = found.pop()["x_rma"]
            assert not any("x_rma" in one for one in found)
            assert (facts["worker"], facts["attempts"]) == (line.id, 1)
            assert 0 <= facts["queue_ms"] <= facts["first_byte_ms"] <= facts["total_ms"]
            assert set(facts) == {"worker", "attempts", "queue_ms", "first_byte_ms", "total_ms"}
            assert (answer.headers["x-rma-worker"], answer.headers["x-rma-attempts"]) == (line.id, "1")
            assert answer.headers["x-rma-first-byte-ms"] == str(facts["first_byte_ms"])


async def test_usage_that_no_engine_tells_is_guessed_from_the_text_and_marked(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = stream(pool, stream_options={"include_usage": True})
        await line.serve(ROLE, delta("a"), delta("b"), delta(finish="stop"), END, headers=SSE)
        last = events((await asked).text)[-2]
        assert (last["choices"], last["x_rma"]["estimated"]) == ([], True)
        used = last["usage"]
        assert used["completion_tokens"] == 2, "events with text, as many as tokens or fewer, and never bytes of a wire"
        assert used["total_tokens"] == used["prompt_tokens"] + 2 > 2


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
