"""Whose machine it is: an owner's own requests come first there, and nobody else learns of it or pays for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from rma_coordinator.domain.choosing import AS_GOOD, LOOKED_AT
from rma_coordinator.domain.credentials import JoinTokenRecord, KeyRecord
from rma_coordinator.domain.records import TaskRecord
from rma_coordinator.domain.tasks import Task
from rma_coordinator.domain.worker_records import WorkerRecord
from rma_core.agent.keys import DeviceKey
from rma_core.commands import run
from rma_core.models.hardware import HardwareReport
from tests.coordinator_fixtures import MACHINE, StandIn, running, until
from tests.dispatch_bench import Bench
from tests.openai_kit import CHAT, HELLO, JSON, REPLY, attach
from tests.test_choosing import Pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from httpx2 import Response

    from rma_core.models import channel as frames
    from tests.coordinator_fixtures import Line, Running

# -- the rule ----------------------------------------------------------------------------------------------------------


def test_an_owners_tasks_come_first_on_the_owners_machine_even_before_what_was_promised_it() -> None:
    pool = Pool({"own": (0.0, 0.01), "slow": (0.0, 0.2)})
    pool.dispatcher.belongs("own", "alice")
    busy = pool.task(answer=200)
    assert pool.given(busy).worker_id == "own"
    promised = pool.task(answer=200)
    assert promised.promise is not None
    assert pool.given(pool.task(answer=200, key="bob")).worker_id == "slow"
    others = [pool.task(key="bob") for _ in range(5)]
    own = pool.task(owner="alice", key="a")
    pool.done(busy)
    assert pool.given(own).worker_id == "own"
    assert {task.state for task in [promised, *others]} == {"queued"}
    pool.done(own)
    assert pool.given(promised).worker_id == "own"


def test_where_an_owners_machine_is_as_good_as_any_it_is_taken() -> None:
    speeds = {f"w{number}": (0.0, 0.01) for number in range(5)} | {"own": (0.0, 0.01 * (AS_GOOD - 0.02))}
    pool = Pool(speeds, slots=2)
    pool.dispatcher.belongs("own", "alice")
    for _ in range(20):
        task = pool.task(owner="alice")
        assert pool.given(task).worker_id == "own"
        pool.done(task)
        other = pool.task()
        assert pool.given(other).worker_id != "own", "the best are as good as each other, and freer"
        pool.done(other)


def test_no_owner_waits_longer_for_having_a_slow_machine() -> None:
    pool = Pool({"fast": (0.0, 0.01), "own": (0.0, 0.02)})
    pool.dispatcher.belongs("own", "alice")
    first, second, third = (pool.task(owner="alice") for _ in range(3))
    assert [pool.given(first).worker_id, pool.given(second).worker_id] == ["fast", "own"]
    assert third.state == "queued"
    pool.done(first)
    assert pool.given(third).worker_id == "fast", "its turn has come there"


def test_of_many_workers_an_owners_is_found() -> None:
    pool = Pool({f"w{number}": (0.0, 0.01) for number in range(10 * LOOKED_AT)})
    pool.dispatcher.belongs("w77", "alice")
    pool.dispatcher.belongs("w78", "bob")
    for _ in range(20):
        task = pool.task(owner="alice")
        assert pool.given(task).worker_id == "w77"
        pool.done(task)


def test_an_owners_machine_that_cannot_take_it_is_left_alone() -> None:
    for state in ("full", "unusable", "departed", "gone", "nobody's"):
        pool = Pool({"own": (0.0, 0.01), "other": (0.0, 0.011)})
        pool.dispatcher.belongs("own", "alice")
        if state == "full":
            assert pool.given(pool.task(owner="alice")).worker_id == "own"
        elif state == "unusable":
            pool.dispatcher.set_usable(pool.dispatcher.seat("own"), usable=False)
        elif state == "departed":
            pool.dispatcher.departed("own")
        elif state == "gone":
            pool.dispatcher.gone("own", "it left", blame=False)
        else:
            pool.dispatcher.belongs("own", "")
            pool.dispatcher.belongs("other", "alice")
        assert pool.given(pool.task(owner="alice")).worker_id == "other"


def test_others_use_a_machine_whose_owner_wants_nothing() -> None:
    bench = Bench()
    bench.dispatcher.belongs("own", "alice")
    bench.worker("own", slots=2)
    assert [bench.attempt(bench.task()).worker_id for _ in range(2)] == ["own", "own"]


def test_what_a_machine_does_for_its_owner_costs_no_other_key_its_turn() -> None:
    """An owner floods, and another key does too: a third waits for one turn at the machine that is everybody's."""
    bench = Bench(max_queued=2000)
    bench.dispatcher.belongs("own", "alice")
    bench.worker("own")
    bench.worker("all")

    def asked(key: str, owner: str = "") -> Task:
        task = a_task(key, owner, now=bench.now)
        bench.dispatcher.submit(task)
        return task

    for _ in range(300):
        asked("key:alice", "alice")
    for _ in range(300):
        asked("key:greedy")
    served: list[str] = []

    def turn(worker_id: str) -> None:
        (attempt,) = bench.dispatcher.seat(worker_id).running.values()
        if worker_id == "all":
            served.append(attempt.task.key_id)
        bench.dispatcher.accept(attempt)
        bench.dispatcher.delivered(attempt, usage={})

    for _ in range(20):
        turn("own")
        turn("all")
    bench.now += 1
    modest = [asked("key:modest") for _ in range(20)]
    for _ in range(30):
        for _ in range(3):
            turn("own")
        turn("all")
    assert served[21:].count("key:modest") in (9, 10)
    assert abs(served.count("key:alice") - served.count("key:greedy")) <= 2, "elsewhere an owner is one key of many"
    assert modest[0].state == "succeeded"
    (last,) = bench.dispatcher.seat("own").running.values()
    assert last.task.key_id == "key:alice"


