"""Which worker a task goes to: loading, reading, answering, waiting and failing, all in seconds."""

from __future__ import annotations

from collections import Counter

import pytest

from rma_coordinator.domain.affinity import prefixes
from rma_coordinator.domain.choosing import MOST_WAIT_S
from rma_coordinator.domain.matching import PATIENT, PATIENT_S
from rma_coordinator.domain.speeds import ANSWER_TOKENS, LOAD_S, MOST_A_TOKEN_S, Measured, Speeds, Work
from rma_coordinator.domain.tasks import Attempt, Task
from tests.dispatch_bench import Bench

LANE = "llm m"
MODELS = {"llm": frozenset({"m"})}
#: A conversation, and the next turn of it.
CHAT, NEXT = (prefixes([b"%d" % number for number in range(count)], salt="") for count in (38, 40))


class Pool:
    """Workers with one model, and what they are known to do."""

    def __init__(self, speeds: dict[str, tuple[float, float]], *, slots: int = 1) -> None:
        """Take seconds a token of reading and of answering, for each worker."""
        self.bench, self.slots = Bench(), slots
        self.dispatcher = self.bench.dispatcher
        for name, (reading, answering) in speeds.items():
            self.worker(name)
            for _ in range(20):
                self.dispatcher.speeds.learn(name, LANE, 10 * answering, beside=0)
                self.dispatcher.speeds.measured(name, LANE, Measured(1, reading, 1, answering), beside=0)

    def worker(self, name: str, *, cold: bool = False) -> None:
        self.dispatcher.arrived(name)
        lanes = frozenset({LANE} if cold else ())
        self.dispatcher.offers(name, {"llm": self.slots}, models=MODELS, cold=lanes, usable=True)

    def task(
        self,
        prompt: float = 0.0,
        answer: float = 100.0,
        *,
        chat: tuple[object, ...] = (),
        key: str = "k",
        owner: str = "",
    ) -> Task:
        task = Task(
            service="llm", model="m", method="POST", path="/", headers=(), body_bytes=0, key_id=key, now=self.bench.now,
            timeout_s=600.0, owner=owner,
        )  # fmt: skip
        task.work, task.streamed, task.prefixes = Work(prompt, answer), True, chat  # type: ignore[assignment]
        self.dispatcher.submit(task)
        return task

    def given(self, task: Task) -> Attempt:
        attempt = self.bench.attempt(task)
        self.dispatcher.accept(attempt)
        return attempt

    def done(self, task: Task) -> None:
        self.dispatcher.delivered(self.given(task), usage={})


def test_a_long_prompt_goes_to_who_reads_fast_and_a_long_answer_to_who_writes_fast() -> None:
    pool = Pool({"reads": (0.001, 0.1), "writes": (0.1, 0.01)})
    won: Counter[str] = Counter()
    for _ in range(50):
        for task in (pool.task(5000, 10), pool.task(10, 500)):
            won[f"{pool.given(task).worker_id} {task.work.prompt:.0f}"] += 1
            pool.dispatcher.cancel(task, "enough")
    assert won == {"reads 5000": 50, "writes 10": 50}


def test_a_model_that_must_be_loaded_first_costs_that() -> None:
    pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.05)})
    pool.worker("fast", cold=True)
    short = pool.task(answer=20)
    assert pool.given(short).worker_id == "slow"
    assert pool.given(short).expected is not None
    pool.dispatcher.cancel(short, "enough")
    assert pool.given(pool.task(answer=2000)).worker_id == "fast"


def test_the_parts_of_a_score_are_there_to_be_shown() -> None:
    pool = Pool({"one": (0.002, 0.05)})
    pool.worker("one", cold=True)
    expected = pool.given(pool.task(1000, 100)).expected
    assert expected is not None
    assert [expected.prefill, expected.service, expected.load] == pytest.approx([2.0, 5.0, LOAD_S])
    assert (expected.wait, expected.failure, expected.saved, expected.known) == (0, 0, 0, True)
    assert expected.total == pytest.approx(2.0 + 5.0 + LOAD_S)


