"""Rules of placement on a live pool: applying does what a preview says, and a restart goes by them."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from bench import _load
from rma_coordinator import effects as effects_module
from rma_coordinator.arranging import KEY, RulesRecord
from rma_coordinator.domain.census import NOTHING
from rma_coordinator.domain.rules import read_rules
from rma_coordinator.store import Put, StoreFailed
from rma_core import Needs
from rma_core.models.worker import ContainerStatus
from tests.coordinator_fixtures import CATALOG, Running, StandIn, entry, running
from tests.coordinator_process import coordinating
from tests.pools import environment, rma
from tests.test_coordinator_api import check_problem

if TYPE_CHECKING:
    from pathlib import Path

TWO = '[services.notes]\nwanted = 1\nmost = 2\n\n[services.ner]\nonly = { labels = { site = "lab" } }\n'


async def fleet(pool: Running, count: int = 3) -> list[StandIn]:
    """Machines that have joined, the first ones in the attic, by id."""
    made = [await pool.enrol(labels={"site": "lab" if number == count - 1 else "attic"}) for number in range(count)]
    for machine in made:
        await machine.beat()
    return sorted(made, key=lambda one: one.id)


def who(pool: Running, service: str) -> list[str]:
    workers = pool.pool.fleet.workers.values()
    return sorted(w.id for w in workers if any(one.service == service for one in w.brief.assignment))


async def preview(pool: Running, text: str) -> dict[str, Any]:
    answer = await pool.client.post("/api/admin/placement/preview", json={"file": text})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def apply(pool: Running, text: str, **more: Any) -> dict[str, Any]:
    answer = await pool.client.put("/api/admin/placement", json={"file": text, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_what_a_preview_names_is_what_changes_and_nothing_before_that(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool, 4)
        everyone = [one.id for one in machines]
        assert who(pool, "notes") == who(pool, "ner") == everyone
        shown = await preview(pool, TWO)
        assert who(pool, "notes") == who(pool, "ner") == everyone, "it was no more than looked at"
        assert {(row["service"], row["now"], row["then"]) for row in shown["services"]} == {
            ("ner", 4, 1),
            ("notes", 4, 2),
        }
        [lab] = [one.id for one in machines if pool.pool.fleet.get(one.id).record.labels["site"] == "lab"]
        done = await apply(pool, TWO, plan=shown["plan"])
        assert (done["workers"], done["was"]) == (shown["workers"], "")
        left = {row["worker_id"] for row in shown["workers"] if "notes" in row["stops"]}
        assert who(pool, "notes") == sorted(set(everyone) - left)
        assert who(pool, "ner") == [lab]
        # Who runs it no more learns of that with its next heartbeat, and why.
        worker_id = next(iter(left - {lab}))
        [machine] = [one for one in machines if one.id == worker_id]
        answer = (await machine.beat(generation=machine.answer["generation"])).json()
        assert answer["containers"] == []
        told = (await pool.client.get(f"/api/admin/workers/{worker_id}")).json()["placement"]
        assert told["notes"] == "the pool runs as many copies as it may (2)"
        assert told["ner"] == "it is kept to machines with site = lab"
        again = await preview(pool, TWO)
        assert (again["changes"], again["looked_at"]) == (0, 4)


async def test_a_preview_says_how_large_the_images_are_that_machines_would_have_to_fetch(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool, 3)
        await apply(pool, TWO)
        before = await preview(pool, "[services.notes]\nmost = 2\n")
        assert [(row["images"], row["image_bytes"], row["images_unknown"]) for row in before["workers"]] == [
            (1, 0, 1)
        ] * 2
        [has] = [one for one in machines if one.id in who(pool, "ner")]
        box = ContainerStatus(name="ner-worker", service="ner", state="healthy", image_bytes=3 * 10**9)
        assert (await has.beat(containers=(box,))).status_code == 200
        shown = await preview(pool, "[services.notes]\nmost = 2\n")
        rows = [(row["images"], row["image_bytes"], row["images_unknown"]) for row in shown["workers"]]
        assert rows == [(1, 3 * 10**9, 0)] * 2
        assert (shown["images"], shown["image_bytes"], shown["images_unknown"]) == (2, 6 * 10**9, 0)
        assert shown["plan"] == before["plan"], "it is what was agreed to, whatever is heard of it meanwhile"


async def test_when_one_that_has_a_copy_leaves_another_takes_it_with_its_next_heartbeat(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool, 3)
        await apply(pool, "[services.notes]\nmost = 1\nwanted = 1\n")
        [has] = who(pool, "notes")
        pool.pool.unregister(pool.pool.fleet.get(has))
        others = [one for one in machines if one.id != has]
        for machine in others:
            assert (await machine.beat()).status_code == 200
        assert who(pool, "notes") == sorted([has, others[0].id]), "who is away keeps its list, and does not count"
        assert pool.pool.fleet.assigned()["notes"] == 1


async def test_a_fleet_that_changed_since_the_preview_is_looked_at_once_more(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        await fleet(pool, 3)
        shown = await preview(pool, TWO)
        await pool.enrol(labels={"site": "lab"})
        refused = await pool.client.put("/api/admin/placement", json={"file": TWO, "plan": shown["plan"]})
        check_problem(refused, 409)
        assert pool.pool.arranging.record.text == ""
        await apply(pool, TWO, plan=(await preview(pool, TWO))["plan"])


async def test_rules_hold_over_a_restart_and_can_be_taken_back(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool)
        await apply(pool, TWO)
        kept = who(pool, "notes")
        assert len(kept) == 2
        entries = (await pool.client.get("/api/admin/audit")).json()["entries"]
        assert entries[0]["action"] == "rules_applied"
        assert entries[0]["by"]
    async with running(tmp_path) as pool:
        told = (await pool.client.get("/api/admin/placement")).json()
        assert (told["text"], told["trouble"]) == (TWO, "")
        assert told["rules"]["services"]["notes"] == {**told["rules"]["services"]["notes"], "wanted": 1, "most": 2}
        for machine in machines:
            found = StandIn(pool, machine.key, machine.answer)
            assert (await found.beat()).status_code == 200
        assert who(pool, "notes") == kept
        done = await apply(pool, "")
        assert done["was"] == TWO
        assert len(who(pool, "notes")) == len(who(pool, "ner")) == 3


async def test_what_the_catalog_has_no_more_is_said_at_the_start_and_the_rest_holds(
    tmp_path: Path, caplog: Any
) -> None:
    async with running(tmp_path) as pool:
        await apply(pool, TWO)
    async with running(tmp_path, entries=CATALOG[:1]) as pool:
        assert "name what the catalog does not have: ner" in caplog.text
        await fleet(pool)
        assert len(who(pool, "notes")) == 2


async def test_rules_that_cannot_be_read_any_more_are_kept_and_said_to_be_in_force_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        await apply(pool, TWO)
        await pool.pool.store.commit([Put(KEY, RulesRecord(text="strategy = 'of a later version'"))])
    async with running(tmp_path) as pool:
        told = (await pool.client.get("/api/admin/placement")).json()
        assert "line 1, strategy: is fill, spread or pack" in told["trouble"]
        await fleet(pool)
        assert len(who(pool, "ner")) == 3


async def test_bad_rules_are_refused_with_their_lines_and_nothing_changes(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        await apply(pool, TWO)
        for call in ("/api/admin/placement/preview", "/api/admin/placement"):
            method = "POST" if call.endswith("preview") else "PUT"
            bad = await pool.client.request(method, call, json={"file": f"{TWO}mots = 1\n[services.nothing]\n"})
            check_problem(bad, 400)
            assert "line 7, services.ner.mots: is unknown" in bad.text
            assert "line 8, services.nothing: the pool has no such service" in bad.text
        assert pool.pool.arranging.record.text == TWO
        reader = await pool.make_key("admin:read", kind="admin")
        headers = pool.bearer(reader)
        assert (await pool.client.put("/api/admin/placement", json={"file": ""}, headers=headers)).status_code == 403


async def test_a_service_says_where_it_runs_and_what_keeps_it_from_running_elsewhere(tmp_path: Path) -> None:
    huge = entry("ner", wanted=2)
    async with running(tmp_path, entries=(CATALOG[0], huge)) as pool:
        machines = await fleet(pool)
        ill = ContainerStatus(name="ner-worker", service="ner", state="backoff", reason="its image is missing")
        await machines[0].beat(containers=(ill,))
        await machines[1].beat(containers=())
        await apply(pool, f'[services.ner]\nonly = {{ workers = ["{machines[0].id}"] }}\n')
        found = (await pool.client.get("/api/admin/services/ner")).json()
        assert (found["wanted"], found["assigned"], found["healthy"]) == (2, 1, 0)
        assert found["only"] == machines[0].id
        assert [(one["worker_id"], one["state"], one["reason"]) for one in found["workers"]] == [
            (machines[0].id, "backoff", "its image is missing")
        ]
        reasons = {one["reason"]: one["workers"] for one in found["reasons"]}
        assert reasons == {f"it is kept to {machines[0].id}": 2, "backoff: its image is missing": 1}
        listed = {one["service"]: one for one in (await pool.client.get("/api/admin/services")).json()["services"]}
        assert listed["ner"]["reasons"] == found["reasons"]
        assert listed["notes"]["reasons"] == [{"reason": "it was assigned just now", "workers": 2}]


# -- who comes, goes and changes meanwhile -----------------------------------------------------------------------------


async def settle(machines: list[StandIn]) -> None:
    for _ in range(4):
        for machine in machines:
            assert (await machine.beat(containers=())).status_code == 200


@pytest.mark.parametrize("back", ["beat", "register", "enable"])
async def test_one_that_comes_back_makes_the_pool_look_at_who_took_its_copy_over(tmp_path: Path, back: str) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool, 3)
        await apply(pool, "[services.notes]\nmost = 1\nwanted = 1\nprefer = { labels = { site = 'lab' } }\n")
        await settle(machines)
        [has] = who(pool, "notes")
        [gone] = [one for one in machines if one.id == has]
        worker, others = pool.pool.fleet.get(has), [one for one in machines if one is not gone]
        if back == "enable":
            await pool.pool.set_disabled(worker, disabled=True)
        else:
            pool.pool.unregister(worker)
        await settle(others)
        assert len([one for one in who(pool, "notes") if one != has]) == 1
        if back == "beat":
            assert (await gone.beat(containers=())).status_code == 200
        elif back == "register":
            gone = await pool.enrol(gone.key, labels=worker.record.labels)
        else:
            await pool.pool.set_disabled(worker, disabled=False)
        await settle(others if back == "enable" else [*others, gone])
        assert who(pool, "notes") == [has], "it is preferred, and there is to be one"


async def test_a_machine_that_is_drained_leaves_what_is_lacked_to_others(tmp_path: Path) -> None:
    catalog = (msgspec.structs.replace(entry("ner", wanted=1), tiers=()),)
    async with running(tmp_path, entries=catalog) as pool:
        machines = await fleet(pool, 3)
        await apply(pool, 'strategy = "spread"\n[services.ner]\nwanted = 0\n')
        assert who(pool, "ner") == []
        for machine in machines[:2]:
            await machine.beat(containers=(), draining=True)
        await apply(pool, 'strategy = "spread"\n')
        assert who(pool, "ner") == [machines[2].id]
        told = (await pool.client.get(f"/api/admin/workers/{machines[0].id}")).json()["placement"]
        assert told["ner"] == "enough copies in the pool (1 running, 1 wanted)"
        pool.pool.unregister(pool.pool.fleet.get(machines[2].id))
        for machine in machines[:2]:
            await machine.beat(containers=(), draining=True)
        assert who(pool, "ner") == [machines[2].id]
        told = (await pool.client.get(f"/api/admin/workers/{machines[0].id}")).json()["placement"]
        assert told["ner"] == "the machine is being drained"
        await machines[1].beat(containers=(), draining=False)
        assert machines[1].id in who(pool, "ner")


async def test_what_an_owner_takes_back_while_rules_are_put_in_force_is_not_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool:
        machines = await fleet(pool, 2)
        worker, store = pool.pool.fleet.get(machines[0].id), pool.pool.store
        commit = store.commit

        async def meanwhile(changes: Any, **more: Any) -> None:
            worker.record = msgspec.structs.replace(worker.record, services=("ner",))
            await commit(changes, **more)

        monkeypatch.setattr(store, "commit", meanwhile)
        await apply(pool, "[services.notes]\nmost = 2\n")
        assert who(pool, "notes") == [machines[1].id]


async def test_a_policy_is_previewed_under_rules_while_workers_change(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(effects_module, "AT_ONCE", 1)
    async with running(tmp_path) as pool:
        await fleet(pool, 4)
        await apply(pool, "[services.notes]\nmost = 2\nwanted = 1\n")
        every = {"policy": "every", "file": '[[tiers]]\ntier = 7\nname = "all"\n'}
        shown = (await pool.client.post("/api/admin/policies/preview", json=every)).json()
        now = {row["service"]: row for row in shown["services"]}
        assert (now["notes"]["now"], now["notes"]["then"]) == (2, 1), "nobody prefers it in that tier"
        every["file"] += 'prefers = ["notes"]\n'
        shown = (await pool.client.post("/api/admin/policies/preview", json=every)).json()
        assert {row["then"] for row in shown["services"] if row["service"] == "notes"} == {2}
        plan = await pool.pool.switching.plan(pool.pool.tiers.find().policy)
        plan = plan._replace(rows=[row._replace(new_tier=7) for row in plan.rows])
        counting = asyncio.create_task(effects_module.effects(pool.pool, plan))
        await asyncio.sleep(0)
        for worker in pool.pool.fleet.workers.values():
            pool.pool.fleet.stand(worker, NOTHING)
        found = await counting
        assert next(one for one in found.capacity if one.service == "notes").then == 1


async def test_rules_whose_commit_was_given_up_are_not_in_force_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as pool:
        await fleet(pool, 1)
        store = pool.pool.store
        commit = store.commit

        async def kept_all_the_same(changes: Any, **more: Any) -> None:
            await commit(changes, **more)
            raise StoreFailed("nobody knows whether it was kept")

        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", kept_all_the_same)
            failed = await pool.client.put("/api/admin/placement", json={"file": TWO})
            assert failed.status_code == 503
        assert pool.pool.arranging.record.text == ""
        await pool.pool.flush()
    async with running(tmp_path) as pool:
        assert pool.pool.arranging.record.text == ""


async def test_after_a_restart_a_copy_that_is_lacked_goes_to_whom_the_strategy_says(tmp_path: Path) -> None:
    cores = {"a": 5, "b": 4, "c": 4}
    catalog = tuple(
        msgspec.structs.replace(entry(name, wanted=1), tiers=(), needs=Needs(cpu_cores=count))
        for name, count in cores.items()
    )
    async with running(tmp_path, entries=catalog[:2]) as pool:
        machines = await fleet(pool, 3)
        await pool.pool.store.commit([Put(KEY, RulesRecord(text='[services.c]\nstrategy = "spread"\n'))])
        [full], [busy] = who(pool, "a"), who(pool, "b")
        assert full != busy
    async with running(tmp_path, entries=catalog) as pool:
        # The one that has room beside what it runs comes first, and leaves the new one to who runs nothing.
        for machine in sorted(machines, key=lambda one: one.id != busy):
            found = StandIn(pool, machine.key, machine.answer)
            assert (await found.beat(containers=())).status_code == 200
        assert {*who(pool, "c")} == {one.id for one in machines} - {full, busy}


async def test_applying_gives_a_lack_to_the_best_machine_and_lets_others_give_way_at_once(tmp_path: Path) -> None:
    catalog = (entry("notes"), msgspec.structs.replace(entry("ner", wanted=1), tiers=()))
    async with running(tmp_path, entries=catalog) as pool:
        machines = await fleet(pool, 4)
        first, last = machines[0].id, machines[-1].id
        # In this order those that give way are looked at before and after those that take over.
        for one in (first, last, first):
            await apply(pool, f'[services.ner]\nwanted = 1\nmost = 1\nprefer = {{ workers = ["{one}"] }}\n')
            assert who(pool, "ner") == [one]
        text = f'strategy = "spread"\n[services.notes]\nonly = {{ workers = ["{first}", "{machines[1].id}"] }}\n'
        await apply(pool, f"{text}[services.ner]\nwanted = 0\n")
        assert (who(pool, "notes"), who(pool, "ner")) == (sorted([first, machines[1].id]), [])
        await apply(pool, text)
        [idle] = who(pool, "ner")
        assert idle in (machines[2].id, last), "those that run notes leave it to those that run nothing"
        # From then on heartbeats go by the same counts.
        pool.pool.unregister(pool.pool.fleet.get(idle))
        await settle([one for one in machines if one.id != idle])
        assert {*who(pool, "ner")} - {idle} == {machines[2].id, last} - {idle}


async def test_two_who_apply_at_once_leave_the_rules_of_one_of_them(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        await fleet(pool, 3)
        texts = [f"[services.notes]\nmost = {most}\nwanted = 1\n" for most in (1, 2)]
        await asyncio.gather(*(apply(pool, text) for text in texts))
        arranging = pool.pool.arranging
        assert arranging.now.rules == read_rules(arranging.record.text)
        assert len(who(pool, "notes")) == arranging.now.rules.of("notes").most


async def test_what_a_pool_lacks_is_told_before_that_there_is_enough(tmp_path: Path) -> None:
    async with running(tmp_path, entries=(msgspec.structs.replace(entry("ner", wanted=1), tiers=()),)) as pool:
        machines = await fleet(pool, 4)
        [has] = who(pool, "ner")
        ill = ContainerStatus(name="ner-worker", service="ner", state="backoff", reason="its image is missing")
        for machine in machines:
            await machine.beat(containers=(ill,) if machine.id == has else ())
        [listed] = (await pool.client.get("/api/admin/services")).json()["services"]
        assert listed["reasons"] == [{"reason": "backoff: its image is missing", "workers": 1}]


async def test_a_pool_with_too_few_machines_is_told_that(tmp_path: Path) -> None:
    async with running(tmp_path, entries=(msgspec.structs.replace(entry("ner", wanted=3), tiers=()),)) as pool:

        async def told() -> list[dict[str, Any]]:
            [listed] = (await pool.client.get("/api/admin/services")).json()["services"]
            shown = (await pool.client.get("/api/admin/services/ner")).json()["reasons"]
            assert shown == listed["reasons"]
            return list(shown)

        nobody = [{"reason": "no machine is online and takes part", "workers": 0}]
        assert await told() == nobody
        healthy = (ContainerStatus(name="ner-worker", service="ner", state="healthy"),)
        for machine in (machines := await fleet(pool, 2)):
            await machine.beat(containers=healthy)
        why = "each machine that is online and takes part runs a copy, and gets no second one"
        assert await told() == [{"reason": why, "workers": 2}]
        for machine in machines:
            await pool.pool.set_disabled(pool.pool.fleet.get(machine.id), disabled=True)
        assert await told() == nobody
        for machine in machines:
            await pool.pool.set_disabled(pool.pool.fleet.get(machine.id), disabled=False)
            await machine.beat(containers=healthy)
        assert await told() == [{"reason": why, "workers": 2}]
        [third] = await fleet(pool, 1)
        await third.beat(containers=healthy)
        assert await told() == []


async def test_fewer_than_the_catalog_wants_may_be_the_most_and_are_then_enough(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        await fleet(pool, 3)
        done = await apply(pool, "[services.ner]\nmost = 1\n")
        [row] = [one for one in done["services"] if one["service"] == "ner"]
        assert (row["wanted"], row["then"], row["short"]) == (1, 1, False)


# -- what policies prefer ----------------------------------------------------------------------------------------------


async def test_a_policy_that_only_prefers_other_services_moves_workers_too(tmp_path: Path) -> None:
    def policy(more: str) -> str:
        return f'[[tiers]]\ntier = 7\nname = "all"\n{more}'

    catalog = tuple(
        msgspec.structs.replace(entry(name, wanted=1), needs=Needs(cpu_cores=6)) for name in ("ner", "notes")
    )
    async with running(tmp_path, entries=catalog) as pool:
        await pool.client.put("/api/admin/policies/active", json={"policy": "every", "file": policy("")})
        machine = await pool.enrol()
        assert who(pool, "ner") == [machine.id], "of two that fit alone the first by name"
        text = policy('prefers = ["notes", "nothing-like-it"]')
        shown = (await pool.client.post("/api/admin/policies/preview", json={"policy": "every", "file": text})).json()
        assert shown["changes"] == 1
        stale = {"policy": "every", "file": policy('prefers = ["ner", "notes"]'), "plan": ""}
        stale["plan"] = (await pool.client.post("/api/admin/policies/preview", json=stale)).json()["plan"]
        refused = await pool.client.put("/api/admin/policies/active", json={**stale, "file": text})
        assert refused.status_code == 409, "it prefers something else than what was seen"
        shadow = (await pool.client.put("/api/admin/policies/shadow", json={"policy": "every", "file": text})).json()
        assert [row["reason"].partition("; it prefers ")[2] for row in shadow["workers"]] == ["notes, nothing-like-it"]
        assert shown["unknown_services"] == ["nothing-like-it"]
        [row] = shown["workers"]
        assert (row["from"], row["to"], row["stops"], row["starts"]) == (7, 7, ["ner"], ["notes"])
        asked = {"policy": "every", "file": text, "plan": shown["plan"]}
        done = await pool.client.put("/api/admin/policies/active", json=asked)
        assert done.status_code == 200, done.text
        async with asyncio.timeout(10):
            while who(pool, "notes") != [machine.id]:  # noqa: ASYNC110 - what is waited for is not ours to signal
                await asyncio.sleep(0.02)
        assert who(pool, "ner") == []
        told = (await pool.client.get(f"/api/admin/workers/{machine.id}")).json()
        assert told["prefers"] == ["notes", "nothing-like-it"]


# -- commands ----------------------------------------------------------------------------------------------------------


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    stdin = subprocess.DEVNULL
    return subprocess.run(command, env=env, stdin=stdin, capture_output=True, text=True, timeout=60, check=False)


async def test_rules_are_shown_previewed_applied_and_taken_back_by_commands(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "rules.toml"
    file.write_text("[services.notes]\nwanted = 0\n")
    async with coordinating(home) as (coordinator, client):
        token = (await client.post("/api/admin/tokens", json={"uses": 1})).json()["token"]
        large = max(_load.machines(), key=lambda one: one.memory_bytes)
        machine = _load.Machine(coordinator.url, large, by_channel=False)
        await machine.register(token)
        await machine.close()
        env = environment(home)

        def services(*arguments: str) -> str:
            done = run(rma("services", *arguments), env)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert "No rules are in force" in services("rules")
        shown = json.loads(services("preview", str(file), "--json"))
        [row] = shown["workers"]
        assert (row["worker_id"], row["stops"]) == (machine.worker_id, ["notes"])
        assert machine.worker_id in services("preview", str(file))
        refused = run(rma("services", "apply", str(file)), env)
        assert refused.returncode == 2
        assert "nobody can be asked here, and nothing was changed" in refused.stderr
        assert services("apply", str(file), "--yes") == "The rules are in force; workers that change: 1.\n"
        assert services("rules").strip() == file.read_text().strip()
        listed = {one["service"]: one for one in json.loads(services("--json"))["services"]}
        assert (listed["notes"]["wanted"], listed["notes"]["assigned"]) == (0, 0)
        assert "the pool wants no copies of it" in services("show", "notes")
        both = run(rma("services", "apply", str(file), "--none"), env)
        assert (both.returncode, "give a file, or --none" in both.stderr) == (2, True)
        file.write_text("[services.notes]\nwanted = many\n")
        wrong = run(rma("services", "apply", str(file), "--yes"), env)
        assert (wrong.returncode, "line 2: invalid value" in wrong.stderr) == (1, True), wrong.stderr
        assert services("apply", "--none", "--yes") == "No rules are in force; workers that change: 1.\n"
        missing = run(rma("services", "show", "nobody-has-this"), env)
        assert missing.returncode == 6
