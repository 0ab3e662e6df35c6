"""Requests of every kind while agents, model servers and the coordinator are killed and start again at random."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import httpx2
import openai

from rma_coordinator.domain.dispatch import MAX_BLAMED
from tests import crash_kit, losses, model_servers, slow_service
from tests.storm import RETRY_S, Ask, Storm

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from tests.losses import Got, Pool

#: Who is killed, by turns in another order each time: a worker's agent or model server, or the coordinator.
Victim = losses.Victim | Literal["coordinator"]
VICTIMS: tuple[Victim, ...] = ("agent", "coordinator", "engine", "agent", "server", "coordinator")
#: Clients that ask at one time.
CLIENTS = 20
#: The share of requests that go to a model.
MODEL = 0.45
#: Seconds at most from that to the kill, and from a kill to the next start.
MOMENT_S, DOWN_S = 0.3, 1.0
#: What was refused before anything was done for it, and is asked again.
REFUSED = (429, 503)
#: What an agent says when it is of use again.
BACK = ("the channel to the coordinator is open", "rma-slow-worker is healthy")


class Killed(NamedTuple):
    """How often agents were killed so far, and model servers; and the coordinator, its starts counted too.

    That one is odd while the coordinator is away.
    """

    agents: int = 0
    servers: int = 0
    coordinator: int = 0

    def away(self, now: Killed) -> bool:
        """Say whether the coordinator was away at some time between this and ``now``."""
        return self.coordinator % 2 == 1 or now.coordinator != self.coordinator

    def given_up(self, now: Killed) -> bool:
        """Say whether a request may have lost as many workers as end it, the first of them a moment before it came."""
        return now.agents + now.servers - self.agents - self.servers >= MAX_BLAMED - 1


def make(chance: random.Random, name: str, hook: str) -> Ask:
    """Return a request to the slow service: small or large, whole or in pieces, for who waits or is told later."""
    body = slow_service.request(
        name,
        before_s=chance.choice([0, 0, 0.05, 0.3, 1]),
        during_s=chance.choice([0, 0.3, 1]),
        pieces=chance.choice([0, 0, 1, 4]),
        filling=chance.choice([10, 10, 10, 80_000, 80_000, 1_300_000]),
        ballast=chance.choice([0, 0, 0, 0, 100_000, 100_000, 1_000_000, 4_000_000]),
    )
    key, later = f"key-{name}" if chance.random() < 0.5 else "", chance.random() < 0.5
    return Ask(name, body, key=key, later=later, hook=hook if later and chance.random() < 0.7 else "")


class Mix(Storm):
    """All clients together, ``total`` requests at least; ``uncut`` is what the model says when nobody is killed."""

    def __init__(self, pool: Pool, uncut: Mapping[losses.Ask, Got], *, total: int, seed: int) -> None:
        super().__init__(pool.made, seed=seed)
        self.pool, self.uncut, self.total = pool, uncut, total
        self.begun = self.ends = 0
        self.killed = Killed()
        self._ended = asyncio.Event()

    @property
    def more(self) -> bool:
        """Whether there are to be more requests: until there were all, and everyone was killed once at least."""
        return self.begun < self.total or not all(self.counts[f"{victim} killed"] for victim in VICTIMS)

    # -- clients -----------------------------------------------------------------------------------------------

    async def client(self, number: int) -> None:
        """Make one request after the other while there are to be more."""
        chance = random.Random(f"{self.seed}/client/{number}")
        async with self.made.client() as http:
            while self.more:
                await self._one(http)
                old = chance.choice(self.asks) if self.asks else None
                if old and old.task_id and (old.end is not None or chance.random() < 0.3):
                    await self.ended(http, old)

    async def _one(self, http: httpx2.AsyncClient) -> None:
        number, self.begun = self.begun, self.begun + 1
        # What is asked does not depend on who comes to ask it.
        chance = random.Random(f"{self.seed}/{number}")
        if chance.random() < MODEL:
            await self._model(losses.ask(chance), f"model-{number}" if chance.random() < 0.3 else "")
        else:
            ask = make(chance, f"slow-{number}", self.hooks.url)
            self.asks.append(ask)
            await (self._later(http, ask) if ask.later else self._waits(http, ask))
        self.ends += 1
        self._ended.set()

    async def _model(self, one: losses.Ask, name: str) -> None:
        """Ask a model until there is an answer or it has broken off; with a name, which makes that safe, again then."""
        while True:
            since = self.killed
            try:
                self._answered(one, name, await losses.answer(self.pool.client, one, name=name))
                return
            except (openai.APIError, losses.Cut) as error:
                if not self._is_refusal(error):
                    self._lost(one, name, since, error)
                    if not name:
                        return
            await asyncio.sleep(RETRY_S)

    def _is_refusal(self, error: Exception) -> bool:
        """Say whether nothing was done for a request: it was never sent, or refused with a time to come again."""
        if isinstance(error, openai.APIStatusError):
            refused = error.status_code in REFUSED and "retry-after" in error.response.headers
            self.counts["refused, asked again"] += refused
            return refused
        return isinstance(error, openai.APIConnectionError) and isinstance(error.__cause__, httpx2.ConnectError)

    def _answered(self, one: losses.Ask, name: str, got: Got) -> None:
        if got.same != self.uncut[one].same:
            self.wrong(f"{one} {name} was answered with {got}")
        self.counts["model, streamed" if one.stream else "model, whole"] += 1
        self.counts["continued"] += len(got.continued_at)
        self.counts["model, by another worker"] += got.attempts > 1

    def _lost(self, one: losses.Ask, name: str, since: Killed, error: Exception) -> None:
        if isinstance(error, losses.Cut):
            self.counts["stream cut"] += 1
            if not self.uncut[one].text.startswith(error.text) or "[DONE]" in error.wire:
                self.wrong(f"{one} {name}: {error}")
        self._broke(f"{one} {name}", since, error)

    def _broke(self, what: str, since: Killed, why: object) -> None:
        """An answer has not come: the coordinator must have been away, or one worker after the other was lost."""
        self.counts["broken off"] += 1
        if since.away(self.killed):
            return
        if since.given_up(self.killed) and "did not answer" in str(why):
            self.counts["given up, workers lost"] += 1
        else:
            self.wrong(f"{what}: the coordinator was there all the time, and: {why!r}")

    async def _send(self, http: httpx2.AsyncClient, ask: Ask) -> httpx2.Response | None:
        while True:
            since = self.killed
            found = await super()._send(http, ask)
            if found is None and not since.away(self.killed):
                self.wrong(f"{ask.name} broke off while the coordinator was there all the time")
            if found is None or found.status_code not in REFUSED or "retry-after" not in found.headers:
                return found
            self.counts["refused, asked again"] += 1
            await asyncio.sleep(RETRY_S)

    async def _waits(self, http: httpx2.AsyncClient, ask: Ask) -> None:
        if ask.key:
            await super()._waits(http, ask)
            return
        since, begun, whole = self.killed, False, bytearray()
        while True:
            try:
                async with http.stream("POST", "/api/inference/slow", content=ask.body) as found:
                    async for piece in found.aiter_bytes():
                        begun = True
                        whole += piece
            except httpx2.ConnectError:
                await asyncio.sleep(RETRY_S)
                continue
            except httpx2.TransportError as error:
                self._cut(ask, since, error, begun=begun)
                return
            if found.status_code not in REFUSED or "retry-after" not in found.headers:
                break
            self.counts["refused, asked again"] += 1
            whole.clear()
            await asyncio.sleep(RETRY_S)
        if found.status_code != 200 or not slow_service.answers(ask.body, json.loads(whole)):
            self.wrong(f"{ask.name}: {found.status_code} {whole[:500].decode()}")
            return
        self.counts["answered at once"] += 1
        self.at_once.append(found.headers["rma-task-id"])

    def _cut(self, ask: Ask, since: Killed, why: Exception, *, begun: bool) -> None:
        """An answer broke off: no other worker can go on with what this service has begun to say."""
        if begun and since.agents != self.killed.agents and not since.away(self.killed):
            self.counts["begun, and its agent was killed"] += 1
        else:
            self._broke(ask.name, since, why)

    async def look(self, http: httpx2.AsyncClient) -> None:
        """Look once; who is killed may well be seen offline."""
        await self.look_at_tasks(http)

    # -- who kills ---------------------------------------------------------------------------------------------

    async def kills(self, apart: int) -> None:
        """Kill someone whenever about ``apart`` requests have come to an end; of workers one at a time."""
        chance, worker_side = random.Random(self.seed), asyncio.Lock()
        while True:
            for victim in chance.sample(VICTIMS, len(VICTIMS)):
                if not await self._reached(self.ends + chance.randint(apart // 2, apart * 3 // 2)):
                    return
                await asyncio.sleep(chance.uniform(0, MOMENT_S))
                self.counts[f"{victim} killed"] += 1
                if victim == "coordinator":
                    await self._kill_coordinator(chance)
                else:
                    await worker_side.acquire()
                    work = self._kill_worker(victim, chance.choice([*self.pool.numbers]), chance.uniform(0, DOWN_S))
                    self._then(work, worker_side.release)

    def _then(self, work: Coroutine[Any, Any, None], done: Callable[[], None]) -> None:
        task = self.made.begin(work)
        task.add_done_callback(lambda _: done())
        task.add_done_callback(self._failed)

    def _failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong(f"a worker has not come back: {error!r}")

    async def _reached(self, count: int) -> bool:
        """Wait until so many requests have come to an end; ``False`` when no more are to come."""
        while self.ends < count:
            if not self.more and self.ends == self.begun:
                return False
            self._ended.clear()
            await self._ended.wait()
        return self.more

    async def _kill_coordinator(self, chance: random.Random) -> None:
        coordinator = self.killed.coordinator
        self.killed = self.killed._replace(coordinator=coordinator + 1)
        self.made.stop()
        await asyncio.sleep(chance.choice([0, chance.uniform(0, DOWN_S)]))
        self.made.start()
        if chance.random() < 0.2:
            # Now and then before it even serves.
            await asyncio.sleep(chance.uniform(0, DOWN_S))
            self.made.stop()
            self.made.start()
        await self.made.ready()
        # Those that have not come back to it yet are away as well; one may be down by itself.
        await self._offered(len(self.pool.servers) - 1)
        self.killed = self.killed._replace(coordinator=coordinator + 2)

    async def _offered(self, least: int) -> None:
        """Wait until so many workers offer the model: of one that is up, the pool hears only a moment later."""
        async with self.made.client(timeout_s=crash_kit.PATIENCE_S) as http, asyncio.timeout(crash_kit.PATIENCE_S):
            while True:
                with contextlib.suppress(httpx2.HTTPError):
                    listed = (await http.get("/v1/models")).json().get("data", [])
                    if sum(int(one["x_rma"]["workers"]) for one in listed) >= least:
                        return
                await asyncio.sleep(0.05)

    async def _kill_worker(self, victim: losses.Victim, worker: str, down_s: float) -> None:
        number = self.pool.numbers[worker]
        await self._offered(len(self.pool.servers))
        if victim == "agent":
            self.killed = self.killed._replace(agents=self.killed.agents + 1)
        else:
            self.killed = self.killed._replace(servers=self.killed.servers + 1)
        self.pool.kill(worker, victim)
        await asyncio.sleep(down_s)
        self.pool.again(worker, victim)
        if victim == "agent":
            agent = self.made.agents[f"m{number}"]
            await crash_kit.until(lambda: all(words in agent.text for words in BACK), what=f"m{number} is back")
            return
        server = self.pool.servers[number]
        await asyncio.to_thread(model_servers.until, lambda: model_servers.is_ready(server), what=f"s{number} is back")


async def pass_over(pool: Pool, uncut: Mapping[losses.Ask, Got], *, total: int, apart: int, seed: int) -> Mix:
    """Make ``total`` requests, kill someone about each ``apart`` of them; return what was seen when all has ended."""
    found = Mix(pool, uncut, total=total, seed=seed)
    async with found.hearing():
        clients = [pool.made.begin(found.client(number)) for number in range(CLIENTS)]
        admin, killer = pool.made.begin(found.admin()), pool.made.begin(found.kills(apart))
        await asyncio.gather(killer, *clients)
        found.over.set()
        await admin
        await pool.made.serving(len(pool.servers))
        await found.all_ended()
    return found
