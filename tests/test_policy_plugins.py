"""Plugins' policies on a live pool: which version is in force, installed, replaced and approved while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rma_coordinator import switching
from rma_core.errors import SettingProblem
from rma_core.plugin_folders import Approval, PluginFolders
from tests import policy_pool
from tests.coordinator_fixtures import until
from tests.policy_plugins import BROKEN, children, install, source, uninstall
from tests.policy_pool import (
    activate,
    audit,
    enrol,
    in_force,
    pool_of,
    rescan,
    settled,
    standing,
    tiers,
    told_more_cores,
)

if TYPE_CHECKING:
    from pathlib import Path

#: Fixtures of every test here.
nothing_is_left, folder = policy_pool.nothing_is_left, policy_pool.folder


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
        [_, before] = (await pool.client.get("/api/admin/plugins")).json()["coordinator"]
        assert (before["name"], before["import_seconds"] is not None) == ("night", True)
        assert (await rescan(pool))["changed"] == []
        assert (await pool.client.get("/api/admin/plugins")).json()["coordinator"][1] == before
        entries = await audit(pool)
        await rescan(pool)
        assert await audit(pool) == entries, "nothing new was found"


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
