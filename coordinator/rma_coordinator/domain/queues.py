"""Waiting tasks, in whose turn they are: fair shares of a service between classes of priority, then between keys.

Start-time fair queueing (Goyal, Vin and Cheng 1996), once for the classes and within each once for its keys: what a
flow was given moves its own clock, and whoever's clock stands lowest is next. So a key with a thousand requests delays
another's by one service time and not by a thousand, a flood of one class leaves each other its share, and what nobody
else wants is everybody's. Pure.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator

    from rma_coordinator.domain.tasks import Priority, Task

#: Parts of a service that each class gets while every class waits.
SHARES: dict[Priority, float] = {"high": 16.0, "normal": 4.0, "low": 1.0}
#: Flows whose clocks are kept before those that the others have caught up with are forgotten.
MOST_CLOCKS = 256
#: Tasks of one key among which a worker that comes free takes the one that suits it, and how often one is overtaken.
LOOKED_AHEAD, MOST_PASSED_OVER = 8, 8
_OWN, _ANYONES, _ANOTHERS = range(3)


class Clocks:
    """Whose turn it is among flows: each has a clock, which being served moves on, and starts where the others are."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[Hashable, float] = {}

    def start(self, flow: Hashable) -> float:
        """Return where a flow's next turn begins: the lowest is next."""
        return max(self._now, self._ends.get(flow, 0.0))

    def serve(self, flow: Hashable, cost: float) -> None:
        """A flow was given something that costs as much."""
        self._now = self.start(flow)
        self._ends[flow] = self._now + cost
        if len(self._ends) > MOST_CLOCKS:
            # Who was caught up with begins where the others are, as a new one does.
            self._ends = {flow: end for flow, end in self._ends.items() if end > self._now}


class Line:
    """What waits for one service, whichever of its models.

    Tasks of one lane, class and key go first in, first out, but for those that suit a worker.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, Priority, str], deque[Task]] = {}
        self._classes = Clocks()
        self._keys: dict[Priority, Clocks] = {name: Clocks() for name in SHARES}
        #: Tasks of each lane that wait and could be anyone's: while there is one, nobody has room.
        self._open: dict[str, int] = {}
        self.waiting = 0

    def __iter__(self) -> Iterator[Task]:
        return (task for group in self._groups.values() for task in group)

    def stuck(self, lane: str) -> bool:
        """Say whether a task waits in a lane that any worker may be given, so that another one has to wait too."""
        return self._open.get(lane, 0) > 0

    def add(self, task: Task, *, first: bool = False) -> None:
        """Let a task wait; ``first`` puts it before others of its key."""
        group = self._groups.setdefault(_group(task), deque())
        if first:
            group.appendleft(task)
        else:
            group.append(task)
        self._count(task, 1)

    def remove(self, task: Task) -> None:
        """Let a task wait no longer, if it does."""
        group = self._groups.get(_group(task))
        if group is not None and task in group:
            group.remove(task)
            self._taken(task, group)

    def pop(self, *, besides: Collection[str] = ()) -> Task | None:
        """Take out whose turn it is, ``besides`` some lanes; ``None`` when there is none."""
        ready = [group for key, group in self._groups.items() if key[0] not in besides]
        return self._take(self._next(ready), 0) if ready else None

    def pop_for(self, worker_id: str, lanes: Collection[str], *, owner: str = "") -> Task | None:
        """Take out whose turn it is at a worker: of some ``lanes`` only, and of its ``owner`` only where one is named.

        Of one key's next few tasks, one whose conversation the worker knows comes first, and one that another worker
        knows last, if it can wait. One that it knows may also be of a key whose turn is not a whole turn away.
        """
        ready = [group for key, group in self._groups.items() if key[0] in lanes and owner in ("", group[0].owner)]
        if not ready:
            return None
        group = self._next(ready)
        place, rank = _suits_best(group, worker_id)
        if rank == _ANOTHERS and group[0].passed_over < MOST_PASSED_OVER:
            for other in self._near(group, ready):
                at, known = _suits_best(other, worker_id)
                if known == _OWN:
                    group[0].passed_over += 1
                    return self._take(other, at)
        return self._take(group, place)

    def _next(self, ready: list[deque[Task]]) -> deque[Task]:
        return ready[0] if len(ready) == 1 else min(ready, key=self._turn)

    def _near(self, group: deque[Task], ready: list[deque[Task]]) -> Iterator[deque[Task]]:
        """Yield the other groups whose turn is less than a whole turn behind a group's."""
        urgency, begins, _ = self._turn(group)
        for other in ready:
            if other is not group:
                its_urgency, its_begin, _ = self._turn(other)
                if its_urgency == urgency and its_begin < begins + 1.0:
                    yield other

    def _take(self, group: deque[Task], place: int) -> Task:
        for task in islice(group, place):
            task.passed_over += 1
        task = group[place]
        del group[place]
        self._taken(task, group)
        return task

    def served(self, task: Task) -> None:
        """A task was given to a worker: its class and its key have had a turn."""
        self._classes.serve(task.priority, 1 / SHARES[task.priority])
        self._keys[task.priority].serve(task.key_id, 1.0)

    def _turn(self, group: deque[Task]) -> tuple[float, float, float]:
        head = group[0]
        return self._classes.start(head.priority), self._keys[head.priority].start(head.key_id), head.created_at

    def _taken(self, task: Task, group: deque[Task]) -> None:
        if not group:
            del self._groups[_group(task)]
        self._count(task, -1)

    def _count(self, task: Task, change: int) -> None:
        self.waiting += change
        if not task.excluded:
            count = self._open.get(task.lane, 0) + change
            if count:
                self._open[task.lane] = count
            else:
                self._open.pop(task.lane, None)


def _suits_best(group: deque[Task], worker_id: str) -> tuple[int, int]:
    """Return the place of the task that suits a worker best, and how well; whom many overtook is next."""
    best, place = _ANOTHERS + 1, 0
    most = LOOKED_AHEAD if group[0].passed_over < MOST_PASSED_OVER else 1
    for at, task in enumerate(islice(group, most)):
        known = task.favourite
        rank = _ANYONES if known is None else _OWN if known.worker_id == worker_id else _ANOTHERS
        if rank < best:
            best, place = rank, at
            if rank == _OWN:
                break
    return place, best


def _group(task: Task) -> tuple[str, Priority, str]:
    return task.lane, task.priority, task.key_id
