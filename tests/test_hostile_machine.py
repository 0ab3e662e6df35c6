"""The coordinator's machine fails it: disk full, read-only or damaged, clock set wrong, no file descriptors left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from rma_coordinator import app as application
from rma_coordinator.server import connections_for
from rma_core.agent.keys import DeviceKey
from tests import coordinator_fixtures
from tests.coordinator_fixtures import PATIENCE_S, Running, TurnedClock, running, soon, until
from tests.coordinator_process import coordinating, starting
from tests.needs import need
from tests.store_kit import disk_of, read_only, small_store

if TYPE_CHECKING:
    from pathlib import Path

DAY_S = 86_400.0
ASYNC = {"Prefer": "respond-async"}
JSON_HEAD = (("content-type", "application/json"),)


def fill(folder: Path) -> Path:
    """Take all the space there is; return the file that has it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return path


async def submit(pool: Running, content: bytes = b"x") -> str:
    answer = await pool.infer(content, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


async def ended(pool: Running, task_id: str) -> dict[str, Any]:
    answer = await pool.client.get(f"/api/inference/tasks/{task_id}?wait=14")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refused(pool: Running) -> bool:
    """Try to submit; say whether it was refused, as it must be, if not taken."""
    answer = await pool.infer(b"y" * 3000, headers=ASYNC)
    if answer.status_code == 202:
        return False
    assert answer.status_code == 503, answer.text
    body = answer.json()
    assert "disk" in body["detail"] or "full" in body["detail"], body
    assert body["hints"]
    assert int(answer.headers["retry-after"]) > 0
    return True


async def until_refused(pool: Running) -> list[str]:
    """Submit until that is refused; return what was acknowledged before."""
    taken: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await pool.infer(b"z" * 3000, headers=ASYNC)
            if answer.status_code != 202:
                assert answer.status_code == 503, answer.text
                return taken
            taken.append(answer.json()["task_id"])


async def test_a_full_disk_refuses_new_work_loses_none_and_ends_without_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need("mount")
    caplog.set_level("INFO")
    with disk_of(tmp_path / "disk", "48m") as home:
        store = small_store(home / "coordinator.db", check_every_s=0.2)
        async with running(home, store=store) as pool:
            machine = await pool.enrol()
            async with machine.channel({"notes": 1}) as line:
                stream = asyncio.create_task(pool.infer(b"a stream"))
                first = await line.task()
                queued = [await submit(pool, b"%d" % number) for number in range(5)]
                filler = fill(home)
                queued += await until_refused(pool)
                health = (await pool.client.get("/health")).json()
                assert (health["status"], health["reason"]) == (
                    "degraded",
                    "no new work is taken: the coordinator's disk is full",
                )
                admin = (await pool.client.get("/api/admin/health")).json()
                assert (admin["status"], admin["store_state"]) == ("degraded", "full")
                assert "full" in admin["reason"]
                assert admin["hints"]
                # What runs goes on, answers that wait for nobody included.
                await line.answer(first.stream, b"streamed on")
                assert (await soon(stream)).text == "streamed on"
                second = await line.serve(b'"done"', headers=JSON_HEAD)
                assert await refused(pool)
                filler.unlink()
                await until(lambda: pool.pool.store.state.ok)
                for _ in queued[1:]:
                    await line.serve(b'"done"', headers=JSON_HEAD)
                found = [await ended(pool, task_id) for task_id in queued]
                assert {one["status"] for one in found} == {"succeeded"}
                assert second.offer.task_id == queued[0]
                assert (await pool.client.get("/health")).json()["status"] == "ok"
                assert await ended(pool, await _served(pool, line))
        ill = [r for r in caplog.records if getattr(r, "action", "") == "store_ill"]
        well = [r for r in caplog.records if getattr(r, "action", "") == "store_well"]
        assert (len(ill), len(well)) == (1, 1), [r.getMessage() for r in ill + well]
        assert "Traceback" not in caplog.text


async def _served(pool: Running, line: coordinator_fixtures.Line) -> str:
    task_id = await submit(pool)
    await line.serve(b'"new"', headers=JSON_HEAD)
    return task_id


async def test_a_body_that_does_not_fit_on_the_disk_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    need("mount")
    with disk_of(tmp_path / "disk", "24m") as home:
        async with running(home, store=small_store(home / "coordinator.db", check_every_s=0.2)) as pool, pool.worker():
            for headers in ({}, ASYNC):
                answer = await pool.infer(os.urandom(30 << 20), headers=headers)
                assert answer.status_code == 503, answer.text
                assert "disk" in answer.json()["detail"]
            assert pool.pool.spools.disk_used == 0
            assert not [path for path in (home / "spool").glob("*") if path.stat().st_size]
            await until(lambda: pool.pool.store.state.ok)
            assert (await pool.infer(b"small", headers=ASYNC)).status_code == 202


async def test_a_disk_that_turns_read_only_refuses_new_work_until_it_can_be_written_again(tmp_path: Path) -> None:
    need("mount")
    home = tmp_path / "home"
    home.mkdir()
    async with (
        running(home, store=small_store(home / "coordinator.db", check_every_s=0.2)) as pool,
        pool.worker() as line,
    ):
        kept = await submit(pool)
        task = await line.task()
        with read_only(home):
            # An open file of a bind mount can still be written; what is made anew cannot.
            answer = await pool.infer(b"x" * 1_000_000, headers=ASYNC)
            assert answer.status_code == 503, answer.text
            assert "cannot be used" in answer.json()["detail"]
            assert (await pool.client.get("/health")).status_code == 200
        await line.answer(task.stream, b'"done"', headers=JSON_HEAD)
        assert (await ended(pool, kept))["status"] == "succeeded"
        assert (await pool.infer(b"x" * 1_000_000, headers=ASYNC)).status_code == 202


# -- the start ---------------------------------------------------------------------------------------------------


def started(home: Path) -> tuple[int, str]:
    """Start a coordinator that cannot; return its exit code and what it said."""
    with starting(home) as coordinator:
        return coordinator.ended(within_s=60), coordinator.said.text


def test_a_damaged_database_ends_the_start_with_what_to_do(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with starting(home) as coordinator:
        coordinator.ready()
    database = home / "coordinator.db"
    for damage in (b"this is no database" * 500, b"\0" * 8192, database.read_bytes()[:100] + os.urandom(60_000)):
        database.write_bytes(damage)
        before = database.read_bytes()
        code, said = started(home)
        assert code == 1, said
        assert "damaged" in said
        assert "→" in said
        assert database.read_bytes() == before


def test_a_database_that_cannot_be_written_ends_the_start_with_what_to_do(tmp_path: Path) -> None:
    need("mount")
    home = tmp_path / "home"
    with starting(home) as coordinator:
        coordinator.ready()
    with read_only(home):
        code, said = started(home)
    assert code in (1, 2), said
    assert "read-only" in said.lower() or "cannot be written" in said
    assert "→" in said


def test_a_disk_with_too_little_space_ends_the_start_with_what_to_do(tmp_path: Path) -> None:
    need("mount")
    with disk_of(tmp_path / "disk", "20m") as home:
        code, said = started(home)
    assert code == 1, said
    assert "MiB free" in said
    assert "→" in said


async def test_a_database_that_is_damaged_while_running_is_said_and_what_runs_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "coordinator.db"
    async with running(tmp_path, store=small_store(database)) as pool, pool.worker(slots=4) as line:
        made = []
        # More than SQLite keeps in memory, so that it must read what was damaged.
        for _ in range(160):
            made.append(await submit(pool))
            await line.serve(*[os.urandom(10_000)] * 6)
        stream = asyncio.create_task(pool.infer(b"a stream"))
        task = await line.task()
        await until(lambda: database.stat().st_size > 2_000_000)
        with database.open("r+b") as file:
            file.seek(8192)
            file.write(os.urandom(database.stat().st_size - 8192))
        statuses = [(await pool.client.get(f"/api/inference/tasks/{task_id}/result")).status_code for task_id in made]
        assert set(statuses) <= {200, 503}, statuses
        assert 503 in statuses
        answer = await pool.infer(b"x", headers=ASYNC)
        assert answer.status_code == 503, answer.text
        assert "damaged" in answer.json()["detail"]
        assert (await pool.client.get("/health")).json()["status"] == "degraded"
        found = (await pool.client.get("/api/admin/health")).json()
        assert found["store_state"] == "damaged"
        assert "put a" in " ".join(found["hints"])
        await line.answer(task.stream, b"streamed on")
        assert (await soon(stream)).text == "streamed on"
    assert "Traceback" not in caplog.text


# -- file descriptors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "descriptors", "given"), [(12_000, 20_000, 12_000), (12_000, 1024, 768), (50, 64, 32), (50, 0, 50)]
)
def test_connections_leave_descriptors_for_the_rest(wanted: int, descriptors: int, given: int) -> None:
    assert connections_for(wanted, descriptors) == given


async def test_used_up_descriptors_cost_new_connections_only_and_end_without_a_restart(tmp_path: Path) -> None:
    before = ["prlimit", "--nofile=96:96"]
    async with coordinating(tmp_path / "home", before=before) as (coordinator, client):
        assert coordinator.process.rlimit(resource.RLIMIT_NOFILE) == (96, 96)
        coordinator.log(r"96 file descriptors are enough for 48 connections")
        answer = await client.get("/health")
        assert answer.status_code == 200
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                one = stack.enter_context(contextlib.closing(socket.socket()))
                one.settimeout(PATIENCE_S)
                with contextlib.suppress(OSError):
                    one.connect(("127.0.0.1", coordinator.port))
            # The connection that was there goes on, files and all.
            for _ in range(3):
                body = os.urandom(600_000)
                made = await client.post("/api/inference/notes", content=body, headers=ASYNC)
                assert made.status_code in (202, 503), made.text
            assert (await client.get("/health")).json()["status"] == "ok"
            coordinator.log(r"connections are open, as many as there may be")
        await until(lambda: _reachable(coordinator.port))
        async with coordinator.client() as other:
            assert (await other.get("/health")).status_code == 200
        assert coordinator.said.text.count("as many as there may be") <= 2
        assert len(coordinator.said.lines) < 30, coordinator.said.text


def _reachable(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as one:
        one.settimeout(5)
        one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return one.recv(100).startswith(b"HTTP/1.1 200")
    return False


async def test_the_soft_limit_is_raised_to_the_hard_one_at_the_start(tmp_path: Path) -> None:
    before = ["prlimit", "--nofile=128:4096"]
    async with coordinating(tmp_path / "home", before=before) as (coordinator, client):
        assert coordinator.process.rlimit(resource.RLIMIT_NOFILE) == (4096, 4096)
        assert (await client.get("/health")).status_code == 200


# -- clocks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> TurnedClock:
    """The wall clock of every coordinator that the test starts."""
    turned = TurnedClock(time.time)
    made = application.create_app
    monkeypatch.setattr(coordinator_fixtures, "create_app", lambda *a, **k: made(*a, **{**k, "wall": turned}))
    return turned


@pytest.mark.parametrize("step_s", [-DAY_S, DAY_S], ids=["a day back", "a day ahead"])
async def test_a_clock_that_steps_a_day_loses_nothing_and_throws_nobody_out(
    tmp_path: Path, wall: TurnedClock, step_s: float
) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        async with machine.channel({"notes": 4}) as line:
            running_id = await submit(pool, b"1")
            task = await line.task()
            done_id = await submit(pool, b"2")
            await line.serve(b'"2"', headers=JSON_HEAD)
            assert (await ended(pool, done_id))["status"] == "succeeded"
            key = {"Idempotency-Key": "k1"}
            first = asyncio.create_task(pool.infer(b"3", headers=key))
            await line.serve(b'"3"', headers=JSON_HEAD)
            assert (await soon(first)).status_code == 200
            nonce = (await pool.client.get("/api/worker/nonce")).json()["nonce"]
            lasting, _ = await pool.pool.create_key(kind="client", label="long", scopes=("infer:*",), ttl_s=90 * DAY_S)
            wall.ahead_s += step_s
            pool.pool.dispatcher.tick()
            pool.pool.sweep()
            await pool.pool.books._expire()
            # Nobody was thrown out: the worker is there, its task runs, its channel carries it.
            workers = (await pool.client.get("/api/admin/workers", headers=pool.bearer(await _key(pool)))).json()
            assert [w["status"] for w in workers["workers"]] == ["healthy"]
            assert pool.pool.nonces.spend(nonce)
            await line.answer(task.stream, b'"1"', headers=JSON_HEAD)
            pool.client.headers["Authorization"] = f"Bearer {await _key(pool)}"
            await until(lambda: not pool.pool.dispatcher.tasks)
            # The answers are kept for those who made the tasks; an idempotency key still means its task.
            for task_id in (running_id, done_id):
                assert (await ended(pool, task_id))["status"] == "succeeded"
            assert (await pool.infer(b"4", headers=pool.bearer(lasting) | ASYNC)).status_code == 202
            assert (await pool.client.get("/api/admin/stats")).json()["uptime_s"] >= 0
        # A machine whose token ran out by the step gets another, and can come back.
        token = await _token(pool, machine.key, machine.id)
        machine.token = token
        assert (await machine.beat()).status_code == 200
        # New machines can join, by what they sign with clocks of their own.
        assert (await pool.enrol(DeviceKey.generate())).id
    async with running(tmp_path) as pool:
        pool.client.headers["Authorization"] = f"Bearer {await _key(pool)}"
        assert len(pool.pool.dispatcher.tasks) == 1
        found = await ended(pool, running_id)
        assert step_s > 0 or found["status"] == "succeeded"


async def _key(pool: Running) -> str:
    from rma_coordinator.domain.credentials import SCOPES

    return await pool.make_key(*SCOPES, kind="admin")


async def _token(pool: Running, key: DeviceKey, worker_id: str) -> str:
    nonce = (await pool.client.get("/api/worker/nonce")).json()
    assertion = key.assertion(issuer=nonce["issuer"], nonce=nonce["nonce"], worker_id=worker_id)
    answer = await pool.client.post("/api/worker/token", json={"assertion": assertion})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["access_token"])
