"""Conversations stay where their beginning is cached, as long as that is worth it."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.affinity import MOST_NEW, Affinity, prefixes
from rma_coordinator.domain.tasks import Task
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_coordinator.domain.affinity import Prefix

MESSAGES = st.lists(st.binary(max_size=20), min_size=1, max_size=2 * MOST_NEW)


@given(MESSAGES, MESSAGES)
def test_a_conversation_that_goes_on_is_known_by_its_beginning(begun: list[bytes], more: list[bytes]) -> None:
    memory = Affinity()
    memory.remember("llm m", prefixes(begun, salt="key"), "w1")
    found = memory.favourite("llm m", prefixes([*begun, *more], salt="key"))
    if len(more) <= MOST_NEW and any(begun):
        assert found is not None
        assert found.worker_id == "w1"
    if found is not None:
        assert 0 <= found.share <= 1
        assert found.saves(4) == found.share


@given(MESSAGES)
def test_nobody_learns_what_another_key_has_asked(messages: list[bytes]) -> None:
    memory = Affinity()
    memory.remember("llm m", prefixes(messages, salt="one"), "w1")
    assert memory.favourite("llm m", prefixes(messages, salt="two")) is None
    assert memory.favourite("llm n", prefixes(messages, salt="one")) is None


def test_where_one_message_ends_and_the_next_begins_matters() -> None:
    assert prefixes([b"ab", b"c"], salt="")[0].digest != prefixes([b"a", b"bc"], salt="")[0].digest


def test_a_conversation_that_went_on_elsewhere_is_there_now_and_is_remembered_once() -> None:
    memory = Affinity()
    turns = [prefixes([b"%d" % number for number in range(count)], salt="") for count in (1, 3, 5)]
    for worker_id, known in zip(("w1", "w1", "w2"), turns, strict=True):
        memory.remember("llm m", known, worker_id)
    found = memory.favourite("llm m", prefixes([b"%d" % number for number in range(7)], salt=""))
    assert found is not None
    assert (found.worker_id, found.since) == ("w2", 0)
    assert len(memory._workers) == 1


def test_the_oldest_conversations_are_forgotten() -> None:
    memory = Affinity(most=100)
    for number in range(1000):
        memory.remember("llm m", prefixes([b"%d" % number], salt=""), "w1")
    assert len(memory._workers) == 100
    assert memory.favourite("llm m", prefixes([b"0"], salt="")) is None
    assert memory.favourite("llm m", prefixes([b"999"], salt="")) is not None


def test_a_cache_is_likely_to_lose_a_conversation_to_others_that_come_after_it() -> None:
    memory = Affinity()
    chat = prefixes([b"a", b"b"], salt="")
    memory.remember("llm m", chat, "w1")
    spared = []
    for number in range(20):
        found = memory.favourite("llm m", chat)
        assert found is not None
        spared.append(found.saves(2))
        memory.remember("llm m", prefixes([b"other %d" % number], salt=""), "w1")
    assert spared[0] == 1.0
    assert spared == sorted(spared, reverse=True)
    assert spared[-1] < 0.25


def test_a_conversation_without_a_word_has_no_beginning() -> None:
    assert prefixes([], salt="") == ()
    assert prefixes([b""], salt="") == ()


class Chats:
    """Chats of many turns on workers with so many slots each, of so many turns a second, in the dispatcher's own time.

    A turn that comes back to the worker of the one before it takes less.
    """

    def __init__(self, speeds: list[float], *, slots: int, chats: int, pauses_s: float, seed: int) -> None:
        self.chance = random.Random(seed)
        self.bench = Bench(max_queued=10_000, seed=seed)
        self.speeds = {f"w{number}": speed for number, speed in enumerate(speeds)}
        for name in self.speeds:
            self.bench.worker(name, slots=slots, service="llm")
        self.pauses_s = pauses_s
        #: When each chat says something next, or gets its answer.
        self.events: list[tuple[float, int, Task | None]] = [
            (self.bench.now + self.chance.uniform(0, 30), number, None) for number in range(chats)
        ]
        self.said = Counter[int]()
        self.last: dict[int, str] = {}
        self.stayed = self.turns = 0
        self.load = Counter[str]()

    def known(self, chat: int) -> tuple[Prefix, ...]:
        return prefixes([b"chat %d, message %d" % (chat, number) for number in range(self.said[chat])], salt="key")

    def run(self, turns: int) -> None:
        while self.turns < turns:
            self.events.sort(key=lambda event: event[0], reverse=True)
            at, chat, task = self.events.pop()
            self.bench.now = at
            if task is None:
                self.ask(chat)
            else:
                self.answered(chat, task)
            self.bench.dispatcher.tick()
            for attempt in self.bench.effects.offered:
                self.bench.dispatcher.accept(attempt)
                number = int(attempt.task.path.removeprefix("/"))
                stays = self.last.get(number) == attempt.worker_id
                seconds = self.chance.uniform(2, 4) / self.speeds[attempt.worker_id] * (0.6 if stays else 1.0)
                self.events.append((at + seconds * (1 + 0.35 * attempt.beside), number, attempt.task))
            self.bench.effects.offered.clear()

    def ask(self, chat: int) -> None:
        self.said[chat] += 1
        task = Task(
            service="llm", method="POST", path=f"/{chat}", headers=(), body_bytes=0, key_id=f"key:{chat % 3}",
            now=self.bench.now, timeout_s=600.0,
        )  # fmt: skip
        task.prefixes = self.known(chat)
        self.bench.dispatcher.submit(task)

    def answered(self, chat: int, task: Task) -> None:
        worker_id = self.bench.attempt(task).worker_id
        self.bench.dispatcher.delivered(self.bench.attempt(task), usage={})
        self.turns += 1
        self.load[worker_id] += 1
        if chat in self.last:
            self.stayed += self.last[chat] == worker_id
        self.last[chat] = worker_id
        self.said[chat] += 1
        self.events.append((self.bench.now + self.chance.uniform(0.5, 1.5) * self.pauses_s, chat, None))

    def most_of_fair(self) -> float:
        """Return the load of the worker that has most of what is fair for it: its part of the speed."""
        whole = sum(self.speeds.values())
        return max(self.load[name] / self.turns / (speed / whole) for name, speed in self.speeds.items())


@pytest.mark.parametrize(
    ("speeds", "chats", "pauses_s"),
    [([1.0] * 5, 40, 10.0), ([1.0] * 5, 60, 2.0), ([1.0, 4.0, 16.0], 200, 5.0)],
    ids=["half busy", "more than they can do", "unequal, more than they can do"],
)
def test_chats_stay_with_their_cache_and_no_worker_has_more_than_a_quarter_above_its_share(
    speeds: list[float], chats: int, pauses_s: float
) -> None:
    for seed in range(3):
        pool = Chats(speeds, slots=4, chats=chats, pauses_s=pauses_s, seed=seed)
        pool.run(3000)
        assert pool.stayed / pool.turns >= 0.8
        assert pool.most_of_fair() <= 1.25
