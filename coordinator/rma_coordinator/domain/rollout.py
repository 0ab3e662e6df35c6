"""A new tier policy is put in force step by step: who moves when, and what stops it; pure, given times and counts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

if TYPE_CHECKING:
    from collections.abc import Iterable

#: So many requests must have ended since the start before their failures mean something.
LEAST_ENDED = 20

Share = Annotated[float, Meta(ge=0, le=1)]


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """How workers move: first a ``canary`` share of those that change, ``hold_s`` later the others, ``per_minute``.

    More ``most_failures`` of all requests, or less ``least_free`` of all slots, than this, and ``on_trouble`` says what
    becomes of it; ``on_restart`` what becomes of it when the coordinator starts in the middle.
    """

    canary: Share = 0.0
    hold_s: Annotated[float, Meta(ge=0, le=86_400)] = 300.0
    per_minute: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None
    most_failures: Share = 0.2
    least_free: Share = 0.0
    on_trouble: Literal["rollback", "stop"] = "rollback"
    on_restart: Literal["continue", "rollback"] = "continue"


class Pulse(NamedTuple):
    """How the pool does: requests that have succeeded and failed so far, slots that are free now, and all."""

    succeeded: int
    failed: int
    free: int
    slots: int

    @property
    def free_share(self) -> float:
        """The share of slots that are free; 1 where there are none."""
        return self.free / self.slots if self.slots else 1.0


class Rollout:
    """Workers that wait for their turn, in order, and those that have had it."""

    def __init__(self, steps: Steps, waiting: Iterable[str], *, now: float, pulse: Pulse, moved: int = 0) -> None:
        """Begin ``now`` (monotonic seconds), with the pool as it is; ``moved`` have had their turn before."""
        self.steps = steps
        self.waiting = dict.fromkeys(waiting)
        self.moved = moved
        #: Why it goes no further, where it does not.
        self.stopped = ""
        self._began, self._pulse, self._before = now, pulse, moved

    @property
    def total(self) -> int:
        """How many change in all."""
        return self.moved + len(self.waiting)

    def due(self, now: float) -> list[str]:
        """Return those whose turn it is."""
        if self.stopped:
            return []
        room = max(0, min(len(self.waiting), self._until(now - self._began) - self.moved))
        return [worker_id for worker_id, _ in zip(self.waiting, range(room), strict=False)]

    def _until(self, elapsed_s: float) -> int:
        """Return how many may have moved after some seconds."""
        steps = self.steps
        # One that goes on after a restart waits once more, but sends no second canary.
        first = max(math.ceil(steps.canary * self.total), self._before)
        if steps.canary:
            elapsed_s -= steps.hold_s
        if elapsed_s < 0:
            return first
        if steps.per_minute is None:
            return self.total
        # The first of a minute moves at its beginning.
        return first + int(elapsed_s * steps.per_minute / 60) + 1

    def done(self, worker_id: str) -> None:
        """Note that a worker has had its turn, or is none any more."""
        del self.waiting[worker_id]
        self.moved += 1

    def trouble(self, pulse: Pulse) -> str:
        """Say why it must not go on, or nothing."""
        if self.moved == self._before:
            # Nobody has moved, so whatever the pool is like is not because of this.
            self._pulse = pulse
            return ""
        failed = pulse.failed - self._pulse.failed
        ended = failed + pulse.succeeded - self._pulse.succeeded
        most, least = self.steps.most_failures, self.steps.least_free
        if ended >= LEAST_ENDED and failed > most * ended:
            return f"{failed} of {ended} requests have failed since it began, and {most:.0%} may"
        # A pool that was full before is not full because of this.
        if pulse.free_share < least <= self._pulse.free_share:
            return f"{pulse.free} of {pulse.slots} slots are free, and {least:.0%} must be"
        return ""
