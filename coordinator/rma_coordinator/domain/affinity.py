"""Which worker has the beginning of a conversation in its cache already. Pure, but for a secret of each process.

A conversation is known by a chain of hashes, one at each message's end, salted with the key whose it is: nobody learns
from how fast an answer comes what others have asked. They are Python's own, which are quick and not made to be hard to
meet: so a secret begins each chain. Where two are alike by chance, a conversation may wait for a worker that does not
know it.
"""

from __future__ import annotations

import math
import secrets
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Nobody can reckon a chain without it, whatever seed PYTHONHASHSEED gives.
_SECRET = secrets.token_bytes(16)
#: Conversations that are remembered, about 200 bytes each.
MOST_REMEMBERED = 20_000
#: Messages at the end of a request that may be new: the last answer, what tools said, the next question.
MOST_NEW = 16
#: Conversations that came after another, for each slot of a worker, until that one is as likely gone from its cache as
#: not: llama.cpp keeps one a slot, others as many as fit into their memory.
KEPT_A_SLOT = 4.0


class Prefix(NamedTuple):
    """A beginning of a conversation: its hash, and how much of the whole it is, 0..1."""

    digest: int
    share: float


def prefixes(messages: Iterable[bytes], *, salt: str) -> tuple[Prefix, ...]:
    """Return the longest beginnings of a conversation, the whole of it first."""
    state, size, found = hash((_SECRET, salt)), 0, list[tuple[int, int]]()
    for message in messages:
        size += len(message)
        state = hash((state, message))
        found.append((state, size))
    if not size:
        return ()
    return tuple([Prefix(digest, length / size) for digest, length in found[: -MOST_NEW - 2 : -1]])


class Favourite(NamedTuple):
    """A worker that has read a beginning already: how much of the whole that is, and what it was given since."""

    worker_id: str
    share: float
    since: int

    def saves(self, slots: int) -> float:
        """Return the part of reading that its cache is likely to spare: the less, the more it was given since."""
        return self.share * math.exp2(-self.since / (KEPT_A_SLOT * max(1, slots)))


class Affinity:
    """Where conversations went last; the oldest are forgotten."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._workers: OrderedDict[tuple[str, int], tuple[str, int]] = OrderedDict()
        #: Conversations that each worker was given.
        self._given: OrderedDict[str, int] = OrderedDict()

    def remember(self, lane: str, known: tuple[Prefix, ...], worker_id: str) -> None:
        """A worker has answered a conversation, and has all of it now."""
        if not known:
            return
        turn = self._given[worker_id] = self._given.get(worker_id, 0) + 1
        self._given.move_to_end(worker_id)
        for key in [(lane, one.digest) for one in known[1:]]:
            # What it went on from is part of it.
            self._workers.pop(key, None)
        self._workers[lane, known[0].digest] = (worker_id, turn)
        self._workers.move_to_end((lane, known[0].digest))
        while len(self._workers) > self._most:
            self._workers.popitem(last=False)
        while len(self._given) > self._most:
            self._given.popitem(last=False)

    def favourite(self, lane: str, known: tuple[Prefix, ...]) -> Favourite | None:
        """Return the worker that has most of a conversation, if any."""
        for one in known:
            found = self._workers.get((lane, one.digest))
            if found is not None:
                worker_id, turn = found
                return Favourite(worker_id, one.share, max(0, self._given.get(worker_id, turn) - turn))
        return None
