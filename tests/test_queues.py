"""Whose turn it is: fair between keys, shared between classes, in order within a key."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.queues import MOST_CLOCKS, SHARES, Clocks, Line
from rma_coordinator.domain.tasks import Task
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_coordinator.domain.tasks import Priority

PRIORITIES: st.SearchStrategy[Priority] = st.sampled_from(["high", "normal", "low"])


def a_task(key: str, priority: Priority = "normal", *, now: float = 0.0, model: str = "") -> Task:
    return Task(
        service="llm", method="POST", path="/", headers=(), body_bytes=0, key_id=key, now=now, timeout_s=600.0,
        priority=priority, model=model,
    )  # fmt: skip


def in_turn(line: Line, count: int) -> list[Task]:
    taken = []
    for _ in range(count):
        task = line.pop()
        assert task is not None
        line.served(task)
        taken.append(task)
    return taken


def test_one_key_with_a_thousand_requests_delays_another_by_one_turn() -> None:
    line = Line()
    for number in range(1000):
        line.add(a_task("greedy", now=number))
    in_turn(line, 300)
    line.add(a_task("modest", now=2000))
    assert "modest" in [task.key_id for task in in_turn(line, 2)]


def test_keys_that_all_wait_are_served_evenly_whatever_they_sent() -> None:
    line = Line()
    for key, count in (("a", 500), ("b", 100), ("c", 40)):
        for _ in range(count):
            line.add(a_task(key))
    assert Counter(task.key_id for task in in_turn(line, 90)) == {"a": 30, "b": 30, "c": 30}


def test_a_flood_of_high_priority_leaves_each_other_class_its_share() -> None:
    line = Line()
    for priority in SHARES:
        for _ in range(500):
            line.add(a_task("one", priority))
    served = Counter(task.priority for task in in_turn(line, 210))
    assert served == {"high": 160, "normal": 40, "low": 10}


def test_an_urgent_task_overtakes_what_waits_already() -> None:
    line = Line()
    for number in range(100):
        line.add(a_task("one", "low", now=number))
    in_turn(line, 10)
    line.add(a_task("two", "high", now=200))
    assert "high" in [task.priority for task in in_turn(line, 2)]


def test_who_was_away_saves_nothing_up() -> None:
    line = Line()
    for _ in range(200):
        line.add(a_task("steady"))
    in_turn(line, 100)
    for _ in range(100):
        line.add(a_task("late"))
    served = Counter(task.key_id for task in in_turn(line, 20))
    assert abs(served["late"] - served["steady"]) <= 1


def test_a_flood_for_one_model_does_not_hold_up_another_keys_model() -> None:
    line = Line()
    for number in range(100):
        line.add(a_task("greedy", model="big", now=number))
    in_turn(line, 5)
    line.add(a_task("modest", model="small", now=500))
    assert "small" in [task.model for task in in_turn(line, 2)]


def test_clocks_are_forgotten_once_others_have_caught_up() -> None:
    clocks = Clocks()
    for number in range(20 * MOST_CLOCKS):
        clocks.serve(f"key-{number}", 1.0)
        clocks.serve("always", 1.0)
    assert len(clocks._ends) <= MOST_CLOCKS + 1


@given(st.lists(st.tuples(st.sampled_from("abc"), PRIORITIES, st.sampled_from(["", "m", "n"])), max_size=60), st.data())
def test_whatever_comes_everything_leaves_once_and_in_order_within_its_key(
    arrivals: list[tuple[str, Priority, str]], data: st.DataObject
) -> None:
    line = Line()
    waiting: list[Task] = []
    left: list[Task] = []
    for number, (key, priority, model) in enumerate(arrivals):
        task = a_task(key, priority, now=float(number), model=model)
        line.add(task)
        waiting.append(task)
        if data.draw(st.booleans()):
            left += in_turn(line, 1)
    still = [task for task in waiting if task not in left]
    one_leaves: bool = data.draw(st.booleans())
    if still and one_leaves:
        gone = still[data.draw(st.integers(0, len(still) - 1))]
        line.remove(gone)
        waiting.remove(gone)
    left += in_turn(line, line.waiting)
    assert line.pop() is None
    assert (list(line), line.waiting, line._open) == ([], 0, {})
    assert Counter(task.id for task in left) == Counter(task.id for task in waiting)
    for group in {(task.lane, task.priority, task.key_id) for task in left}:
        times = [task.created_at for task in left if (task.lane, task.priority, task.key_id) == group]
        assert times == sorted(times)


def test_a_flood_of_one_key_through_the_dispatcher_delays_another_by_one_service_time() -> None:
    bench = Bench(max_queued=2000)
    bench.worker("w1", slots=2)
    flood = [bench.task() for _ in range(1000)]
    other = bench.task(key_id="key:2")
    ended = 0
    while other.state == "queued":
        running = next(task for task in flood if task.state == "running")
        bench.dispatcher.accept(bench.attempt(running))
        bench.dispatcher.delivered(bench.attempt(running), usage={})
        ended += 1
    assert ended <= 2


def test_in_a_large_pool_a_task_still_meets_the_one_free_worker() -> None:
    bench = Bench(max_queued=2000)
    for number in range(300):
        bench.worker(f"w{number}")
    tasks = [bench.task() for _ in range(300)]
    assert all(task.state == "running" for task in tasks)
    waits = [bench.task(), bench.task()]
    assert all(task.state == "queued" for task in waits)
    bench.dispatcher.accept(bench.attempt(tasks[123]))
    bench.dispatcher.delivered(bench.attempt(tasks[123]), usage={})
    assert [task.state for task in waits] == ["running", "queued"]
    assert bench.attempt(waits[0]).worker_id == bench.attempt(tasks[123]).worker_id
