"""A pool that runs while plugins' policies are installed, replaced and broken, and what tests ask it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_coordinator import policy_versions
from rma_core.models.hardware import Capabilities, HardwareReport
from tests.coordinator_fixtures import running, until
from tests.policy_plugins import children

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from httpx2 import Response

    from tests.coordinator_fixtures import Running, StandIn

#: One decision may take so long in these tests.
DEADLINE_S = 0.5
PLUGINS: dict[str, Any] = {
    "approve_plugins": ("*",),
    "only_plugins": ("threshold", "night", "late"),
    "plugins": {"night": {"deadline_s": DEADLINE_S}},
}


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policy_versions, "AGAIN_S", 0.01)
    yield
    assert children() == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the coordinator's path, with nothing in it."""
    found = tmp_path / "installed"
    found.mkdir()
    monkeypatch.syspath_prepend(str(found))
    return found


@contextlib.asynccontextmanager
async def pool_of(home: Path, machines: int = 3, **more: Any) -> AsyncIterator[tuple[Running, list[StandIn]]]:
    async with running(home, **{**PLUGINS, **more}) as pool:
        yield pool, [await enrol(pool) for _ in range(machines)]


async def enrol(pool: Running, does: str = "") -> StandIn:
    return await pool.enrol(
        capabilities=Capabilities(cpu_cores=8, ram="16GB", storage="100GB"), labels={"does": does or "decide"}
    )


async def rescan(pool: Running) -> dict[str, Any]:
    answer = await pool.client.post("/api/admin/policies/rescan")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def activate(pool: Running, name: str = "night") -> Response:
    return await pool.client.put("/api/admin/policies/active", json={"policy": name}, timeout=60)


async def in_force(pool: Running, name: str = "night") -> None:
    done = await activate(pool, name)
    assert done.status_code == 200, done.text
    await settled(pool)


async def settled(pool: Running) -> None:
    await until(lambda: pool.pool.switching._start is None and pool.pool.switching.rollout is None)


async def standing(pool: Running) -> dict[str, Any]:
    found: dict[str, Any] = (await pool.client.get("/api/admin/policies")).json()
    return found


def tiers(pool: Running, machines: list[StandIn]) -> list[int | None]:
    return [pool.pool.fleet.workers[machine.id].record.tier for machine in machines]


def reason(pool: Running, machine: StandIn) -> str:
    return pool.pool.fleet.workers[machine.id].record.tier_reason


def told_more_cores(pool: Running, machine: StandIn, cores: int = 9) -> None:
    """A machine says something new, as with a heartbeat."""
    worker = pool.pool.fleet.workers[machine.id]
    report = HardwareReport(capabilities=Capabilities(cpu_cores=cores, ram="16GB", storage="100GB"))
    worker.record = msgspec.structs.replace(worker.record, report=report)
    pool.pool.decide_again(worker)


async def audit(pool: Running) -> list[str]:
    entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
    return [entry["message"] for entry in reversed(entries)]
