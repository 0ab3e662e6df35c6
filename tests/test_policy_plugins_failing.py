"""Plugins' policies that hang, crash and die on a live pool, and machines for which one fails: nobody else pays."""

from __future__ import annotations

import asyncio
import functools
import itertools
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_coordinator import policy_versions
from rma_coordinator.tiers import NoDecision, Tiers
from rma_core.interfaces import PolicyInput, TierDecision
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.policy_process import PolicyProcess
from tests import policy_pool
from tests.coordinator_fixtures import soon, until
from tests.policy_plugins import BROKEN, children, install, source
from tests.policy_pool import (
    DEADLINE_S,
    activate,
    audit,
    enrol,
    in_force,
    pool_of,
    reason,
    rescan,
    settled,
    standing,
    tiers,
    told_more_cores,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.coordinator_fixtures import Running, StandIn

#: Fixtures of every test here.
nothing_is_left, folder = policy_pool.nothing_is_left, policy_pool.folder
#: What makes a child end with the second machine that it is asked about.
ONCE = "        Night.asked += 1\n        if Night.asked > 1:\n            os._exit(4)\n"


async def test_one_that_ends_again_and_again_is_left_alone(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_versions, "DEATHS", 4)
    # Each child answers once, so no machine is to blame.
    once = source().replace("    def decide(self, asked):", "    asked = 0\n    def decide(self, asked):\n" + ONCE)
    install(folder, code=once)
    async with pool_of(tmp_path / "home", machines=8) as (pool, _):
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "night"}, timeout=60)).json()
        assert (seen["changes"], seen["failed"]) == (4, 4)
        words = "has failed 4 times within a minute, the last time it ended with exit code 4 before it answered"
        reasons = {row["reason"] for row in seen["workers"] if row["failed"]}
        assert reasons == {f"the tier policy 'night' {words}; it is left alone for a while"}


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("hang", "did not answer within 0.5 s and was stopped; it was in decide"),
        ("crash", "crashed in native code"),
        ("raise", "failed: ValueError: no idea"),
        ("gold", "failed: ValidationError: Expected `int | null`, got `str`"),
    ],
)
async def test_one_worker_for_which_it_fails_stays_where_it_was_and_says_so(
    tmp_path: Path, folder: Path, does: str, words: str
) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", machines=5) as (pool, machines):
        odd = await enrol(pool, does)
        more = [await enrol(pool) for _ in range(5)]
        seen = await pool.client.post("/api/admin/policies/preview", json={"policy": "night"}, timeout=60)
        rows = {row["worker_id"]: row for row in seen.json()["workers"]}
        assert (seen.json()["changes"], seen.json()["failed"]) == (10, 1)
        assert (rows[odd.id]["from"], rows[odd.id]["to"]) == (2, 2)
        assert words in rows[odd.id]["reason"]
        await in_force(pool)
        assert tiers(pool, [*machines, *more]) == [7] * 10
        assert (await enrol(pool)).answer["tier"] == 7
        [child] = children()
        # It costs no second hang: nobody asks about it again for a while.
        pool.pool.decide_again(pool.pool.fleet.workers[odd.id])
        assert tiers(pool, [odd]) == [2]
        assert words in reason(pool, odd)
        assert "; the tier stays as it was" in reason(pool, odd)
        assert pool.pool.tiers.active == "night"
        assert (await enrol(pool)).answer["tier"] == 7
        assert [one.pid for one in children()] == [child.pid]


