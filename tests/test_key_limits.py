"""How much a key may ask for: the rules by themselves, and at the doors of a coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.api.limits import duration
from rma_coordinator.domain.limits import (
    ANSWER_TOKENS,
    MEDIA_TOKENS,
    MINUTE_S,
    MOST_DEBT_S,
    NONE,
    ROUNDING_S,
    Estimate,
    Limiter,
    Limits,
    Over,
    Reservation,
    counted,
    decide,
    estimate,
)
from rma_core.models import channel as frames
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus
from tests.coordinator_fixtures import entry, running, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from httpx2 import Response

    from tests.coordinator_fixtures import Line, Running

#: Of a request: so much may doubles that add up be off by.
SLACK = 0.01


# -- the rule ----------------------------------------------------------------------------------------------------------

MOMENTS = st.lists(st.floats(0, 400), min_size=1, max_size=60).map(sorted)


@given(st.integers(1, 200), MOMENTS)
def test_no_window_ever_holds_more_than_a_minutes_worth_and_what_came_back_meanwhile(
    limit: int, moments: list[float]
) -> None:
    limits, limiter = Limits(requests_per_minute=limit), Limiter()
    taken = [at for at in moments for _ in range(5) if limiter.admit("k", limits, at) is None]
    for first, begin in enumerate(taken):
        for last, end in enumerate(taken[first:], first):
            assert last - first + 1 <= limit + (end - begin) * limit / MINUTE_S + SLACK


@given(st.integers(1, 200), st.floats(0, 1e8))
def test_a_whole_minutes_worth_may_be_taken_at_once_and_one_more_after_its_time(limit: int, start: float) -> None:
    limits, limiter = Limits(requests_per_minute=limit), Limiter()
    assert all(limiter.admit("k", limits, start) is None for _ in range(limit))
    over = limiter.admit("k", limits, start)
    assert isinstance(over, Over)
    assert (over.what, over.limit) == ("requests", limit)
    assert over.retry_after_s == pytest.approx(MINUTE_S / limit, abs=2e-3)
    assert limiter.admit("k", limits, start + (over.retry_after_s or 0) + 1e-3) is None


@given(st.integers(1, 100), MOMENTS, st.floats(0, 1000))
def test_a_clock_that_goes_back_gives_nobody_anything(limit: int, moments: list[float], back: float) -> None:
    limits, limiter = Limits(requests_per_minute=limit), Limiter()
    for _ in range(limit):
        limiter.admit("k", limits, 1000.0)
    for moment in moments:
        assert isinstance(limiter.admit("k", limits, 1000.0 - back - moment), Over)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_who_is_not_early_may_take(full_at: float, now: float, limit: int, wanted: int) -> None:
    after, early_s = decide(full_at, now, limit=limit, wanted=wanted)
    assert after >= max(full_at, now)
    assert (early_s <= 0) == (after - now <= MINUTE_S + ROUNDING_S)


class Run(NamedTuple):
    """A request that takes some tokens: when it comes, what is reserved, what it needs, and when that is known."""

    at: float
    reserved: int
    needs: int
    ends: float


RUNS = st.lists(
    st.builds(
        lambda at, reserved, part, took: Run(at, reserved, int(reserved * part), at + took),
        st.floats(0, 300),
        st.integers(1, 100),
        st.floats(0, 1),
        st.floats(0, 200),
    ),
    max_size=25,
)


@given(RUNS)
def test_what_is_really_used_stays_within_the_limit_however_late_it_is_known(runs: list[Run]) -> None:
    limit = 100
    limits, limiter = Limits(tokens_per_minute=limit), Limiter()
    used: list[tuple[float, int]] = []
    open_runs: list[tuple[Run, Reservation]] = []
    for moment, run in sorted([(run.at, run) for run in runs]):
        for ended, reservation in sorted(open_runs, key=lambda one: one[0].ends):
            if ended.ends <= moment:
                reservation.settle(ended.needs, ended.ends)
                open_runs.remove((ended, reservation))
        found = limiter.admit("k", limits, moment, tokens=run.reserved)
        if isinstance(found, Reservation):
            open_runs.append((run, found))
            used.append((moment, run.needs))
    for first in range(len(used)):
        for last in range(first, len(used)):
            took = used[last][0] - used[first][0]
            total = sum(tokens for _, tokens in used[first : last + 1])
            assert total <= limit + took * limit / MINUTE_S + SLACK, used[first : last + 1]


def test_tokens_that_were_reserved_too_many_come_back_at_once() -> None:
    limits, limiter = Limits(tokens_per_minute=100), Limiter()
    reserved = limiter.admit("k", limits, 0.0, tokens=100)
    assert isinstance(reserved, Reservation)
    assert isinstance(limiter.admit("k", limits, 1.0, tokens=50), Over)
    reserved.settle(10, 1.0)
    assert isinstance(limiter.admit("k", limits, 1.0, tokens=90), Reservation)


def test_time_has_given_back_what_was_reserved_long_ago_and_nobody_gets_it_twice() -> None:
    limits, limiter = Limits(tokens_per_minute=60), Limiter()
    old = limiter.admit("k", limits, 0.0, tokens=60)
    assert isinstance(old, Reservation)
    assert isinstance(limiter.admit("k", limits, 100.0, tokens=60), Reservation)
    old.settle(0, 110.0)
    over = limiter.admit("k", limits, 110.0, tokens=20)
    assert isinstance(over, Over)


def test_a_longer_answer_than_was_reserved_delays_the_next_and_no_lie_of_a_worker_delays_it_for_ever() -> None:
    limits, limiter = Limits(tokens_per_minute=60), Limiter()
    reserved = limiter.admit("k", limits, 0.0, tokens=10)
    assert isinstance(reserved, Reservation)
    reserved.settle(90, 0.0)
    over = limiter.admit("k", limits, 0.0, tokens=10)
    assert isinstance(over, Over)
    assert over.retry_after_s == pytest.approx(40, abs=0.01)
    again = limiter.admit("k", limits, 41.0, tokens=10)
    assert isinstance(again, Reservation)
    again.settle(10**15, 41.0)
    late = limiter.admit("k", limits, 41.0, tokens=10)
    assert isinstance(late, Over)
    assert (late.retry_after_s or 0) <= MOST_DEBT_S + MINUTE_S


def test_what_one_rule_forbids_costs_nothing_by_the_other() -> None:
    limits, limiter = Limits(requests_per_minute=2, tokens_per_minute=100), Limiter()
    never = limiter.admit("k", limits, 0.0, tokens=101)
    assert isinstance(never, Over)
    assert (never.what, never.retry_after_s) == ("tokens", None)
    assert isinstance(limiter.admit("k", limits, 0.0, tokens=60), Reservation)
    assert isinstance(limiter.admit("k", limits, 0.0, tokens=60), Over)
    left = limiter.left("k", limits, 0.0)
    assert (left["requests"].remaining, left["tokens"].remaining) == (1, 40)
    assert left["requests"].reset_s == pytest.approx(30)
    assert left["tokens"].reset_s == pytest.approx(36)


def test_a_key_without_limits_leaves_no_trace_and_others_are_forgotten_when_there_are_too_many() -> None:
    limiter = Limiter(most=100)
    assert not NONE
    assert limiter.admit("k", NONE, 0.0, tokens=5) is None
    assert limiter.admit("k", Limits(tokens_per_minute=5), 0.0) is None
    assert not limiter._buckets
    limits = Limits(requests_per_minute=1)
    for number in range(1000):
        assert limiter.admit(f"k{number}", limits, number * 0.001) is None
        assert len(limiter._buckets) <= 100
    assert isinstance(limiter.admit("k999", limits, 1.0), Over), "who asked last is remembered"
    limiter.admit("late", limits, 1000.0)
    assert len(limiter._buckets) < 100, "whose minute is over makes room for others too"
    limiter.forget("late")
    assert limiter.admit("late", limits, 1000.0) is None


# -- estimates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({"messages": [{"role": "user", "content": "x" * 40}]}, Estimate(11, ANSWER_TOKENS)),
        ({"messages": [{"role": "user", "content": "x" * 36}], "max_tokens": 7}, Estimate(10, 7)),
        ({"messages": [], "max_tokens": 7, "max_completion_tokens": 9}, Estimate(0, 9)),
        ({"messages": [], "max_tokens": True}, Estimate(0, ANSWER_TOKENS)),
        ({"messages": [], "max_tokens": -1}, Estimate(0, ANSWER_TOKENS)),
        ({"messages": [], "max_tokens": "many"}, Estimate(0, ANSWER_TOKENS)),
        ({"prompt": "x" * 41}, Estimate(11, ANSWER_TOKENS)),
        ({"prompt": [1, 2, 3]}, Estimate(3, ANSWER_TOKENS)),
        ({"input": ["x" * 4, "y" * 4]}, Estimate(2, 0)),
        ({"messages": [], "tools": [{"name": "x" * 40}]}, Estimate(10, ANSWER_TOKENS)),
        ({"other": "x" * 400}, Estimate(0, ANSWER_TOKENS)),
    ],
)
def test_tokens_are_estimated_from_characters_and_from_what_the_request_allows(
    request_: dict[str, Any], expected: Estimate
) -> None:
    assert estimate(json.dumps(request_).encode()) == expected


def test_a_picture_is_not_its_base64() -> None:
    parts = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}},
    ]
    found = estimate(json.dumps({"messages": [{"role": "user", "content": parts}]}).encode())
    assert MEDIA_TOKENS <= found.prompt <= MEDIA_TOKENS + 20


@given(st.binary(max_size=300))
def test_whatever_a_body_is_it_has_an_estimate(body: bytes) -> None:
    found = estimate(body)
    assert found.prompt >= 0
    assert found.total < 2**63


def test_deep_nesting_is_estimated_by_its_length() -> None:
    body = b'{"messages": ' + b"[" * 100_000
    assert estimate(body).prompt == -(-len(body) // 4)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99}, 7),
        ({"prompt_tokens": 3}, 3),
        ({"total_tokens": 9.0}, 9),
        ({"prompt_tokens": -1, "completion_tokens": float("inf")}, None),
        ({"prompt_tokens": True}, None),
        ({}, None),
        (None, None),
        ("many", None),
    ],
)
def test_what_an_engine_says_it_used_is_believed_as_far_as_it_is_a_number(usage: object, tokens: int | None) -> None:
    assert counted(usage) == tokens


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (59.9991, "1m0s"), (360, "6m0s"), (3661.25, "1h1m1.25s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.floats(0, 1e7))
def test_a_duration_is_never_shorter_than_it_is(seconds: float) -> None:
    pattern = r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?"
    text = duration(seconds)
    if text.endswith("ms"):
        read = float(text[:-2]) / 1000
    else:
        found = re.fullmatch(pattern, text)
        assert found, text
        hours, minutes, rest = (float(part or 0) for part in found.groups())
        read = hours * 3600 + minutes * 60 + rest
    assert seconds - 1e-6 <= read <= seconds + 0.002


# -- at the doors ------------------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
JSON = (("content-type", "application/json"),)
SSE = (("content-type", "text/event-stream"),)


def reply(**usage: int) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return json.dumps({"id": "1", "choices": [choice], **({"usage": usage} if usage else {})}).encode()


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str, finish: str | None = None) -> bytes:
    return event({"id": "1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


class Limited:
    """A pool with one worker that has a model, and a client key with limits."""

    def __init__(self, pool: Running, line: Line, secret: str) -> None:
        self.pool, self.line, self.headers = pool, line, pool.bearer(secret)

    def chat(self, **fields: Any) -> asyncio.Task[Response]:
        content = json.dumps({"model": "tiny", "messages": HELLO, **fields})
        return asyncio.create_task(self.pool.client.post(CHAT, content=content, headers=self.headers))

    async def served(self, **usage: int) -> Response:
        """Ask, and let the worker answer."""
        asked = self.chat()
        await self.line.serve(reply(**usage), headers=JSON)
        return await asked


@contextlib.asynccontextmanager
async def limited(tmp_path: Path, **limits: int) -> AsyncIterator[Limited]:
    async with running(tmp_path) as pool:
        now = pool.clock._base()
        pool.clock._base = lambda: now  # what a limit leaves depends on the time that passes: only turn() makes it pass
        machine = await pool.enrol()
        body = {"kind": "client", "scopes": ["infer:*"], **limits}
        made = (await pool.client.post("/api/admin/keys", json=body)).json()
        assert {name: made[name] for name in limits} == limits
        async with machine.channel({"llm": 4}) as line:
            models = (ModelStatus(name="tiny", state="loaded", context=2048),)
            own = ContainerStatus(
                name="attached", service="llm", state="healthy", runtime=ATTACHED, slots=4, models=models
            )
            await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=(own,)), slots={"llm": 4}))
            await until(lambda: pool.pool.dispatcher.can_serve("llm", "tiny"))
            yield Limited(pool, line, made["key"])


def left(answer: Response) -> dict[str, str]:
    start = "x-ratelimit-"
    return {name.removeprefix(start): value for name, value in answer.headers.items() if name.startswith(start)}


def check_limit(answer: Response, code: str, *, status: int = 429) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (code, "rate_limit_error", None)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    return str(error["message"])


async def test_a_key_may_make_so_many_requests_and_every_answer_says_what_is_left(tmp_path: Path) -> None:
    async with limited(tmp_path, requests_per_minute=2) as one:
        first = await one.served(prompt_tokens=1, completion_tokens=1)
        assert left(first) == {"limit-requests": "2", "remaining-requests": "1", "reset-requests": _about(30)(first)}
        await one.served()
        refused = await one.chat()
        assert "2 requests a minute" in check_limit(refused, "rate_limit_exceeded")
        assert "x-should-retry" not in refused.headers
        assert left(refused)["remaining-requests"] == "0"
        for answer in (
            await one.pool.client.get("/v1/models", headers=one.headers),
            await one.pool.client.get("/v1/models/none", headers=one.headers),
            await one.pool.client.post(CHAT, content=b"{", headers=one.headers),
            await one.pool.client.get("/v1/models/tiny", headers=one.headers),
            await one.pool.client.post(CHAT, content=b"{}", headers={**one.headers, "RMA-Timeout": "x"}),
        ):
            assert left(answer)["limit-requests"] == "2", "whatever the answer is"
        one.pool.turn(31)
        assert (await one.served()).status_code == 200


def _about(seconds: float) -> Callable[[Response], str]:
    """Return what gives an answer's own words if they are a little less than so many seconds."""

    def check(answer: Response) -> str:
        text = answer.headers["x-ratelimit-reset-requests"]
        assert seconds - 5 < float(text.removesuffix("s")) <= seconds, text
        return str(text)

    return check


