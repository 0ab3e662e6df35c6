"""Parked workers: beyond `max_channels` most of those with nothing to do let go of theirs, and come by now and then.

So many of each lane stay on theirs that a task finds one at once; a burst calls the others back.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rma_coordinator.domain.tasks import NO_LANES, lanes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rma_coordinator.domain.dispatch import Dispatcher
    from rma_coordinator.domain.fleet import Worker
    from rma_coordinator.hub import Hub

#: Below this share of `max_channels` nobody is parked.
CHANNELS_LOW = 0.9
#: Workers with room that each lane keeps reachable while others are parked.
SPARE_SEATS = 8


class Parking:
    """Who keeps a channel, of which there may be so many; ``usable`` says whether a worker may be given new work."""

    def __init__(self, hub: Hub, dispatcher: Dispatcher, *, most: int, usable: Callable[[Worker], bool]) -> None:
        self._hub, self._dispatcher, self._most, self._usable = hub, dispatcher, most, usable
        self._channels = 0
        self._spare: Counter[str] = Counter()

    def keeps_channel(self, worker: Worker) -> bool:
        """Say whether a worker should have its channel open; the others are parked while there are enough of them."""
        if self._channels <= self._most * CHANNELS_LOW:
            return True
        seat = self._dispatcher.seats.get(worker.id)
        if seat is not None and seat.running:
            return True
        has = seat is not None and seat.reachable
        if has and self._channels <= self._most:
            return True
        lanes = self._lanes_of(worker)
        # Those beside it count, not it itself.
        wanted = any(self._spare[lane] - has < SPARE_SEATS for lane in lanes)
        if has != wanted:
            step = 1 if wanted else -1
            self._channels += step
            for lane in lanes:
                self._spare[lane] += step
        return wanted

    def count(self) -> None:
        """Look how many channels are open, and how many workers on them have room for each lane."""
        self._channels = self._hub.channels
        if self._channels > self._most * CHANNELS_LOW:
            self._spare = self._dispatcher.spare()

    def _lanes_of(self, worker: Worker) -> frozenset[str]:
        """Return what a worker may be given: also what dispatch is only told of after this."""
        if not self._usable(worker):
            return NO_LANES
        seat, offers = self._dispatcher.seats.get(worker.id), lanes_of(worker.offered(), worker.models)
        return offers if seat is None else offers | seat.lanes()
