"""Waiting tasks, in whose turn they are: fair shares of a service between classes of priority, then between keys.

Start-time fair queueing (Goyal, Vin and Cheng 1996), once for the classes and within each once for its keys: what a
flow was given moves its own clock, and whoever's clock stands lowest is next. So a key with a thousand requests delays
another's by one service time and not by a thousand, a flood of one class leaves each other its share, and what nobody
else wants is everybody's. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator

    from rma_coordinator.domain.tasks import Priority, Task

#: Parts of a service that each class gets while every class waits.
SHARES: dict[Priority, float] = {"high": 16.0, "normal": 4.0, "low": 1.0}
#: Flows whose clocks are kept before those that the others have caught up with are forgotten.
MOST_CLOCKS = 256


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
    """What waits for one service, whichever of its models: tasks of one lane, class and key go first in, first out."""

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

    def pop(self, *, besides: Collection[str] = (), lanes: Collection[str] | None = None) -> Task | None:
        """Take out whose turn it is, ``besides`` some lanes, or of some ``lanes`` only; ``None`` when there is none."""
        ready = [
            group for key, group in self._groups.items() if key[0] not in besides and (lanes is None or key[0] in lanes)
        ]
        if not ready:
            return None
        group = ready[0] if len(ready) == 1 else min(ready, key=self._turn)
        task = group.popleft()
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


def _group(task: Task) -> tuple[str, Priority, str]:
    return task.lane, task.priority, task.key_id
