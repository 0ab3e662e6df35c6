"""Requests that are sent again: which of them run now, and answers that are kept for who named his request. Pure.

SDKs ask again by themselves, and send no name with it: a repetition is known by whose it is and what it says. All of
this is memory, and ends with the process: then a request that is sent again is done again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from rma_core.errors import RMAError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds for which a name stands for its request, and its answer is kept.
NAMED_S = 86_400.0
#: Names that are remembered, about 300 bytes each; the oldest are forgotten first.
MOST_NAMES = 10_000
#: Bytes of one answer that is kept, and of all of them; those that were not asked for again longest go first.
MOST_KEPT_BYTES, MOST_KEPT_BYTES_TOGETHER = 256 * 1024, 8 * 1024 * 1024

R = TypeVar("R")


class OtherRequest(RMAError):
    """A name that stands for one request came with another."""

    code = "other_request"


class Key(NamedTuple):
    """What makes two requests the same: whose they are, and a digest of where they went and what they say."""

    key_id: str
    digest: bytes


def key_of(key_id: str, path: str, body: bytes) -> Key:
    """Return what a request is known by."""
    state = hashlib.sha256(path.encode())
    state.update(b"\0")
    state.update(body)
    return Key(key_id, state.digest())


class Kept(NamedTuple):
    """A whole answer: its headers and its bytes, whole or as events."""

    headers: dict[str, str]
    body: bytes


class _Named(NamedTuple):
    digest: bytes
    at: float


class Repeats(Generic[R]):
    """Runs by what was asked for, the newest first, and names with their answers; ``clock`` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs: dict[Key, list[R]] = {}
        #: Runs that go on, or are kept, for a client that will ask again.
        self.waiting: set[R] = set()
        self._named: OrderedDict[bytes, _Named] = OrderedDict()
        self._answers: OrderedDict[bytes, Kept] = OrderedDict()
        #: Bytes of all answers that are kept, and of what runs keep of theirs meanwhile.
        self.kept_bytes = self.recorded_bytes = 0
        #: Bytes of whole answers that are on their way.
        self.gathered_bytes = 0

    # -- runs --------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[R]:
        return (run for runs in list(self._runs.values()) for run in list(runs))

    def begin(self, key: Key, run: R) -> None:
        """A run has begun, and can be joined from now on."""
        self._runs.setdefault(key, []).insert(0, run)

    def end(self, key: Key, run: R) -> None:
        """A run cannot be joined any more."""
        runs = self._runs.get(key, [])
        if run in runs:
            runs.remove(run)
        if not runs:
            self._runs.pop(key, None)

    def runs(self, key: Key) -> tuple[R, ...]:
        """Return the runs of a request, the newest first."""
        return tuple(self._runs.get(key, ()))

    # -- names -------------------------------------------------------------------------------------------------

    def claim(self, name: str, key: Key) -> Kept | None:
        """Let a name stand for a request of one key; return the answer that is kept for it, if any.

        Raises OtherRequest when it stands for another one of that key.
        """
        self._forget()
        place = _place(name, key)
        known = self._named.get(place)
        if known is None:
            self._named[place] = _Named(key.digest, self._clock())
            while len(self._named) > MOST_NAMES:
                self._drop(next(iter(self._named)))
            return None
        if known.digest != key.digest:
            raise OtherRequest("this Idempotency-Key was used with another request")
        if place in self._answers:
            self._answers.move_to_end(place)
        return self._answers.get(place)

    def keep(self, name: str, key: Key, answer: Kept) -> None:
        """Keep the answer of a named request, where it is not too large and its name still stands for it."""
        place = _place(name, key)
        known = self._named.get(place)
        if known is None or known.digest != key.digest or place in self._answers:
            return
        if len(answer.body) > MOST_KEPT_BYTES:
            return
        self._answers[place] = answer
        self.kept_bytes += len(answer.body)
        while self.kept_bytes > MOST_KEPT_BYTES_TOGETHER:
            self._drop_answer(next(iter(self._answers)))

    def _forget(self) -> None:
        """Forget what is over; names stand in the order in which they were first used."""
        while self._named:
            place, oldest = next(iter(self._named.items()))
            if self._clock() - oldest.at < NAMED_S:
                return
            self._drop(place)

    def _drop(self, place: bytes) -> None:
        del self._named[place]
        self._drop_answer(place)

    def _drop_answer(self, place: bytes) -> None:
        answer = self._answers.pop(place, None)
        if answer is not None:
            self.kept_bytes -= len(answer.body)


def _place(name: str, key: Key) -> bytes:
    """Return under what a name is kept: one client's names are none of another's."""
    return hashlib.sha256(f"{key.key_id}\0{name}".encode()).digest()