def test_a_streamed_answer_must_begin_in_time_that_its_machine_needs() -> None:
    pool = Pool({"one": (0.01, 0.05)})
    short, long = pool.task(10, 100), None
    # Its model may have to be loaded first, though nobody says so.
    assert pool.given(short).first_byte_s == pytest.approx(3 * (LOAD_S + 0.1) + 10)
    pool.done(short)
    long = pool.task(5000, 100)
    assert pool.given(long).first_byte_s == pytest.approx(3 * (LOAD_S + 50) + 10)
    pool.done(long)
    huge = pool.task(500_000, 100)
    assert pool.given(huge).first_byte_s == 300.0


def test_a_chat_waits_for_the_busy_worker_that_knows_it_where_that_is_worth_it() -> None:
    pool = Pool({"one": (0.01, 0.01), "two": (0.01, 0.01)})
    first = pool.task(2000, 100, chat=CHAT)
    here = pool.given(first).worker_id
    other = pool.dispatcher.seat("two" if here == "one" else "one")
    pool.done(first)
    pool.dispatcher.set_usable(other, usable=False)
    beside = pool.task(10, 100)
    assert pool.given(beside).worker_id == here
    pool.dispatcher.set_usable(other, usable=True)
    again = pool.task(2000, 100, chat=NEXT)
    assert (again.state, again.promise and again.promise.worker_id) == ("queued", here)
    assert pool.dispatcher.queued == 1
    pool.bench.now += 1.0
    pool.done(beside)
    assert pool.given(again).worker_id == here


@pytest.mark.parametrize(
    ("chat", "busy_s", "waits"),
    [(NEXT, 4.0, True), ((), 4.0, False), (NEXT, 5.5, False)],
    ids=["sooner there", "no chat", "sooner elsewhere"],
)
def test_a_chat_stays_where_its_cache_is_unless_its_wait_costs_what_that_gains(
    chat: tuple[object, ...], busy_s: float, waits: bool
) -> None:
    pool = Pool({"one": (0.01, 0.01), "two": (0.01, 0.01)})
    first = pool.task(600, 100, chat=CHAT)
    here = pool.given(first).worker_id
    pool.done(first)
    other = pool.dispatcher.seat("two" if here == "one" else "one")
    pool.dispatcher.set_usable(other, usable=False)
    assert pool.given(pool.task(0, 100 * busy_s)).worker_id == here
    pool.dispatcher.set_usable(other, usable=True)
    # Elsewhere it would take 7 s: 6 to read it and 1 to answer.
    assert (pool.task(600, 100, chat=chat).promise is not None) is waits


def waiting(pool: Pool) -> tuple[Task, Task]:
    """Let a task wait for the fast worker, which has one already."""
    busy = pool.task(answer=200)
    assert pool.given(busy).worker_id == "fast"
    task = pool.task(answer=200)
    assert task.promise is not None
    return busy, task


def test_a_task_waits_for_a_worker_that_is_far_faster_and_no_longer_than_that_is_worth() -> None:
    pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.2)})
    _, task = waiting(pool)
    pool.bench.turn(PATIENT * 2.0 + PATIENT_S)
    assert pool.given(task).worker_id == "slow"


def test_a_worker_that_failed_is_tried_now_and_then_while_tasks_could_wait_for_another() -> None:
    pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.2)})
    for _ in range(10):
        pool.dispatcher.speeds.failed("slow", LANE)
    busy = pool.given(pool.task(answer=200))
    assert busy.worker_id == "fast"
    tried = 0
    for _ in range(500):
        task = pool.task(answer=200)
        if task.attempt is not None:
            tried += 1
            assert pool.given(task).worker_id == "slow"
        pool.dispatcher.cancel(task, "the client left")
    assert 1 <= tried <= 50


