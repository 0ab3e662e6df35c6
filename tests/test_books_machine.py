"""A pool's books over every store: acknowledged tasks under crashes, restarts and disks that take their time.

`crash` leaves what was committed: the next life begins with a copy of the folder as it is then. Commits that wait at
the gate may have got through, or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import pytest
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from rma_coordinator.domain.records import LedgerTotal, TaskRecord
from rma_coordinator.domain.tasks import Attempt, Task, new_task_id
from rma_coordinator.ledger import entries_of
from rma_coordinator.pool import Pool
from rma_coordinator.relay import Head
from rma_coordinator.store import MemoryStore, SqliteStore
from rma_core.host import Plugins
from rma_core.models.worker import AttemptRef
from tests.coordinator_fixtures import CATALOG, settings
from tests.virtual import PromptLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from rma_coordinator.relay import Relay
    from rma_coordinator.store import Change, Store
    from rma_coordinator.store.base import R
    from rma_core.models.worker import Fault

T = TypeVar("T")

PLUGINS = Plugins.discover(kinds=["policy"], only=frozenset({"threshold"}))
WORKERS = st.sampled_from(["w1", "w2", "w3"])
KEYS = st.sampled_from(["", "", "k1", "k2", "k3"])
BIG = b"." * 100_000


class Kind(NamedTuple):
    """A store, and what a crash leaves of it for the next life, whose folder has a copy of every file."""

    make: Callable[[Path], Store]
    survive: Callable[[Store, Path], Store]


def _copied(store: Store, _: Path) -> Store:
    return copy.deepcopy(store)


#: One more store needs a line here.
KINDS: dict[str, Kind] = {
    "memory": Kind(lambda _: MemoryStore(), _copied),
    "sqlite": Kind(
        lambda folder: SqliteStore(folder / "coordinator.db", reserve_bytes=0),
        lambda _, folder: SqliteStore(folder / "coordinator.db", reserve_bytes=0),
    ),
}


class Gate:
    """A store whose commits wait while it is shut, each in its turn."""

    def __init__(self, store: Store) -> None:
        self.store, self.shut = store, False
        self.waiting: list[asyncio.Event] = []
        self.inside = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    async def load(self, kind: type[R]) -> list[R]:
        with self.busy():
            return await self.store.load(kind)

    async def get(self, kind: type[R], key: str) -> R | None:
        with self.busy():
            return await self.store.get(kind, key)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Count what the store is at."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def commit(self, changes: Iterable[Change], *, urgent: bool = False) -> None:
        kept = list(changes)
        if self.shut or self.waiting:
            turn = asyncio.Event()
            self.waiting.append(turn)
            await turn.wait()
        with self.busy():
            await self.store.commit(kept, urgent=urgent)

    def let(self, count: int) -> None:
        for turn in self.waiting[:count]:
            turn.set()
        del self.waiting[:count]


class Sink:
    """A worker that can be handed everything, and remembers it."""

    ready = True

    def __init__(self, machine: Lives, worker_id: str) -> None:
        self._machine, self._worker_id = machine, worker_id

    def offer(self, attempt: Attempt, relay: Relay) -> bool:
        self._machine.given(attempt)
        return True

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """A worker may miss it."""

    def forget(self, attempt: Attempt) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Lives(RuleBasedStateMachine):
    """One folder after the other, as one process after the other finds it."""

    kind: ClassVar[Kind]

    def __init__(self) -> None:
        super().__init__()
        self.loop = PromptLoop()
        self.temporary = tempfile.TemporaryDirectory()
        self.folders = 0
        self.now, self.wall = 1000.0, 1.8e9
        self.acknowledged: dict[str, bytes] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.ends: dict[str, tuple[str, bytes | None]] = {}
        self.numbers: dict[str, int] = {}
        self.holders: dict[str, str] = {}
        self.memories: dict[str, dict[str, AttemptRef]] = {}
        self.submitting: list[asyncio.Task[None]] = []
        self.folder = self.new_folder()
        self.begin(self.kind.make(self.folder))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def new_folder(self) -> Path:
        self.folders += 1
        return Path(self.temporary.name) / str(self.folders)

    def begin(self, store: Store) -> None:
        self.folder.mkdir(exist_ok=True)
        self.gate = Gate(store)
        self.pool = Pool(
            settings(self.folder),
            store=self.gate,
            clock=lambda: self.now,
            wall=lambda: self.wall + self.now,
            policies=PLUGINS.policies({}),
            catalog=CATALOG,
        )
        self.run(self.pool.start())
        self.submitting = []

    async def settle(self) -> None:
        """Let everything run until nothing moves but what waits at the gate."""
        for _ in range(2):
            for _ in range(30):
                await asyncio.sleep(0)
            while self.gate.inside:  # noqa: ASYNC110 - a store's thread is not ours to signal
                await asyncio.sleep(0.0005)

    def given(self, attempt: Attempt) -> None:
        task_id = attempt.task.id
        assert self.holders.setdefault(attempt.lease_id, attempt.worker_id) == attempt.worker_id
        assert attempt.number > self.numbers.get(task_id, 0), "numbers only grow"
        self.numbers[task_id] = attempt.number
        ref = AttemptRef(task_id=task_id, attempt=attempt.number, lease_id=attempt.lease_id)
        self.memories.setdefault(attempt.worker_id, {})[attempt.lease_id] = ref

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(key=KEYS, big=st.sampled_from([False, False, False, True]))
    def submit(self, key: str, *, big: bool) -> None:
        self.submitting.append(self.loop.create_task(self.submits(key, BIG if big else b"")))
        self.run(self.settle())

    async def submits(self, key: str, more: bytes) -> None:
        books, name = self.pool.books, new_task_id()
        content = (key or name).encode() + (b"" if key else more)
        known = await books.find(key, "print") if key else None
        if known is None:
            body = books.make_body(name)
            await body.write(content)
            await books.submit(self.make(name, body.size), body, key=key, fingerprint="print" if key else "")
        task_id = known or name
        self.acknowledged[task_id] = content
        if key:
            assert self.keys.setdefault(key, (task_id, "print")) == (task_id, "print"), "a key has one task"

    def make(self, name: str, size: int) -> Task:
        return Task(
            task_id=name,
            service="notes",
            method="POST",
            path="/notes",
            headers=(),
            body_bytes=size,
            key_id="key:1",
            now=self.now,
            timeout_s=5000,
            durable=True,
        )

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if tasks := list(self.pool.dispatcher.tasks.values()):
            task = data.draw(st.sampled_from(tasks))
            self.run(self.does(lambda: self.pool.dispatcher.cancel(task, "its client cancelled it")))

    # -- workers -----------------------------------------------------------------------------------------------

    def kept_by(self, data: st.DataObject, name: str) -> list[AttemptRef]:
        refs = list(self.memories.get(name, {}).values())[-6:]
        return data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.lease_id)) if refs else []

    @rule(name=WORKERS, slots=st.integers(0, 3), data=st.data())
    def arrive(self, name: str, slots: int, data: st.DataObject) -> None:
        refs = self.kept_by(data, name)
        self.run(self.arrives(name, slots, refs))

    async def arrives(self, name: str, slots: int, refs: list[AttemptRef]) -> None:
        self.pool.hub.attach(name, Sink(self, name))
        self.pool.dispatcher.arrived(name, keeps=refs)
        self.pool.dispatcher.offers(name, {"notes": slots}, usable=True)
        await self.settle()

    @rule(name=WORKERS, data=st.data())
    def heartbeat(self, name: str, data: st.DataObject) -> None:
        refs = self.kept_by(data, name)
        self.run(self.does(lambda: self.pool.dispatcher.heard(name, refs)))

    @rule(name=WORKERS)
    def depart(self, name: str) -> None:
        self.pool.dispatcher.departed(name)

    @rule(name=WORKERS)
    def go(self, name: str) -> None:
        self.run(self.does(lambda: self.pool.dispatcher.gone(name, "offline", blame=True)))

    @rule(data=st.data(), twice=st.booleans(), large=st.booleans())
    def answer(self, data: st.DataObject, *, twice: bool, large: bool) -> None:
        """Some attempt that was ever given to a worker comes with a whole answer, perhaps a second time."""
        refs = [(name, ref) for name, known in self.memories.items() for ref in list(known.values())[-6:]]
        if refs:
            name, ref = data.draw(st.sampled_from(refs))
            for _ in range(1 + twice):
                self.run(self.does(lambda: self.whole(name, ref, BIG if large else b"")))

    def whole(self, name: str, ref: AttemptRef, more: bytes) -> None:
        dispatcher = self.pool.dispatcher
        attempt = dispatcher._find(ref.task_id, ref.attempt, ref.lease_id, name)
        if attempt is None or attempt.delivered or not (attempt.open or dispatcher.revive(attempt)):
            return
        relay = self.pool.hub.relays[ref.task_id]
        dispatcher.accept(attempt)
        if relay.head is not None:
            relay.restart()
        relay.put_head(Head(200, ()))
        relay.begin(attempt, self, lambda _: None)
        relay.put(answer_of(ref) + more)
        relay.end()
        dispatcher.delivered(attempt, usage={})

    @rule(data=st.data(), fault=st.sampled_from(["worker", "service", "owner", "coordinator"]))
    def fail(self, data: st.DataObject, fault: Fault) -> None:
        if attempts := [a for task in self.pool.dispatcher.tasks.values() if (a := task.attempt) and a.open]:
            attempt = data.draw(st.sampled_from(attempts))
            self.run(self.does(lambda: self.pool.dispatcher.fail(attempt, fault, "it broke")))

    async def does(self, what: Callable[[], object]) -> None:
        what()
        await self.settle()

    # -- time, the disk, and the process -----------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1.0, 7.0, 70.0]), jump=st.sampled_from([0.0, 0.0, 86_400.0, -86_400.0]))
    def time_passes(self, seconds: float, jump: float) -> None:
        self.wall += jump
        self.run(self.turns(seconds))

    async def turns(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.now += 1.0
            self.pool.dispatcher.tick()
        await self.settle()

    @rule()
    def shut_the_gate(self) -> None:
        self.gate.shut = True

    @rule(count=st.sampled_from([1, 2, 100]))
    def open_the_gate(self, count: int) -> None:
        self.run(self.opens(count))

    async def opens(self, count: int) -> None:
        self.gate.shut = count < len(self.gate.waiting)
        self.gate.let(count)
        await self.settle()

    @rule()
    def note(self) -> None:
        """What is noted is written; while the gate is shut, by and by."""
        self.submitting.append(self.loop.create_task(self.pool.books.write()))
        self.run(self.settle())

    @rule(data=st.data(), away=st.sampled_from([1.0, 100.0, 90_000.0]))
    def crash(self, data: st.DataObject, away: float) -> None:
        """What waits at the gate gets through from its beginning on, as far as it comes; nobody is told."""
        self.gate.let(data.draw(st.integers(0, len(self.gate.waiting))))
        acknowledged, keys = dict(self.acknowledged), dict(self.keys)
        self.run(self.settle())
        # What was told in these last moments was told by a process that was gone.
        self.acknowledged, self.keys = acknowledged, keys
        old, self.folder = self.folder, self.new_folder()
        shutil.copytree(old, self.folder)
        survivor = self.kind.survive(self.gate.store, self.folder)
        self.run(self.abandoned())
        self.wall += away
        self.now = data.draw(st.sampled_from([0.0, 5000.0]))
        self.begin(survivor)

    async def abandoned(self) -> None:
        """End what runs of the former life; what it still does is done to a folder that nobody looks at."""
        me = asyncio.current_task()
        left = [task for task in asyncio.all_tasks() if task is not me]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self.gate.shut = False
        self.gate.waiting.clear()
        with contextlib.suppress(Exception):
            await self.pool.stop()
        await self.gate.store.close()

    @rule()
    def restart(self) -> None:
        """A proper stop, and a start from the same folder."""
        self.run(self.restarts())
        self.begin(self.gate.store)

    async def restarts(self) -> None:
        await self.opens(10_000)
        await asyncio.gather(*self.submitting)
        await self.pool.stop()

    # -- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def what_was_acknowledged_ends_once_and_the_ledger_says_who_did_it(self) -> None:
        self.run(self.look())

    async def look(self) -> None:
        for task_id in self.acknowledged:
            record = await self.pool.books.record(task_id)
            assert record is not None, f"{task_id} was acknowledged and is gone"
            assert len([a for a in record.attempts if a.state in ("offered", "running")]) <= 1
            if record.ended_at is not None:
                await self.look_at_end(record)
            else:
                assert task_id not in self.ends, f"{task_id} had ended"
        records = {record.task_id: record for record in await self.gate.load(TaskRecord)}
        entries = {entry.task_id: entry for entry in await entries_of(self.gate)}
        assert await self.gate.load(LedgerTotal) == []
        assert set(entries) == {task_id for task_id, record in records.items() if record.state == "succeeded"}
        for task_id, entry in entries.items():
            won = [(a.worker_id, a.number) for a in records[task_id].attempts if a.state == "succeeded"]
            assert won == [(entry.worker_id, entry.attempt)]

    async def look_at_end(self, record: TaskRecord) -> None:
        result = await self.pool.books.result(record.task_id)
        data = None
        if result is not None:
            pieces = self.pool.books.answer_pieces(result)
            data = b"".join([piece async for piece in pieces])
            won = next(a for a in record.attempts if a.state == "succeeded")
            ref = AttemptRef(task_id=record.task_id, attempt=won.number, lease_id=won.lease_id)
            assert data.removesuffix(BIG) == answer_of(ref)
        assert (record.state == "succeeded") == (data is not None)
        assert self.ends.setdefault(record.task_id, (record.state, data)) == (record.state, data)

    # -- the end -----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.run(self.finish())
        finally:
            self.run(self.abandoned())
            self.loop.close()
            self.temporary.cleanup()

    async def finish(self) -> None:
        """Everything is well again: a worker comes that can do all of it."""
        await self.opens(10_000)
        await asyncio.gather(*self.submitting)
        await self.turns(80)
        for _ in range(len(self.pool.dispatcher.tasks) + 1):
            await self.arrives("last", 100, [])
            for ref in list(self.memories.get("last", {}).values()):
                await self.does(lambda ref=ref: self.whole("last", ref, b""))  # type: ignore[misc]
            # What another worker was given just now, and never accepts, comes back first.
            await self.turns(7)
        assert self.pool.dispatcher.tasks == {}
        await self.look()
        assert set(self.ends) == set(self.acknowledged)
        left = (self.pool.spools.memory_used, self.pool.spools.disk_used, self.pool.hub.relays)
        assert left == (0, 0, {}), "something was left behind"


def answer_of(ref: AttemptRef) -> bytes:
    return f"{ref.task_id} {ref.attempt} ".encode()


@pytest.mark.parametrize("name", KINDS)
def test_what_was_acknowledged_outlives_every_crash(name: str) -> None:
    class Here(Lives):
        kind = KINDS[name]

    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A life that crashed closes nothing; its files are collected here, where nobody is to blame.
            warnings.simplefilter("ignore", ResourceWarning)
            run_state_machine_as_test(Here, settings=profile(max_examples=40, stateful_step_count=50))
            gc.collect()
    finally:
        logging.disable(logging.NOTSET)
