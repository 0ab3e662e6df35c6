"""Dispatch under everything at once: live and durable tasks, late answers, crashes and restarts, clocks that jump."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rma_coordinator.domain.choosing import MOST_WAIT_S
from rma_coordinator.domain.dispatch import MAX_ATTEMPTS
from rma_coordinator.domain.matching import PATIENT, PATIENT_S
from rma_coordinator.domain.tasks import Attempt, Task
from rma_core.errors import NotFound, TryLater
from rma_core.models.worker import AttemptRef
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_coordinator.domain.tasks import AttemptState, TaskState
    from rma_core.models.worker import Fault

WORKERS = st.sampled_from(["w1", "w2", "w3", "w4"])
SERVICES = st.sampled_from(["notes", "ner"])
SLOTS = st.fixed_dictionaries({"notes": st.integers(0, 3)}, optional={"ner": st.integers(0, 2)})
FAULTS: st.SearchStrategy[Fault] = st.sampled_from(["worker", "service", "owner", "coordinator", "request"])
MAX_QUEUED = 20


class Kept(NamedTuple):
    """A durable task as the disk has it."""

    service: str
    epoch: int
    attempts: tuple[tuple[int, str, str, AttemptState], ...] = ()
    end: TaskState | None = None
    credited: tuple[str, int] | None = None


class Everything(RuleBasedStateMachine):
    """Workers come, go, break and lie, clients ask and leave, time passes: nothing may be lost or done twice.

    ``disk`` outlives each crash. What a crash finds on its way to the disk may be there afterwards, or not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disk: dict[str, Kept] = {}
        self.numbers: dict[str, int] = {}
        self.leases: dict[str, tuple[str, int, str]] = {}
        self.memories: dict[str, dict[str, AttemptRef]] = {}
        self.epoch = 0
        self.begin(1000.0)

    def begin(self, now: float) -> None:
        self.epoch += 1
        self.bench = Bench(max_queued=MAX_QUEUED, now=now)
        self.dispatcher, self.effects = self.bench.dispatcher, self.bench.effects
        self.submitted: list[Task] = []
        self.grown: dict[str, list[Attempt]] = {}
        self.seen = 0
        self.written: set[str] = set()

    # -- what is drawn -----------------------------------------------------------------------------------------

    def any_open(self, data: st.DataObject) -> Attempt | None:
        attempts = [a for task in self.dispatcher.tasks.values() if (a := task.attempt) and a.open]
        return data.draw(st.sampled_from(attempts)) if attempts else None

    def any_known(self, data: st.DataObject) -> Attempt | None:
        """An attempt that some worker was given, in this life of the coordinator or before, and still knows."""
        refs = [(name, ref) for name, known in self.memories.items() for ref in known.values()]
        if not refs:
            return None
        name, ref = data.draw(st.sampled_from(refs))
        try:
            return self.dispatcher.named(ref.task_id, ref.attempt, ref.lease_id, name)
        except NotFound:
            return None

    def kept_by(self, data: st.DataObject, name: str) -> list[AttemptRef]:
        refs = list(self.memories.get(name, {}).values())
        return data.draw(st.lists(st.sampled_from(refs), unique_by=lambda ref: ref.lease_id)) if refs else []

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(service=SERVICES)
    def submit(self, service: str) -> None:
        try:
            self.submitted.append(self.bench.task(service))
        except TryLater:
            assert self.dispatcher.queued >= MAX_QUEUED

    @rule(service=SERVICES, timeout_s=st.sampled_from([30.0, 3000.0]))
    def submit_durable(self, service: str, timeout_s: float) -> None:
        try:
            self.dispatcher.check_room()
        except TryLater:
            return
        task = self.bench.task(service, timeout_s=timeout_s, durable=True)
        self.submitted.append(task)
        self.disk[task.id] = Kept(service, self.epoch)

    @precondition(lambda self: self.dispatcher.tasks)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(list(self.dispatcher.tasks.values())))
        self.dispatcher.cancel(task, "the client left")

    # -- workers -----------------------------------------------------------------------------------------------

    @rule(name=WORKERS, slots=SLOTS, usable=st.sampled_from([True, True, True, False]), data=st.data())
    def arrive(self, name: str, slots: dict[str, int], *, usable: bool, data: st.DataObject) -> None:
        going_on = self.dispatcher.arrived(name, keeps=self.kept_by(data, name))
        assert all(attempt.open and attempt.worker_id == name for attempt in going_on)
        self.dispatcher.offers(name, slots, usable=usable)

    @rule(name=WORKERS, data=st.data())
    def heartbeat(self, name: str, data: st.DataObject) -> None:
        self.dispatcher.heard(name, self.kept_by(data, name))

    @rule(name=WORKERS)
    def forget(self, name: str) -> None:
        self.memories.pop(name, None)

    @rule(name=WORKERS, slots=SLOTS, waits=st.booleans())
    def poll(self, name: str, slots: dict[str, int], *, waits: bool) -> None:
        self.dispatcher.offers(name, slots, usable=True)
        self.dispatcher.polling(name, waiting=True)
        if not waits:
            self.dispatcher.polling(name, waiting=False)

    @rule(name=WORKERS)
    def depart(self, name: str) -> None:
        self.dispatcher.departed(name)

    @rule(name=WORKERS, blame=st.booleans())
    def go(self, name: str, *, blame: bool) -> None:
        self.dispatcher.gone(name, "offline", blame=blame)

    @rule(names=st.sets(WORKERS), deaf=st.sets(WORKERS, max_size=1))
    def fill(self, names: set[str], deaf: set[str]) -> None:
        self.effects.full, self.effects.deaf = names, deaf
        # A way that is free again is looked at by the next tick.
        self.dispatcher.tick()

    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        if attempt := self.any_open(data):
            self.dispatcher.accept(attempt)

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        """Some of a live task's answer goes to its client."""
        attempt = self.any_open(data)
        if attempt and not attempt.task.durable:
            self.dispatcher.accept(attempt)
            attempt.task.committed = True

    @rule(data=st.data(), twice=st.booleans(), kept=st.sampled_from([True, True, False]))
    def deliver(self, data: st.DataObject, *, twice: bool, kept: bool) -> None:
        """A whole answer comes; that of a durable task can be kept, or not, at once or later."""
        if attempt := self.any_open(data):
            self.whole(attempt, kept=kept)
            if twice:
                self.whole(attempt, kept=kept)

    @rule(data=st.data(), kept=st.booleans())
    def deliver_late(self, data: st.DataObject, *, kept: bool) -> None:
        attempt = self.any_known(data)
        if attempt is None or attempt.open:
            return
        end = attempt.task.closing
        if self.dispatcher.revive(attempt):
            assert (attempt.open, attempt.task.attempt) == (True, attempt)
            self.whole(attempt, kept=kept)
        else:
            assert attempt.task.closing == end

    @rule(data=st.data())
    def list_late(self, data: st.DataObject) -> None:
        attempt = self.any_known(data)
        if attempt is not None:
            self.dispatcher.revive(attempt)

    def whole(self, attempt: Attempt, *, kept: bool) -> None:
        self.dispatcher.accept(attempt)
        if attempt.task.durable:
            assert not attempt.open or attempt.task.id in self.effects.collected, "nobody takes its answer in"
        self.dispatcher.delivered(attempt, usage={})
        if attempt.task.durable and kept:
            self.dispatcher.succeed(attempt)

    @rule(data=st.data(), kept=st.booleans())
    def take_in(self, data: st.DataObject, *, kept: bool) -> None:
        """What a durable task's worker has delivered is kept after all, or cannot be."""
        attempt = self.any_open(data)
        if attempt and attempt.delivered:
            if kept:
                self.dispatcher.succeed(attempt)
            else:
                self.dispatcher.spoilt(attempt, "coordinator", "the disk is full")

    @rule(data=st.data(), fault=FAULTS)
    def fail(self, data: st.DataObject, fault: Fault) -> None:
        if attempt := self.any_open(data):
            self.dispatcher.fail(attempt, fault, "it broke")
            self.dispatcher.fail(attempt, fault, "it broke again")

    @rule(data=st.data())
    def break_upload(self, data: st.DataObject) -> None:
        if attempt := self.any_open(data):
            self.dispatcher.broke(attempt, "it broke off")

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        if attempt := self.any_open(data):
            self.dispatcher.give_back(attempt, "nobody took it")

    # -- time, the disk, and the coordinator itself ------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0, 12.0, 61.0, 700.0]), awake=st.booleans())
    def time_passes(self, seconds: float, *, awake: bool) -> None:
        if awake:
            self.bench.turn(min(seconds, 61.0))
        else:
            self.bench.now += seconds
            self.dispatcher.tick()

    @rule()
    def note(self) -> None:
        """What has begun is written down."""
        for task in self.dispatcher.tasks.values():
            if task.durable and task.closing is None:
                self.disk[task.id] = self.disk[task.id]._replace(attempts=snapshot(task))

    @precondition(lambda self: self.effects.to_write)
    @rule(data=st.data())
    def write_end(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.effects.to_write))
        self.effects.to_write.remove(task)
        self.write(task)
        self.dispatcher.closed(task)
        self.dispatcher.closed(task)

    def write(self, task: Task) -> None:
        kept = self.disk[task.id]
        assert kept.end is None, "an end that is on disk never changes"
        assert task.id not in self.written
        self.written.add(task.id)
        holder = task.holder if task.closing == "succeeded" else None
        credited = (holder.worker_id, holder.number) if holder else None
        self.disk[task.id] = kept._replace(attempts=snapshot(task), end=task.closing, credited=credited)

    @rule(data=st.data(), now=st.sampled_from([0.0, 1000.0, 1e6]))
    def crash(self, data: st.DataObject, now: float) -> None:
        """The process is gone; commits on their way are there, or not. A new one begins with what the disk has."""
        for task in self.effects.to_write:
            if data.draw(st.booleans()):
                self.write(task)
        self.begin(now)
        for task_id, kept in self.disk.items():
            if kept.end is None:
                self.submitted.append(self.restored(task_id, kept))

    def restored(self, task_id: str, kept: Kept) -> Task:
        task = Task(
            task_id=task_id,
            service=kept.service,
            method="POST",
            path=f"/{kept.service}",
            headers=(),
            body_bytes=0,
            key_id="key:1",
            now=self.bench.now,
            timeout_s=600,
            durable=True,
            base=(self.epoch - kept.epoch) * MAX_ATTEMPTS,
        )
        for number, worker_id, lease_id, state in kept.attempts:
            attempt = Attempt(task, number, worker_id, self.bench.now, lease_id=lease_id)
            attempt.state = state
            task.attempts.append(attempt)
        given = [attempt for attempt in task.attempts if attempt.open]
        assert len(given) <= 1
        if given:
            self.effects.collected.add(task_id)
        self.dispatcher.restore(task, given[0] if given else None)
        return task

    # -- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def no_lease_has_two_holders_and_numbers_only_grow_over_every_restart(self) -> None:
        for attempt in self.effects.offered[self.seen :]:
            assert attempt.lease_id not in self.leases
            self.leases[attempt.lease_id] = (attempt.task.id, attempt.number, attempt.worker_id)
            assert attempt.number > self.numbers.get(attempt.task.id, 0)
            self.numbers[attempt.task.id] = attempt.number
            ref = AttemptRef(task_id=attempt.task.id, attempt=attempt.number, lease_id=attempt.lease_id)
            self.memories.setdefault(attempt.worker_id, {})[attempt.lease_id] = ref
        self.seen = len(self.effects.offered)

    @invariant()
    def every_task_ends_once_or_is_still_there(self) -> None:
        for task in self.submitted:
            assert self.effects.ended[task.id] == task.final
            assert (task.id in self.dispatcher.tasks) != task.final
        decided = Counter(task.id for task in self.effects.to_write)
        assert all(count == 1 for count in decided.values())
        known = {task.id for task in self.submitted}
        assert all(kept.end is not None or task_id in known for task_id, kept in self.disk.items())

    @invariant()
    def the_ledger_is_the_succeeded_tasks(self) -> None:
        for kept in self.disk.values():
            assert (kept.credited is not None) == (kept.end == "succeeded")
            won = [(worker, number) for number, worker, _, state in kept.attempts if state == "succeeded"]
            assert kept.end is None or won == ([kept.credited] if kept.credited else [])

    @invariant()
    def nothing_that_happens_to_a_worker_harms_what_it_has_delivered(self) -> None:
        delivered = [a for task in self.submitted for a in task.attempts if a.delivered]
        assert [a for a in delivered if a.state in ("lost", "failed", "returned")] == []

    @invariant()
    def at_most_one_attempt_is_open_and_it_speaks_for_its_task(self) -> None:
        for task in self.submitted:
            assert [a for a in task.attempts if a.open] == [a for a in [task.attempt] if a and a.open]
            assert not ((task.final or task.closing) and task.attempt and task.attempt.open)
            if task.closing is None:
                assert (task.state == "running") == bool(task.attempt and task.attempt.open)

    @invariant()
    def attempts_only_grow_and_are_bounded(self) -> None:
        for task in self.submitted:
            known = self.grown.get(task.id, [])
            assert task.attempts[: len(known)] == known
            mine = [a.number for a in task.attempts if a.number > task.base]
            assert mine == list(range(task.base + 1, task.base + 1 + len(mine)))
            assert len(mine) <= MAX_ATTEMPTS
            self.grown[task.id] = list(task.attempts)

    @invariant()
    def queued_tasks_are_in_one_queue_and_counters_agree(self) -> None:
        queued = list(self.dispatcher._matcher)
        assert Counter(task.id for task in queued) == Counter(
            task.id for task in self.dispatcher.tasks.values() if task.state == "queued" and task.closing is None
        )
        assert self.dispatcher.queued == len(queued)
        states = Counter(task.state for task in self.submitted)
        assert (self.dispatcher.succeeded, self.dispatcher.failed) == (states["succeeded"], states["failed"])

    @invariant()
    def no_seat_holds_what_is_not_its_own_or_has_ended(self) -> None:
        held = [a for seat in self.dispatcher.seats.values() for a in seat.running.values()]
        assert all(a.open for a in held)
        # What is delivered needs no worker any more: it may be without a seat while it is put away.
        free = [a for t in self.dispatcher.tasks.values() if (a := t.attempt) and a.open and a.delivered]
        needed = [a for t in self.dispatcher.tasks.values() if (a := t.attempt) and a.open and not a.delivered]
        assert {a.lease_id for a in needed} <= {a.lease_id for a in held}
        assert {a.lease_id for a in held} <= {a.lease_id for a in [*needed, *free]}
        for seat in self.dispatcher.seats.values():
            assert all(a.worker_id == seat.worker_id for a in seat.running.values())
            assert all(quota >= 1 for quota in seat.quota.values())

    @invariant()
    def nothing_waits_while_somebody_who_may_take_it_is_free(self) -> None:
        for task in self.dispatcher.tasks.values():
            if task.state == "queued" and task.closing is None and task.promise is None:
                free = [
                    seat.worker_id
                    for seat in self.dispatcher.seats.values()
                    if seat.usable and seat.reachable and seat.room(task.service) > 0
                    if seat.worker_id not in task.excluded and self.effects.ready(seat.worker_id)
                    if seat.full_until <= self.bench.now
                    if self.dispatcher.breakers.allows(seat.worker_id, task.lane, self.bench.now)
                ]
                assert free == []

    @invariant()
    def a_promise_is_kept_by_a_worker_that_is_there_and_busy_and_for_a_while_only(self) -> None:
        promised = {task.id: task for task in self.dispatcher._matcher if task.promise is not None}
        held = [task for seat in self.dispatcher.seats.values() for task in (seat.promised or {}).values()]
        assert {task.id for task in held} == promised.keys()
        for task in held:
            assert task.promise is not None
            seat = self.dispatcher.seats[task.promise.worker_id]
            assert (seat.usable, seat.reachable, seat.worker_id in task.excluded) == (True, True, False)
            assert 0 <= task.promise.until - self.bench.now <= PATIENT * MOST_WAIT_S + PATIENT_S
            assert len(seat.promised or ()) <= seat.slots.get(task.service, 0)


def snapshot(task: Task) -> tuple[tuple[int, str, str, AttemptState], ...]:
    return tuple((a.number, a.worker_id, a.lease_id, a.state) for a in task.attempts)


Everything.TestCase.settings = settings(max_examples=200, stateful_step_count=60)
test_nothing_is_lost_or_done_twice = Everything.TestCase
