"""When a container that failed is tried again, and when it is given up. Pure, given a clock's readings."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from rma_core.errors import (
    DownloadFailed,
    ImageMissing,
    ImagePullFailed,
    ModelMissing,
    NotSupported,
    OutOfSpace,
    RuntimeFailure,
)

if TYPE_CHECKING:
    from collections.abc import Callable

#: Restarts wait 0, 10, 20, 40 … seconds; this long healthy and it starts over.
RESTART_BASE_S, RESTART_CAP_S, RESET_AFTER_S = 10.0, 300.0, 600.0
#: So many failures within the window, and it is given up.
MAX_FAILURES, FAILURE_WINDOW_S = 5, 1800.0
#: Something given up is tried again after this: images get built, drivers installed, bugs mended.
RESCAN_S = 3600.0
#: Failures that trying again does not mend, and those of getting what it needs.
HOPELESS = (ImageMissing, ModelMissing, NotSupported)
FETCHING = (ImagePullFailed, DownloadFailed, OutOfSpace)


class Restarts:
    """The failures of one container; ``uniform`` gives random numbers."""

    def __init__(self, uniform: Callable[[float, float], float]) -> None:
        self._uniform = uniform
        self._failures: deque[float] = deque(maxlen=MAX_FAILURES)
        self._fetch_failures = 0
        #: How often it was started again.
        self.count = 0
        #: Until then nothing is tried, and the failure that it was given up for.
        self.not_before = 0.0
        self.given_up_for: type[RuntimeFailure] | None = None

    def failed(self, error: RuntimeFailure, words: str, now: float) -> str:
        """Take note of a failure, and return why it is given up; an empty string when it is tried again."""
        if isinstance(error, HOPELESS):
            return self._give_up(error, words, now)
        if isinstance(error, FETCHING):
            self._fetch_failures += 1
            wait_s = RESTART_CAP_S if isinstance(error, OutOfSpace) else self._wait_s(self._fetch_failures + 1)
        else:
            self._failures.append(now)
            self.count += 1
            recent = sum(1 for moment in self._failures if now - moment < FAILURE_WINDOW_S)
            if recent >= MAX_FAILURES:
                told = f"failed {recent} times in {FAILURE_WINDOW_S / 60:.0f} min: {words}"
                return self._give_up(error, told, now)
            wait_s = self._wait_s(len(self._failures))
        self.not_before = now + wait_s
        return ""

    def _give_up(self, error: RuntimeFailure, words: str, now: float) -> str:
        self.given_up_for = type(error)
        self._failures.clear()
        self.not_before = now + RESCAN_S
        return words

    def _wait_s(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row: nothing after the first."""
        if failures <= 1:
            return 0.0
        wait_s = min(RESTART_CAP_S, RESTART_BASE_S * 2.0 ** min(failures - 2, 16))
        return wait_s * self._uniform(1.0, 1.1)

    def fetched(self) -> None:
        """All that it needs is there."""
        self._fetch_failures = 0

    def well(self, for_s: float) -> None:
        """It has been healthy for so long."""
        if for_s >= RESET_AFTER_S:
            self._failures.clear()

    def again(self) -> None:
        """Try at once: the pool or the owner has changed something."""
        self.given_up_for, self.not_before = None, 0.0
        self._failures.clear()
