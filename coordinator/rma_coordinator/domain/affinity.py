"""Which worker has the beginning of a conversation in its cache already. Pure.

A conversation is known by a chain of hashes, one at each message's end, salted with the key whose it is: nobody learns
from how fast an answer comes what others have asked.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Conversations that are remembered, about 200 bytes each.
MOST_REMEMBERED = 20_000
#: Messages at the end of a request that may be new: the last answer, what tools said, the next question.
MOST_NEW = 16
#: A service's time that is spent on reading what it is asked, where all of that could be saved.
READING = 0.5


class Prefix(NamedTuple):
    """A beginning of a conversation: its hash, and how much of the whole it is, 0..1."""

    digest: bytes
    share: float


def prefixes(messages: Iterable[bytes], *, salt: str) -> tuple[Prefix, ...]:
    """Return the longest beginnings of a conversation, the whole of it first."""
    state = hashlib.blake2b(salt.encode(), digest_size=12)
    found, size = list[tuple[bytes, int]](), 0
    for message in messages:
        state.update(len(message).to_bytes(8, "big"))
        state.update(message)
        size += len(message)
        found.append((state.digest(), size))
    return tuple(Prefix(digest, length / size) for digest, length in reversed(found[-MOST_NEW - 1 :]) if size)


class Affinity:
    """Where conversations went last; the oldest are forgotten."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._workers: OrderedDict[tuple[str, bytes], str] = OrderedDict()

    def remember(self, lane: str, known: tuple[Prefix, ...], worker_id: str) -> None:
        """A worker has answered a conversation, and has all of it now."""
        if not known:
            return
        for key in [(lane, one.digest) for one in known[1:]]:
            # What it went on from is part of it.
            self._workers.pop(key, None)
        self._workers[lane, known[0].digest] = worker_id
        self._workers.move_to_end((lane, known[0].digest))
        while len(self._workers) > self._most:
            self._workers.popitem(last=False)

    def favourite(self, lane: str, known: tuple[Prefix, ...]) -> tuple[str, float]:
        """Return the worker that has most of a conversation, and the part of its time that saves; else nobody."""
        for one in known:
            worker_id = self._workers.get((lane, one.digest))
            if worker_id is not None:
                return worker_id, READING * one.share
        return "", 0.0
