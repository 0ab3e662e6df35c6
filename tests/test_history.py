"""The history checker over a simulated pool: kills, partitions, delays and clocks that jump, replayed by a seed."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import random
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

import pytest

from rma_coordinator.books import Books
from rma_coordinator.domain.credentials import SCOPES
from rma_coordinator.domain.records import TaskRecord
from rma_coordinator.domain.tasks import Attempt
from rma_coordinator.domain.webhooks import WebhookRecord
from rma_coordinator.webhooks import Webhooks
from tests.history import History
from tests.simulated_clients import SimulatedClient
from tests.simulated_workers import SimulatedWorker
from tests.simulation import SimulatedStore, World, seeded
from tests.virtual import VirtualLoop, run_virtual

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable
    from pathlib import Path

    from rma_coordinator.domain.keyring import Keyring
    from rma_coordinator.store import Change

CLIENTS, CHANNELS, PLAIN = 8, 4, 2
#: A task may take this long at most, so this long after the last fault nothing is open any more.
ASYNC_TIMEOUT_S = 400.0
DAY_S = 86_400.0


class Outcome(NamedTuple):
    """What a run came to."""

    wrong: list[str]
    operations: int
    summary: dict[str, int]
    #: Two runs of one seed have the same.
    trace: str


class Simulation:
    """One run: clients and workers at work, and a fault every few seconds."""

    def __init__(self, loop: VirtualLoop, home: Path, seed: int, operations: int) -> None:
        self.world = World(loop, home, seed, async_timeout_s=ASYNC_TIMEOUT_S, task_timeout_s=80.0, max_queued_tasks=200)
        self.history = History()
        self.world.disk.watching.append(self.history.watch)
        self.world.hearing.append(self.history.hear)
        self.operations = operations
        self.troubles: list[float] = []
        self.workers = [
            SimulatedWorker(self.world, self.history, index, plain=index >= CHANNELS, slots=1 + index % 3)
            for index in range(CHANNELS + PLAIN)
        ]
        self.clients: list[SimulatedClient] = []

    async def run(self) -> Outcome:
        await self._begin()
        faults = asyncio.create_task(self._faults(), name="faults")
        each = self.operations // CLIENTS
        await asyncio.gather(*[client.run(each) for client in self.clients])
        faults.cancel()
        await self._heal()
        await self._until_all_have_ended()
        await self._look_at_everything()
        await self.world.stop()
        wrong = self.history.check(self.world.disk, self.world.offers, self.troubles)
        text = "\n".join([*self.history.lines(), *map(str, self.world.offers), *wrong])
        trace = hashlib.sha256(text.encode()).hexdigest()
        return Outcome(wrong, len(self.history.operations), self.history.summary(), trace)

    async def _begin(self) -> None:
        await self.world.start()
        life = self.world.life
        assert life is not None
        token, _ = await life.spawn(life.pool.create_token(label="all", uses=100, ttl_s=3600), "token")
        for worker in self.workers:
            await worker.enrol(token)
            worker.start()
        for number in range(CLIENTS):
            made = life.pool.create_key(kind="admin", label="client", scopes=SCOPES, ttl_s=None)
            secret, record = await life.spawn(made, "key")
            await life.spawn(life.pool.renew_webhook_secret(record.key_id), "webhook secret")
            self.clients.append(SimulatedClient(self.world, self.history, number, secret))

    # -- faults ------------------------------------------------------------------------------------------------

    async def _faults(self) -> None:
        faults: list[Callable[[], Awaitable[None]]] = [
            self._crash, self._restart, self._freeze_coordinator, self._bad_disk, self._slow_disk, self._kill_worker,
            self._freeze_worker, self._freeze_worker, self._partition, self._partition, self._cut, self._cut,
            self._wall, self._client_cut,
        ]  # fmt: skip
        running: set[asyncio.Task[None]] = set()
        while True:
            await self.world.pause(0.5, 6.0)
            fault = self.world.random.choice(faults)
            one = asyncio.ensure_future(fault())
            running.add(one)
            one.add_done_callback(running.discard)

    async def _down(self) -> None:
        """Start again after a while; workers and clients find nobody meanwhile."""
        self.troubles.append(self.world.loop.time())
        await self.world.pause(0.05, 3.0 if self.world.random.random() < 0.93 else 40.0)
        if self.world.life is None:
            await self.world.start()

    async def _crash(self) -> None:
        if self.world.life is not None and self.world.life.up:
            self.world.crash()
            await self._down()

    async def _restart(self) -> None:
        if self.world.life is not None and self.world.life.up:
            await self.world.stop()
            await self._down()

    async def _freeze_coordinator(self) -> None:
        life = self.world.life
        if life is not None:
            self.troubles.append(self.world.loop.time())
            self.world.loop.freeze(life.context)
            await self.world.pause(1.0, 30.0)
            self.world.loop.thaw(life.context)

    async def _bad_disk(self) -> None:
        self.troubles.append(self.world.loop.time())
        self.world.disk.fails_until = self.world.loop.time() + self.world.random.uniform(1.0, 12.0)

    async def _slow_disk(self) -> None:
        self.troubles.append(self.world.loop.time())
        self.world.disk.slow_until = self.world.loop.time() + self.world.random.uniform(2.0, 15.0)

    async def _kill_worker(self) -> None:
        worker = self.world.random.choice(self.workers)
        if worker.alive:
            worker.kill()
            await self.world.pause(0.5, 20.0)
            worker.start()

    async def _freeze_worker(self) -> None:
        worker = self.world.random.choice([one for one in self.workers if one.jobs] or self.workers)
        context = worker.context
        self.world.loop.freeze(context)
        await self.world.pause(*self.world.random.choice(((2.0, 15.0), (62.0, 140.0))))
        self.world.loop.thaw(context)

    async def _partition(self) -> None:
        link = self.world.random.choice(self.workers).link
        link.hold(*self.world.random.choice((("up",), ("down",), ("up", "down"))))
        await self.world.pause(0.5, 100.0 if self.world.random.random() < 0.3 else 12.0)
        if self.world.random.random() < 0.4:
            link.cut()
        link.heal()

    async def _cut(self) -> None:
        link = self.world.random.choice(self.workers).link
        link.cut()
        link.refused = True
        await self.world.pause(0.1, 15.0)
        link.heal()

    async def _wall(self) -> None:
        self.world.wall_ahead_s += self.world.random.choice((DAY_S, -DAY_S, 3600.0, -3600.0))

    async def _client_cut(self) -> None:
        self.world.random.choice(self.clients).link.cut()

    # -- the end -----------------------------------------------------------------------------------------------

    async def _heal(self) -> None:
        await asyncio.sleep(150.0)
        self.world.unreliable = False
        for worker in self.workers:
            worker.link.heal()
            if not worker.alive:
                worker.start()
        if self.world.life is None:
            await self.world.start()

    async def _until_all_have_ended(self) -> None:
        end = self.world.loop.time() + ASYNC_TIMEOUT_S + 120.0
        while self.world.loop.time() < end:
            ended = all(record.ended_at is not None for record in self.world.disk.load(TaskRecord))
            if ended and all(record.state != "waiting" for record in self.world.disk.load(WebhookRecord)):
                break
            await asyncio.sleep(5.0)
        await asyncio.sleep(70.0)

    async def _look_at_everything(self) -> None:
        """Ask for every acknowledged task once more, and see that nothing was left behind."""
        for client in self.clients:
            for task_id in dict.fromkeys(one.task_id for one in client.tasks):
                found = await client.ask("get", task_id)
                if not found.state:
                    self.history.complain(f"{task_id} has not ended: {found.outcome} {found.status}")
        life = self.world.life
        assert life is not None
        pool = life.pool
        left = {
            "tasks": list(pool.dispatcher.tasks),
            "queued": pool.dispatcher.queued,
            "relays": list(pool.hub.relays),
            "memory": pool.spools.memory_used,
            "disk": pool.spools.disk_used,
            "webhooks": pool.webhooks.waiting,
            "running": [a.task.id for seat in pool.dispatcher.seats.values() for a in seat.running.values()],
        }
        for error in self.world.errors:
            self.history.complain(f"a handler failed: {error!r}")
        if any(left.values()):
            self.history.complain(f"something was left behind: {left}")


def simulate(home: Path, seed: int, operations: int) -> Outcome:
    """Run one simulation; what it logs is nobody's business, and what the collector does must not depend on it."""
    state, level = random.getstate(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.disable()
    try:
        with seeded(seed), warnings.catch_warnings():
            # A killed process closes nothing; its files and coroutines are collected here, where nobody is to blame.
            warnings.simplefilter("ignore")
            outcome = run_virtual(lambda loop: Simulation(loop, home, seed, operations).run())
            gc.collect()
            return outcome
    finally:
        gc.enable()
        random.setstate(state)
        logging.disable(level)


#: Together ten thousand operations.
SEEDS, OPERATIONS = range(1, 6), 2000


@pytest.mark.parametrize("seed", SEEDS)
def test_the_history_of_a_pool_under_faults_shows_no_violation(tmp_path: Path, seed: int) -> None:
    outcome = simulate(tmp_path, seed, OPERATIONS)
    assert outcome.wrong == [], f"RMA_SEED={seed} replays it"
    assert outcome.operations >= OPERATIONS
    assert min(outcome.summary[f"{kind} ok"] for kind in ("live", "async", "keyed", "get", "delete")) > 0


def test_a_seed_replays_a_run(tmp_path: Path) -> None:
    first, second, other = (simulate(tmp_path / str(run), seed, 300) for run, seed in enumerate((7, 7, 8)))
    assert first.trace == second.trace
    assert first.trace != other.trace


# -- the checker can find something ------------------------------------------------------------------------------


async def _acknowledge_before_commit(self: SimulatedStore, changes: Iterable[Change], *, urgent: bool = False) -> None:
    late = asyncio.ensure_future(COMMIT(self, list(changes), urgent=urgent))
    late.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _tell_before_it_is_written(self: Books, changes: list[Change]) -> None:
    asyncio.ensure_future(INSIST(self, changes)).add_done_callback(lambda done: done.cancelled())


async def _count_no_starts(self: Books, epoch: int) -> None:
    await OPEN(self, min(epoch, 1))


async def _know_no_keys(self: Books, key: str, fingerprint: str) -> str | None:
    return None


def _believe_anyone(self: Attempt, number: int, lease_id: str, worker_id: str) -> bool:
    return self.worker_id == worker_id


async def _forget_what_is_to_be_told(self: Webhooks, keyring: Keyring, *, kept: Container[str]) -> None:
    self._keyring = keyring


def _name_it_anew(self: WebhookRecord) -> str:
    return f"msg_{random.random()}"


COMMIT, INSIST, OPEN = SimulatedStore.commit, Books._insist, Books.open
FENCES: list[tuple[type, str, object, str]] = [
    (SimulatedStore, "commit", _acknowledge_before_commit, "404"),
    (Books, "_insist", _tell_before_it_is_written, "has ended as"),
    (Books, "open", _count_no_starts, "follows attempt"),
    (Books, "find", _know_no_keys, "tasks"),
    (Attempt, "belongs", _believe_anyone, "won"),
    (Webhooks, "open", _forget_what_is_to_be_told, "its end was never told"),
    (WebhookRecord, "message_id", property(_name_it_anew), "was told in two ways"),
]


@pytest.mark.parametrize("fence", FENCES, ids=[fence[1] for fence in FENCES])
def test_a_pool_without_one_of_its_fences_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fence: tuple[type, str, object, str]
) -> None:
    where, name, hole, words = fence
    monkeypatch.setattr(where, name, hole)
    for seed in range(1, 9):
        wrong = simulate(tmp_path / str(seed), seed, 800).wrong
        if any(words in text for text in wrong):
            return
    pytest.fail("the checker has found nothing")


@pytest.mark.soak
def test_histories_for_as_long_as_one_likes(tmp_path: Path) -> None:
    """RMA_SOAK_S seconds (600) from seed RMA_SEED on (a new one each time); RMA_SOAK_S=0 replays one run."""
    seed = int(os.environ.get("RMA_SEED") or time.time_ns() % 10**9)
    end = time.monotonic() + float(os.environ.get("RMA_SOAK_S") or 600)
    while True:
        outcome = simulate(tmp_path / str(seed), seed, OPERATIONS)
        print(f"RMA_SEED={seed}: {outcome.operations} operations, {len(outcome.wrong)} wrong")  # noqa: T201 - what a soak is for
        assert outcome.wrong == [], f"RMA_SEED={seed} replays it"
        if time.monotonic() > end:
            return
        seed += 1
