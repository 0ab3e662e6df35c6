"""Conversations stay where their beginning is cached, as long as that is worth it."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from rma_coordinator.domain.affinity import MOST_NEW, READING, Affinity, prefixes
from rma_coordinator.domain.tasks import Task
from tests.dispatch_bench import Bench

if TYPE_CHECKING:
    from rma_coordinator.domain.affinity import Prefix

MESSAGES = st.lists(st.binary(max_size=20), min_size=1, max_size=2 * MOST_NEW)


@given(MESSAGES, MESSAGES)
def test_a_conversation_that_goes_on_is_known_by_its_beginning(begun: list[bytes], more: list[bytes]) -> None:
    memory = Affinity()
    memory.remember("llm m", prefixes(begun, salt="key"), "w1")
    found, saves = memory.favourite("llm m", prefixes([*begun, *more], salt="key"))
    if len(more) <= MOST_NEW and any(begun):
        assert found == "w1"
        assert 0 < saves <= READING
    assert 0 <= saves <= READING


@given(MESSAGES)
def test_nobody_learns_what_another_key_has_asked(messages: list[bytes]) -> None:
    memory = Affinity()
    memory.remember("llm m", prefixes(messages, salt="one"), "w1")
    assert memory.favourite("llm m", prefixes(messages, salt="two")) == ("", 0.0)
    assert memory.favourite("llm n", prefixes(messages, salt="one")) == ("", 0.0)


def test_where_one_message_ends_and_the_next_begins_matters() -> None:
    assert prefixes([b"ab", b"c"], salt="")[0].digest != prefixes([b"a", b"bc"], salt="")[0].digest


def test_a_conversation_that_went_on_elsewhere_is_there_now_and_is_remembered_once() -> None:
    memory = Affinity()
    turns = [prefixes([b"%d" % number for number in range(count)], salt="") for count in (1, 3, 5)]
    for worker_id, known in zip(("w1", "w1", "w2"), turns, strict=True):
        memory.remember("llm m", known, worker_id)
    assert memory.favourite("llm m", prefixes([b"%d" % number for number in range(7)], salt=""))[0] == "w2"
    assert len(memory._workers) == 1


def test_the_oldest_conversations_are_forgotten() -> None:
    memory = Affinity(most=100)
    for number in range(1000):
        memory.remember("llm m", prefixes([b"%d" % number], salt=""), "w1")
    assert len(memory._workers) == 100
    assert memory.favourite("llm m", prefixes([b"0"], salt="")) == ("", 0.0)
    assert memory.favourite("llm m", prefixes([b"999"], salt=""))[0] == "w1"


def test_a_conversation_without_a_word_has_no_beginning() -> None:
    assert prefixes([], salt="") == ()
    assert prefixes([b""], salt="") == ()


class Chats:
    """Chats of many turns on a few workers, in the dispatcher's own time."""

    def __init__(self, *, workers: int, slots: int, chats: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.bench = Bench(max_queued=10_000)
        for number in range(workers):
            self.bench.worker(f"w{number}", slots=slots, service="llm")
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
            for attempt in self.bench.effects.offered:
                self.bench.dispatcher.accept(attempt)
                number = int(attempt.task.path.removeprefix("/"))
                self.events.append((at + self.chance.uniform(2, 4), number, attempt.task))
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
        self.events.append((self.bench.now + self.chance.uniform(5, 15), chat, None))


def test_chats_stay_with_their_cache_and_no_worker_has_more_than_a_quarter_above_its_share() -> None:
    for seed in range(5):
        chats = Chats(workers=5, slots=4, chats=40, seed=seed)
        chats.run(2000)
        assert chats.stayed / chats.turns >= 0.8
        assert max(chats.load.values()) <= 1.25 * chats.turns / 5
