"""A coordinator that is killed while workers move to another tier policy: it goes on, or back, and says which."""

from __future__ import annotations

from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import pytest

from bench import _load
from tests.coordinator_fixtures import soon, until
from tests.coordinator_process import Coordinator, coordinating

if TYPE_CHECKING:
    from pathlib import Path

    from rma_core.http import AsyncClient

MACHINES = 40
#: So many have moved when it is killed, at least.
MOVED = 5
POLICY = '[[tiers]]\ntier = 4\nname = "many cores"\ncpu_cores = 6\n\n[[tiers]]\ntier = 5\nname = "the rest"\n'


async def standing(client: AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/api/admin/policies")).json()
    return found


async def tiers(client: AsyncClient) -> dict[str, int | None]:
    workers = (await client.get("/api/admin/workers?limit=1000")).json()["workers"]
    return {worker["worker_id"]: worker["tier"] for worker in workers}


async def moving(client: AsyncClient, least: int) -> None:
    async def moved() -> bool:
        now = (await standing(client))["moving"]
        return now is not None and now["moved"] >= least

    while not await moved():
        pass


async def settled(client: AsyncClient) -> None:
    while (await standing(client))["moving"] is not None:
        pass


@pytest.mark.parametrize("on_restart", ["continue", "rollback"])
async def test_killed_on_the_way_it_goes_on_or_back_as_was_asked_for(tmp_path: Path, on_restart: str) -> None:
    home = tmp_path / "home"
    body = {"policy": "many", "file": POLICY}
    async with coordinating(home) as (coordinator, client):
        token = (await client.post("/api/admin/tokens", json={"uses": MACHINES})).json()["token"]
        for report in islice(cycle(_load.machines()), MACHINES):
            machine = _load.Machine(coordinator.url, report, by_channel=False)
            await machine.register(token)
            await machine.close()
        before = await tiers(client)
        plan = (await client.post("/api/admin/policies/preview", json=body)).json()
        named = {row["worker_id"]: row["to"] for row in plan["workers"] if row["changes"]}
        steps = {"per_minute": 600, "on_restart": on_restart}
        done = await client.put("/api/admin/policies/active", json={**body, "plan": plan["plan"], "steps": steps})
        assert done.status_code == 200, done.text
        await soon(moving(client, MOVED))
        coordinator.kill()
    again: Coordinator
    async with coordinating(home) as (again, client):
        await soon(settled(client))
        after, now = await tiers(client), await standing(client)
        entries = (await client.get("/api/admin/audit")).json()["entries"]
        said = " ".join(entry["message"] for entry in entries)
        if on_restart == "continue":
            assert now["active"] == "many"
            assert after == {**before, **named}
            assert "was restarted while workers moved to 'many': it goes on" in said
        else:
            assert now["active"] == "threshold"
            assert after == before
            assert "was restarted while workers moved to 'many': back to 'threshold'" in said
        await until(lambda: "it goes on" in again.said.text or "back to 'threshold'" in again.said.text)
