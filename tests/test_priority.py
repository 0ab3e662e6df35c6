"""How urgent a request is: what its client asks for, and what its key may."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.coordinator_fixtures import running, until

if TYPE_CHECKING:
    from pathlib import Path

    from rma_coordinator.domain.tasks import Task
    from tests.coordinator_fixtures import Running

BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]})


async def asked(pool: Running, path: str, body: str, **headers: str) -> Task:
    """Return the task that a request became, which is still there: nobody works in this pool."""
    answer = await pool.client.post(path, content=body, headers={"prefer": "respond-async", **headers})
    assert answer.status_code == 202, answer.text
    return pool.pool.dispatcher.find(answer.json()["task_id"])


async def test_a_request_is_as_urgent_as_it_asks_for_and_its_key_may(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        client = pool.bearer(await pool.make_key("infer:*"))
        urgent = pool.bearer(await pool.make_key("infer:*", "priority:high"))
        notes = "/api/inference/notes"
        assert (await asked(pool, notes, "text", **client)).priority == "normal"
        assert (await asked(pool, notes, "text", **client, **{"rma-priority": "low"})).priority == "low"
        assert (await asked(pool, notes, "text", **client, **{"rma-priority": "high"})).priority == "normal"
        assert (await asked(pool, notes, "text", **urgent, **{"rma-priority": "High"})).priority == "high"


async def test_a_priority_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        for path in ("/api/inference/notes", "/v1/chat/completions"):
            answer = await pool.client.post(path, content=BODY, headers={"rma-priority": "now"})
            assert answer.status_code == 400
            assert "high, normal, low" in answer.text


async def test_the_priority_of_an_acknowledged_request_outlives_the_coordinator(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        headers = pool.bearer(await pool.make_key("infer:*"))
        kept = await asked(pool, "/api/inference/notes", "text", **headers, **{"rma-priority": "low"})
    async with running(tmp_path) as pool:
        await until(lambda: kept.id in pool.pool.dispatcher.tasks)
        assert pool.pool.dispatcher.find(kept.id).priority == "low"
