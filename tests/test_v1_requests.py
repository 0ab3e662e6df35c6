"""Requests under /v1: which are refused, and what of the others reaches the model server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.asgi import Call
from rma_coordinator.api.v1.calls import MAX_BODY_BYTES
from rma_coordinator.api.v1.requests import MOST_VALUES, Manner, manner
from tests.coordinator_fixtures import running
from tests.openai_kit import CHAT, JSON, REPLY, ask, check_error, pool_with

if TYPE_CHECKING:
    from pathlib import Path


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


async def test_what_need_not_change_reaches_the_model_server_byte_for_byte(tmp_path: Path) -> None:
    fields = '"user": "u", "x_unknown" : [1.50, {"a":null}],  "seed":10000000000000000001, "tools": [{"type":"x"}]'
    sent = f'{{ "model": "tiny","messages":[{{"role":"user", "content":"\\u00e9"}}],{fields}}}'.encode()
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, sent)
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert line.bodies[task.stream] == sent
        assert task.offer.headers == (("content-type", "application/json"),), "no credential goes on"
        assert (await asked).status_code == 200


async def test_the_developers_words_are_the_systems_to_engines_and_nothing_else_of_the_messages_changes(
    tmp_path: Path,
) -> None:
    """llama.cpp's and vLLM's templates refuse a role that they do not know, or drop what it says."""
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    said = {"role": "user", "content": parts, "name": "ann"}
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, messages=[{"role": "developer", "content": "be brief", "x": 1}, said], model="tiny")
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        given = json.loads(line.bodies[task.stream])
        assert given["messages"] == [{"role": "system", "content": "be brief", "x": 1}, said]
        assert (await asked).status_code == 200


async def test_the_newer_limit_of_tokens_counts_and_engines_get_it_by_both_names(tmp_path: Path) -> None:
    cases = (
        (b'"max_completion_tokens":7', {"max_completion_tokens": 7, "max_tokens": 7}),
        (b'"max_tokens":9,"max_completion_tokens":7', {"max_completion_tokens": 7, "max_tokens": 7}),
        (b'"max_tokens":9', {"max_tokens": 9}),
        (b'"max_completion_tokens":"x"', {"max_completion_tokens": "x"}),
    )
    async with pool_with(tmp_path) as (pool, line):
        for limits, seen in cases:
            asked = ask(pool, b' {"model":"tiny","messages":[{"role":"user"}],' + limits + b"}")
            task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            given = json.loads(line.bodies[task.stream])
            assert {name: given[name] for name in given if name.startswith("max")} == seen
            assert (await asked).status_code == 200


async def test_an_empty_list_of_tools_is_left_out_and_nothing_else_changes(tmp_path: Path) -> None:
    tools = b'"tools":[],"tool_choice":"auto","parallel_tool_calls":true'
    sent = b'{"model":"tiny","messages":[{"role":"user"}],' + tools + b',"x":1.50}'
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, sent)
        task = await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        assert line.bodies[task.stream] == b'{"model":"tiny","messages":[{"role":"user"}],"x":1.50}'
        assert (await asked).status_code == 200


def test_a_client_with_little_patience_is_kept_alive_more_often() -> None:
    for patience_s, silence_s in ((None, 10), (600.0, 10), (6.0, 2), (0.1, 0.25)):
        assert Manner(patience_s=patience_s).third_s(10) == silence_s


def test_who_leaves_when_its_patience_is_over_will_ask_again_and_others_will_not() -> None:
    told = Manner(patience_s=20, tries=0, sdk=True)
    assert [told.lost_patience(waited_s) for waited_s in (0.5, 17.9, 18, 20, 22.9, 23.1, 40)] == [
        False, False, True, True, True, False, False,
    ]  # fmt: skip
    assert [Manner(patience_s=20, tries=tries).lost_patience(20) for tries in (None, 0, 1, 2)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert [Manner(patience_s=1, tries=0).lost_patience(waited_s) for waited_s in (0.7, 0.8, 2.2, 2.3)] == [
        False, True, True, False,
    ]  # fmt: skip
    untold = Manner(tries=0, sdk=True)
    assert [untold.lost_patience(waited_s) for waited_s in (20, 299, 300, 450, 601)] == [False, True, True, False, True]
    assert not Manner(tries=0).lost_patience(300)
    assert [untold.gave_up(waited_s) for waited_s in (300, 600)] == [False, True]
    assert [told.gave_up(waited_s) for waited_s in (19.9, 20)] == [False, True]
    assert Manner().gave_up(0), "nobody knows how long it waits"


def test_what_clients_say_of_themselves_is_read_and_nonsense_is_not() -> None:
    def said(**headers: str) -> Manner:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return manner(Call({"method": "POST", "path": "/v1/embeddings", "headers": raw}, never, never))

    assert said() == Manner()
    python = said(x_stainless_read_timeout="600.0", x_stainless_retry_count="1", user_agent="AsyncOpenAI/Python 3")
    assert python == Manner(patience_s=600, tries=1, sdk=True)
    assert said(x_stainless_timeout="30", user_agent="OpenAI/JS 7") == Manner(patience_s=30, sdk=True)
    assert said(x_rma_keepalive="1", idempotency_key="a-b") == Manner(keep_alive=True, name="a-b")
    for odd in ("", "nan", "-1", "0", "x", "1_0x"):
        assert said(x_stainless_read_timeout=odd, x_stainless_retry_count=odd or "x").patience_s is None
    for odd in ("-1", "1.5", "99999", "\u0661", "x"):
        assert said(x_stainless_retry_count=odd).tries is None


async def never(*_: object) -> Any:
    raise AssertionError("nothing is read or sent")
