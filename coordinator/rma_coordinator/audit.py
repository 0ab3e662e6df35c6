"""What admins did to the pool, and what it did by itself: the latest entries, kept with what they speak of."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import msgspec

from rma_coordinator.store import Delete, Put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_coordinator.store import Change

#: Entries that are kept.
KEPT = 1000
#: Who acts when no person does.
ITSELF = "rma"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done: when (Unix seconds), by whom (a key's id), what (a word), and in a sentence."""

    number: int
    at: float
    by: str
    action: str
    message: str

    @property
    def key(self) -> str:
        """Its key in the store."""
        return f"{self.number:012d}"


class Audit:
    """The latest entries, oldest first; an entry counts once what it speaks of is in the store."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._entries: deque[AuditEntry] = deque()
        self._next = 1

    def restore(self, entries: Iterable[AuditEntry]) -> None:
        """Take in what the store holds, by key."""
        self._entries = deque(entries)
        self._next = self._entries[-1].number + 1 if self._entries else 1

    def entry(self, action: str, message: str, *, by: str) -> AuditEntry:
        """Return a new entry, whose number nobody else gets."""
        number, self._next = self._next, self._next + 1
        return AuditEntry(number=number, at=self._wall(), by=by, action=action, message=message)

    def changes(self, entry: AuditEntry) -> list[Change]:
        """Return what is to be committed with what the entry speaks of."""
        old = [Delete(AuditEntry, one.key) for one, _ in zip(self._entries, self._surplus(), strict=False)]
        return [Put(entry.key, entry), *old]

    def _surplus(self) -> range:
        return range(max(0, len(self._entries) + 1 - KEPT))

    def keep(self, entry: AuditEntry) -> None:
        """Show an entry that was committed."""
        for _ in self._surplus():
            self._entries.popleft()
        self._entries.append(entry)

    def latest(self, limit: int, *, prefix: str = "") -> list[AuditEntry]:
        """Return the newest entries, newest first, of actions that begin with ``prefix``."""
        found = (entry for entry in reversed(self._entries) if entry.action.startswith(prefix))
        return [entry for entry, _ in zip(found, range(limit), strict=False)]
