"""Dispatch: attempts, leases and blame, with a clock that the tests turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from rma_coordinator.domain.dispatch import FULL_S, MAX_ATTEMPTS, MOST_FULL_S, REMEMBERED
from rma_coordinator.domain.tasks import LEASE_S
from rma_core.errors import NotFound, TryLater
from rma_core.models.worker import AttemptRef
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_core.models.worker import Fault


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


def test_a_worker_that_had_no_room_just_then_may_have_the_task_a_moment_later(bench: Bench) -> None:
    seat = bench.worker("w1", 4)
    task = bench.task()
    full = bench.attempt(task)
    bench.dispatcher.fail(full, "owner", "notes is busy")
    assert (full.state, task.state, seat.quota) == ("lost", "queued", {})
    bench.turn(FULL_S)
    assert (task.state, bench.attempt(task).worker_id, bench.attempt(task).number) == ("running", "w1", 2)


def test_a_worker_that_gave_a_task_back_may_have_it_again_when_there_is_no_other(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    task = attempt.task
    bench.dispatcher.fail(attempt, "owner", "its model server is used by others just now")
    bench.turn(FULL_S / 2)
    assert (attempt.state, task.state) == ("returned", "queued")
    bench.turn(FULL_S / 2)
    assert (task.state, bench.attempt(task).worker_id) == ("running", "w1")


def test_a_task_that_all_but_its_blamed_worker_gave_back_goes_to_those_again(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.worker("w2")
    bench.dispatcher.fail(attempt, "service", "crashed")
    for _ in range(3):
        again = bench.attempt(attempt.task)
        assert again.worker_id == "w2"
        bench.dispatcher.accept(again)
        bench.dispatcher.fail(again, "owner", "busy just now")
        assert attempt.task.state == "queued"
        bench.turn(MOST_FULL_S)


def test_a_task_ends_when_the_last_worker_that_could_try_it_again_has_gone(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    waits = bench.task()
    bench.worker("w2")
    bench.dispatcher.fail(attempt, "service", "crashed")
    again = bench.attempt(attempt.task)
    bench.dispatcher.accept(again)
    bench.dispatcher.fail(again, "owner", "busy just now")
    assert attempt.task.state == "queued"
    bench.dispatcher.gone("w2", "it left", blame=False)
    assert (attempt.task.state, attempt.task.reasons[-1]) == ("failed", "no other worker offers notes")
    assert waits.state == "running", "w1 has room for what it has not failed"


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


def test_a_broken_upload_whose_worker_still_has_it_is_not_charged(bench: Bench) -> None:
    bench.worker("w1")
    attempt = bench.running()
    bench.dispatcher.broke(attempt, "the answer broke off")
    bench.turn(5)
    bench.dispatcher.heard("w1", [AttemptRef(task_id=attempt.task.id, attempt=1, lease_id=attempt.lease_id)])
    bench.turn(20)
    assert attempt.open


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


def test_an_answer_that_comes_back_before_it_was_ever_accepted_is_taken_in(bench: Bench) -> None:
    bench.worker("w1")
    task = bench.task(durable=True)
    attempt = bench.attempt(task)
    bench.dispatcher.give_back(attempt, "the worker left before it was handed the task")
    assert task.id not in bench.effects.collected
    assert bench.dispatcher.revive(attempt)
    assert task.id in bench.effects.collected, "or nobody would take its answer in, and it would hang for ever"


def test_the_time_without_a_connection_is_not_held_against_an_attempt_that_goes_on(bench: Bench) -> None:
    bench.worker("w1", 2)
    ran, offered = bench.running(), bench.attempt(bench.task())
    bench.turn(LEASE_S - 58)
    bench.dispatcher.departed("w1")
    bench.turn(8)
    ran.lease_until = bench.now - 1
    keeps = [AttemptRef(task_id=a.task.id, attempt=a.number, lease_id=a.lease_id) for a in (ran, offered)]
    assert bench.dispatcher.arrived("w1", keeps=keeps) == [ran, offered]
    bench.turn(10)
    assert (ran.state, offered.state) == ("running", "running")
