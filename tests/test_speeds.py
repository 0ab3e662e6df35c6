"""What a worker's next task would take: measured, aged, an average where nothing is known."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain import speeds
from rma_coordinator.domain.speeds import HALF_LIFE_S, MOST_PAIRS, Measured, Speeds, Work
from tests.coordinator_fixtures import running
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from pathlib import Path

    from rma_coordinator.domain.tasks import Task


class Turned:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_of_whom_nothing_is_known_is_taken_for_an_average_worker() -> None:
    found = Speeds(Turned())
    for _ in range(40):
        found.learn("fast", "ocr", 1.0, beside=0)
        found.learn("slow", "ocr", 4.0, beside=0)
    new = found.expected("new", "ocr", beside=0)
    assert found.expected("fast", "ocr", beside=0).total < new.total < found.expected("slow", "ocr", beside=0).total
    assert not new.known
    assert new.failure == 0


def test_what_a_worker_did_before_anyone_else_is_neither_good_nor_bad() -> None:
    found = Speeds(Turned())
    assert found.expected("any", "ocr", beside=3).total == 0


def test_a_worker_that_became_slower_is_known_to_be() -> None:
    found = Speeds(Turned())
    for _ in range(30):
        found.learn("one", "ocr", 1.0, beside=0)
    for _ in range(30):
        found.learn("one", "ocr", 3.0, beside=0)
    assert found.expected("one", "ocr", beside=0).service == pytest.approx(3.0, rel=0.1)


def test_tasks_beside_each_other_are_no_sign_of_a_slow_machine() -> None:
    found = Speeds(Turned())
    for _ in range(10):
        found.learn("busy", "llm", 2.05, beside=3)
        found.learn("idle", "llm", 1.0, beside=0)
    busy, idle = (found.expected(name, "llm", beside=0).service for name in ("busy", "idle"))
    assert busy == pytest.approx(idle, rel=0.01)
    assert found.expected("idle", "llm", beside=3).service > idle


def test_a_machine_that_was_given_long_answers_is_no_slower_for_that() -> None:
    found = Speeds(Turned())
    for _ in range(30):
        found.learn("long", "llm", 4.0, beside=0, answer_bytes=4000)
        found.learn("short", "llm", 1.0, beside=0, answer_bytes=1000)
    long, short = (found.expected(name, "llm", beside=0).service for name in ("long", "short"))
    assert long == pytest.approx(short, rel=0.15)


def test_failures_cost_seconds_and_are_forgiven_by_successes_and_time() -> None:
    clock = Turned()
    found = Speeds(clock)
    for name in ("good", "bad"):
        for _ in range(20):
            found.learn(name, "ocr", 1.0, beside=0)
    for _ in range(10):
        found.failed("bad", "ocr")
    assert found.expected("good", "ocr", beside=0).failure == 0
    worst = found.expected("bad", "ocr", beside=0).failure
    assert worst > 1
    clock.now += 2 * HALF_LIFE_S
    faded = found.expected("bad", "ocr", beside=0).failure
    assert faded < worst / 2, "who is given nothing is forgiven in time"
    for _ in range(300):
        found.learn("bad", "ocr", 1.0, beside=0)
    assert found.expected("bad", "ocr", beside=0).failure < faded / 10


def test_what_nobody_has_seen_for_hours_counts_as_unknown() -> None:
    clock = Turned()
    found = Speeds(clock)
    for _ in range(20):
        found.learn("one", "ocr", 1.0, beside=0)
    clock.now += HALF_LIFE_S
    assert found.expected("one", "ocr", beside=0).known
    clock.now += 10 * HALF_LIFE_S
    assert not found.expected("one", "ocr", beside=0).known


def test_no_more_pairs_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_PAIRS <= 20_000
    monkeypatch.setattr(speeds, "MOST_PAIRS", 50)
    found = Speeds(Turned())
    for number in range(200):
        found.learn(f"w{number}", f"llm m{number}", 1.0, beside=0)
        found.failed(f"v{number}", "ocr")
    assert len(found._pairs) <= 50
    assert len(found._lanes) <= 50
    assert len(found._slowness) <= 50


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.integers(0, 64), st.booleans(), st.floats(0, 1e6), st.integers(0, 10**9)),
        max_size=50,
    )
)
def test_whatever_is_measured_a_score_is_a_number_of_seconds(
    measured: list[tuple[float, int, bool, float, int]],
) -> None:
    clock = Turned()
    found = Speeds(clock)
    for seconds, beside, fails, passes, size in measured:
        if fails:
            found.failed("one", "ocr")
        else:
            found.learn("one", "ocr", seconds, beside=beside, answer_bytes=size)
        clock.now += passes
        expected = found.expected("one", "ocr", beside=beside)
        assert 0 <= expected.service < float("inf")
        assert 0 <= expected.failure < float("inf")


# -- in dispatch ---------------------------------------------------------------------------------------------------


class Paced:
    """Workers that take as long as they take, in the dispatcher's own time."""

    def __init__(self, paces: dict[str, float], *, seed: int = 1) -> None:
        self.bench = Bench(max_queued=10_000, seed=seed)
        self.paces, self.done = paces, Counter[str]()
        self.ends: list[tuple[float, Task]] = []
        for name in paces:
            self.bench.worker(name)

    def begun(self) -> None:
        """Accept what was offered."""
        for attempt in self.bench.effects.offered:
            self.bench.dispatcher.accept(attempt)
            self.ends.append((self.bench.now + self.paces[attempt.worker_id], attempt.task))
        self.bench.effects.offered.clear()

    def step(self) -> None:
        """Turn the clock to the next end of a task."""
        self.begun()
        self.ends.sort(key=lambda end: end[0])
        at, task = self.ends.pop(0)
        self.bench.now = max(self.bench.now, at)
        attempt = self.bench.attempt(task)
        self.done[attempt.worker_id] += 1
        self.bench.dispatcher.delivered(attempt, usage={})


