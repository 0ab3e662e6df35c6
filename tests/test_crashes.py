"""Workers and the coordinator die at any moment, as real processes: each acknowledged task still ends exactly once."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx2
import pytest

from rma_core.models.channel import RESUME_WITHIN_S
from tests import crash_kit, slow_service
from tests.netns import machine
from tests.storm import check_executed, check_store, pass_over

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.crash_kit import Town
    from tests.netns import Machine

#: Seconds that a request of these tests takes by itself.
WORK_S = 4.0
#: What a slow machine may take on top of what the design promises.
SLACK_S = 30.0
#: The shortest lease there can be, and the usual one.
SHORT_LEASE_S, LEASE_S = 25.0, 60.0


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A short path: the services listen on Unix sockets below it.
    return tmp_path_factory.mktemp("t")


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    with machine(31) as first, machine(32) as second:
        yield first, second


class Ask(NamedTuple):
    """A request: its name, its body, and whether its client waits or is told later."""

    name: str
    body: bytes
    waits: bool
    key: str = ""


#: What runs when a machine is lost: small and streamed answers, for clients that wait and for such that are told later.
#: What a waiting client streams begins late: an answer of which it has seen some cannot be begun anew.
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "small-waits": (True, {"before_s": WORK_S}),
    "small-later": (False, {"before_s": WORK_S}),
    "stream-waits": (True, {"before_s": WORK_S - 1, "during_s": 1, "pieces": 8, "filling": 100_000}),
    "stream-later": (False, {"before_s": 0.2, "during_s": WORK_S, "pieces": 8, "filling": 100_000}),
}


def ask(kind: str, number: int) -> Ask:
    """Return the n-th request of a kind."""
    waits, shape = KINDS[kind]
    name = f"{kind}-{number}"
    return Ask(name, slow_service.request(name, **shape), waits)


async def outcome(client: httpx2.AsyncClient, ask: Ask) -> str:
    """Make a request, see its whole and right answer, and return its task's id."""
    if ask.waits:
        answer = await client.post("/api/inference/slow", content=ask.body)
        assert answer.status_code == 200, (ask.name, answer.text)
        task_id = answer.headers["rma-task-id"]
    else:
        headers = {"Prefer": "respond-async"} | ({"Idempotency-Key": ask.key} if ask.key else {})
        made = await client.post("/api/inference/slow", content=ask.body, headers=headers)
        assert made.status_code == 202, (ask.name, made.text)
        task_id, url, status = made.json()["task_id"], made.headers["location"], ""
        while status not in ("succeeded", "failed", "cancelled"):
            found = (await client.get(f"{url}?wait=20")).json()
            status = found["status"]
        assert status == "succeeded", (ask.name, found)
        answer = await client.get(found["result_url"])
    assert slow_service.answers(ask.body, answer.json()), (ask.name, answer.text[:200])
    return str(task_id)


class Under(NamedTuple):
    """Requests that the machines work on: who began each, and the outcomes that are to come."""

    first: dict[str, str]
    outcomes: dict[str, asyncio.Task[str]]


async def spread(made: Town, client: httpx2.AsyncClient) -> Under:
    """Begin two requests of each kind, one after the other: the freest machine gets the next, so each gets one."""
    under, before = Under({}, {}), len(slow_service.noted(made.log))
    for kind in KINDS:
        for number in (before, before + 1):
            one = ask(kind, number)
            under.outcomes[one.name] = made.begin(outcome(client, one))
            under.first[one.name] = (
                await crash_kit.until(functools.partial(made.where, one.name), what=f"{one.name} runs\n{made.words()}")
            )[0]
    return under


async def all_end(made: Town, under: Under, *, within_s: float) -> dict[str, str]:
    """Wait until every request has its right answer; return the tasks' ids by name."""
    await asyncio.wait(under.outcomes.values(), timeout=within_s, return_when=asyncio.FIRST_EXCEPTION)
    late = [name for name, one in under.outcomes.items() if not one.done()]
    try:
        found = {name: one.result() for name, one in under.outcomes.items() if one.done()}
    except AssertionError as error:
        raise AssertionError(f"{error}\n{made.words()}") from None
    assert not late, f"not within {within_s:.0f} s: {late}\n{made.words()}"
    return found


async def attempts(client: httpx2.AsyncClient) -> dict[str, list[tuple[str, str]]]:
    """Return for each task who had it and how that ended, attempt by attempt."""
    found = (await client.get("/api/admin/tasks?limit=500")).json()["tasks"]
    return {task["task_id"]: [(one["worker_id"], one["status"]) for one in task["attempts"]] for task in found}


async def check_once(made: Town, client: httpx2.AsyncClient, ids: dict[str, str], under: Under) -> None:
    """Assert that each task ended once, and only what the lost machine had was begun elsewhere."""
    told = await attempts(client)
    for name, task_id in ids.items():
        states = [state for _, state in told[task_id]]
        assert states.count("succeeded") == 1, (name, told[task_id])
        if under.first[name] == "m1":
            assert states == ["succeeded"], (name, told[task_id])
        else:
            assert made.where(name)[:2] == ["m0", "m1"], (name, told[task_id], made.where(name))


