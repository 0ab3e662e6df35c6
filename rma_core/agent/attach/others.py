"""How much of an attached server others than the pool use: its owner first of all, whose own use comes first.

Two servers let that be seen. llama.cpp says how many of its slots are at work. Ollama does not, but of each loaded
model it says when it will leave memory, and moves that on whenever an answer ends: moved on by no answer of the pool's,
somebody else has just used it. Of any other server nothing is seen. Pure, given a clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Seconds for which an owner who has just used an Ollama has one of its slots to come back to.
BACK_WITHIN_S = 30.0
#: Seconds after the end of an answer of the pool's in which Ollama may still be noting that end.
NOTED_WITHIN_S = 5.0


class Others:
    """What was seen of others at one server; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._slots = 0
        self._expires: dict[str, str] | None = None
        self._seen_at = self._ours_until = -BACK_WITHIN_S
        self._looked_at = clock()

    @property
    def taken(self) -> int:
        """Slots that others have, as far as it can be seen."""
        return self._slots or int(self._clock() - self._seen_at < BACK_WITHIN_S)

    def forget(self) -> None:
        """The server is away, or another one: nothing is known."""
        self._slots, self._expires = 0, None
        self._seen_at = self._clock() - BACK_WITHIN_S

    def ours(self) -> None:
        """A request of the pool's begins there, or ends."""
        self._ours_until = self._clock() + NOTED_WITHIN_S

    def slots_seen(self, at_work: int, ours: int) -> None:
        """So many slots are at work, and so many requests of the pool's are there."""
        self._slots = max(0, at_work - ours)

    def expiries_seen(self, expires: Mapping[str, str], ours: int) -> None:
        """The models that are loaded leave memory then, by name; so many requests of the pool's are there."""
        before, since = self._expires, self._looked_at
        self._expires, self._looked_at = dict(expires), self._clock()
        moved = before is not None and any(before.get(name) != moment for name, moment in expires.items())
        # What moved while the pool was at it says nothing of others.
        if moved and not ours and since >= self._ours_until:
            self._seen_at = self._clock()