def test_one_request_at_a_time_goes_to_the_fastest_worker() -> None:
    paced = Paced({"slow": 16.0, "middle": 4.0, "fast": 1.0})
    for _ in range(200):
        paced.bench.task()
        paced.step()
    assert paced.done["fast"] > 150
    assert min(paced.done.values()) >= 1, "each was tried"


def test_workers_of_speeds_1_4_16_do_nine_tenths_of_their_sum() -> None:
    paced = Paced({"slow": 16.0, "middle": 4.0, "fast": 1.0})
    begun, count = paced.bench.now, 1000
    for _ in range(count):
        paced.bench.task()
    for _ in range(count):
        paced.step()
    rate = count / (paced.bench.now - begun)
    assert rate >= 0.9 * (1 / 16 + 1 / 4 + 1)


def test_a_worker_that_comes_in_the_middle_of_a_burst_is_given_work_at_once() -> None:
    paced = Paced({"one": 5.0})
    for _ in range(50):
        paced.bench.task()
    paced.step()
    paced.paces["two"] = 5.0
    paced.bench.worker("two")
    assert paced.bench.dispatcher.seat("two").running


# -- shown ---------------------------------------------------------------------------------------------------------


async def test_an_admin_sees_what_a_workers_next_task_would_take(tmp_path: Path) -> None:
    async with running(tmp_path) as pool:
        machine = await pool.enrol()
        pool.pool.dispatcher.speeds.learn(machine.id, "llm tiny", 0.25, beside=0)
        pool.pool.dispatcher.speeds.failed(machine.id, "notes")
        shown = (await pool.client.get(f"/api/admin/workers/{machine.id}")).json()["speeds"]
        none = dict.fromkeys(("wait_s", "load_s", "prefill_s", "saved_s", "shut_s"), 0.0)
        tiny = none | {"lane": "llm tiny", "service_s": 0.25, "failure_s": 0.0, "known": True}
        notes = none | {"lane": "notes", "service_s": 0.0, "failure_s": shown[1]["failure_s"], "known": False}
        assert shown == [tiny, notes]
        assert shown[1]["failure_s"] > 0


SEATS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.booleans()),
    min_size=1,
    max_size=4,
    unique_by=lambda s: s[0],
)
#: What happened: who did a task in how long, failed one, or had one measured by its engine; and how long ago.
HAPPENED = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.sampled_from(["learn", "fail", "measure"]), st.floats(0.01, 50), st.integers(0, 4000)
    ),
    max_size=20,
)


@given(happened=HAPPENED, seats=SEATS, tokens=st.booleans(), favourite=st.sampled_from(["", "a", "d"]))
def test_many_workers_at_once_are_reckoned_as_each_by_itself(
    happened: list[tuple[str, str, float, int]], seats: list[tuple[str, int, bool]], *, tokens: bool, favourite: str
) -> None:
    clock = Turned()
    found = Speeds(clock)
    for worker_id, what, seconds, later_s in happened:
        clock.now += later_s
        if what == "learn":
            found.learn(worker_id, "llm x", seconds, beside=1, answer_bytes=int(seconds * 100))
        elif what == "fail":
            found.failed(worker_id, "llm x")
        else:
            measured = Measured(10, seconds / 9, 20, seconds, load_s=seconds / 3)
            found.measured(worker_id, "llm x", measured, beside=0)
    work = Work(100.0, 50.0) if tokens else Work()
    places = [
        SimpleNamespace(worker_id=name, counts={"llm": beside}, cold=frozenset({"llm x"} if cold else ()))
        for name, beside, cold in seats
    ]
    totals, sure = found.totals(places, "llm x", "llm", work, favourite=favourite, saves=0.5)
    each = [
        found.expected(
            name, "llm x", beside=beside, saves=0.5 if name == favourite else 0.0, work=work, loaded=not cold
        )
        for name, beside, cold in seats
    ]
    if happened:
        assert totals == pytest.approx([one.total for one in each])
    assert sure == sum(one.sure for one in each)