async def check_books(made: Town, ids: Sequence[str]) -> None:
    """End the coordinator as a person does and look what it has kept."""
    assert made.stop(signal.SIGTERM) == 0, made.words()
    found = await crash_kit.kept(made.home)
    crash_kit.check_ends(found, made.home)
    assert set(found.ledger) == set(ids)


async def afterwards(made: Town, client: httpx2.AsyncClient) -> list[str]:
    """Send as much as fills one machine until both serve again; return the ids of the tasks that show it."""
    ids: list[str] = []
    deadline = time.monotonic() + crash_kit.PATIENCE_S
    while time.monotonic() < deadline:
        names = [f"again-{len(ids)}-{number}" for number in range(crash_kit.SLOTS + 1)]
        bodies = {name: slow_service.request(name, before_s=1) for name in names}
        made_now = [outcome(client, Ask(name, body, waits=True)) for name, body in bodies.items()]
        ids += await asyncio.gather(*made_now)
        if {made.where(name)[-1] for name in names} == {"m0", "m1"}:
            return ids
    raise AssertionError(f"both machines serve again\n{made.words()}")


async def hit(made: Town, client: httpx2.AsyncClient) -> Under:
    """Return requests of which each kind runs on both machines."""
    under = await spread(made, client)
    kinds = {name.rpartition("-")[0] for name, where in under.first.items() if where == "m0"}
    assert kinds == set(KINDS), under.first
    return under


#: Two namespaces reach the coordinator, so it listens everywhere.
EVERYWHERE = "0.0.0.0"
#: In the suite a lease ends early; `make soak` waits for the usual one.
LEASES = [SHORT_LEASE_S, pytest.param(LEASE_S, marks=pytest.mark.soak)]


async def on_first(made: Town, client: httpx2.AsyncClient, *, work_s: float) -> Under:
    """Begin requests that take longer until the first machine has one."""
    under = Under({}, {})
    while "m0" not in under.first.values():
        name = f"long-{len(under.first)}"
        body = slow_service.request(name, before_s=work_s)
        under.outcomes[name] = made.begin(outcome(client, Ask(name, body, waits=False)))
        under.first[name] = (await crash_kit.until(functools.partial(made.where, name), what=f"{name} runs"))[0]
    return under


async def seen_from(made: Town, client: httpx2.AsyncClient) -> Under:
    """Begin answers that their clients see from the start, until the first machine gives one; each is to be cut."""
    under = Under({}, {})
    while "m0" not in under.first.values():
        name, begun = f"seen-{len(under.first)}", asyncio.Event()
        body = slow_service.request(name, during_s=600, pieces=100, filling=100_000)
        under.outcomes[name] = made.begin(is_cut(client, body, begun))
        async with asyncio.timeout(crash_kit.PATIENCE_S):
            await begun.wait()
        under.first[name] = made.where(name)[0]
    return under


async def is_cut(client: httpx2.AsyncClient, body: bytes, begun: asyncio.Event) -> str:
    """See some of an answer, and then its connection break: it must never look whole."""
    async with client.stream("POST", "/api/inference/slow", content=body) as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces)
        begun.set()
        with pytest.raises(httpx2.RemoteProtocolError):
            [_ async for _ in pieces]
        return str(answer.headers["rma-task-id"])


@pytest.mark.timeout(300)
async def test_an_agent_killed_in_the_middle_of_its_tasks_costs_the_clients_only_time(
    folder: Path, machines: tuple[Machine, Machine]
) -> None:
    async with crash_kit.town(folder, machines, host=EVERYWHERE) as made, made.client() as client:
        seen = await seen_from(made, client)
        under = await hit(made, client)
        made.agents["m0"].stop(signal.SIGKILL)
        ids = await all_end(made, under, within_s=RESUME_WITHIN_S + WORK_S + SLACK_S)
        await check_once(made, client, ids, under)
        [cut] = [seen.outcomes[name] for name, where in seen.first.items() if where == "m0"]
        told = await attempts(client)
        assert [state for _, state in told[await cut]] == ["failed"], "what a client has seen of cannot be begun anew"
        for one in seen.outcomes.values():
            one.cancel()
        made.start_agent("m0", "", machines[0])
        await check_books(made, [*ids.values(), *await afterwards(made, client)])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("lease_s", LEASES)
async def test_a_pulled_cable_costs_the_clients_only_time_and_plugged_in_again_the_machine_serves(
    folder: Path, machines: tuple[Machine, Machine], lease_s: float
) -> None:
    env = {"RMA_LEASE_S": str(lease_s)}
    async with crash_kit.town(folder, machines, host=EVERYWHERE, **env) as made, made.client(timeout_s=180) as client:
        under = await hit(made, client)
        machines[0].cable("down")
        ids = await all_end(made, under, within_s=lease_s + RESUME_WITHIN_S + WORK_S + SLACK_S)
        await check_once(made, client, ids, under)
        machines[0].cable("up")
        await check_books(made, [*ids.values(), *await afterwards(made, client)])


