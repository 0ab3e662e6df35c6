"""Streams, whole answers, tasks for later and large bodies while everyone dies: each request has one end, and its own.

Everything is real: the coordinator, three agents with a llama.cpp server and the slow service each, OpenAI's SDK, and a
receiver of webhooks.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import pytest

from tests.losses import answer, asks, workers
from tests.mixed import pass_over
from tests.needs import need
from tests.storm import check_executed, check_store

if TYPE_CHECKING:
    from pathlib import Path

#: Requests in the suite and under `make soak`, and about how many of them come to an end between two kills.
REQUESTS, APART = 300, 16
MANY_REQUESTS, MANY_APART = 2000, 16
#: Workers that do them.
WORKERS = 3
#: Seconds that engines work at once between their rests: an answer is long enough to be cut, and many are given.
WORKS_S = 0.01
SETTINGS = {"RMA_WEBHOOK_HTTP": "1", "RMA_WEBHOOK_NETWORKS": "127.0.0.0/8", "RMA_HEARTBEAT_INTERVAL_S": "2"}


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A short path: the services listen on Unix sockets below it.
    return tmp_path_factory.mktemp("x")


@pytest.mark.parametrize(
    ("requests", "apart"),
    [
        pytest.param(REQUESTS, APART, marks=pytest.mark.timeout(600)),
        pytest.param(MANY_REQUESTS, MANY_APART, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
async def test_requests_of_every_kind_have_one_end_while_agents_model_servers_and_the_coordinator_are_killed(
    folder: Path, requests: int, apart: int
) -> None:
    need("llama")
    seed = int(os.environ.get("RMA_SEED") or secrets.randbelow(2**31))
    print(f"seed {seed} (RMA_SEED)")  # noqa: T201 - pytest shows it with a failure
    async with workers(folder, WORKERS, slow=True, works_s=WORKS_S, **SETTINGS) as pool:
        uncut = {one: await answer(pool.client, one) for one in asks()}
        found = await pass_over(pool, uncut, total=requests, apart=apart, seed=seed)
        check_executed(pool.made, found)
        await check_store(pool.made, found)
        print(dict(found.counts))  # noqa: T201 - what the storm was like
        assert not found.violations, "\n".join([*found.violations, pool.made.words()])
        assert not [line for line in pool.made.said if "Traceback" in line or " CRITICAL " in line]
        assert "Traceback" not in pool.made.words()