def test_a_task_whose_busy_worker_leaves_does_not_wait_for_it() -> None:
    for leaves in ("gone", "departed", "unusable"):
        pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.2)})
        _, task = waiting(pool)
        if leaves == "gone":
            pool.dispatcher.gone("fast", "it left", blame=False)
        elif leaves == "departed":
            pool.dispatcher.departed("fast")
        else:
            pool.dispatcher.set_usable(pool.dispatcher.seat("fast"), usable=False)
        assert pool.given(task).worker_id == "slow"


def test_a_client_that_leaves_takes_its_waiting_task_along() -> None:
    pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.2)})
    _, task = waiting(pool)
    pool.dispatcher.cancel(task, "the client left")
    assert (task.state, pool.dispatcher.queued, pool.dispatcher.seat("fast").promised) == ("cancelled", 0, None)


def test_only_as_many_wait_for_a_worker_as_it_has_slots() -> None:
    pool = Pool({"fast": (0.0, 0.01), "slow": (0.0, 0.2)})
    waiting(pool)
    assert pool.given(pool.task(answer=200)).worker_id == "slow"


def test_nobody_waits_for_longer_than_a_free_worker_would_take() -> None:
    pool = Pool({"fast": (0.0, 0.01), "other": (0.0, 0.012)})
    busy = pool.task(answer=200)
    pool.given(busy)
    assert pool.task(answer=200).promise is None
    assert pool.dispatcher.queued == 0
    slow = Pool({"fast": (0.0, 0.1), "slow": (0.0, 2.0)})
    slow.given(slow.task(answer=10 * MOST_WAIT_S * 10))
    assert slow.task(answer=10 * MOST_WAIT_S * 10).promise is None


# -- what is learnt ------------------------------------------------------------------------------------------------


def test_an_engines_own_timings_are_learnt_apart_and_whatever_it_says_stays_a_number() -> None:
    speeds = Speeds(lambda: 0.0)
    speeds.learn("w", LANE, 1.0, beside=0)
    speeds.measured("w", LANE, Measured(1000, 2.0, 50, 5.0, 12.0), beside=0)
    assert list(speeds.per_token("w", LANE)) == pytest.approx([0.002, 0.1])
    assert speeds.expected("w", LANE, beside=0, work=Work(0, 1), loaded=False).load == pytest.approx(12.0)
    speeds.measured("w", LANE, Measured(1, 1e12, 1, MOST_A_TOKEN_S * 2), beside=0)
    assert list(speeds.per_token("w", LANE)) == pytest.approx([0.002, 0.1])


def test_tasks_beside_each_other_are_no_sign_of_slow_tokens() -> None:
    speeds = Speeds(lambda: 0.0)
    speeds.learn("w", LANE, 1.0, beside=0)
    for _ in range(30):
        speeds.measured("w", LANE, Measured(100, 2.05, 100, 20.5), beside=3)
    assert list(speeds.per_token("w", LANE)) == pytest.approx([0.01, 0.1], rel=0.01)


def test_a_worker_that_is_slow_at_one_thing_is_taken_for_slow_at_a_new_one() -> None:
    speeds = Speeds(lambda: 0.0)
    for _ in range(30):
        speeds.learn("slow", "ocr", 4.0, beside=0)
        speeds.learn("fast", "ocr", 1.0, beside=0)
        speeds.learn("other", LANE, 1.0, beside=0)
    new = {name: speeds.expected(name, LANE, beside=0).total for name in ("slow", "fast", "stranger")}
    assert new["fast"] < new["stranger"] < new["slow"]


def test_the_length_of_an_answer_is_what_a_key_was_answered_lately_or_what_it_may_be_at_most() -> None:
    speeds = Speeds(lambda: 0.0)
    assert speeds.length("k", LANE) == ANSWER_TOKENS
    assert speeds.length("k", LANE, 16) == 16
    for _ in range(60):
        speeds.answered("k", LANE, 40)
    assert speeds.length("k", LANE) == pytest.approx(40)
    assert speeds.length("another", LANE) == ANSWER_TOKENS
