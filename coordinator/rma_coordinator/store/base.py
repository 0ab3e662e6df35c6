"""What every store can do, in which state it can be, and what it is handed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

import msgspec

from rma_core.errors import OutOfSpace, RMAError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

R = TypeVar("R", bound=msgspec.Struct)

#: What the state of a store can be called; only ``ok`` takes everything, ``full`` and ``stalled`` take urgent commits.
Code = Literal["ok", "closed", "full", "stalled", "failed", "read_only", "damaged", "dead"]
#: States in which an urgent commit is still tried.
TRIED_IN: frozenset[Code] = frozenset({"ok", "full", "stalled"})


class StoreFailed(RMAError):
    """The store cannot keep anything now; what was not acknowledged is not kept."""

    code = "store"


class StoreState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the store takes new work, else why not, as a sentence, and what to do about it."""

    ok: bool
    reason: str = ""
    code: Code = "ok"
    hints: tuple[str, ...] = ()

    def error(self) -> RMAError:
        """Return what a caller gets whose commit is refused in this state."""
        made = OutOfSpace if self.code == "full" else StoreFailed
        return made(self.reason, hints=self.hints)


#: Everything is taken.
OK = StoreState(ok=True)
#: Before it is opened and after it was closed.
CLOSED = StoreState(ok=False, code="closed", reason="the store is not open")


class Put(NamedTuple):
    """Keep ``record`` under ``key`` among the records of its type."""

    key: str
    record: msgspec.Struct


class Delete(NamedTuple):
    """Forget the record of type ``kind`` under ``key``."""

    kind: type[msgspec.Struct]
    key: str


Change = Put | Delete

#: A change as it is written: kind, key, and the record as JSON or None to forget it.
Row = tuple[str, str, bytes | None]

_encode = msgspec.json.Encoder().encode


def encoded(change: Change) -> Row:
    """Return a change as it is written. Raises TypeError for a record that JSON cannot hold."""
    if type(change) is Put:
        record = change.record
        return type(record).__name__, change.key, _encode(record)
    return change.kind.__name__, change.key, None  # type: ignore[union-attr] # the exact type is cheaper to ask for


class Store(Protocol):
    """What every store can do."""

    async def open(self) -> None:
        """Make it ready.

        Raises SettingProblem when another coordinator holds it or it cannot be used as it is set, OutOfSpace when there
        is too little space to begin with, StoreFailed when it is damaged, read-only or broken.
        """

    @property
    def state(self) -> StoreState:
        """Whether new work is taken; free to ask for at any time."""

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key, as they all were at one moment. Raises StoreFailed."""

    def pages(self, kind: type[R], size: int) -> AsyncIterator[list[R]]:
        """Give every record of a type, by key, ``size`` at a time. Raises StoreFailed.

        Never more than a page is in memory; what is committed meanwhile may be seen or not.
        """

    async def get(self, kind: type[R], key: str) -> R | None:
        """Return one record, or None; every acknowledged commit is seen. Raises StoreFailed."""

    async def commit(self, changes: Iterable[Change], *, urgent: bool = False) -> None:
        """Keep all of the changes or none; they are durable when this returns. Raises StoreFailed, OutOfSpace.

        While the state is not ok only what is ``urgent`` is tried (the ends of tasks that run), at the cost of a
        reserve. A commit that was cancelled or given up because the disk did not answer may still be kept, whole.
        """

    async def backup(self, path: Path) -> int:
        """Write a consistent copy to a new file while commits go on; return its size in bytes.

        Raises SettingProblem for a file that exists and for a store that has nothing to copy, OutOfSpace, StoreFailed.
        """

    async def close(self) -> None:
        """Finish what waits and let go."""
