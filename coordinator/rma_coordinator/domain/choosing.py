"""Which worker a task is given to: the one that has it done soonest, as far as is known. Pure, given time and chance.

A score is seconds, and all its parts can be shown: `Expected`. Of workers that are about as good the freest is taken.
A task may wait for a busy worker that will have it done much sooner than any that is free, because it is far faster or
has its conversation in its cache, but only for a while, and only while there is room for everybody else.

Somebody's task goes to a machine of its owner's where that is about as good as the best free one. To go to a slower one
its owner would wait for nothing; and for a machine that is kept free for its owner everybody else would.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from rma_coordinator.domain.affinity import Affinity
    from rma_coordinator.domain.breakers import Breakers
    from rma_coordinator.domain.lanes import Lanes
    from rma_coordinator.domain.speeds import Expected, Speeds
    from rma_coordinator.domain.tasks import Attempt, Seat, Task

#: Up to so many free workers are all looked at; of more, so many at random are enough.
LOOKED_AT = 32
#: Workers that take at most so much longer than the best are as good: of them the one that knows the conversation is
#: taken, else the freest, not always the best.
AS_GOOD = 1.15
#: How often a worker of which little is known, or that failed lately, is tried although a better one is there.
EXPLORED = 0.02
#: Busy workers that are looked at beside the one that knows the conversation.
BUSY_LOOKED_AT = 8
#: A busy worker must have a task done in this part of the time that the best free one would need; one that knows its
#: conversation in this one, for what is read anew elsewhere keeps everybody else waiting too.
WORTH_WAITING, WORTH_KEEPING = 0.5, 0.9
#: Nobody waits by choice unless so large a part of the workers is free: near saturation waiting costs everyone.
LEAST_FREE = 0.25
#: Seconds that a task waits for a busy worker at most; what is done sooner than this does not wait at all.
MOST_WAIT_S, LEAST_TAKES_S = 10.0, 0.5
#: What has run for longer than was expected goes on for at least this part of the time that it has run.
OVERDUE = 0.25


class Choice(NamedTuple):
    """Who gets a task and what that is expected to take; ``waits_s`` is more than 0 for one that is busy now."""

    seat: Seat
    expected: Expected
    waits_s: float = 0.0


class Give(Protocol):
    """Hands a task to a worker that has room for it."""

    def __call__(self, task: Task, seat: Seat, expected: Expected) -> None:
        """Make an attempt of it."""


class Chooser:
    """Knows everything that a choice depends on, and decides nothing else."""

    def __init__(
        self,
        lanes: Lanes,
        speeds: Speeds,
        affinity: Affinity,
        breakers: Breakers,
        *,
        ready: Callable[[str], bool],
        chance: random.Random,
    ) -> None:
        self._lanes, self._speeds, self._affinity, self._breakers = lanes, speeds, affinity, breakers
        self.ready, self.chance = ready, chance

    def recall(self, task: Task) -> None:
        """Find out which worker knows the beginning of a task that came."""
        if task.prefixes:
            task.favourite = self._affinity.favourite(task.lane, task.prefixes)

    def choose(self, task: Task, now: float, *, waiting: int, seats: dict[str, Seat]) -> Choice | None:
        """Return the best worker for a task while so many others are ``waiting``; ``None`` when nobody has room."""
        if not self._lanes.has_free(task.lane):
            return None
        free = self._free(task, now, seats)
        seat = self._ready(task, free)
        if seat is None:
            # Those that were looked at may be barred from it, or not be ready just now.
            everyone = self._lanes.free(task.lane, task.service)
            free = [seat for seat in everyone if self.may(task, seat, now)]
            seat = self._ready(task, free)
        if seat is None:
            return None
        choice = Choice(seat, self.expected(task, seat))
        roomy = not waiting and len(free) >= LEAST_FREE * min(LOOKED_AT, len(self._lanes.offering(task.lane)))
        slow = choice.expected.known and choice.expected.takes > LEAST_TAKES_S
        if not (roomy and slow and task.patience) or (not choice.expected.sure and self._explores(task)):
            return choice
        return self._busier(task, choice, now, seats) or choice

    def _explores(self, task: Task) -> bool:
        """Say whether a task is one of the few by which something is learnt."""
        return task.priority != "high" and self.chance.random() < EXPLORED

    def expected(self, task: Task, seat: Seat, *, less: int = 0) -> Expected:
        """Return what a task would take at a worker, beside what that has, of which so many will have ended."""
        favourite, saves = task.favourite, 0.0
        if favourite is not None and favourite.worker_id == seat.worker_id:
            saves = favourite.saves(seat.slots.get(task.service, 1))
        return self._speeds.expected(
            seat.worker_id,
            task.lane,
            beside=seat.counts.get(task.service, 0) - less,
            saves=saves,
            work=task.work,
            loaded=task.lane not in seat.cold,
        )

    def may(self, task: Task, seat: Seat, now: float) -> bool:
        """Say whether a worker with room may be given a task, if it is ready at this moment."""
        return (
            seat.full_until <= now
            and seat.worker_id not in task.excluded
            and (not seat.shares or seat.takes(task.lane))
            and (not self._breakers or self.allows(seat, task.lane, now))
        )

    def allows(self, seat: Seat, lane: str, now: float) -> bool:
        """Say whether a worker may be given a lane's tasks: not while it is shut, unless everybody is."""
        if self._breakers.allows(seat.worker_id, lane, now):
            return True
        others = self._lanes.offering(lane)
        return not any(self._breakers.allows(one.worker_id, lane, now) for one in others if one.usable)

    def _free(self, task: Task, now: float, seats: dict[str, Seat]) -> list[Seat]:
        lane, service = task.lane, task.service
        some: Iterable[Seat] = self._lanes.some_free(lane, service, LOOKED_AT, self.chance)
        if task.excluded or self._breakers:
            found = [seat for seat in some if self.may(task, seat, now)]
        else:
            found = [seat for seat in some if seat.full_until <= now and (not seat.shares or seat.takes(lane))]
        known = seats.get(task.favourite.worker_id) if task.favourite is not None else None
        if known is not None and known not in found and known.room(service) > 0 and self._reachable(task, known, now):
            found.append(known)
        if task.owner:
            own = self._lanes.owned(task.owner, LOOKED_AT, self.chance)
            found += [
                seat
                for seat in own
                if seat not in found and seat.room(service) > 0 and self._reachable(task, seat, now)
            ]
        if task.attempts and len(found) > 1:
            tried = {attempt.worker_id for attempt in task.attempts}
            found = [seat for seat in found if seat.worker_id not in tried] or found
        return found

    def _reachable(self, task: Task, seat: Seat, now: float) -> bool:
        offers = seat.usable and seat.reachable and seat.offers(task.service, task.model)
        return offers and self.may(task, seat, now)

    def _ready(self, task: Task, seats: list[Seat]) -> Seat | None:
        """Return the best of some workers that can be given something at this moment."""
        while seats:
            seat = seats[0] if len(seats) == 1 else self._pick(task, seats)
            if self.ready(seat.worker_id):
                return seat
            seats = [one for one in seats if one is not seat]
        return None

    def _pick(self, task: Task, seats: list[Seat]) -> Seat:
        """Return the best of some workers; now and then one of which little is known, or that failed lately."""
        service, lane, favourite, saves, place = task.service, task.lane, "", 0.0, -1
        if task.favourite is not None:
            for number, seat in enumerate(seats):
                if seat.worker_id == task.favourite.worker_id:
                    favourite, place = seat.worker_id, number
                    saves = task.favourite.saves(seat.slots[service])
                    break
        totals, sure = self._speeds.totals(seats, lane, service, task.work, favourite=favourite, saves=saves)
        home = bool(task.owner) and any(seat.owner == task.owner for seat in seats)
        # Whose own machine is free is not sent away from it to learn something about another's.
        if 0 < sure < len(seats) and not home and self._explores(task):
            good = [seat for seat in seats if not self._speeds.expected(seat.worker_id, lane, beside=0).sure]
        else:
            limit = AS_GOOD * min(totals)
            if favourite and totals[place] <= limit and not task.owner:
                return seats[place]
            good = [seat for seat, total in zip(seats, totals, strict=True) if total <= limit]
        if task.owner:
            # Only of those that are as good: nobody waits longer for having a machine of one's own.
            good = [seat for seat in good if seat.owner == task.owner] or good
        if favourite:
            good = [seat for seat in good if seat.worker_id == favourite] or good
        return good[0] if len(good) == 1 else _freest(good, service)

    def _busier(self, task: Task, best: Choice, now: float, seats: dict[str, Seat]) -> Choice | None:
        """Return a busy worker that is worth waiting for."""
        found, least = None, best.expected.total
        for seat in self._busy(task, seats):
            expected = self.expected(task, seat, less=1)
            limit = min(least, (WORTH_KEEPING if expected.saved else WORTH_WAITING) * best.expected.total)
            if not expected.known or expected.total >= limit or not self._reachable(task, seat, now):
                continue
            waits_s = self.wait_s(seat, task.service, now)
            total = waits_s + expected.total
            if waits_s <= MOST_WAIT_S and total < limit:
                found, least = Choice(seat, expected._replace(wait=waits_s), waits_s), total
        return found

    def _busy(self, task: Task, seats: dict[str, Seat]) -> Iterable[Seat]:
        lane, service = task.lane, task.service
        everyone = self._lanes.offering(lane)
        if len(everyone) > BUSY_LOOKED_AT:
            listed = everyone if isinstance(everyone, list) else list(everyone)
            some = {seat.worker_id: seat for seat in (self.chance.choice(listed) for _ in range(BUSY_LOOKED_AT))}
        else:
            some = {seat.worker_id: seat for seat in everyone}
        if task.favourite is not None and (known := seats.get(task.favourite.worker_id)) is not None:
            some[known.worker_id] = known
        full = [seat for seat in some.values() if seat.room(service) <= 0]
        return [seat for seat in full if promises(seat) < seat.slots.get(service, 0)]

    def wait_s(self, seat: Seat, service: str, now: float) -> float:
        """Return the seconds until a busy worker has room for one more, behind those that wait for it already."""
        mine = [attempt for attempt in seat.running.values() if attempt.task.service == service]
        ends = sorted(_left_s(attempt, now) for attempt in mine)
        place = promises(seat)
        return ends[place] if place < len(ends) else MOST_WAIT_S + 1


def _left_s(attempt: Attempt, now: float) -> float:
    """Return the seconds until an attempt is likely to end; what takes longer than expected may go on for as long."""
    if attempt.expected is None or not attempt.expected.known:
        return MOST_WAIT_S + 1
    elapsed = now - (attempt.offered_at if attempt.started_at is None else attempt.started_at)
    return max(attempt.expected.takes - elapsed, OVERDUE * elapsed)


def promises(seat: Seat) -> int:
    """Return how many tasks wait for a worker."""
    return len(seat.promised) if seat.promised else 0


def _freest(seats: list[Seat], service: str) -> Seat:
    """Return the worker with most room; then the least busy, then the one that was given nothing for longest."""
    best = seats[0]
    room = best.rooms.get(service, 0)
    for seat in seats:
        its = seat.rooms.get(service, 0)
        if its > room or (its == room and _restedness(seat) > _restedness(best)):
            best, room = seat, its
    return best


def _restedness(seat: Seat) -> tuple[float, float, str]:
    return -seat.load, -seat.last_given, seat.worker_id