async def test_how_often_each_version_failed_is_listed(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", machines=1) as (pool, _):
        odd = [await enrol(pool, does) for does in ("raise", "die", "hang")]

        async def failures() -> dict[tuple[str, str], int]:
            found = await standing(pool)
            return {(one["name"], one["version"]): one["failures"] for one in (*found["policies"], *found["unused"])}

        assert await failures() == {("night", "1.0"): 0, ("threshold", ""): 0}
        seen = await pool.client.post("/api/admin/policies/preview", json={"policy": "night"}, timeout=60)
        assert seen.json()["failed"] == len(odd)
        counted = await failures()
        # One that dies of what it was asked second is asked that again, first.
        assert counted.pop(("night", "1.0")) >= len(odd)
        assert counted == {("threshold", ""): 0}
        shown = (await pool.client.get("/api/admin/policies/night")).json()
        assert (shown["failures"] >= len(odd), bool(shown["failed_at"])) == (True, True)
        plugins = (await pool.client.get("/api/admin/plugins")).json()["coordinator"]
        assert {one["name"]: one["failures"] for one in plugins} == {"threshold": 0, "night": shown["failures"]}
        install(folder, "1.1", code=BROKEN)
        await rescan(pool)
        assert await failures() == {("night", "1.1"): 1, ("threshold", ""): 0}


def test_a_policy_in_this_process_that_raises_is_counted_too() -> None:
    class Raising:
        name, summary = "raising", "for tests"

        def decide(self, asked: PolicyInput) -> TierDecision:
            raise ValueError(asked.worker_id)

    policy = Raising()
    tiers = Tiers({"raising": policy}, wanted="raising")
    asked = PolicyInput(report=HardwareReport(capabilities=Capabilities(cpu_cores=1, ram="1GB")), worker_id="w")
    for _ in range(2):
        assert isinstance(tiers.decide(asked), NoDecision)
    assert tiers.failed(policy).times == 2


async def test_one_that_tells_something_new_all_the_time_holds_up_nobody_else(tmp_path: Path, folder: Path) -> None:
    said = 'reason="tier {tier}: version {version}"'.format(tier=7, version="1.0")
    code = source().replace(said, 'reason=f"tier 7: {asked.report.cpu_cores} cores"')
    install(folder, code=code.replace("does, answer = ", "time.sleep(0.03); does, answer = "))
    async with pool_of(tmp_path / "home") as (pool, machines):
        odd = await enrol(pool)

        async def flap() -> None:
            for cores in itertools.count(10):
                told_more_cores(pool, odd, cores)
                await asyncio.sleep(0.005)

        flapping = asyncio.create_task(flap())
        try:
            await in_force(pool)
            for cores in range(100, 104):
                told_more_cores(pool, machines[0], cores)
                said = f"tier 7: {cores} cores"
                # The waits of one that has no answer grow to ten seconds.
                await until(functools.partial(_says, pool, machines[0], said), within_s=5)
            await until(lambda: reason(pool, odd).startswith("tier 7: "))
        finally:
            flapping.cancel()
            await asyncio.gather(flapping, return_exceptions=True)


def _says(pool: Running, machine: StandIn, words: str) -> bool:
    return reason(pool, machine) == words


async def test_nothing_else_waits_while_it_hangs(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", plugins={"night": {"deadline_s": 5.0}}) as (pool, machines):
        odd = await enrol(pool, "hang")
        asked = pool.client.post("/api/admin/policies/preview", json={"policy": "night"}, timeout=60)
        looking = asyncio.create_task(asked)
        await until(children)
        began = asyncio.get_running_loop().time()
        for machine in [*machines, odd]:
            assert (await machine.beat()).status_code == 200
        assert (await pool.client.get("/health")).status_code == 200
        assert asyncio.get_running_loop().time() - began < 5.0
        assert not looking.done()
        assert (await soon(looking, within_s=30)).json()["failed"] == 1


async def test_one_that_hangs_for_all_is_refused_soon(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "hangs").touch()
    install(folder)
    table = {"deadline_s": DEADLINE_S, "hangs": str(tmp_path / "hangs")}
    async with pool_of(tmp_path / "home", machines=20, plugins={"night": table}) as (pool, machines):
        before = tiers(pool, machines)
        done = await soon(activate(pool))
        assert done.status_code == 409
        assert "'night' fails for 20 of 20 workers" in done.json()["detail"]
        assert (tiers(pool, machines), pool.pool.tiers.active) == (before, "threshold")
        again = (await pool.client.post("/api/admin/policies/preview", json={"policy": "night"})).json()
        assert any(
            "has failed for 3 machines in a row, the last time it did not answer" in row["reason"]
            for row in again["workers"]
        )


async def test_one_in_force_that_begins_to_hang_gives_way_to_the_one_before(tmp_path: Path, folder: Path) -> None:
    install(folder)
    table = {"deadline_s": DEADLINE_S, "hangs": str(tmp_path / "hangs")}
    async with pool_of(tmp_path / "home", machines=6, plugins={"night": table}) as (pool, machines):
        before = tiers(pool, machines)
        await in_force(pool)
        (tmp_path / "hangs").touch()
        for machine in machines:
            told_more_cores(pool, machine)
        # Until there is an answer they stay, and the policy has not failed.
        assert tiers(pool, machines) == [7] * 6
        assert pool.pool.tiers.failing == set()
        await until(lambda: pool.pool.tiers.active == "threshold", within_s=30)
        await settled(pool)
        assert tiers(pool, machines) == before
        assert any("it fails for" in message for message in await audit(pool))


async def test_a_machine_that_joins_while_it_hangs_gets_its_tier_later(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rma_coordinator.enrolment.DECIDED_S", 0.1)
    install(folder)
    table = {"deadline_s": 3.0, "hangs": str(tmp_path / "hangs")}
    async with pool_of(tmp_path / "home", plugins={"night": table}) as (pool, _):
        await in_force(pool)
        (tmp_path / "hangs").touch()
        new = await enrol(pool)
        assert new.answer["tier"] is None
        assert new.answer["tier_reason"] == "the tier policy 'night' is being asked, and the tier follows"
        (tmp_path / "hangs").unlink()
        await until(lambda: tiers(pool, [new]) == [7])


async def test_who_says_something_new_is_decided_once_there_is_an_answer(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        install(folder, "1.1", tier=8)
        await rescan(pool)
        await in_force(pool)
        [worker] = [pool.pool.fleet.workers[machines[0].id]]
        worker.record = msgspec.structs.replace(worker.record, tier=5, tier_reason="by hand")
        told_more_cores(pool, machines[0])
        assert (worker.record.tier, reason(pool, machines[0])) == (5, "by hand")
        await until(lambda: worker.record.tier == 8)


async def test_one_that_died_after_it_was_replaced_says_that_it_cannot_come_back(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", machines=12) as (pool, machines):
        await in_force(pool)
        install(folder, "1.1", tier=8)
        for child in children():
            child.kill()
        told_more_cores(pool, machines[0])
        words = "the tier policy 'night' cannot be asked: 1.0 cannot be started again: 1.1 is installed now"
        await until(lambda: reason(pool, machines[0]).startswith(words))
        assert tiers(pool, machines) == [7] * 12
        await rescan(pool)
        await in_force(pool)
        assert tiers(pool, machines) == [8] * 12


async def test_what_is_kept_and_what_waits_is_bounded(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_versions, "KEPT", 4)
    monkeypatch.setattr(policy_versions, "MOST_WAITING", 2)
    install(folder)
    async with pool_of(tmp_path / "home", machines=8) as (pool, machines):
        await in_force(pool)
        await until(lambda: tiers(pool, machines) == [7] * 8)
        assert pool.pool.policy_plugins is not None
        [policy] = pool.pool.policy_plugins.policies.values()
        assert len(policy.of._kept) <= 4
        assert policy.of._waiting == {}


async def test_a_machine_that_cannot_start_a_child_now_costs_no_policy_its_place(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        working, tries = PolicyProcess.start, 0

        async def none(*_: Any, **__: Any) -> Any:
            nonlocal tries
            tries += 1
            raise BlockingIOError("fork: no more processes")

        monkeypatch.setattr(PolicyProcess, "start", none)
        for child in children():
            child.kill()
        for machine in machines:
            told_more_cores(pool, machine)
        await until(lambda: tries >= 3)
        assert (await standing(pool))["active"] == "night"
        assert not pool.pool.tiers.failing
        monkeypatch.setattr(PolicyProcess, "start", working)
        await until(lambda: not pool.pool.tiers.pending and not pool.pool.tiers.pended.is_set())
        assert tiers(pool, machines) == [7, 7, 7]


async def test_one_machine_of_which_a_policy_dies_costs_the_others_nothing(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        bad = pool.pool.fleet.workers[machines[0].id]
        bad.record = msgspec.structs.replace(bad.record, labels={"does": "die"})
        for cores in range(10, 16):
            told_more_cores(pool, machines[0], cores)
            await until(lambda: not pool.pool.tiers.pending and "tier stays" in reason(pool, machines[0]))
        assert "for this machine" in reason(pool, machines[0])
        told_more_cores(pool, machines[1])
        await until(lambda: not pool.pool.tiers.pending)
        fresh = await enrol(pool)
        assert (tiers(pool, [machines[1], fresh]), (await standing(pool))["active"]) == ([7, 7], "night")
        assert "left alone" not in reason(pool, machines[0])


async def test_a_child_that_was_killed_while_nobody_asked_it_is_replaced_and_nobody_blamed(
    tmp_path: Path, folder: Path
) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", machines=1) as (pool, machines):
        await rescan(pool)
        for child in children():
            child.kill()
            await asyncio.to_thread(child.wait, 30)
        await in_force(pool)
        assert tiers(pool, machines) == [7]


async def test_for_whom_it_fails_while_it_is_put_in_force_is_told_so_and_asked_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_versions, "FAILED_S", 1.0)
    install(folder)
    async with pool_of(tmp_path / "home", machines=4) as (pool, machines):
        odd = await enrol(pool, "raise")
        await in_force(pool)
        assert "failed: ValueError: no idea; the tier stays as it was" in reason(pool, odd)
        worker = pool.pool.fleet.workers[odd.id]
        worker.record = msgspec.structs.replace(worker.record, labels={"does": "decide"})
        pool.pool.decide_again(worker)
        await until(lambda: tiers(pool, [odd]) == [7])
        assert tiers(pool, machines) == [7] * 4
