"""A client's own deadline, answers that explain themselves, and requests that nobody could ever serve."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.placement import could_run
from rma_coordinator.domain.worker_records import WorkerRecord
from rma_core import Capabilities, Needs
from rma_core.commands import run
from rma_core.commands.tasks import life
from rma_core.models import channel as frames
from rma_core.models.hardware import HardwareReport
from rma_core.models.worker import ATTACHED, ContainerStatus, Heartbeat, ModelStatus, RuntimeReport
from tests.coordinator_fixtures import entry, running, until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rma_core.catalog import CatalogEntry
    from tests.coordinator_fixtures import Line, Running

ASYNC = {"Prefer": "respond-async"}
JSON_HEAD = (("content-type", "application/json"),)


async def began(pool: Running, task: frames.Task) -> None:
    """Wait until the coordinator knows that a worker has begun."""
    await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].attempts[-1].started_at)


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_after_the_clients_deadline_a_request_that_waits_ends_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=1) as line:
        first = asyncio.create_task(pool.infer(b"1"))
        task = await line.task()
        await began(pool, task)
        second = asyncio.create_task(pool.infer(b"2", headers={"RMA-Timeout": "20"}))
        await until(lambda: pool.pool.dispatcher.queued)
        pool.turn(19)
        assert not second.done()
        pool.turn(2)
        answer = await second
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline")
        assert "no worker was free within 20 s" in answer.json()["detail"]
        await line.answer(task.stream, b"x")
        assert (await first).status_code == 200


async def test_the_deadline_goes_to_the_worker_which_is_told_to_stop_after_it(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"x", headers={"RMA-Timeout": "12.5"}))
        task = await line.task()
        assert 11 < task.offer.total_s <= 12.5
        assert task.offer.first_byte_s <= 12.5
        await began(pool, task)
        pool.turn(13)
        answer = await asked
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline")
        assert answer.headers["rma-worker"] == line.id
        assert (await line.frame(frames.Cancel)).stream == task.stream


async def test_a_longer_deadline_than_the_services_own_is_the_services(tmp_path: Path) -> None:
    async with running(tmp_path, task_timeout_s=30.0, async_timeout_s=100.0) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"x", headers={"RMA-Timeout": "1e9"}))
        task = await line.task()
        assert task.offer.total_s <= 30
        await line.answer(task.stream, b"y")
        await asked
        await pool.infer(b"x", headers={"RMA-Timeout": "5000", **ASYNC})
        assert 30 < (await line.task()).offer.total_s <= 100


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "soon", "", "1,5", "0x10"])
async def test_what_is_no_number_of_seconds_is_refused(tmp_path: Path, text: str) -> None:
    async with running(tmp_path) as pool:
        for path in ("/api/inference/notes", "/v1/chat/completions", "/v1/embeddings"):
            answer = await pool.client.post(path, content=b"{}", headers={"RMA-Timeout": text})
            assert answer.status_code == 400
            assert "RMA-Timeout" in answer.text


async def test_a_kept_task_has_its_deadline_too_and_says_so_after_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        made = (await pool.infer(b"x", headers={"RMA-Timeout": "20", **ASYNC})).json()
        assert made["deadline_at"] is not None
        pool.turn(21)
        url = f"/api/inference/tasks/{made['task_id']}"
        found = (await pool.client.get(f"{url}?wait=10")).json()
        assert (found["status"], found["error"]["code"]) == ("failed", "deadline")
        assert "no worker was free within 20 s" in found["error"]["message"]
        key = pool.key
    async with running(tmp_path) as pool:
        headers = pool.bearer(key)
        again = (await pool.client.get(url, headers=headers)).json()
        assert again == found
        late = await pool.client.get(f"{url}/result", headers=headers)
        assert (late.status_code, late.json()["code"]) == (504, "deadline")


async def attach(pool: Running, line: Line, state: Any = "loaded") -> None:
    models = (ModelStatus(name="tiny", state=state),)
    own = ContainerStatus(name="attached", service="llm", state="healthy", runtime=ATTACHED, slots=2, models=models)
    await line.say(frames.Beat(beat=Heartbeat(worker_id=line.id, containers=(own,)), slots={"llm": 2}))
    await until(lambda: pool.pool.dispatcher.can_serve("llm", "tiny"))


async def test_a_model_has_the_deadline_as_well_and_sdks_are_told_not_to_try_again(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(service="llm") as line:
        await attach(pool, line)
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]})
        asked = asyncio.create_task(
            pool.client.post("/v1/chat/completions", content=body, headers={"RMA-Timeout": "15"})
        )
        task = await line.task()
        assert task.offer.total_s <= 15
        await began(pool, task)
        pool.turn(16)
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
        assert "within 15 s" in answer.json()["error"]["message"]


async def test_from_a_shell_a_request_has_a_deadline_and_a_webhook_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, webhook_http=True) as pool:
        made = (await pool.client.post("/api/admin/keys", json={"scopes": ["infer:*"]})).json()
        admin = ("--coordinator", pool.url, "--key", pool.key)
        code = await asyncio.to_thread(run, ["keys", "webhook-secret", made["key_id"], *admin])
        assert (code, capfd.readouterr().out[:6]) == (0, "whsec_")
        words = ["infer", "notes", "text", "--coordinator", pool.url, "--key", made["key"], "--timeout", "7.5"]
        assert await asyncio.to_thread(run, [*words, "--webhook", "http://hooks.example/"]) == 2
        assert "--webhook goes with --detach" in capfd.readouterr().err
        assert await asyncio.to_thread(run, [*words, "--detach", "--webhook", "http://hooks.example/"]) == 0
        task = pool.pool.dispatcher.tasks[capfd.readouterr().out.strip()]
        assert task.deadline - task.created_at == pytest.approx(7.5)
        assert task.webhook == "http://hooks.example/"
        assert await asyncio.to_thread(run, [*words[:-1], "0"]) == 2
        pool.pool.dispatcher.cancel(task, "enough")
        listed = ("keys", *admin)
        limits = ("--client", "--requests-per-minute", "5", "--bytes-per-month", "2GB")
        assert await asyncio.to_thread(run, ["keys", "create", *limits, *admin]) == 0
        assert await asyncio.to_thread(run, [*listed]) == 0
        assert "5 requests" in (told := capfd.readouterr().out)
        assert "0 bytes of 2 GB" in told
        for wrong in ("0", "-1", "much", "2 apples"):
            assert await asyncio.to_thread(run, ["keys", "create", "--bytes-per-month", wrong, *admin]) == 2


# -- answers that explain themselves -----------------------------------------------------------------------------------


def timings(headers: Mapping[str, str]) -> dict[str, float]:
    """Return what Server-Timing says, in milliseconds."""
    found = dict(part.split(";dur=") for part in headers["server-timing"].split(", "))
    return {name: float(text) for name, text in found.items()}


async def test_a_whole_answer_says_who_gave_it_and_how_long_what_took(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(slots=1) as line:
        busy = asyncio.create_task(pool.infer(b"1"))
        task = await line.task()
        await began(pool, task)
        asked = asyncio.create_task(pool.infer(b"2"))
        await until(lambda: pool.pool.dispatcher.queued)
        pool.turn(3)
        await line.answer(task.stream, b"x")
        await busy
        task = await line.task()
        await began(pool, task)
        pool.turn(2)
        await line.say(frames.Head(stream=task.stream, status=200, headers=(("content-length", "1"),)))
        await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].attempts[-1].first_byte_at)
        pool.turn(1)
        await line.data(task.stream, b"y")
        await line.say(frames.End(stream=task.stream))
        answer = await asked
        took = timings(answer.headers)
        # Beside the turned clock, real time passes too.
        assert 3000 <= took["queue"] <= took["first-byte"] - 1990
        assert 5000 <= took["first-byte"] <= took["total"] - 990
        assert took["total"] >= 6000
        assert (answer.headers["rma-worker"], answer.headers["rma-attempt"]) == (line.id, "1")
        assert re.fullmatch("task-[0-9a-z]{20}", answer.headers["rma-task-id"])
        assert "rma-model-state" not in answer.headers


async def test_a_streamed_answer_says_what_is_known_when_it_begins(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"1"))
        task = await line.task()
        await line.say(frames.Head(stream=task.stream, status=200, headers=(("content-type", "text/plain"),)))
        await line.data(task.stream, b"begins")
        await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].committed)
        await line.say(frames.End(stream=task.stream))
        assert set(timings((await asked).headers)) == {"queue", "first-byte"}


async def test_a_failure_and_a_kept_answer_explain_themselves_too(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        asked = asyncio.create_task(pool.infer(b"1"))
        task = await line.task()
        await line.say(frames.Error(stream=task.stream, fault="request", reason="no"))
        failed = await asked
        assert (failed.status_code, failed.headers["rma-worker"]) == (400, line.id)
        assert set(timings(failed.headers)) == {"queue", "total"}
        made = await pool.infer(b"1", headers=ASYNC)
        await line.serve(b"{}", headers=JSON_HEAD)
        found = (await pool.client.get(f"{made.headers['location']}?wait=10")).json()
        assert set(found["seconds"]) == {"queue", "first_byte", "total"}
        assert 0 <= found["seconds"]["queue"] <= found["seconds"]["first_byte"] <= found["seconds"]["total"]
        (one,) = found["attempts"]
        assert 0 <= one["offered_s"] <= one["started_s"] <= one["first_byte_s"] <= one["ended_s"]
        assert one["answer_bytes"] == 2
        kept = await pool.client.get(f"{made.headers['location']}/result")
        took = timings(kept.headers)
        assert took["total"] == pytest.approx(found["seconds"]["total"] * 1000, abs=0.1)
        assert kept.headers["rma-worker"] == line.id


async def test_whether_the_model_was_cold_is_what_it_was_when_the_attempt_began(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker(service="llm") as line:
        await attach(pool, line, "cold")
        body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]})
        asked = asyncio.create_task(pool.client.post("/v1/chat/completions", content=body))
        task = await line.task()
        await until(lambda: pool.pool.dispatcher.tasks[task.offer.task_id].attempts[0].model_state)
        await attach(pool, line, "loaded")
        await line.answer(task.stream, b'{"choices": []}', headers=JSON_HEAD)
        await asked
        shown = (await pool.client.get(f"/api/admin/tasks/{task.offer.task_id}")).json()
    assert shown["attempts"][0]["model_state"] == "cold"
    told = list(life(shown))
    assert any(line.endswith("attempt 1 began, its model cold") for line in told)
    assert any(line.endswith("attempt 1: its answer began") for line in told)
    assert "to be done within 600 s" in told[1]


async def test_the_whole_life_of_a_kept_task_outlives_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        made = (await pool.infer(b"1", headers=ASYNC)).json()
        await line.serve(b"{}", headers=JSON_HEAD)
        await pool.client.get(f"/api/inference/tasks/{made['task_id']}?wait=10")
        before = (await pool.client.get(f"/api/admin/tasks/{made['task_id']}")).json()
    async with running(tmp_path) as pool:
        after = (await pool.client.get(f"/api/admin/tasks/{made['task_id']}")).json()
    assert set(after) == set(before)
    assert len(after["attempts"]) == 1
    for shown, then in ((before, after), (before["attempts"][0], after["attempts"][0])):
        for name, value in shown.items():
            if name not in ("attempts", "expected"):
                assert then[name] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value), name


# -- what nobody could ever do -----------------------------------------------------------------------------------------


def change(pool: Running, changed: CatalogEntry) -> None:
    """Have the pool's catalog say something else of a service."""
    now = pool.pool.arranging.now
    entries = (changed, *(one for one in now.entries if one.service != changed.service))
    pool.pool.arranging.now = now._replace(entries=entries, catalog={**now.catalog, changed.service: changed})


