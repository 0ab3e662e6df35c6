"""Clients under /v1 that leave: their tasks end at once, in every phase."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rma_core.models import channel as frames
from tests.coordinator_fixtures import until
from tests.openai_kit import JSON, SSE, ask, delta, pool_with, stream

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("phase", ["queued", "leased", "answering"])
async def test_a_client_that_leaves_ends_its_task_at_once(tmp_path: Path, phase: str, streamed: bool) -> None:
    async with pool_with(tmp_path, slots=1) as (pool, line):
        first = ask(pool) if phase == "queued" else None
        if first is not None:
            await line.task()
        asked = stream(pool) if streamed else ask(pool)
        await until(lambda: len(pool.pool.dispatcher.tasks) == (2 if first else 1))
        task = list(pool.pool.dispatcher.tasks.values())[-1]
        if phase != "queued":
            given = await line.task()
            if phase == "answering":
                await line.say(frames.Head(stream=given.stream, status=200, headers=SSE if streamed else JSON))
                await line.data(given.stream, delta("a") if streamed else b'{"choices"')
        asked.cancel()
        await until(lambda: task.state == "cancelled")
        if phase != "queued":
            cancelled = await line.frame(frames.Cancel)
            assert cancelled.stream == given.stream
        if first is not None:
            first.cancel()
        await until(lambda: not pool.pool.dispatcher.tasks)
