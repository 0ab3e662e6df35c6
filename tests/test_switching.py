"""A tier policy is swapped on a live pool: seen before, step by step, back again, and on after a restart."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_coordinator import audit, shadow
from rma_coordinator.audit import Audit
from rma_coordinator.choices import PolicyRecord
from rma_coordinator.domain.fleet import WorkerRecord
from rma_coordinator.store import StoreFailed
from rma_coordinator.tiers import Known
from rma_core.agent.keys import DeviceKey
from rma_core.catalog import Needs
from rma_core.interfaces import TierDecision
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.models.worker import ContainerStatus
from tests.coordinator_fixtures import entry, running, soon, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from rma_core.interfaces import PolicyInput
    from tests.coordinator_fixtures import Running, StandIn

#: Machines with 8 cores and more are first, which `threshold` has in its tier 2.
CORES = '[[tiers]]\ntier = 1\nname = "large"\ncpu_cores = 8\n\n[[tiers]]\ntier = 3\nname = "small"\n'
NONE = '[[tiers]]\ntier = 5\nname = "all"\n'
SIZES = (2, 4, 8, 8, 16, 16)


class Failing:
    """A policy that fails for machines with so many cores."""

    name, summary = "failing", "fails for some"

    def __init__(self, *cores: int) -> None:
        self.cores = cores

    def decide(self, asked: PolicyInput) -> TierDecision:
        if asked.report.cpu_cores in self.cores:
            raise RuntimeError("no idea")
        return TierDecision(tier=7, reason="tier 7: everyone")


@contextlib.asynccontextmanager
async def fleet(
    home: Path, sizes: tuple[int, ...] = SIZES, **more: Any
) -> AsyncIterator[tuple[Running, list[StandIn]]]:
    async with running(home, **more) as pool:
        yield pool, [await pool.enrol(capabilities=capabilities(cores)) for cores in sizes]


def capabilities(cores: int) -> Capabilities:
    return Capabilities(cpu_cores=cores, ram="16GB", storage="100GB")


def tiers_of(pool: Running, machines: list[StandIn]) -> list[int | None]:
    return [pool.pool.fleet.workers[machine.id].record.tier for machine in machines]


async def activate(pool: Running, text: str = CORES, name: str = "cores", **more: Any) -> dict[str, Any]:
    """Put a policy in force and return the answer."""
    body = {"policy": name, "file": text, **more}
    done = await pool.client.put("/api/admin/policies/active", json=body)
    assert done.status_code == 200, done.text
    answer: dict[str, Any] = done.json()
    return answer


async def standing(pool: Running) -> dict[str, Any]:
    answer: dict[str, Any] = (await pool.client.get("/api/admin/policies")).json()
    return answer


async def settled(pool: Running) -> None:
    await until(lambda: pool.pool.switching._start is None and pool.pool.switching.rollout is None)


async def settled_at_start(pool: Running) -> None:
    await until(lambda: pool.pool.switching._start is None and pool.pool.switching.rollout is None)


async def told(pool: Running) -> list[str]:
    """What was done, oldest first."""
    entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
    return [entry["action"] for entry in reversed(entries)]


async def test_what_a_preview_names_is_what_moves_and_a_rollback_undoes_it(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        assert before == [3, 2, 2, 2, 2, 2]
        asked = {"policy": "cores", "file": CORES}
        seen = (await pool.client.post("/api/admin/policies/preview", json=asked)).json()
        named = {row["worker_id"]: row["to"] for row in seen["workers"] if row["changes"]}
        assert tiers_of(pool, machines) == before
        done = await activate(pool, plan=seen["plan"])
        assert (done["policy"], done["was"], done["changes"]) == ("cores", "threshold", len(named))
        await settled(pool)
        after = tiers_of(pool, machines)
        assert after == [3, 3, 1, 1, 1, 1]
        moved = {m.id: now for m, was, now in zip(machines, before, after, strict=True) if was != now}
        assert moved == named
        beat = (await machines[2].beat()).json()
        assert (beat["tier"], beat["tier_reason"]) == (1, "tier 1: 8 cores and 16 GiB")
        now = await standing(pool)
        assert (now["active"], now["previous"], now["moving"]) == ("cores", ["threshold"], None)
        assert [p["active"] for p in now["policies"] if p["name"] == "cores"] == [True]
        assert now["by"] != ""
        back = await pool.client.post("/api/admin/policies/rollback", json={})
        assert (back.json()["policy"], back.json()["was"]) == ("threshold", "cores")
        await settled(pool)
        assert tiers_of(pool, machines) == before
        nothing = await pool.client.post("/api/admin/policies/rollback", json={})
        assert (nothing.status_code, nothing.json()["code"]) == (409, "refused")
        assert await told(pool) == ["policy_activated", "policy_done", "policy_rolled_back", "policy_done"]


async def test_a_preview_says_what_stops_and_starts_and_what_the_pool_would_have_then(tmp_path: Path) -> None:
    needs = Needs(cpu_cores=8)
    offered = tuple(
        msgspec.structs.replace(entry(service, f"POST /{service}", wanted=wanted), tiers=tiers, needs=needs)
        for service, tiers, wanted in (("first", (1,), 4), ("second", (2,), 4), ("spare", (), 1))
    )
    async with running(tmp_path, entries=offered) as pool:
        machines = [await pool.enrol(capabilities=capabilities(cores), services=None) for cores in SIZES]
        asked = {"policy": "cores", "file": CORES}
        seen = (await pool.client.post("/api/admin/policies/preview", json=asked)).json()
        before = pool.pool.fleet.assigned()
        records = {m.id: pool.pool.fleet.workers[m.id].record.assignment for m in machines}
        assert pool.pool.fleet.assigned() == before
        await activate(pool)
        await settled(pool)
        after = pool.pool.fleet.assigned()
        assert {one["service"]: (one["now"], one["then"]) for one in seen["services"]} == {
            service: (before.get(service, 0), after.get(service, 0)) for service in ("first", "second", "spare")
        }
        assert before != after
        rows = {row["worker_id"]: row for row in seen["workers"]}
        for machine in machines:
            was = {a.lane for a in records[machine.id]}
            now = {a.lane for a in pool.pool.fleet.workers[machine.id].record.assignment}
            row = rows[machine.id]
            assert (set(row.get("stops", ())), set(row.get("starts", ()))) == (was - now, now - was)
        assert (seen["stops"], seen["starts"]) == (
            sum(len(row.get("stops", ())) for row in rows.values()),
            sum(len(row.get("starts", ())) for row in rows.values()),
        )
        assert {one["service"] for one in seen["services"] if one["short"]} == {
            one["service"] for one in seen["services"] if one["then"] < min(one["wanted"], one["now"])
        }


async def test_a_preview_says_how_large_the_images_are_that_would_be_fetched(tmp_path: Path) -> None:
    offered = tuple(
        msgspec.structs.replace(entry(service, f"POST /{service}", wanted=wanted), tiers=tiers)
        for service, tiers, wanted in (("first", (1,), 1), ("also", (1,), 1), ("second", (2,), 8))
    )
    async with running(tmp_path, entries=offered) as pool:
        # The first one helps out with all that the pool lacks, and tells of one image how large that is.
        machines = [await pool.enrol(capabilities=capabilities(16)) for _ in range(3)]
        box = ContainerStatus(name="first-worker", service="first", state="healthy", image_bytes=700)
        assert (await machines[0].beat(containers=(box,))).status_code == 200
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "cores", "file": CORES})).json()
        rows = {row["worker_id"]: row for row in seen["workers"]}
        assert [
            (rows[one.id]["images"], rows[one.id]["image_bytes"], rows[one.id]["images_unknown"]) for one in machines
        ] == [(0, 0, 0), (2, 700, 1), (2, 700, 1)]
        assert (seen["images"], seen["image_bytes"], seen["images_unknown"], seen["model_bytes"]) == (4, 1400, 2, 0)


async def test_a_fleet_that_changed_since_its_preview_is_looked_at_again(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "cores", "file": CORES})).json()
        await pool.enrol(capabilities=capabilities(32))
        body = {"policy": "cores", "file": CORES, "plan": seen["plan"]}
        refused = await pool.client.put("/api/admin/policies/active", json=body)
        assert refused.status_code == 409
        assert "the fleet, or the policy, has changed" in refused.json()["detail"]
        assert (await standing(pool))["active"] == "threshold"
        assert tiers_of(pool, machines)[2] == 2


async def test_workers_move_in_steps_and_who_waits_keeps_its_tier(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        await activate(pool, steps={"canary": 0.2, "hold_s": 100, "per_minute": 1})
        await until(lambda: tiers_of(pool, machines).count(1) + tiers_of(pool, machines).count(3) == 2)
        waiting = [m for m in machines if m.id in pool.pool.tiers.waiting]
        assert len(waiting) == 4
        assert (await standing(pool))["moving"] == {
            "total": 5, "moved": 1, "stopped": "", "canary": 0.2, "hold_s": 100.0, "per_minute": 1.0,
            "most_failures": 0.2, "least_free": 0.0, "on_trouble": "rollback", "on_restart": "continue",
        }  # fmt: skip
        # Its report says nothing new, but it is decided once more: by the policy that still holds for it.
        tier = pool.pool.fleet.workers[waiting[0].id].record.tier
        pool.pool.decide_again(pool.pool.fleet.workers[waiting[0].id])
        assert pool.pool.fleet.workers[waiting[0].id].record.tier == tier == 2
        # Who comes now is nobody's who waits.
        new = await pool.enrol(capabilities=capabilities(64))
        assert new.answer["tier"] == 1
        another = await pool.client.put("/api/admin/policies/active", json={"policy": "threshold"})
        assert (another.status_code, another.json()["hints"][0][:4]) == (409, "wait")
        for moved in (2, 3, 4, 5):
            pool.turn(100 if moved == 2 else 60)
            await until(lambda moved=moved: (r := pool.pool.switching.rollout) is None or r.moved == moved)  # type: ignore[misc]
        await settled(pool)
        assert tiers_of(pool, machines) == [3, 3, 1, 1, 1, 1]


async def test_a_rollback_on_the_way_moves_back_only_who_has_moved(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        await activate(pool, steps={"per_minute": 1})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
        back = (await pool.client.post("/api/admin/policies/rollback", json={})).json()
        assert back["changes"] == 1
        await settled(pool)
        assert tiers_of(pool, machines) == before


@pytest.mark.parametrize("on_trouble", ["rollback", "stop"])
async def test_requests_that_fail_stop_it(tmp_path: Path, on_trouble: str) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        await activate(pool, steps={"per_minute": 1, "on_trouble": on_trouble})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
        pool.pool.dispatcher.failed += 30
        if on_trouble == "rollback":
            await until(lambda: pool.pool.tiers.active == "threshold")
            await settled(pool)
            assert tiers_of(pool, machines) == before
            entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
            [entry] = [e for e in entries if e["action"] == "policy_rolled_back"]
            assert "30 of 30 requests have failed" in entry["message"]
            assert entry["by"] == "rma"
            return
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.stopped)
        pool.turn(10_000)
        now = await standing(pool)
        assert (now["active"], now["moving"]["moved"]) == ("cores", 1)
        assert "have failed" in now["moving"]["stopped"]
        assert (await told(pool))[-1] == "policy_stopped"
    async with running(tmp_path) as pool:
        # It is still stopped after a restart, and an admin decides.
        now = await standing(pool)
        assert "have failed" in now["moving"]["stopped"]
        await activate(pool)
        await settled(pool)
        assert tiers_of(pool, machines) == [3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(("on_restart", "after"), [("continue", "cores"), ("rollback", "threshold")])
async def test_a_restart_on_the_way_goes_on_or_back_and_says_which(tmp_path: Path, on_restart: str, after: str) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        await activate(pool, steps={"per_minute": 1, "on_restart": on_restart})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
    async with running(tmp_path) as pool:
        assert pool.pool.tiers.active == after
        await until(lambda: pool.pool.switching._start is None)
        for _ in SIZES:
            pool.turn(60)
            await until(lambda: (r := pool.pool.switching.rollout) is None or not r.due(pool.clock()))
        await settled(pool)
        assert tiers_of(pool, machines) == (before if after == "threshold" else [3, 3, 1, 1, 1, 1])
        said = (await pool.client.get("/api/admin/audit")).json()["entries"]
        words = "it goes on" if on_restart == "continue" else "back to 'threshold', as was asked for"
        assert any("was restarted" in entry["message"] and words in entry["message"] for entry in said)


async def test_what_was_put_in_force_stays_until_the_settings_name_another(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        await activate(pool)
        await settled(pool)
    async with running(tmp_path) as pool:
        assert (pool.pool.tiers.active, pool.pool.switching.rollout) == ("cores", None)
        assert (await pool.enrol(capabilities=capabilities(64))).answer["tier"] == 1
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "all.toml").write_text(NONE)
    async with running(tmp_path, tier_policy="all") as pool:
        await settled(pool)
        assert pool.pool.tiers.active == "all"
        assert tiers_of(pool, machines) == [5] * 6
        assert (await standing(pool))["previous"] == ["cores", "threshold"]
        await pool.client.post("/api/admin/policies/rollback", json={})
        await settled(pool)
        assert pool.pool.tiers.active == "cores"
    async with running(tmp_path, tier_policy="all") as pool:
        assert pool.pool.tiers.active == "cores"


async def test_a_policy_that_is_gone_after_a_restart_gives_way_to_the_one_before(tmp_path: Path) -> None:
    class Gone:
        name, summary = "gone", "is uninstalled"

        def decide(self, asked: PolicyInput) -> TierDecision:
            return TierDecision(tier=9, reason="tier 9: everyone")

    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        pool.pool.tiers._installed["gone"] = Known(Gone())
        await activate(pool, "", "gone")
        await settled(pool)
        assert tiers_of(pool, machines) == [9] * 6
    async with running(tmp_path) as pool:
        await settled(pool)
        assert (pool.pool.tiers.active, tiers_of(pool, machines)) == ("threshold", before)
        assert "policy_lost" in await told(pool)


async def test_a_policy_that_fails_for_one_leaves_it_where_it_was_and_says_so(tmp_path: Path) -> None:
    async with fleet(tmp_path, (2, *[8] * 11)) as (pool, machines):
        pool.pool.tiers._installed["failing"] = Known(Failing(2))
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "failing"})).json()
        assert (seen["failed"], seen["changes"]) == (1, 11)
        [row] = [row for row in seen["workers"] if row["failed"]]
        assert (row["worker_id"], row["from"], row["to"], row["changes"]) == (machines[0].id, 3, 3, False)
        await activate(pool, "", "failing")
        await settled(pool)
        assert tiers_of(pool, machines) == [3, *[7] * 11]
        # It is decided once more when it registers again.
        pool.pool.decide_again(pool.pool.fleet.workers[machines[0].id])
        record = pool.pool.fleet.workers[machines[0].id].record
        assert (record.tier, pool.pool.tiers.active) == (3, "failing")
        assert "RuntimeError: no idea; the tier stays as it was" in record.tier_reason


async def test_a_policy_that_fails_for_many_is_refused(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        pool.pool.tiers._installed["failing"] = Known(Failing(2, 4, 8))
        refused = await pool.client.put("/api/admin/policies/active", json={"policy": "failing"})
        assert refused.status_code == 409
        assert "fails for 4 of 6 workers" in refused.json()["detail"]
        assert "no idea" in refused.json()["detail"]
        assert (tiers_of(pool, machines), pool.pool.tiers.active) == (before, "threshold")


async def test_one_that_fails_for_many_later_gives_way_by_itself(tmp_path: Path) -> None:
    policy = Failing()
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        pool.pool.tiers._installed["failing"] = Known(policy)
        await activate(pool, "", "failing")
        await settled(pool)
        policy.cores = (8, 16)
        for machine in machines:
            pool.pool.decide_again(pool.pool.fleet.workers[machine.id])
        await until(lambda: pool.pool.tiers.active == "threshold")
        await settled(pool)
        assert tiers_of(pool, machines) == before
        entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
        assert any("it fails for 4 workers" in entry["message"] for entry in entries)


async def test_a_machine_that_registers_again_while_its_policy_fails_keeps_its_tier(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        key = DeviceKey.generate()
        machine = await pool.enrol(key, capabilities=capabilities(8))
        pool.pool.tiers.use(Failing(8))
        again = await pool.register(key, await pool.join_token(), capabilities=capabilities(8))
        assert (again.status_code, again.json()["tier"]) == (200, 2)
        assert machine.id == again.json()["worker_id"]
        assert "the tier stays as it was" in again.json()["tier_reason"]


async def test_a_file_in_the_folder_is_seen_at_once_and_what_is_in_force_keeps_its_text(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        (tmp_path / "policies").mkdir()
        file = tmp_path / "policies" / "cores.toml"
        file.write_text(CORES)
        assert "cores" in {p["name"] for p in (await standing(pool))["policies"]}
        await activate(pool, "")
        await settled(pool)
        file.write_text(NONE)
        assert (await pool.enrol(capabilities=capabilities(64))).answer["tier"] == 1
        await activate(pool, "")
        await settled(pool)
        assert tiers_of(pool, machines) == [5] * 6
    file.unlink()
    async with running(tmp_path) as pool:
        assert pool.pool.tiers.active == "cores"
        assert (await pool.enrol(capabilities=capabilities(64))).answer["tier"] == 5


# -- what a strict reading found -----------------------------------------------------------------------------------


async def test_a_restart_goes_back_past_a_policy_that_is_gone(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        pool.pool.tiers._installed["failing"] = Known(Failing())
        await activate(pool, "", "failing")
        await settled(pool)
        await activate(pool, steps={"per_minute": 1, "on_restart": "rollback"})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
    async with running(tmp_path) as pool:
        await settled_at_start(pool)
        assert (pool.pool.tiers.active, tiers_of(pool, machines)) == ("threshold", before)


async def test_who_waits_after_a_restart_keeps_its_tier_whatever_it_reports(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        await activate(pool, NONE, "all")
        await settled(pool)
        await activate(pool, steps={"per_minute": 1})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
    async with running(tmp_path) as pool:
        await until(lambda: pool.pool.switching.rollout is not None)
        waiting = [m for m in machines if m.id in pool.pool.tiers.waiting]
        assert waiting
        for machine in waiting:
            pool.pool.decide_again(pool.pool.fleet.workers[machine.id])
        assert tiers_of(pool, waiting) == [5] * len(waiting)


async def test_another_policy_over_a_stopped_one_leaves_who_waits_where_it_is(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        await activate(pool, NONE, "all", steps={"per_minute": 1, "on_trouble": "stop"})
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.moved == 1)
        pool.pool.dispatcher.failed += 30
        await until(lambda: pool.pool.switching.rollout and pool.pool.switching.rollout.stopped)
        await activate(pool, steps={"per_minute": 1})
        waiting = [m for m in machines if m.id in pool.pool.tiers.waiting]
        before = tiers_of(pool, waiting)
        for machine in waiting:
            pool.pool.decide_again(pool.pool.fleet.workers[machine.id])
        assert tiers_of(pool, waiting) == before


async def test_who_reports_while_a_plan_is_made_has_its_turn_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path) as (pool, machines):
        switching, store = pool.pool.switching, pool.pool.store
        worker, commit = pool.pool.fleet.workers[machines[0].id], store.commit

        async def meanwhile(changes: Any, **more: Any) -> None:
            # The plan is made, and says that this one stays: now it has more cores.
            if switching.rollout is None and worker.record.report.cpu_cores == 2:
                report = HardwareReport(capabilities=capabilities(16))
                worker.record = msgspec.structs.replace(worker.record, report=report)
                pool.pool.decide_again(worker)
            await commit(changes, **more)

        monkeypatch.setattr(store, "commit", meanwhile)
        await activate(pool)
        await settled(pool)
        assert tiers_of(pool, machines) == [1, 3, 1, 1, 1, 1]


async def test_it_is_done_only_once_the_tiers_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet(tmp_path) as (pool, machines):
        store, failures = pool.pool.store, 2
        commit = store.commit

        async def failing(changes: Any, **more: Any) -> None:
            nonlocal failures
            changes = list(changes)
            if failures and any(isinstance(getattr(one, "record", None), WorkerRecord) for one in changes):
                failures -= 1
                raise StoreFailed("the disk does not keep up")
            await commit(changes, **more)

        monkeypatch.setattr(store, "commit", failing)
        await activate(pool)
        await settled(pool)
        kept = await store.load(WorkerRecord)
        assert {one.worker_id: one.tier for one in kept} == dict(
            zip([m.id for m in machines], [3, 3, 1, 1, 1, 1], strict=True)
        )
        assert failures == 0


async def test_a_commit_that_may_be_kept_all_the_same_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path) as (pool, machines):
        store = pool.pool.store
        commit = store.commit

        async def unsure(changes: Any, **more: Any) -> None:
            await commit(changes, **more)
            monkeypatch.setattr(store, "commit", commit)
            raise StoreFailed("nobody knows")

        monkeypatch.setattr(store, "commit", unsure)
        refused = await pool.client.put("/api/admin/policies/active", json={"policy": "cores", "file": CORES})
        assert refused.status_code == 503
        assert pool.pool.tiers.active == "threshold"
        await until(lambda: not pool.pool.switching._unsure)
        assert await store.load(PolicyRecord) == []
    async with running(tmp_path) as pool:
        await settled_at_start(pool)
        assert (pool.pool.tiers.active, tiers_of(pool, machines)) == ("threshold", [3, 2, 2, 2, 2, 2])


async def test_a_rollback_to_the_settings_own_file_has_its_text_of_then(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    file = tmp_path / "policies" / "mine.toml"
    file.write_text(NONE)
    async with running(tmp_path, tier_policy="mine") as pool:
        machines = [await pool.enrol(capabilities=capabilities(cores)) for cores in SIZES]
        assert tiers_of(pool, machines) == [5] * 6
        file.write_text(CORES)
        await activate(pool, "", "mine")
        await settled(pool)
        assert tiers_of(pool, machines) == [3, 3, 1, 1, 1, 1]
        file.unlink()
        await standing(pool)
        back = await pool.client.post("/api/admin/policies/rollback", json={"active": "mine"})
        assert back.status_code == 200, back.text
        await settled(pool)
        assert tiers_of(pool, machines) == [5] * 6


async def test_settings_that_name_another_policy_move_a_fleet_that_never_had_one_put_in_force(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        assert tiers_of(pool, machines) == [3, 2, 2, 2, 2, 2]
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "all.toml").write_text(NONE)
    async with running(tmp_path, tier_policy="all") as pool:
        await settled_at_start(pool)
        assert tiers_of(pool, machines) == [5] * 6
    (tmp_path / "policies" / "all.toml").write_text(CORES)
    async with running(tmp_path, tier_policy="all") as pool:
        await settled_at_start(pool)
        assert tiers_of(pool, machines) == [3, 3, 1, 1, 1, 1]
        said = await told(pool)
        assert said == ["policy_set", "policy_done"] * 2


async def test_naming_the_active_policy_in_the_settings_keeps_the_way_back(tmp_path: Path) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "cores.toml").write_text(CORES)
    async with fleet(tmp_path) as (pool, machines):
        await activate(pool, "")
        await settled(pool)
    async with running(tmp_path, tier_policy="cores") as pool:
        await settled_at_start(pool)
        assert (await standing(pool))["previous"] == ["threshold"]
        await pool.client.post("/api/admin/policies/rollback", json={})
        await settled(pool)
        assert tiers_of(pool, machines) == [3, 2, 2, 2, 2, 2]


async def test_a_rollback_from_another_policy_than_was_meant_is_refused(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, _):
        await activate(pool)
        await settled(pool)
        refused = await pool.client.post("/api/admin/policies/rollback", json={"active": "threshold"})
        assert (refused.status_code, pool.pool.tiers.active) == (409, "cores")


async def test_whoever_wants_to_go_back_does_not_wait_for_a_plan_that_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        await activate(pool)
        await settled(pool)
        switching, planned = pool.pool.switching, asyncio.Event()
        asked, plan = asyncio.Event(), switching.plan

        async def slowly(policy: Any, text: str = "") -> Any:
            if policy.name == "all":
                asked.set()
                await planned.wait()
            return await plan(policy, text)

        monkeypatch.setattr(switching, "plan", slowly)
        body = {"policy": "all", "file": NONE}
        activating = asyncio.create_task(pool.client.put("/api/admin/policies/active", json=body))
        await soon(asked.wait())
        back = await soon(pool.client.post("/api/admin/policies/rollback", json={"active": "cores"}))
        assert back.status_code == 200, back.text
        await settled(pool)
        planned.set()
        refused = await soon(activating)
        assert refused.status_code == 409
        assert "'threshold' was put in force while 'all' was asked about the workers" in refused.text
        assert (pool.pool.tiers.active, tiers_of(pool, machines)) == ("threshold", before)
        assert pool.pool.tiers.noting == []


# -- in the shadow -------------------------------------------------------------------------------------------------


async def test_a_policy_in_the_shadow_is_asked_beside_and_where_it_differs_is_kept(tmp_path: Path) -> None:
    path = "/api/admin/policies/shadow"
    async with fleet(tmp_path) as (pool, machines):
        before = tiers_of(pool, machines)
        begun = (await pool.client.put(path, json={"policy": "cores", "file": CORES})).json()
        assert (begun["policy"], begun["active"], begun["asked"], begun["failed"]) == ("cores", "threshold", 6, 0)
        differs = {row["worker_id"]: (row["tier"], row["shadow_tier"]) for row in begun["workers"]}
        assert differs == {m.id: (2, 3 if m is machines[1] else 1) for m in machines[1:]}
        new = await pool.enrol(capabilities=capabilities(64))
        assert new.answer["tier"] == 2
        now = (await pool.client.get(path)).json()
        assert now["asked"] == 7
        assert (now["workers"][0]["worker_id"], now["workers"][0]["times"]) == (new.id, 1)
        assert tiers_of(pool, machines) == before
        assert (await standing(pool))["shadow"] == "cores"
    async with running(tmp_path) as pool:
        # It is asked again of all after a restart.
        await until(lambda: pool.pool.tiers.shadow and pool.pool.tiers.shadow.asked >= 7)
        ended = await pool.client.delete(path)
        assert ended.json()["policy"] == "cores"
        assert (await pool.client.get(path)).status_code == 404
        assert (await pool.client.delete(path)).status_code == 404
        assert {"policy_shadow", "policy_shadow_ended"} <= set(await told(pool))
    async with running(tmp_path) as pool:
        assert pool.pool.tiers.shadow is None


async def test_a_policy_that_fails_in_the_shadow_costs_nobody_anything(tmp_path: Path) -> None:
    async with fleet(tmp_path) as (pool, machines):
        pool.pool.tiers._installed["failing"] = Known(Failing(8))
        begun = (await pool.client.put("/api/admin/policies/shadow", json={"policy": "failing"})).json()
        assert begun["failed"] == 2
        assert any("no idea" in row["reason"] for row in begun["workers"])
        pool.pool.decide_again(pool.pool.fleet.workers[machines[2].id])
        assert pool.pool.fleet.workers[machines[2].id].record.tier == 2
        assert pool.pool.tiers.failing == set()


def test_what_is_kept_of_a_shadow_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "KEPT", 2)
    found = shadow.Shadow(Failing(), since=1.0, wall=lambda: 2.0)
    said = TierDecision(tier=7, reason="tier 7: everyone")
    for worker_id in ("a", "b", "a", "c"):
        found.compare(worker_id, 1, said, failed=False)
    assert [(one.worker_id, one.times) for one in found.disagreements()] == [("c", 1), ("a", 2)]


async def test_only_who_may_write_puts_a_policy_in_force(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        reader = pool.bearer(await pool.make_key("admin:read", kind="admin"))
        body = {"policy": "cores", "file": CORES}
        for method, path in (("PUT", "/api/admin/policies/active"), ("POST", "/api/admin/policies/rollback")):
            refused = await pool.client.request(method, path, json=body, headers=reader)
            assert refused.status_code == 403
        assert (await pool.client.get("/api/admin/audit", headers=reader)).json() == {"entries": []}
        assert (await pool.client.get("/api/admin/audit?limit=0")).status_code == 400


def test_the_audit_keeps_the_latest_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "KEPT", 3)
    book = Audit(lambda: 5.0)
    deleted = []
    for number in range(5):
        entry = book.entry(f"a_{number}", "done", by="me")
        deleted += [change.key for change in book.changes(entry)[1:]]
        book.keep(entry)
    assert deleted == ["000000000001", "000000000002"]
    assert [entry.number for entry in book.latest(10)] == [5, 4, 3]
    assert [entry.number for entry in book.latest(1, prefix="a_2")] == [3]
    again = Audit(lambda: 5.0)
    again.restore(reversed(book.latest(10)))
    assert again.entry("x", "y", by="me").number == 6