def a_task(key: str, owner: str, *, now: float) -> Task:
    """Return a task of a key."""
    return Task(
        service="notes", method="POST", path="/notes", headers=(), body_bytes=0, key_id=key, now=now, timeout_s=600.0,
        owner=owner,
    )  # fmt: skip


# -- at the doors ------------------------------------------------------------------------------------------------------

OWNER = "alice@example.org"
BODY = json.dumps({"model": "tiny", "messages": HELLO})


class Two:
    """A pool with two machines of one slot, one of which is somebody's, and two keys, one of them the owner's."""

    def __init__(self, pool: Running, own: Line, other: Line, keys: dict[str, str], way: str) -> None:
        self.pool, self.lines = pool, {"own": own, "other": other}
        self.keys, self.way = keys, way

    def ask(self, who: str) -> asyncio.Task[Response]:
        """Send a request with a key."""
        path, more = CHAT if self.way == "v1" else "/api/inference/notes", {}
        if self.way == "later":
            more = {"prefer": "respond-async"}
        headers = {**self.pool.bearer(self.keys[who]), **more}
        # No two are the same: under /v1 that would be one request that is repeated.
        content = BODY.replace("hello", f"hello {self.pool.pool.dispatcher.queued} {who}")
        return asyncio.create_task(self.pool.client.post(path, content=content, headers=headers))

    async def queued(self, who: str) -> asyncio.Task[Response]:
        """Send a request that has to wait."""
        before = self.pool.pool.dispatcher.queued
        asked = self.ask(who)
        await until(lambda: self.pool.pool.dispatcher.queued == before + 1)
        return asked

    async def task(self, where: str) -> frames.Task:
        """Return the next task of a machine, which has begun it."""
        task = await self.lines[where].task()
        await until(lambda: self.pool.pool.dispatcher.find(task.offer.task_id).state == "running")
        return task

    async def answer(self, where: str, task: frames.Task) -> None:
        """Let a machine answer."""
        await self.lines[where].answer(task.stream, json.dumps(REPLY).encode(), headers=JSON)

    def whose(self, task: frames.Task) -> str:
        """Return whose key a task is of."""
        key_id = self.pool.pool.dispatcher.find(task.offer.task_id).key_id
        return next(name for name, key in self.keys.items() if self.pool.pool.keyring.principal(key).id == key_id)


async def a_key(pool: Running, **facts: Any) -> str:
    """Return a new client key."""
    answer = await pool.client.post("/api/admin/keys", json={"kind": "client", **facts})
    assert answer.status_code == 201, answer.text
    assert answer.json()["owner"] == facts.get("owner", "")
    return str(answer.json()["key"])


