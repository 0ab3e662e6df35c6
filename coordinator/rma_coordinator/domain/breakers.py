"""Workers that fail one kind of work again and again are not given it until they have shown that they can. Pure.

After LEAST_STREAK failures without a success between them a worker is shut for that lane, each time for twice as long.
Then one task is its probe: a success opens it, a failure shuts it again. The first success does not forgive all: until
a second one, a single failure shuts it.
"""

from __future__ import annotations

from collections import OrderedDict

#: Failures in a row, by the worker's own fault, that shut it.
LEAST_STREAK = 3
#: Seconds it is shut: at first, and at most.
SHUT_S, MOST_SHUT_S = 30.0, 900.0
#: Workers and lanes that are remembered.
MOST_REMEMBERED = 20_000


class Breaker:
    """One worker at one thing."""

    __slots__ = ("period", "probe", "streak", "until")

    def __init__(self) -> None:
        self.streak = 0
        self.until = 0.0
        self.period = SHUT_S
        #: The lease of the attempt that shows whether it can, while there is one.
        self.probe = ""


class Breakers:
    """Everyone who has failed lately; empty most of the time."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str], Breaker] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._known)

    def allows(self, worker_id: str, lane: str, now: float) -> bool:
        """Say whether a worker may be given a task of a lane now."""
        found = self._known.get((worker_id, lane))
        return found is None or found.streak < LEAST_STREAK or (now >= found.until and not found.probe)

    def until(self, worker_id: str, lane: str) -> float:
        """Return the moment from which a worker may be tried again; 0 where it is not shut."""
        found = self._known.get((worker_id, lane))
        return found.until if found is not None and found.streak >= LEAST_STREAK else 0.0

    def given(self, worker_id: str, lane: str, lease_id: str) -> None:
        """A worker was given a task: of one that was shut, its probe."""
        found = self._known.get((worker_id, lane))
        if found is not None and found.streak >= LEAST_STREAK:
            found.probe = lease_id

    def failed(self, worker_id: str, lane: str, now: float) -> bool:
        """A task failed there, by the worker's fault; say whether that has shut it."""
        key = (worker_id, lane)
        found = self._known.setdefault(key, Breaker())
        self._known.move_to_end(key)
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        if found.streak >= LEAST_STREAK and now < found.until:
            # What ran beside the one that shut it says nothing new.
            return False
        found.streak, found.probe = min(found.streak + 1, LEAST_STREAK), ""
        if found.streak < LEAST_STREAK:
            return False
        found.until = now + found.period
        found.period = min(MOST_SHUT_S, 2 * found.period)
        return True

    def succeeded(self, worker_id: str, lane: str, now: float) -> bool:
        """A task succeeded there; say whether that has opened it."""
        found = self._known.get((worker_id, lane))
        if found is None:
            return False
        if found.streak >= LEAST_STREAK:
            if now < found.until:
                # It was given before.
                return False
            found.streak, found.probe = LEAST_STREAK - 1, ""
            return True
        del self._known[worker_id, lane]
        return False

    def ended(self, worker_id: str, lane: str, lease_id: str) -> None:
        """An attempt ended that shows nothing: another one may be the probe."""
        found = self._known.get((worker_id, lane))
        if found is not None and found.probe == lease_id:
            found.probe = ""

    def forgive(self, worker_id: str, lane: str) -> None:
        """Take the last failure back: it was the task's, not the worker's."""
        found = self._known.get((worker_id, lane))
        if found is not None:
            found.streak -= 1
            if found.streak <= 0:
                del self._known[worker_id, lane]
