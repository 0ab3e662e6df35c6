"""Clients that keep asking while the coordinator dies and comes back, and that remember all they were told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx2
from standardwebhooks.webhooks import Webhook

from tests import slow_service
from tests.crash_kit import check_ends, kept
from tests.receivers import DIE, Receiver, listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.crash_kit import Town
    from tests.receivers import Arrival

FINAL = frozenset({"succeeded", "failed", "cancelled"})
#: Seconds between two tries of a client whose coordinator is away, and of the looks of an admin.
RETRY_S, LOOK_S = 0.2, 0.5
#: Seconds that an acknowledged task may take when nobody kills any more: a lease, and the work that waits.
END_WITHIN_S = 150.0

#: Clients that ask at one time.
CLIENTS = 6
#: Seconds at most from the coordinator's start to its end, from that to the next start, and before it even serves.
UP_S, DOWN_S, STARTING_S = 4.0, 1.5, 1.5
#: Seconds of the longer absences: more than three heartbeats of the agents in these tests.
LONG_DOWN_S = 7.0


class Ask:
    """One request: what was sent, and what is known of it."""

    def __init__(self, name: str, body: bytes, *, key: str, later: bool, hook: str = "") -> None:
        self.name, self.body, self.key, self.later = name, body, key, later
        #: Where its end is to be told, if anywhere.
        self.hook = hook
        self.task_id = ""
        #: What was said of its end, the first time.
        self.end: dict[str, Any] | None = None
        self.unknown = False

    @property
    def headers(self) -> dict[str, str]:
        """Its headers."""
        return {
            **({"Prefer": "respond-async"} if self.later else {}),
            **({"Idempotency-Key": self.key} if self.key else {}),
            **({"RMA-Webhook": self.hook} if self.hook else {}),
        }


def make(rng: random.Random, name: str, hook: str) -> Ask:
    """Return a request of some kind, size and length; the end of some is told to ``hook``."""
    body = slow_service.request(
        name,
        before_s=rng.choice([0, 0, 0.05, 0.3, 1, 2.5]),
        during_s=rng.choice([0, 0.5, 2]),
        pieces=rng.choice([0, 0, 1, 4]),
        filling=rng.choice([10, 10, 10, 80_000, 80_000, 1_300_000]),
        ballast=rng.choice([0, 0, 0, 100_000]),
    )
    key, later = f"key-{name}" if rng.random() < 0.5 else "", rng.random() < 0.7
    return Ask(name, body, key=key, later=later, hook=hook if later and rng.random() < 0.6 else "")


class Hooks(Receiver):
    """Hears of ends; each fifth is not taken when it first comes, one of two of these with no answer at all."""

    def __init__(self, wrong: Callable[[str], None]) -> None:
        super().__init__()
        self.secret = ""
        self.heard: dict[str, tuple[str, bytes]] = {}
        self._wrong = wrong

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/"

    def verdict(self, arrival: Arrival) -> int | str:
        """Look at what has come, and answer."""
        said: dict[str, Any] = Webhook(self.secret).verify(arrival.body, arrival.headers)
        task_id, message = said["data"]["task_id"], (arrival.headers["webhook-id"], arrival.body)
        first = task_id not in self.heard
        if self.heard.setdefault(task_id, message) != message:
            self._wrong(f"{task_id} was told as {self.heard[task_id]} and as {message}")
        if said["type"] != "task.succeeded":
            self._wrong(f"{task_id} was told to be {said}")
        trouble: dict[int, int | str] = {0: 500, 1: DIE}
        return trouble.get(len(self.heard) % 10, 200) if first else 200


class Storm:
    """All clients together. ``violations`` is what must be empty at the end."""

    def __init__(self, made: Town, *, seed: int) -> None:
        self.made, self.seed = made, seed
        self.asks: list[Ask] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.over = asyncio.Event()
        #: Tasks of clients that waited, and were answered.
        self.at_once: list[str] = []
        #: Who had which attempt of which task, as far as anyone was told.
        self._attempts: dict[str, dict[int, str]] = {}
        self.hooks = Hooks(self.wrong)

    def wrong(self, words: str) -> None:
        """Remember what must not be."""
        self.violations.append(words)

    @contextlib.asynccontextmanager
    async def hearing(self) -> AsyncIterator[None]:
        """Listen to webhooks, which are signed with a new secret of the key that everyone here uses."""
        async with listening(self.hooks):
            async with self.made.client() as http:
                key_id = (await http.get("/api/admin/keys")).json()["keys"][0]["key_id"]
                made = await http.post(f"/api/admin/keys/{key_id}/webhook-secret")
                self.hooks.secret = made.json()["secret"]
            yield

    # -- clients -------------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        """Make one request after the other until the storm is over."""
        rng = random.Random(f"{self.seed}/{number}")
        async with self.made.client() as http:
            while not self.over.is_set():
                ask = make(rng, f"{number}-{len(self.asks)}", self.hooks.url)
                self.asks.append(ask)
                await (self._later(http, ask) if ask.later else self._waits(http, ask))
                old = rng.choice(self.asks)
                if old.task_id and (old.end is not None or rng.random() < 0.3):
                    await self.ended(http, old)
                await asyncio.sleep(rng.uniform(0, 0.3))

    async def _send(self, http: httpx2.AsyncClient, ask: Ask) -> httpx2.Response | None:
        """Send a request, again and again where its key makes that safe; ``None`` when its outcome is unknown."""
        while True:
            try:
                answer = await http.post("/api/inference/slow", content=ask.body, headers=ask.headers)
            except httpx2.ConnectError:
                # It was never sent.
                await asyncio.sleep(RETRY_S)
                continue
            except httpx2.TransportError:
                self.counts["broken off"] += 1
                if not ask.key:
                    ask.unknown = True
                    return None
                await asyncio.sleep(RETRY_S)
                continue
            if answer.status_code != 409 or answer.json()["code"] != "still_running":
                return answer
            await asyncio.sleep(RETRY_S)

    async def _later(self, http: httpx2.AsyncClient, ask: Ask) -> None:
        answer = await self._send(http, ask)
        if answer is None:
            return
        if answer.status_code != 202:
            self.wrong(f"{ask.name}: {answer.status_code} {answer.text[:300]}")
            return
        self.counts["acknowledged"] += 1
        ask.task_id = answer.json()["task_id"]
        if ask.key and (again := await self._send(http, ask)) and again.json().get("task_id") != ask.task_id:
            self.wrong(f"{ask.name}: its key found {again.text[:300]} instead of {ask.task_id}")

    async def _waits(self, http: httpx2.AsyncClient, ask: Ask) -> None:
        answer = await self._send(http, ask)
        if answer is None:
            return
        if answer.status_code != 200 or not slow_service.answers(ask.body, answer.json()):
            self.wrong(f"{ask.name}: {answer.status_code} {answer.text[:300]}")
        elif ask.key:
            ask.task_id = answer.headers["rma-task-id"]
            self.counts["answered under a key"] += 1
        else:
            self.counts["answered at once"] += 1
            self.at_once.append(answer.headers["rma-task-id"])

    async def ended(self, http: httpx2.AsyncClient, ask: Ask, *, within_s: float = END_WITHIN_S) -> None:
        """Wait for a task's end, which is the same however often one asks, and is the right answer to its request."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            found = await self._get(http, f"/api/inference/tasks/{ask.task_id}?wait=2")
            if found is None:
                await asyncio.sleep(RETRY_S)
                continue
            if found.status_code != 200:
                self.wrong(
                    f"{ask.name}: {ask.task_id} was acknowledged, and now {found.status_code} {found.text[:300]}"
                )
                return
            view = found.json()
            self.attempts(ask.task_id, view["attempts"])
            if view["status"] in FINAL:
                await self._check_end(http, ask, view)
                return
            if ask.end is not None:
                self.wrong(f"{ask.name}: {ask.task_id} was {ask.end['status']} and is {view['status']}")
        self.wrong(f"{ask.name}: {ask.task_id} has not ended within {within_s:.0f} s")

    async def _check_end(self, http: httpx2.AsyncClient, ask: Ask, view: dict[str, Any]) -> None:
        # Which may still be on its way, and be shown to be so.
        view.pop("webhook", None)
        if ask.end is not None:
            if view != ask.end:
                self.wrong(f"{ask.name}: it ended as {str(ask.end)[:500]} and then as {str(view)[:500]}")
            self.counts["asked again"] += 1
            return
        ask.end = view
        if view["status"] != "succeeded":
            self.wrong(f"{ask.name}: {str(view)[:1000]}")
            return
        found = view.get("result")
        if found is None:
            whole = None
            while whole is None:
                whole = await self._get(http, view["result_url"])
            found = whole.json()
        if not slow_service.answers(ask.body, found):
            self.wrong(f"{ask.name}: the answer is {str(found)[:300]}")

    async def _get(self, http: httpx2.AsyncClient, path: str) -> httpx2.Response | None:
        try:
            return await http.get(path)
        except httpx2.TransportError:
            await asyncio.sleep(RETRY_S)
            return None

    # -- an admin ------------------------------------------------------------------------------------------------

    async def admin(self) -> None:
        """Look at workers and tasks all the time."""
        async with self.made.client() as http:
            while not self.over.is_set():
                await self.look(http)
                await asyncio.sleep(LOOK_S)

    async def look(self, http: httpx2.AsyncClient) -> None:
        """Look once: nobody is offline."""
        found = await self._get(http, "/api/admin/workers")
        for worker in found.json()["workers"] if found is not None else ():
            self.counts[f"seen {worker['status']}"] += 1
            if worker["status"] == "offline":
                self.wrong(f"{worker['worker_id']} is offline: {worker['status_reason']}")
        await self.look_at_tasks(http)

    async def look_at_tasks(self, http: httpx2.AsyncClient) -> None:
        """Look at the newest tasks: no attempt's number comes twice."""
        found = await self._get(http, "/api/admin/tasks?limit=50")
        for task in found.json()["tasks"] if found is not None else ():
            self.attempts(task["task_id"], task["attempts"])

    def attempts(self, task_id: str, found: list[dict[str, Any]]) -> None:
        """Take in what was said of a task's attempts: a number stays one worker's, and new ones are higher."""
        known = self._attempts.setdefault(task_id, {})
        highest = max(known, default=0)
        numbers = [one["attempt"] for one in found]
        if numbers != sorted(set(numbers)):
            self.wrong(f"{task_id}: attempts {numbers}")
        for one in found:
            number, worker = one["attempt"], one["worker_id"]
            if number not in known and number < highest:
                self.wrong(f"{task_id}: attempt {number} came after {highest}")
            if known.setdefault(number, worker) != worker:
                self.wrong(f"{task_id}: attempt {number} was {known[number]}'s and is {worker}'s")

    # -- the end -------------------------------------------------------------------------------------------------

    async def all_ended(self) -> None:
        """Wait for the end of every task that was acknowledged, and ask twice."""
        async with self.made.client() as http:
            for _ in range(2):
                for ask in [ask for ask in self.asks if ask.task_id]:
                    await self.ended(http, ask)
            await self._all_told(http)

    async def _all_told(self, http: httpx2.AsyncClient) -> None:
        """Wait until everyone who wanted to be told of an end was, and nothing more waits to be."""
        owed = {ask.task_id: ask.name for ask in self.asks if ask.hook and ask.task_id}
        deadline, waiting = time.monotonic() + END_WITHIN_S, 1
        while waiting and time.monotonic() < deadline:
            await asyncio.sleep(RETRY_S)
            found = await self._get(http, "/api/admin/stats")
            waiting = found.json()["webhooks"]["waiting"] if found is not None else 1
        for task_id in owed.keys() - self.hooks.heard.keys():
            self.wrong(f"{owed[task_id]}: the end of {task_id} was never told")
        self.counts["webhooks owed"], self.counts["webhooks arrived"] = len(owed), len(self.hooks.arrivals)

    def names(self, results: dict[str, bytes]) -> None:
        """See in the kept answers that no request was made a task twice."""
        tasks = Counter(json.loads(data)["id"] for data in results.values())
        for name, count in tasks.items():
            if count > 1:
                self.wrong(f"{name} became {count} tasks")


