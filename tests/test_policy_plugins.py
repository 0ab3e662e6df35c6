"""Plugins' policies on a live pool: installed, replaced and broken while it runs; one that hangs costs nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_coordinator import policy_versions, switching
from rma_coordinator.tiers import NoDecision, Tiers
from rma_core.errors import SettingProblem
from rma_core.interfaces import PolicyInput, TierDecision
from rma_core.models.hardware import Capabilities, HardwareReport
from rma_core.plugin_folders import Approval, PluginFolders
from rma_core.policy_process import PolicyProcess
from tests.coordinator_fixtures import running, soon, until
from tests.policy_plugins import BROKEN, children, install, source, uninstall

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


#: What makes a child end with the second machine that it is asked about.
ONCE = "        Night.asked += 1\n        if Night.asked > 1:\n            os._exit(4)\n"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


async def test_a_version_is_found_put_in_force_followed_by_the_next_and_gone_back_to(
    tmp_path: Path, folder: Path
) -> None:
    async with pool_of(tmp_path / "home") as (pool, machines):
        before = tiers(pool, machines)
        assert (await activate(pool)).status_code == 404
        assert children() == []
        install(folder)
        assert (await activate(pool)).status_code == 404, "nobody has looked yet"
        found = await rescan(pool)
        assert (found["new"], found["changed"], found["unused"]) == ([{"name": "night", "version": "1.0"}], [], [])
        assert tiers(pool, machines) == before
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "night"})).json()
        assert (seen["changes"], seen["failed"]) == (3, 0)
        await in_force(pool)
        assert tiers(pool, machines) == [7, 7, 7]
        [first] = children()

        install(folder, "1.1", tier=8)
        found = await rescan(pool)
        assert found["changed"] == [{"name": "night", "was": "1.0", "now": "1.1"}]
        assert (found["active"], found["version"]) == ("night", "1.0")
        # What is in force goes on, for who comes too, though its files are others by now.
        assert (await enrol(pool)).answer["tier"] == 7
        rows = [(p["version"], p["active"]) for p in (await standing(pool))["policies"] if p["name"] == "night"]
        assert rows == [("1.0", True), ("1.1", False)]
        await in_force(pool)
        assert tiers(pool, machines) == [8, 8, 8]
        now = await standing(pool)
        assert (now["version"], now["previous_versions"]) == ("1.1", ["1.0", ""])

        back = await pool.client.post("/api/admin/policies/rollback", json={})
        assert (back.json()["policy_version"], back.json()["was_version"]) == ("1.0", "1.1")
        await settled(pool)
        assert tiers(pool, machines) == [7, 7, 7]
        assert first.is_running()
        said = await audit(pool)
        assert "'night' 1.1 is in force, 'night' 1.0 was; workers that change: 4" in said
        assert "back to 'night' 1.0 from 'night' 1.1; workers that change: 4" in said
        assert (await rescan(pool))["changed"] == []


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (BROKEN, "failed", "cannot be imported: module 'a_module_that_nobody_has' is not installed here"),
        ("def rma_tier_policies(config): return []\n", "invalid", "rma_tier_policies"),
        ("from rma_core import hookimpl\n@hookimpl\ndef rma_tier_policies(config): return 1 / 0\n", "failed", "Zero"),
        ("import os\nos._exit(7)\n", "failed", "ended with exit code 7 before it answered"),
        (source(name="threshold"), "invalid", "it gives a policy 'threshold', and 'threshold' is built in"),
    ],
)
async def test_a_broken_version_is_refused_with_its_reason_and_the_old_one_stays(
    tmp_path: Path, folder: Path, code: str, state: str, words: str
) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        install(folder, "1.1", code=code)
        [refused] = (await rescan(pool))["unused"]
        assert (refused["name"], refused["version"], refused["state"]) == ("night", "1.1", state)
        assert words in refused["reason"]
        done = await activate(pool)
        assert done.status_code == 409
        assert "rma-policy-night 1.1" in done.json()["detail"]
        assert words in done.json()["detail"]
        now = await standing(pool)
        assert (now["active"], now["version"], now["unused"]) == ("night", "1.0", [refused])
        assert tiers(pool, machines) == [7, 7, 7]
        assert (await enrol(pool)).answer["tier"] == 7
        plugins = (await pool.client.get("/api/admin/plugins")).json()["coordinator"]
        assert [p["state"] for p in plugins if p["name"] == "night"] == [state]
        install(folder, "1.2", tier=9)
        assert (await rescan(pool))["unused"] == []
        await in_force(pool)
        assert tiers(pool, machines) == [9, 9, 9]


async def test_who_had_plugins_looked_at_and_what_that_found_is_in_the_audit_after_a_restart_too(
    tmp_path: Path, folder: Path
) -> None:
    home = tmp_path / "home"
    install(folder)
    async with pool_of(home, machines=0) as (pool, _):
        install(folder, "1.1")
        install(folder, name="late", code=BROKEN)
        await rescan(pool)
        await rescan(pool)
        shown = (await pool.client.get("/api/admin/policies/threshold")).json()["entries"]
        key = pool.pool.keyring.principal(pool.key).id
    async with pool_of(home, machines=0) as (pool, _):
        entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
        assert entries == shown
        again, first = entries
        assert (first["action"], first["by"]) == ("policy_rescanned", key)
        before = "plugins with policies were looked at: "
        late = "late of rma-policy-late 1.0 is failed: cannot be imported: module 'a_module_that_nobody_has'"
        assert first["message"].startswith(f"{before}night 1.1 is there, 1.0 was; {late}")
        # What is refused still is.
        assert again["message"].startswith(f"{before}{late}")


async def test_a_look_that_takes_nothing_in_is_in_the_audit_too(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "MOST_WORDS", 200)
    async with pool_of(tmp_path / "home", machines=0, strict_plugins=True) as (pool, _):
        install(folder, code="raise ValueError('no' * 200)\n")
        assert (await pool.client.post("/api/admin/policies/rescan")).status_code == 409
        [said] = await audit(pool)
        words = "plugins with policies were looked at: none is taken in: the policy plugin night: cannot be imported"
        assert said.startswith(words)
        assert len(said) == switching.MOST_WORDS + 1


async def test_two_plugins_with_one_policy_are_both_refused(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        install(folder, name="late", code=source(name="night"))
        unused = (await rescan(pool))["unused"]
        assert {one["name"] for one in unused} == {"night", "late"}
        assert all("policy 'night' is given 2 times, by rma-policy-" in one["reason"] for one in unused)
        assert tiers(pool, [*machines, await enrol(pool)]) == [7] * 4
        uninstall(folder, "late")
        assert (await rescan(pool))["unused"] == []


async def test_a_deadline_that_is_none_is_said(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", plugins={"night": {"deadline_s": "soon"}}) as (pool, _):
        [unused] = (await standing(pool))["unused"]
        assert unused["reason"] == "deadline_s in [plugins.night] is 'soon': give seconds, up to 30"


async def test_a_strict_pool_takes_nothing_in_where_one_is_broken(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", strict_plugins=True) as (pool, machines):
        await in_force(pool)
        install(folder, name="late", code=BROKEN)
        refused = await pool.client.post("/api/admin/policies/rescan")
        assert refused.status_code == 409
        assert "plugins cannot be taken in: the policy plugin late: cannot be imported" in refused.json()["detail"]
        assert tiers(pool, [*machines, await enrol(pool)]) == [7] * 4


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


async def test_one_in_a_folder_of_its_own_is_used_once_its_files_are_approved(tmp_path: Path) -> None:
    folders = PluginFolders(tmp_path / "home" / "plugins")
    async with pool_of(tmp_path / "home") as (pool, machines):
        own = folders.path / "rma-policy-night"
        install(own)
        own.chmod(0o700)
        [unused] = (await rescan(pool))["unused"]
        assert (unused["name"], unused["state"]) == ("night", "unapproved")
        approval = Approval(sha256=folders.get("rma-policy-night").digest, version="1.0", at="2026-01-01T00:00:00Z")
        folders.decide(lambda decisions: decisions.approve("rma-policy-night", approval))
        assert (await rescan(pool))["new"] == [{"name": "night", "version": "1.0"}]
        await in_force(pool)
        assert tiers(pool, machines) == [7] * 3
        install(own, "1.1", tier=8)
        [unused] = (await rescan(pool))["unused"]
        assert "its files are not those of 1.0 that you approved" in unused["reason"]
        assert tiers(pool, [*machines, await enrol(pool)]) == [7] * 4


async def test_a_plugin_that_nobody_approved_is_not_even_imported(tmp_path: Path, folder: Path) -> None:
    install(folder, code=f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    async with pool_of(tmp_path / "home", approve_plugins=("late",)) as (pool, _):
        [refused] = (await rescan(pool))["unused"]
        assert (refused["state"], "approve" in refused["reason"]) == ("unapproved", True)
        assert (await activate(pool)).status_code == 409
    assert not (tmp_path / "imported").exists()


async def test_one_that_is_uninstalled_stays_in_force_until_another_is(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        uninstall(folder)
        assert (await rescan(pool))["gone"] == ["night"]
        assert tiers(pool, [*machines, await enrol(pool)]) == [7] * 4
        assert (await activate(pool)).status_code == 404
        await in_force(pool, "threshold")
        assert tiers(pool, machines) == [2] * 3
        await pool.client.post("/api/admin/policies/rollback", json={})
        await settled(pool)
        assert tiers(pool, machines) == [7] * 3
    async with pool_of(tmp_path / "home", machines=0) as (pool, _):
        await settled(pool)
        assert tiers(pool, machines) == [2] * 3
        words = "'night' 1.0 is not there any more: 'threshold' is in force again"
        assert words in await audit(pool)


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


async def test_nothing_else_waits_while_it_hangs(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", plugins={"night": {"deadline_s": 5.0}}) as (pool, machines):
        odd = await enrol(pool, "hang")
        looking = asyncio.create_task(pool.client.post("/api/admin/policies/preview", json={"policy": "night"}))
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


async def test_a_restart_with_another_version_says_so(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
    install(folder, "1.1", tier=8)
    async with pool_of(tmp_path / "home", machines=0) as (pool, _):
        await settled(pool)
        assert tiers(pool, machines) == [8] * 3
        assert (await standing(pool))["version"] == "1.1"
        words = "'night' 1.0 was in force, and 1.1 is installed now: that is in force"
        assert words in await audit(pool)
    install(folder, "1.1", tier=9)
    async with pool_of(tmp_path / "home", machines=0) as (pool, _):
        await settled(pool)
        assert tiers(pool, machines) == [9] * 3
        assert "'night' 1.1 is in force, and its files or settings are others than they were" in await audit(pool)
    install(folder, "1.2", code=BROKEN)
    async with pool_of(tmp_path / "home", machines=0) as (pool, _):
        await settled(pool)
        assert tiers(pool, machines) == [2] * 3
        said = " ".join(await audit(pool))
        assert "'night' 1.1 is not there any more (rma-policy-night 1.2 is failed: cannot be imported" in said
        assert "'threshold' is in force again" in said


async def test_one_that_fails_once_at_a_start_is_not_lost(tmp_path: Path, folder: Path) -> None:
    install(folder)
    free = {"night": {"confined": False}}
    async with pool_of(tmp_path / "home", plugins=free) as (pool, machines):
        await in_force(pool)
    once = str(tmp_path / "once")
    busy = f"import os\nif not os.path.exists({once!r}):\n    os.mkdir({once!r})\n    os._exit(9)\n"
    install(folder, code=busy + source())
    async with pool_of(tmp_path / "home", machines=0, plugins=free) as (pool, _):
        await settled(pool)
        assert (pool.pool.tiers.active, tiers(pool, machines)) == ("night", [7] * 3)
    assert (tmp_path / "once").exists()


async def test_settings_that_name_a_plugins_policy_keep_which_version_that_is(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home", tier_policy="night") as (pool, machines):
        await settled(pool)
        assert tiers(pool, machines) == [7] * 3
        assert "'night' 1.0 is in force, as the settings say" in await audit(pool)
    install(folder, "1.1", tier=8)
    async with pool_of(tmp_path / "home", machines=0, tier_policy="night") as (pool, _):
        await settled(pool)
        assert tiers(pool, machines) == [8] * 3
    install(folder, code=BROKEN)
    with pytest.raises(SettingProblem, match=r"there is no tier policy 'night': rma-policy-night 1\.0 is failed"):
        async with pool_of(tmp_path / "home", tier_policy="night"):
            pass


async def test_a_policy_of_a_plugin_is_asked_in_the_shadow(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        begun = (await pool.client.put("/api/admin/policies/shadow", json={"policy": "night"})).json()
        assert (begun["asked"], begun["failed"], len(begun["workers"])) == (3, 0, 3)
        told_more_cores(pool, machines[0])
        await until(lambda: pool.pool.tiers.shadow and pool.pool.tiers.shadow.asked == 4)
        assert tiers(pool, machines) == [2] * 3
        await pool.client.delete("/api/admin/policies/shadow")


async def test_a_child_lives_only_while_somebody_needs_it(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        assert children() == [], "it has said which policies it has"
        await pool.client.post("/api/admin/policies/preview", json={"policy": "night"})
        assert len(children()) == 1
        plugins = pool.pool.policy_plugins
        assert plugins is not None
        await plugins.tidy([], idle_s=0)
        assert children() == []
        await in_force(pool)
        for number in range(1, 6):
            install(folder, f"1.{number}", tier=10 + number)
            await rescan(pool)
            await in_force(pool)
        await plugins.tidy(pool.pool.switching.needed, idle_s=0)
        # The one in force, and a few that can be gone back to.
        assert len(children()) == 1 + 3
        for tier in (14, 13, 12):
            await pool.client.post("/api/admin/policies/rollback", json={})
            await settled(pool)
            assert tiers(pool, machines) == [tier] * 3
        await pool.client.post("/api/admin/policies/rollback", json={})
        await settled(pool)
        assert pool.pool.tiers.active == "threshold"


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


def with_a_record_that_never_ends(folder: Path) -> None:
    [info] = folder.glob("rma_policy_night-*.dist-info")
    (folder / "loop").symlink_to("/dev/zero")
    lines = ["rma_policy_night.py,,", "/dev/zero,,", "../../../../../../../../dev/zero,,", "loop,,", "nothing,,", ""]
    (info / "RECORD").write_text("\n".join(lines))


async def test_a_list_of_files_that_never_ends_is_not_read(tmp_path: Path, folder: Path) -> None:
    install(folder)
    with_a_record_that_never_ends(folder)
    async with pool_of(tmp_path / "home") as (pool, machines):
        await in_force(pool)
        assert tiers(pool, machines) == [7, 7, 7]


async def test_a_plan_is_of_the_version_that_was_seen(tmp_path: Path, folder: Path) -> None:
    install(folder)
    async with pool_of(tmp_path / "home") as (pool, _):
        await rescan(pool)
        seen = (await pool.client.post("/api/admin/policies/preview", json={"policy": "night"})).json()["plan"]
        install(folder, "1.1")
        await rescan(pool)
        body = {"policy": "night", "plan": seen}
        refused = await pool.client.put("/api/admin/policies/active", json=body, timeout=60)
        assert (refused.status_code, "or the policy, has changed" in refused.text) == (409, True)
