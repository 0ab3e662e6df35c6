"""Bytes of a month: what is counted for whom, what outlives a restart, and what happens when they are used up."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.traffic import POOL, Traffic, TrafficRecord, month_of
from rma_core.models import channel as frames
from tests.coordinator_fixtures import Running, running, until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from rma_coordinator.domain.traffic import Passed

JANUARY, FEBRUARY = (dt.datetime(2026, month, 1, tzinfo=dt.UTC).timestamp() for month in (1, 2))
DAY_S = 86_400.0


def of(passed: Passed) -> tuple[int, int]:
    return passed.requests, passed.answers


def written(traffic: Traffic) -> list[TrafficRecord]:
    return sorted(traffic.take()[0], key=lambda one: one.key)


# -- by itself ---------------------------------------------------------------------------------------------------------


@given(st.floats(0, 4e9))
def test_a_month_is_the_calendars_in_utc(now: float) -> None:
    moment = dt.datetime.fromtimestamp(now, dt.UTC)
    name, ends_at = month_of(now)
    assert name == f"{moment.year:04d}-{moment.month:02d}"
    last, first = (dt.datetime.fromtimestamp(ends_at + s, dt.UTC) for s in (-1, 0))
    assert (last.year, last.month) == (moment.year, moment.month)
    assert (first.day, first.hour, first.minute) == (1, 0, 0)


def test_a_new_month_begins_at_nothing_and_the_last_one_is_remembered() -> None:
    traffic = Traffic(now=JANUARY)
    traffic.answer("key:1", 10)
    traffic.tick(FEBRUARY - 1)
    assert (of(traffic.of("key:1")), of(traffic.of(POOL))) == ((0, 10), (0, 10))
    traffic.tick(FEBRUARY)
    assert (traffic.month, of(traffic.of("key:1")), of(traffic.of("key:1", "last"))) == ("2026-02", (0, 0), (0, 10))
    assert [one.month for one in written(traffic)] == ["2026-01", "2026-01"], "what was counted last is still written"


def test_a_clock_that_is_set_back_over_the_end_of_a_month_loses_nothing() -> None:
    traffic = Traffic(now=JANUARY)
    traffic.answer("key:1", 1)
    traffic.tick(FEBRUARY + DAY_S)
    traffic.answer("key:1", 2)
    traffic.tick(FEBRUARY - DAY_S)
    traffic.answer("key:1", 4)
    assert (traffic.month, of(traffic.of("key:1"))) == ("2026-01", (0, 5))
    traffic.tick(FEBRUARY)
    assert of(traffic.of("key:1")) == (0, 2)


def test_what_is_older_than_the_last_month_is_forgotten_in_memory_and_in_the_store() -> None:
    traffic = Traffic(now=JANUARY)
    traffic.restore([TrafficRecord(subject="key:1", month="2025-11", answer_bytes=5)])
    assert traffic.take() == ([], {"2025-11/key:1"})
    assert traffic.take() == ([], set())


def test_what_could_not_be_written_is_written_the_next_time() -> None:
    traffic = Traffic(now=JANUARY)
    traffic.answer("key:1", 1)
    records, gone = traffic.take()
    traffic.answer("key:1", 1)
    traffic.put_back(records, gone | {"2025-11/key:1"})
    again, left = traffic.take()
    assert {one.subject: one.answer_bytes for one in again} == {"key:1": 2, POOL: 2}
    assert left == {"2025-11/key:1"}


def test_a_pool_near_its_end_says_so_once_at_each_part(caplog: pytest.LogCaptureFixture) -> None:
    traffic = Traffic(most=100, now=JANUARY)
    with caplog.at_level(logging.WARNING):
        for size, lines in ((79, 0), (1, 1), (10, 1), (10, 2), (10, 2)):
            traffic.answer("key:1", size)
            traffic.tick(JANUARY)
            traffic.tick(JANUARY)
            assert len(caplog.records) == lines, size
    assert traffic.full
    assert [record.action for record in caplog.records] == ["traffic_high", "traffic_full"]  # type: ignore[attr-defined]
    again = Traffic(most=100, now=JANUARY)
    again.restore(written(traffic))
    again.tick(JANUARY)
    assert (again.full, len(caplog.records)) == (True, 2), "a restart is no news"
    again.tick(FEBRUARY)
    assert not again.full


# -- in a coordinator --------------------------------------------------------------------------------------------------


async def test_each_byte_is_counted_where_it_is_said_to_be(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        secret = await pool.make_key("infer:*")
        key = pool.bearer(secret)
        traffic = pool.pool.traffic
        (subject,) = [f"key:{one.key_id}" for one in pool.pool.keyring.all_keys() if one.scopes == ("infer:*",)]

        asked = asyncio.create_task(pool.client.post("/api/inference/notes", content=b"r" * 100, headers=key))
        await line.serve(b"a" * 1000)
        assert (await asked).content == b"a" * 1000
        assert [of(traffic.of(who)) for who in (subject, line.id, POOL)] == [(100, 1000)] * 3

        # Kept: it goes out when it is fetched, as often as that is.
        made = await pool.client.post(
            "/api/inference/notes", content=b"r" * 10, headers={**key, "Prefer": "respond-async"}
        )
        await line.serve(b"b" * 500)
        url = made.headers["location"]
        await pool.client.get(f"{url}?wait=10", headers=key)
        assert [of(traffic.of(who)) for who in (subject, line.id, POOL)] == [(110, 1000), (110, 1500), (110, 1000)]
        for times in (1, 2):
            assert (await pool.client.get(f"{url}/result", headers=key)).content == b"b" * 500
            assert of(traffic.of(subject)) == (110, 1000 + times * 500)
        assert of(traffic.of(POOL)) == (110, 2000)
        assert of(traffic.of(line.id)) == (110, 1500)


async def test_an_attempt_that_was_lost_counts_for_its_worker_and_no_answer_for_the_key(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as first:
        asked = asyncio.create_task(pool.infer(b"r" * 7))
        task = await first.task()
        await first.say(frames.Head(stream=task.stream, status=200, headers=(("content-length", "50"),)))
        await first.data(task.stream, b"x" * 20)
        traffic = pool.pool.traffic
        async with pool.worker() as second:
            await until(lambda: next(iter(pool.pool.hub.relays.values()))._received == 20)
            await first.say(frames.Error(stream=task.stream, fault="worker", reason="it broke"))
            await second.serve(b"y" * 30)
            assert (await asked).content == b"y" * 30
            assert of(traffic.of(first.id)) == (7, 20)
            assert of(traffic.of(second.id)) == (7, 30)
            assert of(traffic.of(POOL)) == (14, 30)


async def test_counts_outlive_a_restart_and_are_shown(tmp_path: Path) -> None:
    async with running(tmp_path, bytes_per_month=10**6) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"r" * 100))
        await line.serve(b"a" * 200)
        await asked
        worker_id, key = line.id, pool.key
    async with running(tmp_path, bytes_per_month=10**6) as pool:
        stats = (await pool.client.get("/api/admin/stats")).json()["traffic"]
        assert (stats["request_bytes"], stats["answer_bytes"], stats["limit_bytes"]) == (100, 200, 10**6)
        worker = (await pool.client.get(f"/api/admin/workers/{worker_id}")).json()["traffic"]
        assert (worker["request_bytes"], worker["answer_bytes"], worker["limit_bytes"]) == (100, 200, None)
        keys = (await pool.client.get("/api/admin/keys", headers=pool.bearer(key))).json()["keys"]
        assert sum(one["traffic"]["answer_bytes"] for one in keys) == 200


async def test_a_pool_that_has_passed_all_it_may_refuses_new_work_and_says_until_when(tmp_path: Path) -> None:
    async with running(tmp_path, bytes_per_month=100) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"r" * 60))
        await line.serve(b"a" * 40)
        assert (await asked).status_code == 200
        answers = [await pool.infer(b"x"), await pool.infer(b"x", headers={"Prefer": "respond-async"})]
        for answer in answers:
            problem = answer.json()
            assert (answer.status_code, problem["code"]) == (503, "pool_quota")
            assert "more may pass from" in problem["detail"]
            assert "UTC" in problem["detail"]
            left_s = month_of(pool.pool.wall())[1] - pool.pool.wall()
            assert abs(int(answer.headers["retry-after"]) - left_s) < 60


async def test_a_key_that_has_used_up_its_bytes_is_refused_and_another_is_not(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asked_for = {"kind": "client", "scopes": ["infer:*"], "bytes_per_month": 50}
        made = (await pool.client.post("/api/admin/keys", json=asked_for)).json()
        key = pool.bearer(made["key"])
        asked = asyncio.create_task(pool.client.post("/api/inference/notes", content=b"r" * 10, headers=key))
        await line.serve(b"a" * 40)
        assert (await asked).status_code == 200
        refused = await pool.client.post("/api/inference/notes", content=b"r", headers=key)
        assert (refused.status_code, refused.json()["code"]) == (429, "insufficient_quota")
        assert refused.headers["x-should-retry"] == "false"
        shown = next(one for one in (await _keys(pool)) if one["key_id"] == made["key_id"])
        assert (shown["bytes_per_month"], shown["traffic"]["answer_bytes"]) == (50, 40)
        other = asyncio.create_task(pool.infer(b"r"))
        await line.serve(b"a")
        assert (await other).status_code == 200


async def _keys(pool: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await pool.client.get("/api/admin/keys")).json()["keys"]
    return found


async def test_a_worker_that_has_passed_all_it_may_gets_nothing_new_and_the_reason_is_told(tmp_path: Path) -> None:
    async with running(tmp_path, worker_bytes_per_month=50) as pool, pool.worker() as line:
        beat = await line.machine.beat()
        assert beat.status_code == 200
        asked = asyncio.create_task(pool.infer(b"r" * 10))
        await line.serve(b"a" * 40)
        assert (await asked).status_code == 200
        pool.pool.sweep()
        refused = await pool.infer(b"r")
        assert refused.status_code == 503
        assert "used up their bytes of this month" in refused.json()["detail"]
        async with pool.worker() as other:
            again = asyncio.create_task(pool.infer(b"r"))
            await other.serve(b"a")
            assert (await again).headers["rma-worker"] == other.id