async def kill(made: Town, rng: random.Random) -> None:
    """Kill the coordinator at some moment and start it again, now and then before it even served."""
    await asyncio.sleep(rng.uniform(0, UP_S))
    made.stop()
    await asyncio.sleep(LONG_DOWN_S if rng.random() < 0.1 else rng.choice([0, rng.uniform(0, DOWN_S)]))
    made.start()
    if rng.random() < 0.2:
        await asyncio.sleep(rng.uniform(0, STARTING_S))
    else:
        await made.ready()


async def pass_over(made: Town, *, kills: int, seed: int) -> Storm:
    """Kill the coordinator so many times while clients ask; return what they saw once all that they know has ended."""
    rng, found = random.Random(seed), Storm(made, seed=seed)
    async with found.hearing():
        clients = [made.begin(found.client(number)) for number in range(CLIENTS)]
        admin = made.begin(found.admin())
        for _ in range(kills):
            await kill(made, rng)
        await made.ready()
        found.over.set()
        await asyncio.gather(admin, *clients)
        await found.all_ended()
    return found


def check_executed(made: Town, found: Storm) -> None:
    """Assert that what was acknowledged was executed; count what was more than once."""
    starts = Counter(one.id for one in slow_service.noted(made.log) if one.what == "start")
    ends = Counter(one.id for one in slow_service.noted(made.log) if one.what == "end")
    for ask in found.asks:
        if ask.task_id and not ends[ask.name]:
            found.wrong(f"{ask.name} was never executed to its end")
    found.counts["executed"] = sum(starts.values())
    found.counts["begun more than once"] = sum(count > 1 for count in starts.values())


async def check_store(made: Town, found: Storm) -> None:
    """End the coordinator as a person does, and look at what is on disk."""
    assert made.stop(signal.SIGTERM) == 0, made.words()
    on_disk = await kept(made.home)
    check_ends(on_disk, made.home)
    known = {ask.task_id for ask in found.asks if ask.task_id}
    assert {one.state for one in on_disk.webhooks.values()} == {"delivered"}
    assert {ask.task_id for ask in found.asks if ask.hook and ask.task_id} <= set(on_disk.webhooks)
    assert known <= set(on_disk.tasks)
    found.counts["tasks kept"] = len(on_disk.tasks)
    found.counts["of them acknowledged"] = len(known)
    found.counts["answered at once, not credited"] = len(set(found.at_once) - set(on_disk.ledger))
    spool = made.home / "spool"
    found.names(
        {
            name: (spool / f"{name}.answer").read_bytes() if one.data is None else one.data
            for name, one in on_disk.results.items()
        }
    )
