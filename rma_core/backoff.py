"""Waiting between tries: longer each time, never twice the same, and as long as the other side asks for."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: First and longest wait unless others are given.
BASE_S = 2.0
CAP_S = 300.0


class Backoff:
    """``min(cap, base * 2**n) * U(0.5, 1)`` seconds for the n-th wait in a row."""

    def __init__(
        self,
        *,
        base_s: float = BASE_S,
        cap_s: float = CAP_S,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._base_s, self._cap_s, self._uniform = base_s, cap_s, uniform
        self._tries = 0

    @property
    def tries(self) -> int:
        """Waits since the last success."""
        return self._tries

    def next_s(self, retry_after_s: float | None = None) -> float:
        """Return how long to wait now: at least what the other side asked for, and never nothing."""
        # Beyond 2**30 the cap has long been reached, and a float would overflow one day.
        wait_s = min(self._cap_s, self._base_s * 2 ** min(self._tries, 30)) * self._uniform(0.5, 1.0)
        self._tries += 1
        return wait_s if retry_after_s is None else max(retry_after_s, self._base_s / 2) * self._uniform(1.0, 1.1)

    def reset(self) -> None:
        """Start over after a success."""
        self._tries = 0
