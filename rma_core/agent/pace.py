"""How far something is, how long it still takes where that can be known, and whether it is stuck. Pure."""

from __future__ import annotations

from rma_core.models.sizes import GIB, duration

#: A model may take so long to load, whatever it is, and so much longer for each GiB.
LOAD_BASE_S, LOAD_S_PER_GIB = 300.0, 20.0
#: Seconds in which a model that tells how far it is must have got further, and the step that counts.
STALL_BASE_S, STALL_S_PER_GIB, STEP = 60.0, 4.0, 0.002
#: From here on a share says nothing more: what is left is not reading.
NEARLY = 0.98
#: A rate is known after so much of the way, and so many seconds.
KNOWN_SHARE, KNOWN_S = 0.01, 2.0


class Pace:
    """One way from 0 to 1, told now and then by `at`."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._first: tuple[float, float] | None = None
        self._moved_at = now
        self._best = 0.0
        self.share: float | None = None

    def at(self, now: float, share: float | None) -> None:
        """Take note of how far it is now; ``None`` where nobody can say."""
        self.share = share
        if share is None:
            return
        self._first = self._first or (now, share)
        if share >= self._best + STEP:
            self._best, self._moved_at = share, now

    def eta_s(self, now: float) -> float | None:
        """Return the seconds that are left if it goes on as so far; ``None`` while that is not known."""
        if self.share is None or self._first is None:
            return None
        began, begin = self._first
        if self.share - begin < KNOWN_SHARE or now - began < KNOWN_S:
            return None
        return (1.0 - self.share) * (now - began) / (self.share - begin)

    def overdue(self, now: float, size_bytes: int) -> str:
        """Say why a model of this size is not waited for any longer; an empty string while it is.

        One that is seen to get further is never cut off, however slow; one that stands still is, and one of which
        nothing can be seen once it has had all the time that its size may need.
        """
        gib = size_bytes / GIB
        stalled_s, stall_s = now - self._moved_at, STALL_BASE_S + STALL_S_PER_GIB * gib
        if self.share is not None and self.share < NEARLY:
            stuck = stalled_s > stall_s
            return f"stuck at {self.share:.0%} for {duration(stalled_s)}" if stuck else ""
        allowed_s = LOAD_BASE_S + LOAD_S_PER_GIB * gib
        late = now - self._began > allowed_s and stalled_s > stall_s
        return f"not loaded within {duration(now - self._began)}" if late else ""
