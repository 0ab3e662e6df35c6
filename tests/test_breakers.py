"""Workers that fail again and again are left alone for a while, and come back by showing that they can."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain import breakers
from rma_coordinator.domain.breakers import LEAST_STREAK, MOST_SHUT_S, SHUT_S, Breakers
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    import pytest

EVENTS = st.lists(st.tuples(st.sampled_from(["fail", "succeed", "give", "end"]), st.floats(0, 100)), max_size=80)


def shut(found: Breakers, now: float) -> None:
    for _ in range(LEAST_STREAK):
        found.failed("w", "llm", now)


def test_failures_in_a_row_shut_a_worker_for_that_lane_alone() -> None:
    found = Breakers()
    assert [found.failed("w", "llm", 0.0) for _ in range(LEAST_STREAK)] == [False] * (LEAST_STREAK - 1) + [True]
    assert not found.allows("w", "llm", SHUT_S - 1)
    assert found.allows("w", "ocr", 0.0)
    assert found.allows("other", "llm", 0.0)


def test_a_success_between_them_counts() -> None:
    found = Breakers()
    for _ in range(10):
        for _ in range(LEAST_STREAK - 1):
            found.failed("w", "llm", 0.0)
        found.succeeded("w", "llm", 0.0)
    assert found.allows("w", "llm", 0.0)
    assert not found


def test_one_task_at_a_time_is_the_probe_and_its_success_opens() -> None:
    found = Breakers()
    shut(found, 0.0)
    assert found.allows("w", "llm", SHUT_S)
    found.given("w", "llm", "lease-1")
    assert not found.allows("w", "llm", SHUT_S + 5)
    assert found.succeeded("w", "llm", SHUT_S + 6)
    assert found.allows("w", "llm", SHUT_S + 6)
    assert found.failed("w", "llm", SHUT_S + 7), "not all is forgiven by one success"


def test_a_probe_that_fails_shuts_for_twice_as_long_and_never_for_ever() -> None:
    found, now, lengths = Breakers(), 0.0, []
    shut(found, now)
    for _ in range(10):
        lengths.append(found.until("w", "llm") - now)
        now = found.until("w", "llm")
        found.given("w", "llm", f"lease at {now}")
        assert found.failed("w", "llm", now)
    assert lengths == [min(MOST_SHUT_S, SHUT_S * 2**number) for number in range(10)]


def test_a_probe_that_shows_nothing_lets_another_one_follow() -> None:
    found = Breakers()
    shut(found, 0.0)
    found.given("w", "llm", "lease-1")
    found.ended("w", "llm", "another")
    assert not found.allows("w", "llm", SHUT_S)
    found.ended("w", "llm", "lease-1")
    assert found.allows("w", "llm", SHUT_S)


def test_what_ran_beside_the_one_that_shut_it_says_nothing_new() -> None:
    found = Breakers()
    shut(found, 0.0)
    assert not found.failed("w", "llm", 1.0)
    assert not found.succeeded("w", "llm", 2.0)
    assert found.until("w", "llm") == SHUT_S


@given(EVENTS)
def test_a_shut_worker_can_always_be_tried_again_some_day(events: list[tuple[str, float]]) -> None:
    found, now = Breakers(), 0.0
    for number, (kind, seconds) in enumerate(events):
        now += seconds
        if kind == "fail":
            found.failed("w", "llm", now)
        elif kind == "succeed":
            found.succeeded("w", "llm", now)
        elif kind == "give" and found.allows("w", "llm", now):
            found.given("w", "llm", f"{number}")
        else:
            for lease in range(number):
                found.ended("w", "llm", f"{lease}")
    for lease in range(len(events)):
        found.ended("w", "llm", f"{lease}")
    assert found.allows("w", "llm", now + MOST_SHUT_S)


def test_no_more_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakers, "MOST_REMEMBERED", 10)
    found = Breakers()
    for number in range(100):
        found.failed(f"w{number}", "llm", 0.0)
    assert len(found._known) == 10


# -- in dispatch ---------------------------------------------------------------------------------------------------


def fail(bench: Bench, name: str, count: int) -> None:
    """Let a worker fail so many tasks of its own."""
    for _ in range(count):
        task = bench.task()
        attempt = bench.attempt(task)
        assert attempt.worker_id == name
        bench.dispatcher.accept(attempt)
        bench.dispatcher.fail(attempt, "service", "out of memory")
        bench.dispatcher.cancel(task, "the client left")


def test_a_machine_that_fails_at_once_cannot_eat_the_queue() -> None:
    bench = Bench()
    bench.worker("bad", 8)
    fail(bench, "bad", LEAST_STREAK)
    bench.worker("good", 2)
    tasks = [bench.task() for _ in range(6)]
    assert {task.attempt.worker_id for task in tasks if task.attempt} == {"good"}
    assert [task.state for task in tasks] == ["running"] * 2 + ["queued"] * 4


def test_a_worker_that_fails_one_kind_of_work_is_still_given_another() -> None:
    bench = Bench()
    bench.worker("bad", 8)
    fail(bench, "bad", LEAST_STREAK)
    bench.worker("good", 1)
    bench.dispatcher.offers("bad", {"notes": 8, "ner": 1}, usable=True)
    assert bench.attempt(bench.task("ner")).worker_id == "bad"


def test_where_everybody_is_shut_somebody_is_tried_all_the_same() -> None:
    bench = Bench()
    bench.worker("bad", 8)
    fail(bench, "bad", LEAST_STREAK)
    assert bench.attempt(bench.task()).worker_id == "bad"


def test_after_a_while_one_task_shows_whether_it_can_again() -> None:
    bench = Bench()
    bench.worker("bad", 8)
    fail(bench, "bad", LEAST_STREAK)
    bench.worker("good", 1)
    first = bench.task()
    tasks = [bench.task() for _ in range(3)]
    assert [task.state for task in tasks] == ["queued"] * 3
    for _ in range(int(SHUT_S) + 1):
        bench.turn(1.0)
        for attempt in bench.effects.offered:
            if attempt.open:
                bench.dispatcher.accept(attempt)
    probes = [task for task in tasks if task.state == "running"]
    assert [bench.attempt(task).worker_id for task in probes] == ["bad"]
    bench.dispatcher.accept(bench.attempt(probes[0]))
    bench.dispatcher.delivered(bench.attempt(probes[0]), usage={})
    assert bench.attempt(first).worker_id == "good"
    assert [task.state for task in tasks if task is not probes[0]] == ["running"] * 2


def test_who_was_shut_is_tried_again_though_another_could_do_everything() -> None:
    bench = Bench()
    bench.worker("bad", 8)
    fail(bench, "bad", LEAST_STREAK)
    bench.worker("good", 8)
    for name in ("bad", "good"):
        for _ in range(20):
            bench.dispatcher.speeds.learn(name, "notes", 1.0, beside=0)
    bench.turn(SHUT_S + 1)
    given = Counter[str]()
    for _ in range(500):
        attempt = bench.running("notes")
        given[attempt.worker_id] += 1
        bench.dispatcher.delivered(attempt, usage={})
    assert given["bad"] >= 1


def test_a_task_that_breaks_every_worker_shuts_none() -> None:
    bench = Bench()
    names = ("w1", "w2", "w3", "w4")
    for name in names:
        bench.worker(name, 4)
    for _ in range(3 * LEAST_STREAK):
        task = bench.task()
        while task.attempt is not None and task.attempt.open:
            bench.dispatcher.accept(task.attempt)
            bench.dispatcher.fail(task.attempt, "service", "it crashed")
        assert task.state == "failed"
    assert all(bench.dispatcher.breakers.allows(name, "notes", bench.now) for name in names)