async def joined(pool: Running, key: DeviceKey | None = None, **facts: Any) -> StandIn:
    """Return a machine that has joined by a new token."""
    made = await pool.client.post("/api/admin/tokens", json=facts)
    assert made.json()["owner"] == facts.get("owner", "")
    return await joined_with(pool, key or DeviceKey.generate(), made.json()["token"])


async def joined_with(pool: Running, key: DeviceKey, token: str) -> StandIn:
    answer = await pool.register(key, token)
    assert answer.status_code in (200, 201), answer.text
    assert OWNER not in answer.text, "a machine need not know"
    return StandIn(pool, key, answer.json())


@contextlib.asynccontextmanager
async def two(home: Path, way: str) -> AsyncIterator[Two]:
    async with running(home) as pool:
        machines = [await joined(pool, owner=OWNER), await joined(pool)]
        keys = {"alice": await a_key(pool, owner=OWNER), "bob": await a_key(pool)}
        slots = {"notes": 0 if way == "v1" else 1}
        async with machines[0].channel(slots) as own, machines[1].channel(slots) as other:
            for line in (own, other) if way == "v1" else ():
                await attach(pool, line, "tiny", slots=1)
            yield Two(pool, own, other, keys, way)


WAYS = pytest.mark.parametrize("way", ["v1", "at once", "later"])


@WAYS
async def test_an_owners_request_goes_to_the_owners_machine_and_first_in_its_queue(tmp_path: Path, way: str) -> None:
    async with two(tmp_path, way) as pool:
        asked = []
        for _ in range(3):
            asked.append(pool.ask("alice"))
            task = await pool.task("own")
            await pool.answer("own", task)
            await asked[-1]
            await until(lambda: not pool.pool.pool.dispatcher.running)
        asked += [pool.ask("bob"), pool.ask("bob")]
        running_ = {where: await pool.task(where) for where in pool.lines}
        asked += [await pool.queued("bob") for _ in range(3)]
        asked.append(await pool.queued("alice"))
        await pool.answer("own", running_["own"])
        own = await pool.task("own")
        assert pool.whose(own) == "alice"
        await pool.answer("other", running_["other"])
        other = await pool.task("other")
        assert pool.whose(other) == "bob"
        await pool.answer("own", own)
        await pool.answer("other", other)
        for where in pool.lines:
            await pool.answer(where, await pool.task(where))
        answers = await asyncio.gather(*asked)
        assert {answer.status_code for answer in answers} == {202 if way == "later" else 200}