async def test_a_service_that_no_machine_could_run_is_refused_at_once_and_one_that_nobody_runs_now_is_not(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as pool:
        huge = msgspec.structs.replace(entry("ocr"), needs=Needs(cpu_cores=4, memory="4TB"))
        change(pool, huge)
        empty = await pool.infer(b"x", path="ocr")
        assert (empty.status_code, empty.json()["code"]) == (503, "try_later"), "whoever joins may be able to"
        async with pool.worker():
            for more in ({}, ASYNC, {"Idempotency-Key": "k"}):
                answer = await pool.infer(b"x", path="ocr", headers=more)
                assert (answer.status_code, answer.json()["code"]) == (501, "impossible")
                assert "no machine of this pool could ever run ocr: needs 4 TiB of memory" in answer.json()["detail"]
                assert "retry-after" not in answer.headers
        change(pool, msgspec.structs.replace(huge, needs=Needs(cpu_cores=4)))
        async with pool.worker(services=("notes",)):
            later = await pool.infer(b"x", path="ocr")
            assert (later.status_code, later.json()["code"]) == (503, "try_later")
            assert later.headers["retry-after"]


async def test_after_a_restart_nobody_is_called_unable_before_he_has_spoken(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker():
        pass
    async with running(tmp_path) as pool:
        change(pool, msgspec.structs.replace(entry("ocr"), needs=Needs(memory="4TB")))
        assert (await pool.infer(b"x", path="ocr")).status_code == 503


async def test_what_an_owner_attached_stands_outside_of_what_a_machine_could_run(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        change(pool, msgspec.structs.replace(entry("llm"), needs=Needs(memory="4TB")))
        async with pool.worker(service="llm") as line:
            assert pool.pool.impossible(pool.pool.catalog["llm"])
            await attach(pool, line)
            assert not pool.pool.impossible(pool.pool.catalog["llm"])
            pool.pool.dispatcher.seats[line.id].usable = False
            assert not pool.pool.impossible(pool.pool.catalog["llm"])


def machine(**facts: Any) -> WorkerRecord:
    report = HardwareReport(capabilities=Capabilities(cpu_cores=8, ram="32GB", storage="200GB"))
    known = {"tier": 2, "report": report, **facts}
    return WorkerRecord(worker_id="worker-00000000", thumbprint="t", public_key="k", registered_at=0.0, **known)


@given(st.lists(st.sampled_from(["healthy", "unhealthy", "undetected"]), max_size=3), st.booleans())
def test_an_engine_that_is_down_may_come_back_and_one_that_is_not_there_may_not(
    states: list[Any], isolated: bool
) -> None:
    runtimes = tuple(RuntimeReport(name=f"r{n}", isolated=isolated, state=state) for n, state in enumerate(states))
    could = could_run([entry("notes")], machine(runtimes=runtimes))
    known = [one for one in states if one != "undetected"]
    assert ("notes" in could) == (not states or (bool(known) and isolated))


def test_a_machine_below_every_tier_could_run_nothing() -> None:
    assert could_run([entry("notes")], machine()) == {"notes"}
    assert could_run([entry("notes")], machine(tier=None)) == frozenset()


async def test_a_body_that_is_larger_than_the_service_takes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async with running(tmp_path) as pool, pool.worker() as line:
        pool.pool.catalog["notes"] = msgspec.structs.replace(pool.pool.catalog["notes"], max_body_bytes=100)

        async def endless() -> Any:
            for _ in range(50):
                yield b"x" * 10

        for more in ({}, ASYNC):
            answer = await pool.infer(b"x" * 101, headers=more)
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
            assert "at most 100 bytes" in answer.json()["detail"]
            streamed = await pool.client.post("/api/inference/notes", content=endless(), headers=more)
            assert streamed.status_code == 413
        asked = asyncio.create_task(pool.infer(b"x" * 100))
        await line.serve(b"y")
        assert (await asked).status_code == 200