async def test_a_key_without_limits_hears_of_none(tmp_path: Path) -> None:
    async with limited(tmp_path) as one:
        assert left(await one.served()) == {}
        assert one.pool.pool.limiter._buckets == {}


async def test_tokens_are_reserved_at_admission_and_settled_by_what_the_engine_counted(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=1000) as one:
        asked = one.chat(max_tokens=900)
        task = await one.line.task()
        refused = await one.chat(max_tokens=200)
        assert "too few are left" in check_limit(refused, "rate_limit_exceeded")
        assert int(left(refused)["remaining-tokens"]) < 100
        await one.line.answer(task.stream, reply(prompt_tokens=5, completion_tokens=20), headers=JSON)
        answer = await asked
        assert int(left(answer)["remaining-tokens"]) >= 975
        assert (await one.pool.client.get("/v1/models", headers=one.headers)).headers["x-ratelimit-limit-tokens"]


async def test_a_request_that_could_never_be_within_the_limit_is_told_so(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=100) as one:
        answer = await one.chat(max_tokens=5000)
        assert "bound its answer with max_tokens" in answer.json()["error"]["message"]
        assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
        assert left(answer)["remaining-tokens"] == "100"


async def test_a_stream_is_settled_by_its_usage_and_one_without_by_what_was_delivered(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=1000) as one:
        usage = event({"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200}})
        for parts, used in (
            ((delta("hi"), delta("", "stop"), usage, b"data: [DONE]\n\n"), 200),
            ((delta("hello there"), delta("", "stop"), b"data: [DONE]\n\n"), 10),
        ):
            before = _remaining(one)
            asked = one.chat(stream=True)
            await one.line.serve(*parts, headers=SSE)
            answer = await asked
            assert answer.text.endswith("data: [DONE]\n\n")
            assert left(answer)["limit-tokens"] == "1000"
            assert abs(before - _remaining(one) - used) <= 10


def _remaining(one: Limited) -> int:
    pool = one.pool.pool
    (record,) = [key for key in pool.keyring.all_keys() if key.limits is not None]
    assert record.limits is not None
    return pool.limiter.left(f"key:{record.key_id}", record.limits, pool.clock())["tokens"].remaining


async def test_what_the_pool_failed_to_answer_costs_no_tokens_and_who_left_early_gets_none_back(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=1000) as one:
        asked = one.chat(max_tokens=500)
        task = await one.line.task()
        await one.line.say(frames.Error(stream=task.stream, fault="worker", reason="it broke"))
        failed = await asked
        assert (failed.status_code, left(failed)["remaining-tokens"]) == (502, "1000")
        refused = one.chat(max_tokens=500)
        await one.line.serve(b'{"error": {"message": "no"}}', status=400, headers=JSON)
        assert (await refused).status_code == 400
        assert _remaining(one) == 1000
        gone = one.chat(max_tokens=500)
        await one.line.task()
        gone.cancel()
        await asyncio.wait([gone])
        await until(lambda: not one.pool.pool.dispatcher.tasks)
        assert _remaining(one) < 600


async def test_a_key_whose_bytes_are_used_up_is_told_that_no_retry_helps(tmp_path: Path) -> None:
    async with limited(tmp_path, bytes_per_month=10) as one:
        assert (await one.served()).status_code == 200
        answer = await one.chat()
        assert "bytes of this month" in check_limit(answer, "insufficient_quota")
        assert answer.headers["x-should-retry"] == "false"


async def test_requests_to_services_count_like_those_to_models(tmp_path: Path) -> None:
    async with limited(tmp_path, requests_per_minute=1) as one, one.pool.worker() as line:
        asked = asyncio.create_task(one.pool.infer(b"x", headers=one.headers))
        await line.serve(b"y")
        assert (await asked).status_code == 200
        for more in ({}, {"Prefer": "respond-async"}, {"Idempotency-Key": "k"}):
            answer = await one.pool.infer(b"x", headers={**one.headers, **more})
            assert (answer.status_code, answer.json()["code"]) == (429, "rate_limit_exceeded")
            assert 55 <= int(answer.headers["retry-after"]) <= 60
        check_limit(await one.chat(), "rate_limit_exceeded")


async def test_of_many_requests_at_once_exactly_as_many_pass_as_may(tmp_path: Path) -> None:
    async with limited(tmp_path, requests_per_minute=30) as one:
        tasks = [one.chat() for _ in range(100)]
        serving = asyncio.create_task(_serve_all(one.line))
        codes = [(await task).status_code for task in tasks]
        serving.cancel()
        assert (codes.count(200), codes.count(429)) == (30, 70)


async def test_a_service_of_models_is_metered_by_what_its_worker_counted(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=1000) as one:
        one.pool.pool.catalog["llm"] = entry("llm")
        path, body = "/api/inference/llm", json.dumps({"prompt": "hello", "max_tokens": 600})
        for more in ({}, {"Prefer": "respond-async"}):
            headers = {**one.headers, **more}
            asked = asyncio.create_task(one.pool.client.post(path, content=body, headers=headers))
            task = await one.line.task()
            refused = await one.pool.client.post(path, content=body, headers=headers)
            assert (refused.status_code, refused.json()["code"]) == (429, "rate_limit_exceeded")
            await one.line.say(frames.Head(stream=task.stream, status=200))
            usage = {"prompt_tokens": 2.0, "completion_tokens": 10.0}
            await one.line.say(frames.End(stream=task.stream, usage=usage))
            assert (await asked).status_code in (200, 202)
            await until(lambda: not one.pool.pool.dispatcher.tasks)
            assert _remaining(one) > 950
            assert one.pool.pool.reserved == {}
        one.pool.pool.settings = msgspec.structs.replace(one.pool.pool.settings, memory_body_bytes=10)
        large = await one.pool.client.post(path, content="x" * 5000, headers=one.headers)
        assert "about 1506 tokens" in large.json()["detail"]


async def test_a_full_queue_gives_back_what_was_reserved(tmp_path: Path) -> None:
    async with limited(tmp_path, tokens_per_minute=1000) as one:
        one.pool.pool.catalog["llm"] = entry("llm")
        one.pool.pool.dispatcher._max_queued = 0
        for more in ({}, {"Prefer": "respond-async"}):
            headers = {**one.headers, **more}
            answer = await one.pool.client.post("/api/inference/llm", content="{}", headers=headers)
            assert answer.json()["code"] == "queue_full"
            assert (_remaining(one), one.pool.pool.reserved) == (1000, {})


async def _serve_all(line: Line) -> None:
    while True:
        await line.serve(reply(), headers=JSON)


async def test_a_revoked_keys_state_is_forgotten_and_limits_are_listed(tmp_path: Path) -> None:
    async with limited(tmp_path, requests_per_minute=5, tokens_per_minute=500) as one:
        await one.served()
        keys = (await one.pool.client.get("/api/admin/keys")).json()["keys"]
        (made,) = [key for key in keys if key["tokens_per_minute"]]
        assert (made["requests_per_minute"], made["tokens_per_minute"], made["bytes_per_month"]) == (5, 500, None)
        await one.pool.client.delete(f"/api/admin/keys/{made['key_id']}")
        assert one.pool.pool.limiter._buckets == {}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "many", 2**60])
async def test_a_limit_is_a_whole_number_and_at_least_one(tmp_path: Path, wrong: object) -> None:
    async with running(tmp_path) as pool:
        for name in ("requests_per_minute", "tokens_per_minute", "bytes_per_month"):
            answer = await pool.client.post("/api/admin/keys", json={name: wrong})
            assert (answer.status_code, answer.json()["errors"][0]["where"]) == (400, f"$.{name}")
