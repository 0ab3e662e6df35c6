"""/v1 as plain HTTP: pages of other origins, OPTIONS and HEAD, and connections that are used as HTTP/1.1 allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.api.browsers import EXPOSED
from rma_coordinator.api.v1.calls import MAX_BODY_BYTES
from tests.coordinator_fixtures import Running, connected, running
from tests.openai_kit import CHAT, END, HELLO, JSON, REPLY, SSE, ask, delta, pool_with, stream

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

PAGE = {"origin": "https://app.example"}
ASKS = {
    **PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


def permissions(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


async def test_no_page_may_read_anything_unless_the_admin_names_its_origin(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, line):
        asked = ask(pool, headers=PAGE)
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        for answer in (
            await asked,
            await pool.client.get("/v1/models", headers=PAGE),
            await pool.client.request("OPTIONS", CHAT, headers=ASKS),
        ):
            assert answer.status_code in (200, 204)
            assert permissions(answer.headers) == {}


async def test_a_page_of_a_named_origin_may_ask_first_and_read_every_header_that_explains(tmp_path: Path) -> None:
    async with pool_with(tmp_path, cors_origins=["https://App.example/"]) as (pool, line):
        first = await pool.client.request("OPTIONS", CHAT, headers={**ASKS, "authorization": ""})
        assert (first.status_code, first.content) == (204, b"")
        assert permissions(first.headers) == {
            "access-control-allow-origin": "https://app.example",
            "access-control-allow-methods": "OPTIONS, POST",
            "access-control-allow-headers": "authorization,content-type,x-stainless-lang",
            "access-control-max-age": "600",
            "access-control-expose-headers": ", ".join(EXPOSED),
        }
        asked = [ask(pool, headers=PAGE), stream(pool, headers=PAGE)]
        await line.serve(json.dumps(REPLY).encode(), headers=JSON)
        await line.serve(delta("a"), delta(finish="stop"), END, headers=SSE)
        answers = [
            await asked[0],
            await asked[1],
            await pool.client.get("/v1/models", headers=PAGE),
            await ask(pool, model="gone", messages=HELLO, headers=PAGE),
            await pool.client.get("/v1/nothing", headers=PAGE),
            await pool.client.get("/v1/models", headers={**PAGE, "authorization": ""}),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 404, 404, 401]
        for answer in answers:
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert answer.headers["vary"] == "origin"
            assert "access-control-allow-credentials" not in answer.headers, "a key counts, and never a cookie"
        ours = {name for answer in answers for name in answer.headers if name.startswith(("x-r", "rma-", "openai-"))}
        assert ours <= set(EXPOSED), "a page reads no header that is not named"


async def test_another_origin_stays_outside_and_a_star_lets_in_any_page_but_only_below_v1(tmp_path: Path) -> None:
    async with running(tmp_path / "a", cors_origins=["https://app.example"]) as pool:
        for origin in ("https://app.example.evil.example", "http://app.example", "null", ""):
            answer = await pool.client.request("OPTIONS", CHAT, headers={**ASKS, "origin": origin})
            assert permissions(answer.headers) == {}, origin
    async with running(tmp_path / "b", cors_origins=["*"]) as pool:
        answer = await pool.client.get("/v1/models", headers={"origin": "null"})
        assert answer.headers["access-control-allow-origin"] == "*"
        for path in ("/health", "/api/admin/workers", "/v2/models"):
            assert permissions((await pool.client.get(path, headers=PAGE)).headers) == {}
        odd = {**ASKS, "access-control-request-headers": "x\ty", "access-control-request-private-network": "true"}
        answer = await pool.client.request("OPTIONS", "/v1/models/org/name", headers=odd)
        assert answer.headers["access-control-allow-headers"].startswith("authorization, ")
        assert answer.headers["access-control-allow-private-network"] == "true"
        assert answer.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS"


async def test_options_says_what_an_address_takes_and_head_is_a_get_without_its_body(tmp_path: Path) -> None:
    async with pool_with(tmp_path) as (pool, _):
        for path, takes in ((CHAT, "OPTIONS, POST"), ("/v1/models", "GET, HEAD, OPTIONS")):
            answer = await pool.client.request("OPTIONS", path, headers={"authorization": ""})
            assert (answer.status_code, answer.headers["allow"]) == (204, takes)
        assert (await pool.client.request("OPTIONS", "/v1/nothing")).status_code == 404
        for path, status in (("/v1/models", 200), ("/v1/models/tiny", 200), ("/v1/models/gone", 404), (CHAT, 405)):
            head, full = await pool.client.head(path), await pool.client.get(path)
            assert (head.status_code, head.content) == (status, b"")
            assert head.headers["content-type"] == "application/json"
            assert head.headers["content-length"] == full.headers["content-length"]


def written(pool: Running, length: int, *more: str) -> bytes:
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "host: x",
        f"authorization: Bearer {pool.key}",
        f"content-length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def answered(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one response that says its length."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0)))


async def test_one_connection_carries_one_request_after_another(tmp_path: Path) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO}).encode()
    async with pool_with(tmp_path) as (pool, line), connected(pool.port) as (reader, writer):
        for content, status in ((body, 200), (b"{", 400), (body, 200)):
            writer.write(written(pool, len(content)) + content)
            if status == 200:
                await line.serve(json.dumps(REPLY).encode(), headers=JSON)
            assert (await answered(reader))[0] == status


@pytest.mark.parametrize("length", [100, MAX_BODY_BYTES + 1], ids=["small", "too large"])
async def test_a_client_that_waits_to_be_told_to_go_on_is_told_or_refused(tmp_path: Path, length: int) -> None:
    async with pool_with(tmp_path) as (pool, _), connected(pool.port) as (reader, writer):
        writer.write(written(pool, length, "expect: 100-continue"))
        status, _, content = await answered(reader)
        if length == 100:
            assert status == 100
            writer.write(b"{" + b" " * 99)
            assert (await answered(reader))[0] == 400
        else:
            if status == 100:
                # Hypercorn's says it by itself, for it cannot know what will be refused.
                status, _, content = await answered(reader)
            assert status == 413, "before any of it was sent"
            assert json.loads(content)["error"]["code"] == "request_too_large"
