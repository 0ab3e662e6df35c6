"""Durable tasks: kept before they are acknowledged, ended once, found again after a restart, late answers included."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator.books import Books
from rma_coordinator.domain.records import LedgerEntry, TaskRecord
from rma_coordinator.domain.tasks import LEASE_S
from rma_coordinator.ledger import entries_of
from rma_coordinator.spool import Body
from rma_coordinator.store import SqliteStore, StoreFailed
from rma_core.models import channel as frames
from tests.coordinator_fixtures import Running, StandIn, running, soon, until

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from httpx2 import Response

    from rma_coordinator.store import Change

ASYNC = {"Prefer": "respond-async"}
JSON_HEAD = (("content-type", "application/json"),)


async def submit(pool: Running, content: bytes = b"text", **headers: str) -> dict[str, Any]:
    answer = await pool.infer(content, headers={**ASYNC, **headers})
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/api/inference/tasks/{found['task_id']}"
    return found


async def ask(pool: Running, task_id: str, *, wait: float = 0) -> dict[str, Any]:
    answer = await pool.client.get(f"/api/inference/tasks/{task_id}?wait={wait}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ledger(pool: Running) -> list[LedgerEntry]:
    await pool.pool.books.write()
    return await entries_of(pool.pool.store)


async def test_an_asynchronous_task_is_acknowledged_run_and_its_result_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        made = await submit(pool, b"the request")
        assert made["status"] == "queued"
        async with pool.worker() as line:
            task = await line.task()
            assert line.bodies[task.stream] == b"the request"
            assert (await ask(pool, made["task_id"]))["status"] == "running"
            await line.answer(task.stream, b'{"title": "x"}', headers=JSON_HEAD)
            found = await ask(pool, made["task_id"], wait=10)
            assert (found["status"], found["result"]) == ("succeeded", {"title": "x"})
            whole = await pool.client.get(found["result_url"])
            assert (whole.status_code, whole.content) == (200, b'{"title": "x"}')
            assert (whole.headers["rma-worker"], whole.headers["x-content-type-options"]) == (line.id, "nosniff")
            entries = await ledger(pool)
            assert [(e.task_id, e.worker_id, e.bytes_in) for e in entries] == [(made["task_id"], line.id, 11)]


async def test_a_large_request_and_a_large_answer_outlive_the_process(tmp_path: Path) -> None:
    body, answer = b"b" * 300_000, b"a" * 900_000
    async with running(tmp_path) as pool:
        made = await submit(pool, body)
    async with running(tmp_path) as pool, pool.worker() as line:
        task = await line.task()
        url = f"{task.offer.body_url}?attempt={task.offer.attempt}&lease_id={task.offer.lease_id}"
        assert (await pool.client.get(url, headers=line.machine.headers)).content == body
        assert (await line.machine.result(task.offer, answer)).status_code == 200
        assert (await ask(pool, made["task_id"], wait=10))["status"] == "succeeded"
    async with running(tmp_path) as pool:
        assert (await pool.client.get(f"/api/inference/tasks/{made['task_id']}/result")).content == answer


async def test_a_body_that_a_crash_left_of_an_ended_task_goes_at_the_next_start(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool, b"b" * 300_000)
        await line.machine.result((await line.task()).offer, b"a" * 900_000)
        assert (await ask(pool, made["task_id"], wait=10))["status"] == "succeeded"
    body, answer = (tmp_path / "spool" / name for name in (made["task_id"], f"{made['task_id']}.answer"))
    body.write_bytes(b"left")
    async with running(tmp_path):
        assert (body.exists(), answer.exists()) == (False, True)


async def test_a_task_that_ran_when_the_coordinator_died_goes_on_with_the_worker_that_still_has_it(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        made = await submit(pool)
        async with machine.channel({"notes": 1}) as line:
            task = await line.task()
            await until(lambda: pool.pool.dispatcher.running)
            await pool.pool.books.write()
            ref = line.ref(task)
    async with running(tmp_path) as pool:
        machine = StandIn(pool, machine.key, machine.answer)
        assert (await ask(pool, made["task_id"]))["status"] == "running"
        async with machine.channel({"notes": 1}, attempts=(ref,)) as line:
            await line.answer(task.stream, b'"kept"', headers=JSON_HEAD)
            found = await ask(pool, made["task_id"], wait=10)
    assert (found["status"], found["result"], len(found["attempts"])) == ("succeeded", "kept", 1)


async def test_attempts_that_a_worker_no_longer_has_after_a_restart_are_free_at_once_and_numbers_only_grow(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        made = await submit(pool)
        async with machine.channel({"notes": 1}) as line:
            await line.task()
            await pool.pool.books.write()
    async with running(tmp_path) as pool:
        machine = StandIn(pool, machine.key, machine.answer)
        async with machine.channel({"notes": 1}) as line:
            task = await line.serve(b'"again"', headers=JSON_HEAD)
            found = await ask(pool, made["task_id"], wait=10)
    assert (task.offer.attempt, found["status"]) == (11, "succeeded")
    assert [a["status"] for a in found["attempts"]] == ["lost", "succeeded"]


async def test_a_worker_that_polls_keeps_its_task_over_a_restart_by_listing_it(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        kept, lost = await submit(pool, b"1"), await submit(pool, b"2")
        assert (await machine.beat()).status_code == 200
        answer = await machine.poll(most=2)
        offers = {offer["task_id"]: offer for offer in answer.json()["tasks"]}
        refs = [_ref(offer) for offer in offers.values()]
        await machine.beat(*refs)
        await pool.pool.books.write()
    async with running(tmp_path) as pool:
        machine = StandIn(pool, machine.key, machine.answer)
        again = await machine.beat(_ref(offers[kept["task_id"]]))
        assert again.json().get("cancel", []) == []
        assert (await ask(pool, lost["task_id"]))["status"] == "queued"
        offer = offers[kept["task_id"]]
        done = await machine.result(_offer(offer), b"kept")
        assert done.json() == {"status": "succeeded"}
        assert (await ask(pool, kept["task_id"], wait=10))["status"] == "succeeded"


def _offer(data: dict[str, Any]) -> Any:
    import msgspec

    from rma_core.models.worker import TaskOffer

    return msgspec.convert(data, TaskOffer)


def _ref(data: dict[str, Any]) -> Any:
    from rma_core.models.worker import AttemptRef

    return AttemptRef(task_id=data["task_id"], attempt=data["attempt"], lease_id=data["lease_id"])


async def late_and_rival(pool: Running, late: StandIn) -> tuple[dict[str, Any], frames.Task]:
    """Let a worker with a task stay away until the task is lost to it; it has more room than any other."""
    async with late.channel({"notes": 8}) as line:
        made = await submit(pool)
        task = await line.task()
        line.ws.transport.abort()
    await until(lambda: late.id not in pool.pool.hub.sinks)
    pool.turn(12)
    return made, task


async def test_an_outdated_attempt_may_still_deliver_while_nothing_final_is_known(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        late = await pool.enrol()
        async with pool.worker() as other:
            made, task = await late_and_rival(pool, late)
            second = await other.task()
            assert second.offer.attempt == 2
            done = await late.result(task.offer, b'"late"')
            assert done.json() == {"status": "succeeded"}
            cancel = await other.frame(frames.Cancel)
            assert (cancel.stream, cancel.reason) == (second.stream, "an earlier attempt has delivered after all")
            found = await ask(pool, made["task_id"], wait=10)
            assert [a["status"] for a in found["attempts"]] == ["succeeded", "cancelled"]
            again = await late.result(task.offer, b'"late"')
            assert again.json() == {"status": "succeeded"}, "the answer to the first may have been lost"
            assert [(e.attempt, e.worker_id) for e in await ledger(pool)] == [(1, late.id)]


async def test_a_late_answer_is_refused_once_another_has_ended_the_task(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        late = await pool.enrol()
        async with pool.worker() as other:
            made, task = await late_and_rival(pool, late)
            await other.serve(b'"first"', headers=JSON_HEAD)
            assert (await ask(pool, made["task_id"], wait=10))["result"] == "first"
            refused = await late.result(task.offer, b'"late"')
            assert refused.status_code == 404
            assert [e.worker_id for e in await ledger(pool)] == [other.id]


async def test_a_late_answer_that_breaks_off_costs_the_later_attempt_nothing(tmp_path: Path) -> None:
    async def breaking() -> Any:
        yield b"half"
        raise RuntimeError("broken off")

    async with running(tmp_path) as pool:
        late = await pool.enrol()
        async with pool.worker() as other:
            made, task = await late_and_rival(pool, late)
            second = await other.task()
            with pytest.raises(RuntimeError):
                await late.result(task.offer, breaking())
            await other.answer(second.stream, b'"second"', headers=JSON_HEAD)
            assert (await ask(pool, made["task_id"], wait=10))["result"] == "second"


async def test_a_late_answer_that_is_not_as_long_as_it_says_costs_the_later_attempt_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        late = await pool.enrol()
        async with pool.worker() as other:
            made, task = await late_and_rival(pool, late)
            second = await other.task()
            wrong = await late.complete(
                task.offer, http_status=200, body=b"short", headers=(("content-length", "500"),)
            )
            assert wrong.status_code == 400
            await other.answer(second.stream, b'"second"', headers=JSON_HEAD)
            assert (await ask(pool, made["task_id"], wait=10))["result"] == "second"


async def test_a_task_whose_commit_was_given_up_is_undone_once_that_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given_up = SqliteStore.commit, True

    async def commit(self: SqliteStore, changes: Any, *, urgent: bool = False) -> None:
        nonlocal given_up
        changes = list(changes)
        await real(self, changes, urgent=urgent)
        if given_up and any(type(getattr(change, "record", None)) is TaskRecord for change in changes):
            given_up = False
            raise StoreFailed("the disk did not answer; it is not known what it has kept")

    monkeypatch.setattr(SqliteStore, "commit", commit)
    async with running(tmp_path) as pool:
        refused = await pool.infer(b"text", headers={**ASYNC, "Idempotency-Key": "k1"})
        assert refused.status_code == 503
        await until(lambda: not pool.pool.books._closing)
        again = (await pool.infer(b"text", headers={**ASYNC, "Idempotency-Key": "k1"})).json()
    async with running(tmp_path) as pool:
        assert list(pool.pool.dispatcher.tasks) == [again["task_id"]]


async def test_a_worker_that_comes_back_while_its_task_waits_takes_it_up_again(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        late = await pool.enrol()
        async with pool.worker(slots=1) as other:
            await submit(pool)
            busy = await other.task()
            made, task = await late_and_rival(pool, late)
            await other.say(frames.Progress(stream=busy.stream))
            assert (await ask(pool, made["task_id"]))["status"] == "queued"
            async with late.channel({"notes": 1}, attempts=(other.ref(task),)) as line:
                await line.answer(task.stream, b'"first"', headers=JSON_HEAD)
                found = await ask(pool, made["task_id"], wait=10)
    assert (found["status"], found["result"]) == ("succeeded", "first")


async def test_a_task_is_cancelled_once_and_its_worker_told(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool)
        task = await line.task()
        url = f"/api/inference/tasks/{made['task_id']}"
        answers = [await pool.client.delete(url) for _ in range(2)]
        assert [(a.status_code, a.json()["status"]) for a in answers] == [(200, "cancelled")] * 2
        assert (await line.frame(frames.Cancel)).stream == task.stream
        ended = await submit(pool)
        await line.serve(b"1", headers=JSON_HEAD)
        await ask(pool, ended["task_id"], wait=10)
        refused = await pool.client.delete(f"/api/inference/tasks/{ended['task_id']}")
        assert (refused.status_code, refused.json()["code"]) == (409, "refused")
        assert len(await ledger(pool)) == 1


async def test_tasks_belong_to_the_key_that_made_them(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        made = await submit(pool)
        stranger = pool.bearer(await pool.make_key("infer:*"))
        url = f"/api/inference/tasks/{made['task_id']}"
        for method, path in (("GET", url), ("DELETE", url), ("GET", f"{url}/result")):
            assert (await pool.client.request(method, path, headers=stranger)).status_code == 404
        early = await pool.client.get(f"{url}/result")
        assert (early.status_code, early.json()["code"]) == (409, "not_finished")


async def test_an_answer_that_is_an_error_of_the_service_is_a_failed_task_with_that_answer(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool)
        await line.serve(b'{"detail": "no such page"}', status=422, headers=JSON_HEAD)
        found = await ask(pool, made["task_id"], wait=10)
        assert (found["status"], found["http_status"], found["error"]) == ("failed", 422, {"detail": "no such page"})


async def test_a_failed_task_has_every_reason(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool)
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="service", reason="out of memory"))
        found = await ask(pool, made["task_id"], wait=10)
        assert found["status"] == "failed"
        assert f"{line.id}: out of memory" in found["error"]["message"]


# -- Idempotency-Key ---------------------------------------------------------------------------------------------


def keyed(pool: Running, key: str, content: bytes = b"text", **headers: str) -> asyncio.Task[Response]:
    return asyncio.create_task(pool.infer(content, headers={"Idempotency-Key": key, **headers}))


async def test_a_request_under_an_idempotency_key_is_done_once_and_answered_again(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        first = keyed(pool, "k1")
        await line.serve(b'"done"', headers=JSON_HEAD)
        answers = [await soon(first), await soon(keyed(pool, "k1"))]
        assert [(a.status_code, a.text) for a in answers] == [(200, '"done"')] * 2
        assert [a.headers.get("idempotency-replayed") for a in answers] == [None, "true"]
        assert answers[0].headers["rma-task-id"] == answers[1].headers["rma-task-id"]
        assert len(await ledger(pool)) == 1
    async with running(tmp_path) as pool:
        again = await soon(keyed(pool, "k1", Prefer="respond-async"))
        assert again.json()["task_id"] != answers[0].headers["rma-task-id"], "another key's keys are none of this one's"


async def test_the_same_key_with_another_request_is_refused_and_one_that_runs_is_a_conflict(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        first = keyed(pool, "k1")
        task = await line.task()
        running_still = await soon(keyed(pool, "k1"))
        assert (running_still.status_code, running_still.json()["code"]) == (409, "still_running")
        assert running_still.headers["location"].endswith(task.offer.task_id)
        other = await soon(keyed(pool, "k1", b"something else"))
        assert (other.status_code, other.json()["code"]) == (409, "refused")
        await line.answer(task.stream, b"1", headers=JSON_HEAD)
        assert (await soon(first)).text == "1"


async def test_of_equal_requests_at_the_same_time_only_one_makes_a_task(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        answers = await asyncio.gather(*[keyed(pool, "k1", Prefer="respond-async") for _ in range(8)])
        assert {a.status_code for a in answers} == {202}
        assert len({a.json()["task_id"] for a in answers}) == 1


async def test_a_client_that_leaves_finds_its_answer_under_its_key(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        first = keyed(pool, "k1")
        task = await line.task()
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        await line.answer(task.stream, b'"done"', headers=JSON_HEAD)
        await until(lambda: not pool.pool.dispatcher.tasks)
        assert (await soon(keyed(pool, "k1"))).text == '"done"'


@pytest.mark.parametrize("key", ["", "with space", "ü", "x" * 256])
async def test_a_key_that_is_none_is_refused(tmp_path: Path, key: str) -> None:
    async with running(tmp_path) as pool:
        answer = await pool.infer(headers=[("Idempotency-Key", key.encode())])
        assert answer.status_code == 400


# -- bounds ------------------------------------------------------------------------------------------------------


async def test_finished_tasks_are_kept_for_their_time_and_up_to_their_number(tmp_path: Path) -> None:
    async with running(tmp_path, kept_tasks=2, result_ttl_s=100) as pool, pool.worker() as line:
        made = []
        for _ in range(3):
            made.append(await submit(pool))
            await line.serve(b"1", headers=JSON_HEAD)
            await ask(pool, made[-1]["task_id"], wait=10)
        await until(lambda: len(pool.pool.books._kept) == 2)
        codes = [(await pool.client.get(f"/api/inference/tasks/{m['task_id']}")).status_code for m in made]
        assert codes == [404, 200, 200]
        pool.turn(101)
        pool.pool.books._work.set()
        await until(lambda: not pool.pool.books._kept)


async def test_an_answer_too_large_to_keep_fails_the_task_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, max_result_bytes=1024) as pool, pool.worker() as line:
        made = await submit(pool)
        task = await line.task()
        await line.machine.result(task.offer, b"x" * 5000)
        found = await ask(pool, made["task_id"], wait=10)
        assert found["status"] == "failed"
        assert "larger than the 1024 bytes" in found["error"]["message"]


async def test_a_credit_counts_once_it_is_on_disk_and_no_answer_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        worker, store, writes = pool.pool.fleet.get(line.id), pool.pool.store, asyncio.Event()
        commit = store.commit

        async def slow(changes: Iterable[Change], *, urgent: bool = False) -> None:
            await writes.wait()
            await commit(changes, urgent=urgent)

        monkeypatch.setattr(store, "commit", slow)
        asking = asyncio.create_task(pool.infer())
        await line.serve(b"1")
        assert (await soon(asking)).status_code == 200
        assert (worker.completed, pool.pool.books.ledger.completed()[line.id]) == (0, 0)
        writes.set()
        await until(lambda: worker.completed == 1)
        assert [entry.worker_id for entry in await entries_of(store)] == [line.id]


async def test_the_ledger_has_every_task_once_and_older_entries_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rma_coordinator.ledger.LEDGER_ROWS", 5)
    async with running(tmp_path) as pool, pool.worker(slots=8) as line:
        for _ in range(23):
            asking = asyncio.create_task(pool.infer())
            await line.serve(b"1")
            await soon(asking)
        await until(lambda: pool.pool.books.ledger.completed()[line.id] == 23)
        # Fewer than ten stay on their own, and which, depends on how many are written together.
        await until(lambda: sum(total.tasks for total in pool.pool.books.ledger.totals.values()) > 23 - 10)
        worker = line.id
    async with running(tmp_path) as pool:
        assert pool.pool.fleet.get(worker).completed == 23
        assert len(await entries_of(pool.pool.store)) < 10


async def test_an_end_that_cannot_be_written_is_not_known_before_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool)
        task = await line.task()
        await pool.pool.books.write()
        real, failing = SqliteStore.commit, True

        async def commit(self: SqliteStore, changes: Any, *, urgent: bool = False) -> None:
            if failing:
                raise StoreFailed("the disk has gone")
            await real(self, changes, urgent=urgent)

        monkeypatch.setattr(SqliteStore, "commit", commit)
        await line.answer(task.stream, b'"done"', headers=JSON_HEAD)
        await until(lambda: pool.pool.dispatcher.tasks[made["task_id"]].closing)
        assert (await ask(pool, made["task_id"]))["status"] == "running"
        pool.turn(LEASE_S * 2)
        failing = False
        assert (await ask(pool, made["task_id"], wait=10))["result"] == "done"


async def test_an_answer_whose_task_is_cancelled_while_it_is_put_away_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = await submit(pool)
        task = await line.task()
        sync = Body.sync

        async def cancelled_meanwhile(self: Body) -> None:
            await sync(self)
            pool.pool.dispatcher.cancel(pool.pool.dispatcher.tasks[made["task_id"]], "its client cancelled it")
            await until(lambda: pool.pool.books._closing)
            await asyncio.sleep(0)

        monkeypatch.setattr(Body, "sync", cancelled_meanwhile)
        await line.answer(task.stream, b'"done"', headers=JSON_HEAD)
        assert (await ask(pool, made["task_id"], wait=10))["status"] == "cancelled"
        await until(lambda: (pool.pool.spools.memory_used, pool.pool.spools.disk_used) == (0, 0))
        assert await ledger(pool) == []


async def test_a_client_whose_task_cannot_be_ended_in_time_is_not_told_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, async_timeout_s=0.5) as pool, pool.worker() as line:
        asking = keyed(pool, "k1")
        task = await line.task()
        written = asyncio.Event()
        insist = Books._insist

        async def slow(self: Books, changes: Any) -> None:
            await written.wait()
            await insist(self, changes)

        monkeypatch.setattr(Books, "_insist", slow)
        await line.answer(task.stream, b'"done"', headers=JSON_HEAD)
        answer = await soon(asking)
        assert (answer.status_code, answer.json()["code"]) == (409, "still_running")
        assert answer.headers["location"].endswith(task.offer.task_id)
        written.set()
        assert (await ask(pool, task.offer.task_id, wait=10))["result"] == "done"
