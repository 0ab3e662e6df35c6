"""The whole life of a task, as an admin reads it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_core.commands.tasks import life
from tests.coordinator_fixtures import running, until

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


async def test_a_tasks_life_tells_who_had_it_when_and_what_became_of_that(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        first, second = await pool.enrol(), await pool.enrol()
        async with first.channel({"notes": 1}), second.channel({"notes": 1}):
            kind = {"content-type": "text/plain"}
            asked = asyncio.create_task(pool.client.post("/api/inference/notes", content="some text", headers=kind))
            await until(lambda: [task for task in pool.pool.dispatcher.tasks.values() if task.attempt])
            task = next(iter(pool.pool.dispatcher.tasks.values()))
            lost = task.attempt
            assert lost is not None
            pool.pool.dispatcher.accept(lost)
            pool.pool.dispatcher.fail(lost, "worker", "the machine caught fire")
            await until(lambda: task.attempt is not lost)
            shown = (await pool.client.get(f"/api/admin/tasks/{task.id}")).json()
            pool.pool.dispatcher.cancel(task, "enough")
            await asked
            ended = (await pool.client.get(f"/api/admin/tasks/{task.id}")).json()
    assert [one["worker_id"] for one in shown["attempts"]] == [lost.worker_id, task.attempts[1].worker_id]
    assert (shown["status"], shown["ended_s"], shown["body_bytes"]) == ("running", None, 9)
    told = "\n".join(life(shown))
    assert f"attempt 1 was offered to {lost.worker_id}" in told
    assert "attempt 1 failed: the machine caught fire" in told
    assert "attempt 2 was offered" in told
    assert "enough" in list(life(ended))[-1]


async def test_a_task_that_nobody_remembers_is_not_found(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        answer = await pool.client.get("/api/admin/tasks/task-00000000000000000000")
    assert answer.status_code == 404
    assert "remembered for a while" in answer.text


MOMENTS = ("offered_s", "started_s", "ended_s")
SECONDS = st.none() | st.floats(0, 1e6)


@given(st.lists(st.tuples(st.floats(0, 1e6), SECONDS, SECONDS), max_size=5), SECONDS)
def test_events_stand_in_the_order_of_their_time(times: list[tuple[Any, Any, Any]], ended: float | None) -> None:
    attempts = [
        {"attempt": number, "worker_id": "w", "status": "lost", "reason": ""} | dict(zip(MOMENTS, moments, strict=True))
        for number, moments in enumerate(times)
    ]  # fmt: skip
    task = {
        "task_id": "task-1", "service": "notes", "model": "", "priority": "low", "key": "key:1", "status": "failed",
        "created_at": "now", "body_bytes": 1, "answer_bytes": 0, "http_status": None, "reasons": ["why"],
        "attempts": attempts, "ended_s": ended, "deadline_s": 600.0,
    }  # fmt: skip
    seconds = [float(line.split()[0]) for line in list(life(task))[1:]]
    assert seconds == sorted(seconds)
