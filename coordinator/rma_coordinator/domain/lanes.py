"""Who offers what, and who of them has room: found without looking at every worker. Pure.

A lane is a service, or a service with one of its models. The lists of free workers are mended when they are drawn from:
whoever has no room any more is taken out then, so that giving a task costs nothing here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from rma_coordinator.domain.tasks import NO_LANES

if TYPE_CHECKING:
    import random
    from collections.abc import Collection, Mapping

    from rma_coordinator.domain.tasks import Seat


@lru_cache(maxsize=1024)
def _same(lanes: frozenset[str]) -> frozenset[str]:
    """Return one object for all equal ones: many workers offer the same."""
    return lanes


class Lanes:
    """Each lane's workers, and those of them that have room, in no order."""

    def __init__(self) -> None:
        self._offering: dict[str, list[Seat]] = {}
        self._free: dict[str, list[Seat]] = {}
        self._owned: dict[str, list[Seat]] = {}

    def offering(self, lane: str) -> Collection[Seat]:
        """Return everyone who offers a lane, with room or without."""
        return self._offering.get(lane, ())

    def offer(self, seat: Seat, slots: dict[str, int], models: Mapping[str, frozenset[str]]) -> None:
        """Note what a worker offers from now on."""
        if seat.slots == slots and seat.models == models:
            return
        before = seat.lanes()
        seat.offer(slots, models)
        after = seat.lanes()
        for lane in before - after:
            _remove(self._offering, lane, seat)
        for lane in (before - after) & seat.listed:
            _remove(self._free, lane, seat)
        seat.listed = _same(seat.listed & after)
        for lane in after - before:
            self._offering.setdefault(lane, []).append(seat)
        seat.unlisted = True
        self.open(seat)

    def belong(self, seat: Seat, owner: str) -> None:
        """Note whose machine a worker is; empty: nobody's in particular."""
        if seat.owner == owner:
            return
        if seat.owner:
            _remove(self._owned, seat.owner, seat)
        seat.owner = owner
        if owner:
            self._owned.setdefault(owner, []).append(seat)

    def owned(self, owner: str, most: int, chance: random.Random) -> Collection[Seat]:
        """Return up to ``most`` of somebody's workers, with room or without; at random where there are more."""
        found = self._owned.get(owner, ())
        return found if len(found) <= most else chance.sample(found, most)

    def open(self, seat: Seat) -> None:
        """A worker may have room now."""
        if not (seat.unlisted and seat.usable and seat.reachable):
            return
        seat.unlisted = False
        for service in seat.slots:
            if seat.room(service) <= 0:
                seat.unlisted = True
                continue
            for lane in seat.lanes(service) - seat.listed:
                self._free.setdefault(lane, []).append(seat)
                seat.listed = _same(seat.listed | {lane})

    def free(self, lane: str, service: str) -> list[Seat]:
        """Return everyone who has room."""
        listed = self._free.get(lane)
        if not listed:
            return []
        # As `_has_room`, which would be called for each: this is the hottest loop of all.
        found = [seat for seat in listed if seat.rooms.get(service, 0) > 0 and seat.usable and seat.reachable]
        if len(found) < len(listed):
            for place in range(len(listed) - 1, -1, -1):
                if not _has_room(listed[place], service):
                    _take_out(listed, place, lane)
        return found

    def some_free(self, lane: str, service: str, most: int, chance: random.Random) -> list[Seat]:
        """Return up to ``most`` who have room, at random where there are more."""
        listed = self._free.get(lane)
        if not listed:
            return []
        found: dict[str, Seat] = {}
        for _ in range(2 * most):
            if len(listed) <= most:
                return self.free(lane, service)
            if len(found) >= most:
                break
            place = chance.randrange(len(listed))
            seat = listed[place]
            if _has_room(seat, service):
                found[seat.worker_id] = seat
            else:
                _take_out(listed, place, lane)
        return list(found.values())

    def has_free(self, lane: str) -> bool:
        """Say whether anyone may have room; nobody has where this is false."""
        return bool(self._free.get(lane))


def _has_room(seat: Seat, service: str) -> bool:
    return seat.rooms.get(service, 0) > 0 and seat.usable and seat.reachable


def _take_out(listed: list[Seat], place: int, lane: str) -> None:
    seat = listed[place]
    listed[place] = listed[-1]
    listed.pop()
    seat.listed, seat.unlisted = _same(seat.listed - {lane}) or NO_LANES, True


def _remove(lists: dict[str, list[Seat]], name: str, seat: Seat) -> None:
    lists[name].remove(seat)
    if not lists[name]:
        del lists[name]
