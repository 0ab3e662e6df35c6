"""Detectors that keep hanging or crashing are left alone for a while, longer each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Rounds in a row that a detector may hang or crash before it is left alone.
ROUNDS = 3
#: For how long it is left alone the first, second, third … time; the last one repeats.
BACKOFFS_S = (60.0, 300.0, 1800.0, 3600.0)


class Quarantine:
    """Who is left alone, until when and why, in memory; holds one entry per installed detector at most."""

    def __init__(
        self, *, clock: Callable[[], float], rounds: int = ROUNDS, backoffs_s: Sequence[float] = BACKOFFS_S
    ) -> None:
        """Start with nobody in it. ``clock`` gives monotonic seconds."""
        self._clock = clock
        self._rounds = rounds
        self._backoffs_s = tuple(backoffs_s)
        self._failures: dict[str, int] = {}
        self._held: dict[str, tuple[float, str]] = {}

    def reason(self, name: str) -> str:
        """Say why ``name`` is not called now and when it will be; an empty string when it may be."""
        until, why = self._held.get(name, (0.0, ""))
        left_s = until - self._clock()
        if not why or left_s <= 0:
            return ""
        failures = self._failures[name]
        return f"failed {failures} times in a row and is tried again in {left_s:.0f} s; the last time it {why}"

    def failed(self, name: str, why: str) -> None:
        """Count a hang or a crash; ``why`` goes on from "the last time it …"."""
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        if failures >= self._rounds:
            step = min(failures - self._rounds, len(self._backoffs_s) - 1)
            self._held[name] = (self._clock() + self._backoffs_s[step], why)

    def passed(self, name: str) -> None:
        """Forget everything about ``name``: it answered."""
        self._failures.pop(name, None)
        self._held.pop(name, None)
