"""A dispatcher alone, with a clock that tests turn and effects that take everything down."""

from __future__ import annotations

import random
from collections import Counter

from rma_coordinator.domain.dispatch import Dispatcher
from rma_coordinator.domain.tasks import Attempt, Seat, Task


class Recording:
    """Effects that take everything down; ``deaf`` workers cannot be handed anything, ``full`` ones not now."""

    def __init__(self) -> None:
        self.offered: list[Attempt] = []
        self.withdrawn: list[Attempt] = []
        self.again: list[Task] = []
        self.ended: Counter[str] = Counter()
        self.to_write: list[Task] = []
        #: Durable tasks whose answer somebody takes in: from the first attempt that is accepted to the end.
        self.collected: set[str] = set()
        self.deaf: set[str] = set()
        self.full: set[str] = set()
        self.seats: dict[str, Seat] = {}

    def ready(self, worker_id: str) -> bool:
        return worker_id not in self.full

    def offer(self, attempt: Attempt) -> bool:
        seat = self.seats[attempt.worker_id]
        assert seat.room(attempt.task.service) >= 0, "more than its slots"
        assert (seat.usable, seat.reachable) == (True, True)
        assert attempt.number > max((a.number for a in attempt.task.attempts[:-1]), default=0)
        earlier = [a for a in attempt.task.attempts[:-1] if a.worker_id == attempt.worker_id]
        assert not [a for a in earlier if a.state == "failed"], "never to the same worker again"
        self.offered.append(attempt)
        return attempt.worker_id not in self.deaf

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        assert reason
        assert not attempt.open
        self.withdrawn.append(attempt)

    def accepted(self, attempt: Attempt) -> None:
        assert attempt.state == "running"
        if attempt.task.durable:
            self.collected.add(attempt.task.id)

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

    def __init__(self, *, max_queued: int = 100, now: float = 1000.0, seed: int = 1) -> None:
        self.now = now
        self.effects = Recording()
        self.dispatcher = Dispatcher(
            self.effects, clock=lambda: self.now, max_queued=max_queued, chance=random.Random(seed)
        )
        self.effects.seats = self.dispatcher.seats

    def task(
        self,
        service: str = "notes",
        *,
        key_id: str = "key:1",
        timeout_s: float = 600,
        durable: bool = False,
        model: str = "",
    ) -> Task:
        task = Task(
            service=service,
            model=model,
            method="POST",
            path=f"/{service}",
            headers=(),
            body_bytes=0,
            key_id=key_id,
            now=self.now,
            timeout_s=timeout_s,
            durable=durable,
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
