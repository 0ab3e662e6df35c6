"""Dispatch: attempts, leases and blame, with a clock that the tests turn, and a machine that tries everything."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rma_coordinator.domain.dispatch import MAX_ATTEMPTS, REMEMBERED, Dispatcher
from rma_coordinator.domain.tasks import LEASE_S, Attempt, Seat, Task
from rma_core.errors import NotFound, TryLater
from rma_core.models.worker import AttemptRef

if TYPE_CHECKING:
    from rma_core.models.worker import Fault


class Recording:
    """Effects that take everything down; ``deaf`` workers cannot be handed anything, ``full`` ones not now."""

    def __init__(self) -> None:
        self.offered: list[Attempt] = []
        self.withdrawn: list[Attempt] = []
        self.again: list[Task] = []
        self.ended: Counter[str] = Counter()
        self.to_write: list[Task] = []
        self.deaf: set[str] = set()
        self.full: set[str] = set()
        self.seats: dict[str, Seat] = {}

    def ready(self, worker_id: str) -> bool:
        return worker_id not in self.full

    def offer(self, attempt: Attempt) -> bool:
        seat = self.seats[attempt.worker_id]
        assert seat.room(attempt.task.service) >= 0, "more than its slots"
        assert (seat.usable, seat.reachable) == (True, True)
        earlier = [a for a in attempt.task.attempts[:-1] if a.worker_id == attempt.worker_id]
        assert not [a for a in earlier if a.state in ("failed", "returned")], "never to the same worker again"
        self.offered.append(attempt)
        return attempt.worker_id not in self.deaf

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        assert reason
        assert not attempt.open
        self.withdrawn.append(attempt)

    def accepted(self, attempt: Attempt) -> None:
        assert attempt.state == "running"

    def closing(self, task: Task) -> None:
        assert task.durable
        self.to_write.append(task)

    def restarted(self, task: Task) -> None:
        assert not task.committed
        self.again.append(task)

    def finished(self, task: Task) -> None:
        assert task.final
        self.ended[task.id] += 1


class Bench:
    """A dispatcher with everything a test needs of it."""

    def __init__(self, *, max_queued: int = 100) -> None:
        self.now = 1000.0
        self.effects = Recording()
        self.dispatcher = Dispatcher(self.effects, clock=lambda: self.now, max_queued=max_queued)
        self.effects.seats = self.dispatcher.seats

    def task(self, service: str = "notes", *, timeout_s: float = 600) -> Task:
        task = Task(
            service=service,
            method="POST",
            path=f"/{service}",
            headers=(),
            body_bytes=0,
            key_id="key:1",
            now=self.now,
            timeout_s=timeout_s,
        )
        self.dispatcher.submit(task)
        return task

    def worker(self, name: str, slots: int = 1, service: str = "notes") -> Seat:
        self.dispatcher.arrived(name)
        self.dispatcher.offers(name, {service: slots}, usable=True)
        return self.dispatcher.seat(name)

    def running(self, service: str = "notes") -> Attempt:
        """Return a task's first attempt, accepted."""
        attempt = self.attempt(self.task(service))
        self.dispatcher.accept(attempt)
        return attempt

    def attempt(self, task: Task) -> Attempt:
        assert task.attempt is not None
        return task.attempt

    def turn(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.dispatcher.tick()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_task_waits_until_a_worker_has_a_free_slot_for_its_service(bench: Bench) -> None:
    bench.worker("w-other", service="ner")
    task = bench.task()
    assert (task.state, bench.dispatcher.queued) == ("queued", 1)
    bench.worker("w1")
    assert (task.state, bench.dispatcher.queued, bench.dispatcher.running) == ("running", 0, 1)


def test_the_freest_worker_gets_the_next_task(bench: Bench) -> None:
    bench.worker("w1", 1)
    bench.worker("w2", 3)
    got = [bench.attempt(bench.task()).worker_id for _ in range(4)]
    assert sorted(got) == ["w1", "w2", "w2", "w2"]
    assert got[:2] == ["w2", "w2"]


def test_a_full_queue_refuses_with_a_time_to_try_again() -> None:
    bench = Bench(max_queued=1)
    bench.task()
    with pytest.raises(TryLater) as refused:
        bench.task()
    assert refused.value.retry_after_s == 5


def test_a_task_not_accepted_goes_back_unblamed_and_never_to_the_same_worker(bench: Bench) -> None:
    lazy = bench.worker("w1", 8)
    task = bench.task()
    other = bench.worker("w2", 1)
    bench.turn(6)
    first, second = task.attempts
    assert (first.state, first.reason) == ("lost", "not accepted within 5 s")
    assert second.worker_id == "w2"
    assert lazy.quota == {"notes": 4}
    assert other.quota == {}


def test_three_different_workers_that_fail_end_the_task_with_every_reason(bench: Bench) -> None:
    for name in ("w1", "w2", "w3", "w4"):
        bench.worker(name)
    task = bench.task()
    for number in range(3):
        attempt = bench.attempt(task)
        bench.dispatcher.accept(attempt)
        bench.dispatcher.fail(attempt, "service", f"reason {number}")
    assert (task.state, len({a.worker_id for a in task.attempts})) == ("failed", 3)
    assert [reason.partition(": ")[2] for reason in task.reasons[:3]] == ["reason 0", "reason 1", "reason 2"]
    assert task.reasons[3:] == ["given up after 3 attempts"]


@pytest.mark.parametrize(("fault", "state"), [("owner", "returned"), ("coordinator", "lost")])
def test_what_is_not_the_workers_fault_is_not_charged_to_it(bench: Bench, fault: Fault, state: str) -> None:
    seat = bench.worker("w1", 4)
    attempt = bench.running()
    bench.worker("w2")
    bench.dispatcher.fail(attempt, fault, "the owner came back")
    assert (attempt.state, seat.quota) == (state, {})
    assert bench.attempt(attempt.task).worker_id == "w2"


def test_a_bad_request_fails_at_once_and_blames_nobody(bench: Bench) -> None:
    seat = bench.worker("w1", 4)
    bench.worker("w2", 1)
    attempt = bench.running()
    bench.dispatcher.fail(attempt, "request", "no such page")
    assert (attempt.task.state, attempt.task.reasons, seat.quota) == ("failed", ["no such page"], {})


def test_nobody_left_to_ask_is_a_reason_of_its_own(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.dispatcher.fail(attempt, "service", "out of memory")
    assert attempt.task.reasons == ["w1: out of memory", "no other worker offers notes"]


def test_a_broken_channel_that_comes_back_with_its_attempt_goes_on(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.dispatcher.departed("w1")
    bench.turn(9)
    ref = AttemptRef(task_id=attempt.task.id, attempt=1, lease_id=attempt.lease_id)
    assert bench.dispatcher.arrived("w1", keeps=(ref,)) == [attempt]
    bench.turn(9)
    assert attempt.open


def test_a_broken_channel_that_stays_away_loses_what_ran_and_is_blamed_for_that_alone(bench: Bench) -> None:
    bench.worker("w1", 2)
    ran, waited = bench.running(), bench.attempt(bench.task())
    bench.dispatcher.departed("w1")
    bench.worker("w2", 2)
    bench.turn(11)
    assert (ran.state, waited.state) == ("failed", "lost")
    assert [bench.attempt(a.task).worker_id for a in (ran, waited)] == ["w2", "w2"]


def test_a_worker_that_never_saw_its_task_may_be_given_it_again(bench: Bench) -> None:
    bench.worker("w1")
    task = bench.task()
    bench.dispatcher.departed("w1")
    bench.worker("w1")
    assert [a.state for a in task.attempts] == ["lost", "offered"]
    assert bench.attempt(task).worker_id == "w1"


def test_a_worker_that_comes_back_is_given_nothing_before_it_says_what_it_can_take(bench: Bench) -> None:
    bench.worker("w1")
    bench.dispatcher.departed("w1")
    task = bench.task()
    bench.dispatcher.arrived("w1")
    assert task.state == "queued"
    bench.dispatcher.offers("w1", {}, usable=True)
    assert task.state == "queued"


def test_progress_renews_the_lease_and_its_absence_ends_the_attempt(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    for _ in range(3):
        bench.turn(LEASE_S - 10)
        bench.dispatcher.progress(attempt)
    assert attempt.open
    bench.turn(LEASE_S + 1)
    assert (attempt.state, attempt.reason) == ("failed", "no progress for 60 s")


def test_a_broken_upload_waits_a_moment_for_its_workers_reason(bench: Bench) -> None:
    bench.worker("w1", 2)
    told, silent = bench.running(), bench.running()
    bench.worker("w2", 2)
    for attempt in (told, silent):
        bench.dispatcher.broke(attempt, "the answer broke off")
    bench.turn(5)
    bench.dispatcher.fail(told, "owner", "the owner came back")
    bench.turn(6)
    assert (told.state, told.reason) == ("returned", "the owner came back")
    assert (silent.state, silent.reason) == ("failed", "the answer broke off")


def test_an_answer_that_has_begun_to_go_out_is_never_begun_again(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.worker("w2")
    attempt.task.committed = True
    bench.dispatcher.fail(attempt, "service", "crashed")
    assert (attempt.task.state, len(attempt.task.attempts)) == ("failed", 1)
    assert "the answer broke off: crashed" in attempt.task.reasons


def test_a_worker_that_left_frees_its_tasks_at_once(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.worker("w2")
    bench.dispatcher.gone("w1", "the worker left", blame=False)
    assert (attempt.state, bench.attempt(attempt.task).worker_id) == ("lost", "w2")


def test_a_task_has_a_last_moment_whether_it_ran_or_waited(bench: Bench) -> None:
    waited = bench.task("ner", timeout_s=10)
    bench.worker("w1")
    ran = bench.task(timeout_s=10)
    bench.dispatcher.accept(bench.attempt(ran))
    bench.turn(11)
    assert waited.reasons == ["no worker was free within 10 s"]
    assert ran.reasons == ["no whole answer within 10 s"]
    assert bench.attempt(ran) in bench.effects.withdrawn


def test_a_coordinator_that_stood_still_gives_everyone_that_time(bench: Bench) -> None:
    bench.worker("w1", 2)
    ran, waited = bench.running(), bench.attempt(bench.task())
    bench.now += 300
    bench.dispatcher.tick()
    assert (ran.open, waited.open) == (True, True)
    bench.turn(6)
    assert (ran.open, waited.open) == (True, False)


def test_a_worker_that_fails_gets_less_but_never_nothing_and_more_again_when_it_succeeds(bench: Bench) -> None:
    seat = bench.worker("w1", 8)
    quotas = []
    for _ in range(5):
        bench.dispatcher.fail(bench.running(), "service", "broken")
        quotas.append(seat.quota["notes"])
    assert quotas == [4, 2, 1, 1, 1]
    for _ in range(4):
        bench.dispatcher.succeed(bench.running())
        quotas.append(seat.quota["notes"])
    assert quotas[5:] == [2, 4, 8, 8]


def test_a_success_while_the_worker_says_no_slots_leaves_it_a_quota(bench: Bench) -> None:
    seat = bench.worker("w1", 2)
    attempt = bench.running()
    bench.dispatcher.offers("w1", {"notes": 0}, usable=True)
    bench.dispatcher.succeed(attempt)
    bench.dispatcher.offers("w1", {"notes": 2}, usable=True)
    assert seat.room("notes") > 0


def test_a_way_that_is_full_costs_nothing_and_one_that_is_deaf_ends_in_the_end(bench: Bench) -> None:
    bench.effects.full = {"w1"}
    bench.worker("w1")
    task = bench.task()
    assert (task.state, task.attempts) == ("queued", [])
    bench.effects.full, bench.effects.deaf = set(), {"w1"}
    bench.dispatcher.tick()
    assert (task.state, len(task.attempts)) == ("failed", MAX_ATTEMPTS)


@pytest.mark.parametrize("lease", ["", "0" * 32, "ä" * 32, "\udcff"])
def test_only_the_newest_attempt_with_its_lease_may_speak(bench: Bench, lease: str) -> None:
    bench.worker("w1")
    attempt = bench.running()
    task = attempt.task
    assert bench.dispatcher.current(task.id, 1, attempt.lease_id, "w1") is attempt
    wrong = [(task.id, 1, lease, "w1"), (task.id, 2, attempt.lease_id, "w1"), (task.id, 1, attempt.lease_id, "w2")]
    for arguments in [*wrong, ("task-0", 1, attempt.lease_id, "w1")]:
        with pytest.raises(NotFound):
            bench.dispatcher.current(*arguments)
    bench.dispatcher.succeed(attempt)
    with pytest.raises(NotFound):
        bench.dispatcher.current(task.id, 1, attempt.lease_id, "w1")


def test_finished_tasks_are_remembered_up_to_a_bound(bench: Bench) -> None:
    bench.worker("w1")
    for _ in range(REMEMBERED + 5):
        bench.dispatcher.succeed(bench.running())
    assert len(bench.dispatcher.finished) == REMEMBERED
    assert bench.dispatcher.tasks == {}
    assert bench.dispatcher.succeeded == REMEMBERED + 5


WORKERS = st.sampled_from(["w1", "w2", "w3", "w4"])
SERVICES = st.sampled_from(["notes", "ner"])
SLOTS = st.fixed_dictionaries({"notes": st.integers(0, 3)}, optional={"ner": st.integers(0, 2)})
FAULTS: st.SearchStrategy[Fault] = st.sampled_from(["worker", "service", "owner", "coordinator", "request"])


class Everything(RuleBasedStateMachine):
    """Workers come, go, break and lie, clients ask and leave, time passes: nothing may be lost or done twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(max_queued=20)
        self.dispatcher, self.effects = self.bench.dispatcher, self.bench.effects
        self.submitted: list[Task] = []
        self.grown: dict[str, list[Attempt]] = {}

    def any_open(self, data: st.DataObject) -> Attempt | None:
        attempts = [a for task in self.dispatcher.tasks.values() if (a := task.attempt) and a.open]
        return data.draw(st.sampled_from(attempts)) if attempts else None

    @rule(service=SERVICES)
    def submit(self, service: str) -> None:
        try:
            self.submitted.append(self.bench.task(service))
        except TryLater:
            assert self.dispatcher.queued >= 20

    @precondition(lambda self: self.dispatcher.tasks)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(list(self.dispatcher.tasks.values())))
        self.dispatcher.cancel(task, "the client left")

    @rule(name=WORKERS, slots=SLOTS, usable=st.sampled_from([True, True, True, False]), keeps=st.booleans())
    def arrive(self, name: str, slots: dict[str, int], *, usable: bool, keeps: bool) -> None:
        running = self.dispatcher.seat(name).running.values() if keeps else ()
        refs = [AttemptRef(task_id=a.task.id, attempt=a.number, lease_id=a.lease_id) for a in running]
        self.dispatcher.arrived(name, keeps=refs)
        self.dispatcher.offers(name, slots, usable=usable)

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
        if attempt := self.any_open(data):
            self.dispatcher.accept(attempt)
            attempt.task.committed = True

    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        if attempt := self.any_open(data):
            self.dispatcher.succeed(attempt)
            self.dispatcher.succeed(attempt)

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

    @rule(seconds=st.sampled_from([0.5, 1.0, 6.0, 12.0, 61.0, 700.0]), awake=st.booleans())
    def time_passes(self, seconds: float, *, awake: bool) -> None:
        if awake:
            self.bench.turn(min(seconds, 61.0))
        else:
            self.bench.now += seconds
            self.dispatcher.tick()

    @invariant()
    def every_task_ends_once_or_is_still_there(self) -> None:
        for task in self.submitted:
            assert self.effects.ended[task.id] == task.final
            assert (task.id in self.dispatcher.tasks) != task.final

    @invariant()
    def at_most_one_attempt_is_open_and_it_is_the_newest(self) -> None:
        for task in self.submitted:
            assert not any(attempt.open for attempt in task.attempts[:-1])
            assert not (task.final and task.attempt and task.attempt.open)
            assert (task.state == "running") == bool(task.attempt and task.attempt.open)

    @invariant()
    def attempts_only_grow_and_never_go_back_to_an_excluded_worker(self) -> None:
        for task in self.submitted:
            known = self.grown.get(task.id, [])
            assert task.attempts[: len(known)] == known
            assert [a.number for a in task.attempts] == list(range(1, len(task.attempts) + 1))
            assert len(task.attempts) <= MAX_ATTEMPTS
            blamed = [a.worker_id for a in task.attempts if a.state in ("failed", "returned")]
            assert len(blamed) == len(set(blamed))
            self.grown[task.id] = list(task.attempts)

    @invariant()
    def queued_tasks_are_in_one_queue_and_counters_agree(self) -> None:
        queued = [task for queue in self.dispatcher._queues.values() for task in queue]
        assert Counter(task.id for task in queued) == Counter(
            task.id for task in self.dispatcher.tasks.values() if task.state == "queued"
        )
        assert self.dispatcher.queued == len(queued)
        states = Counter(task.state for task in self.submitted)
        assert self.dispatcher.running == states["running"]
        assert (self.dispatcher.succeeded, self.dispatcher.failed) == (states["succeeded"], states["failed"])

    @invariant()
    def no_seat_holds_what_is_not_its_own_or_has_ended(self) -> None:
        held = [a for seat in self.dispatcher.seats.values() for a in seat.running.values()]
        assert all(a.open for a in held)
        assert len(held) == self.dispatcher.running
        for seat in self.dispatcher.seats.values():
            assert all(a.worker_id == seat.worker_id for a in seat.running.values())
            assert all(quota >= 1 for quota in seat.quota.values())

    @invariant()
    def nothing_waits_while_somebody_who_may_take_it_is_free(self) -> None:
        for task in self.dispatcher.tasks.values():
            if task.state == "queued":
                free = [
                    seat.worker_id
                    for seat in self.dispatcher.seats.values()
                    if seat.usable and seat.reachable and seat.room(task.service) > 0
                    if seat.worker_id not in task.excluded and self.effects.ready(seat.worker_id)
                ]
                assert free == []


Everything.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
test_nothing_is_lost_or_done_twice = Everything.TestCase