async def test_whose_an_acknowledged_request_is_outlives_the_coordinator(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await joined(pool, owner=OWNER)
        keys = [await a_key(pool), await a_key(pool, owner=OWNER)]
        made = []
        for secret in (keys[0], keys[0], keys[1]):
            headers = {**pool.bearer(secret), "prefer": "respond-async"}
            made.append((await pool.infer(b"text", headers=headers)).json()["task_id"])
    async with running(tmp_path) as pool:
        again = StandIn(pool, machine.key, machine.answer)
        async with again.channel({"notes": 1}) as line:
            served = [(await line.serve(b"x")).offer.task_id for _ in made]
        assert served == [made[2], made[0], made[1]]


@WAYS
async def test_no_client_ever_learns_whose_a_machine_or_a_key_is(tmp_path: Path, way: str) -> None:
    async with two(tmp_path, way) as pool:
        heard: list[Response] = []
        for who in ("alice", "bob"):
            headers = pool.pool.bearer(pool.keys[who])
            asked = pool.ask(who)
            where = "own" if who == "alice" else "other"
            await pool.answer(where, await pool.task(where))
            heard.append(await asked)
            if way == "later":
                address = heard[-1].headers["location"]
                heard.append(await pool.pool.client.get(f"{address}?wait=10", headers=headers))
                heard.append(await pool.pool.client.get(f"{address}/result", headers=headers))
            for path in ("/v1/models", "/v1/models/tiny", "/health", "/api/admin/workers", "/api/admin/keys"):
                heard.append(await pool.pool.client.get(path, headers=headers))  # noqa: PERF401 - one after the other
        assert {answer.status_code for answer in heard} <= {200, 202, 403, 404}
        for answer in heard:
            assert OWNER not in f"{answer.headers}{answer.text}"
        shown = (await pool.pool.client.get("/api/admin/workers")).json()["workers"]
        assert {one["worker_id"]: one["owner"] for one in shown} == {
            pool.lines["own"].id: OWNER, pool.lines["other"].id: "",
        }  # fmt: skip


async def test_an_admin_says_whose_a_machine_is_and_neither_a_start_nor_the_same_token_undoes_it(
    tmp_path: Path,
) -> None:
    key = DeviceKey.generate()

    async def shown(pool: Running) -> str:
        return str((await pool.client.get(f"/api/admin/workers/{machine.id}")).json()["owner"])

    async with running(tmp_path) as pool:
        token = (await pool.client.post("/api/admin/tokens", json={"owner": OWNER, "uses": 2})).json()["token"]
        machine = await joined_with(pool, key, token)
        address = f"/api/admin/workers/{machine.id}/owner"
        async with machine.channel({"notes": 1}) as line:
            await until(lambda: pool.pool.dispatcher.seats[line.id].owner == OWNER)
            for owner in ("", "bob"):
                answer = await pool.client.post(address, json={"owner": owner})
                assert (answer.status_code, answer.json()["owner"]) == (200, owner)
                assert pool.pool.dispatcher.seats[line.id].owner == owner
        await joined_with(pool, key, token)
        assert await shown(pool) == "bob"
        for wrong in ("two words", "-x", "x" * 65, "ä", 5, None):
            answer = await pool.client.post(address, json={"owner": wrong})
            assert answer.status_code == 400, (wrong, answer.text)
            assert "$.owner" in answer.text
            for path in ("/api/admin/keys", "/api/admin/tokens"):
                assert (await pool.client.post(path, json={"owner": wrong})).status_code == 400
    async with running(tmp_path) as pool:
        assert await shown(pool) == "bob"
        async with StandIn(pool, key, machine.answer).channel({"notes": 1}) as line:
            await until(lambda: pool.pool.dispatcher.seats[line.id].owner == "bob")
        await joined(pool, key, owner="carol")
        assert await shown(pool) == "carol", "another token says something new"
        await joined(pool, key)
        assert await shown(pool) == "carol", "one that names nobody says nothing"


async def test_from_a_shell_owners_are_named_shown_changed_and_cleared(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path) as pool:
        admin = ("--coordinator", pool.url, "--key", pool.key)

        async def rma(*words: str, code: int = 0) -> str:
            assert await asyncio.to_thread(run, [*words, *admin]) == code
            said = capfd.readouterr()
            return said.out if code == 0 else said.err

        await rma("keys", "create", "--client", "--owner", OWNER)
        assert OWNER in await rma("keys")
        token = json.loads(await rma("tokens", "create", "--owner", OWNER, "--json"))["token"]
        assert OWNER in await rma("tokens")
        machine = await joined_with(pool, DeviceKey.generate(), token)
        assert OWNER in await rma("workers")
        assert f"{OWNER}'s machine" in await rma("workers", machine.id)
        assert "bob's machine" in await rma("workers", machine.id, "--owner", "bob")
        assert "machine:" not in await rma("workers", machine.id, "--owner", "")
        assert "which worker?" in await rma("workers", "--owner", "bob", code=2)
        for words in (["workers", machine.id], ["keys", "create"], ["tokens", "create"]):
            assert "letters, digits" in await rma(*words, "--owner", "two words", code=2)


KEPT = (
    KeyRecord(key_id="0" * 8, hash="", kind="client", label="", scopes=(), created_at=1.0),
    JoinTokenRecord(token_id="0" * 8, hash="", label="", created_at=1.0, expires_at=2.0, uses=1),
    WorkerRecord(
        worker_id="w", thumbprint="", public_key="", registered_at=1.0, report=HardwareReport(capabilities=MACHINE)
    ),
    TaskRecord(
        task_id="t", service="notes", method="POST", path="/", headers=(), key_id="k", created_at=1.0, timeout_s=1.0,
        epoch=1,
    ),
)  # fmt: skip


@pytest.mark.parametrize("record", KEPT, ids=lambda record: type(record).__name__)
def test_what_was_kept_before_there_were_owners_is_nobodys(record: msgspec.Struct) -> None:
    plain = msgspec.to_builtins(record)
    plain.pop("owner", None)
    assert msgspec.convert(plain, type(record)) == record