@pytest.mark.timeout(400)
@pytest.mark.parametrize("lease_s", LEASES)
async def test_an_agent_frozen_beyond_its_lease_and_thawed_ends_nothing_again_and_serves(
    folder: Path, machines: tuple[Machine, Machine], lease_s: float
) -> None:
    env = {"RMA_LEASE_S": str(lease_s)}
    async with crash_kit.town(folder, machines, host=EVERYWHERE, **env) as made, made.client(timeout_s=180) as client:
        under, long = await hit(made, client), await on_first(made, client, work_s=lease_s)
        made.agents["m0"].process.send_signal(signal.SIGSTOP)
        ids = await all_end(made, under, within_s=lease_s + RESUME_WITHIN_S + WORK_S + SLACK_S)
        before = await attempts(client)
        # Its services went on: it wakes with the whole answer to what the other machine still works on.
        made.agents["m0"].process.send_signal(signal.SIGCONT)
        late = await all_end(made, long, within_s=lease_s + SLACK_S)
        await check_once(made, client, ids | late, Under(under.first | long.first, {}))
        again = await afterwards(made, client)
        told = await attempts(client)
        assert {task_id: told[task_id] for task_id in ids.values()} == {one: before[one] for one in ids.values()}
        await check_books(made, [*ids.values(), *late.values(), *again])


# -- the coordinator -------------------------------------------------------------------------------------------------

#: Seconds between heartbeats: who misses three of them is offline, were it his own doing.
BEAT_S = 2.0


async def weather(folder: Path, *, kills: int) -> None:
    """Let a storm pass over a coordinator and two agents, and assert that nothing was lost or done twice."""
    seed = int(os.environ.get("RMA_SEED") or secrets.randbelow(2**31))
    print(f"seed {seed} (RMA_SEED)")  # noqa: T201 - pytest shows it with a failure
    settings = {"RMA_WEBHOOK_HTTP": "1", "RMA_WEBHOOK_NETWORKS": "127.0.0.0/8", "RMA_HEARTBEAT_INTERVAL_S": str(BEAT_S)}
    async with crash_kit.town(folder, [None, None], **settings) as made:
        pids = {name: agent.process.pid for name, agent in made.agents.items()}
        found = await pass_over(made, kills=kills, seed=seed)
        await made.serving(2)
        check_executed(made, found)
        await check_store(made, found)
        print(dict(found.counts))  # noqa: T201 - what the storm was like
        assert found.counts["acknowledged"], "nobody asked for anything"
        assert not found.violations, "\n".join([*found.violations, made.words()])
        assert {name: agent.process.pid for name, agent in made.agents.items() if agent.process.poll() is None} == pids
        assert not [line for line in made.said if "Traceback" in line or " ERROR " in line or " CRITICAL " in line]
        assert "Traceback" not in "\n".join(agent.text for agent in made.agents.values())


@pytest.mark.timeout(600)
async def test_a_coordinator_killed_again_and_again_loses_no_task_and_does_none_twice(folder: Path) -> None:
    await weather(folder, kills=12)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_a_coordinator_killed_fifty_times_loses_no_task_and_does_none_twice(folder: Path) -> None:
    await weather(folder, kills=50)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_what_agents_finished_while_the_coordinator_was_away_for_more_than_a_lease_is_not_done_again(
    folder: Path,
) -> None:
    async with crash_kit.town(folder, [None, None]) as made:
        asks = [
            Ask(
                name,
                slow_service.request(name, before_s=before_s, pieces=pieces, filling=filling),
                waits=False,
                key=name,
            )
            for name, before_s, pieces, filling in [
                ("small", 2.0, 0, 10),
                ("large", 2.0, 0, 300_000),
                ("stream", 2.0, 4, 100_000),
                ("long", LEASE_S + 10, 0, 10),
            ]
        ]
        ids: dict[str, str] = {}
        async with made.client() as client:
            for one in asks:
                headers = {"Prefer": "respond-async", "Idempotency-Key": one.key}
                sent = await client.post("/api/inference/slow", content=one.body, headers=headers)
                ids[one.name] = sent.json()["task_id"]
            for one in asks:
                await crash_kit.until(functools.partial(made.where, one.name), what=f"{one.name} runs")
            # What has begun is on disk a moment later.
            await asyncio.sleep(1)
        made.stop()
        await asyncio.sleep(LEASE_S + 5)
        made.start()
        await made.ready()
        async with made.client() as client:
            for one in asks:
                assert await outcome(client, one) == ids[one.name]
        assert [len(made.where(one.name)) for one in asks[:3]] == [1, 1, 1], made.words()
        await check_books(made, list(ids.values()))
