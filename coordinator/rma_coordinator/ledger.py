"""The ledger: which worker finished which task, and what that came to; the newest on their own, older ones added up.

What a durable task earns is written with its end. What is answered at once is owed until it is written: many at a time,
in one record, for a record each would cost more than the answers.
"""

from __future__ import annotations

from collections import Counter, deque
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from rma_coordinator.domain.records import LedgerEntry, LedgerPage, LedgerTotal
from rma_coordinator.store import Delete, Put

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rma_coordinator.store import Change, Store

#: Entries that are kept on their own.
LEDGER_ROWS = 1000
#: Entries that are written in one record at most.
PAGE_ENTRIES = 256


class Lot(NamedTuple):
    """Entries that are written together: one of a durable task, or a page of others. ``key`` is theirs in the store."""

    key: str
    kind: type[LedgerEntry | LedgerPage]
    entries: tuple[LedgerEntry, ...]


async def entries_of(store: Store) -> list[LedgerEntry]:
    """Return every entry that stands on its own, about in the order of their ends. Raises StoreFailed."""
    return [entry for lot in await _lots(store) for entry in lot.entries]


async def _lots(store: Store) -> list[Lot]:
    single = [Lot(one.task_id, LedgerEntry, (one,)) for one in await store.load(LedgerEntry)]
    pages = [Lot(one.key, LedgerPage, one.entries) for one in await store.load(LedgerPage)]
    return sorted([*single, *pages], key=lambda lot: lot.entries[0].ended_at)


class Ledger:
    """Credits of all workers; ``on_credited`` is told of each one once it is on disk."""

    def __init__(self, store: Store, on_credited: Callable[[LedgerEntry], None]) -> None:
        self._store, self._on_credited = store, on_credited
        self._owed: deque[LedgerEntry] = deque()
        self._lots: deque[Lot] = deque()
        self._rows = 0
        self.totals: dict[str, LedgerTotal] = {}

    async def open(self) -> None:
        """Take up what the store holds. Raises StoreFailed."""
        self.totals = {total.key: total for total in await self._store.load(LedgerTotal)}
        self._lots.extend(await _lots(self._store))
        self._rows = sum(len(lot.entries) for lot in self._lots)

    def completed(self) -> Counter[str]:
        """Return how many tasks it has of each worker."""
        counts: Counter[str] = Counter(entry.worker_id for lot in self._lots for entry in lot.entries)
        for total in self.totals.values():
            counts[total.worker_id] += total.tasks
        return counts

    def owe(self, entry: LedgerEntry) -> None:
        """A task has succeeded whose end is not written by itself."""
        self._owed.append(entry)

    def owed(self) -> list[Lot]:
        """Return everything that is owed, as it is to be written; `settle` it once it is."""
        owed, found = iter(self._owed), list[Lot]()
        while entries := tuple(islice(owed, PAGE_ENTRIES)):
            found.append(Lot(entries[0].task_id, LedgerPage, entries))
        return found

    def settle(self, lots: Iterable[Lot]) -> None:
        """What was owed is on disk."""
        for lot in lots:
            for _ in lot.entries:
                self._owed.popleft()
            self._credited(lot)

    def credited(self, entry: LedgerEntry) -> None:
        """A durable task's entry is on disk, with its end."""
        self._credited(Lot(entry.task_id, LedgerEntry, (entry,)))

    def _credited(self, lot: Lot) -> None:
        self._lots.append(lot)
        self._rows += len(lot.entries)
        for entry in lot.entries:
            self._on_credited(entry)

    async def fold(self) -> bool:
        """Add the oldest entries up, so that it does not grow for ever; say whether any were. Raises StoreFailed."""
        if self._rows < 2 * LEDGER_ROWS:
            return False
        old, rows = list[Lot](), 0
        for lot in self._lots:
            if rows >= LEDGER_ROWS:
                break
            old.append(lot)
            rows += len(lot.entries)
        totals: dict[str, LedgerTotal] = {}
        for entry in (entry for lot in old for entry in lot.entries):
            empty = LedgerTotal(worker_id=entry.worker_id, service=entry.service)
            known = totals.get(empty.key) or self.totals.get(empty.key, empty)
            totals[empty.key] = known.plus(entry)
        puts: list[Change] = [Put(total.key, total) for total in totals.values()]
        await self._store.commit([*puts, *(Delete(lot.kind, lot.key) for lot in old)], urgent=True)
        self.totals |= totals
        for _ in old:
            self._lots.popleft()
        self._rows -= rows
        return True


def written(lot: Lot) -> Change:
    """Return what writes a page of entries."""
    return Put(lot.key, LedgerPage(key=lot.key, entries=lot.entries))
