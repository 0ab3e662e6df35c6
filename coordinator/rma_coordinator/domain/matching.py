"""Waiting tasks meet workers with room: whose turn it is, and who has it done soonest. Pure; `give` does the rest.

A task waits in its service's line, or, for a short while, at a busy worker that was promised it: see `choosing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rma_coordinator.domain.choosing import LOOKED_AT
from rma_coordinator.domain.queues import Line
from rma_coordinator.domain.tasks import Promise, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rma_coordinator.domain.choosing import Choice, Chooser, Give
    from rma_coordinator.domain.lanes import Lanes
    from rma_coordinator.domain.tasks import Seat

#: A task waits for a busy worker so much longer than was expected, and so many seconds more, before others may have it.
PATIENT, PATIENT_S = 1.5, 0.5


class Matcher:
    """Everything that waits, and who could take it; each method leaves nothing waiting that somebody free may take."""

    def __init__(
        self, seats: dict[str, Seat], lanes: Lanes, chooser: Chooser, *, clock: Callable[[], float], give: Give
    ) -> None:
        self._seats, self.lanes, self.chooser = seats, lanes, chooser
        self._clock, self._give = clock, give
        self._lines: dict[str, Line] = {}
        #: Tasks that wait for a busy worker.
        self._promised: dict[str, Task] = {}

    def __iter__(self) -> Iterator[Task]:
        for line in self._lines.values():
            yield from line
        yield from self._promised.values()

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return sum(line.waiting for line in self._lines.values()) + len(self._promised)

    def services(self) -> set[str]:
        """Return the services that tasks wait for."""
        return {service for service, line in self._lines.items() if line.waiting}

    # -- tasks -------------------------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """Take a new task in."""
        self.chooser.recall(task)
        line = self._line(task.service)
        if not line.waiting:
            # Nobody's turn comes before it.
            choice = self._choose(task, line)
            if choice is not None:
                line.served(task)
                self._serve(task, choice)
                return
            line.add(task)
            return
        crowded = len(self.lanes.offering(task.lane)) > LOOKED_AT and line.stuck(task.lane)
        line.add(task)
        # Who comes free looks for work: in a large pool that is full, nobody else need be asked.
        if not crowded:
            self.match(task.service)

    def restore(self, task: Task) -> None:
        """Let a task wait that waited before, and look for nobody yet."""
        self._line(task.service).add(task)

    def again(self, task: Task) -> None:
        """Let a task wait, before others of its key, whose attempt was lost."""
        self._line(task.service).add(task, first=True)
        self.match(task.service)

    def remove(self, task: Task) -> None:
        """Let a task wait no longer, if it does."""
        if task.promise is not None:
            self._unpromise(task)
        else:
            self._line(task.service).remove(task)

    # -- workers -----------------------------------------------------------------------------------------------

    def freed(self, seat: Seat, service: str = "") -> None:
        """A worker may have room, for anything or for one service: give it what waits for it, in turn."""
        self.lanes.open(seat)
        for name in (service,) if service else list(seat.slots):
            line = self._lines.get(name)
            if seat.promised or (line is not None and line.waiting):
                self._fill(seat, name, self._line(name))

    def lost(self, seat: Seat) -> None:
        """A worker cannot be given anything for now: what it was promised waits with everybody else."""
        for task in list((seat.promised or {}).values()):
            self._unpromise(task)
            self.again(task)

    def tick(self, now: float) -> None:
        """Let promises run out, and look whether what waits can be given to anyone."""
        for task in [one for one in self._promised.values() if one.promise is not None and now >= one.promise.until]:
            self._unpromise(task)
            self._line(task.service).add(task, first=True)
        for service, line in list(self._lines.items()):
            if line.waiting:
                self.match(service)

    # -- inside ------------------------------------------------------------------------------------------------

    def match(self, service: str) -> None:
        """Give waiting tasks to free workers: whose turn it is first, and to the best worker for it."""
        line = self._line(service)
        full: set[str] = set()
        barred: list[Task] = []
        while (task := line.pop(besides=full)) is not None:
            choice = self._choose(task, line)
            if choice is not None:
                line.served(task)
                self._serve(task, choice)
                continue
            barred.append(task)
            # A task that no worker is barred from shows that nobody has room: the rest need not be tried.
            if not task.excluded:
                full.add(task.lane)
        for task in reversed(barred):
            line.add(task, first=True)

    def _fill(self, seat: Seat, service: str, line: Line) -> None:
        now, barred = self._clock(), list[Task]()
        lanes = {lane for lane in seat.lanes(service) if self.chooser.allows(seat, lane, now)}
        while self._may_take(seat, service, now):
            open_lanes = set(filter(seat.takes, lanes)) if seat.shares else lanes
            own = line.pop_for(seat.worker_id, open_lanes, owner=seat.owner) if seat.owner else None
            beforehand = own or self._promised_one(seat, service)
            task = beforehand or line.pop_for(seat.worker_id, open_lanes)
            if task is None:
                break
            if not self.chooser.may(task, seat, now):
                barred.append(task)
                continue
            # A promise was a turn already, and what a machine does for its owner is none: it would put everyone whose
            # turn is next on a level with whoever had many.
            if beforehand is None:
                line.served(task)
            self._give(task, seat, self.chooser.expected(task, seat))
        for task in reversed(barred):
            line.add(task, first=True)

    def _may_take(self, seat: Seat, service: str, now: float) -> bool:
        reachable = seat.usable and seat.reachable and seat.full_until <= now
        return reachable and seat.room(service) > 0 and self.chooser.ready(seat.worker_id)

    def _promised_one(self, seat: Seat, service: str) -> Task | None:
        """Take out what a worker was promised first."""
        found = next((one for one in (seat.promised or {}).values() if one.service == service), None)
        if found is not None:
            self._unpromise(found)
        return found

    def _choose(self, task: Task, line: Line) -> Choice | None:
        return self.chooser.choose(task, self._clock(), waiting=line.waiting, seats=self._seats)

    def _serve(self, task: Task, choice: Choice) -> None:
        """Give a task to the worker that was chosen, or promise it to one that is busy."""
        if choice.waits_s > 0:
            self._promise(task, choice)
        else:
            self._give(task, choice.seat, choice.expected)

    def _promise(self, task: Task, choice: Choice) -> None:
        seat = choice.seat
        if seat.promised is None:
            seat.promised = {}
        until = self._clock() + PATIENT * choice.waits_s + PATIENT_S
        task.promise, task.patience = Promise(seat.worker_id, until), task.patience - 1
        seat.promised[task.id] = self._promised[task.id] = task

    def _unpromise(self, task: Task) -> None:
        promise, task.promise = task.promise, None
        self._promised.pop(task.id, None)
        seat = self._seats.get(promise.worker_id) if promise is not None else None
        if seat is not None and seat.promised is not None:
            seat.promised.pop(task.id, None)
            if not seat.promised:
                seat.promised = None

    def _line(self, service: str) -> Line:
        return self._lines.get(service) or self._lines.setdefault(service, Line())
