"""A store that is gone with the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from rma_coordinator.store.base import CLOSED, OK, encoded
from rma_core.errors import SettingProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from rma_coordinator.store.base import Change, R, StoreState


class MemoryStore:
    """Keeps records as bytes in memory, for tests and `--store memory`; everything is gone with the process."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, bytes]] = {}
        self._state = CLOSED

    @property
    def state(self) -> StoreState:
        """Whether it is open."""
        return self._state

    async def open(self) -> None:
        """Be ready."""
        self._state = OK

    async def load(self, kind: type[R]) -> list[R]:
        """Return every record of a type, by key."""
        self._check()
        table = self._tables.get(kind.__name__, {})
        return [msgspec.json.decode(table[key], type=kind) for key in sorted(table)]

    async def pages(self, kind: type[R], size: int) -> AsyncIterator[list[R]]:
        """Give every record of a type, by key, ``size`` at a time."""
        records = await self.load(kind)
        for start in range(0, len(records), size):
            yield records[start : start + size]

    async def get(self, kind: type[R], key: str) -> R | None:
        """Return one record, or None."""
        self._check()
        data = self._tables.get(kind.__name__, {}).get(key)
        return None if data is None else msgspec.json.decode(data, type=kind)

    async def commit(self, changes: Iterable[Change], *, urgent: bool = False) -> None:  # noqa: ARG002 - nothing is refused
        """Keep all of the changes."""
        self._check()
        for kind, key, data in [encoded(change) for change in changes]:
            table = self._tables.setdefault(kind, {})
            if data is None:
                table.pop(key, None)
            else:
                table[key] = data

    async def backup(self, path: Path) -> int:
        """Refuse: what is kept in memory on purpose is not written to a file by the way."""
        raise SettingProblem(
            f"no copy was made at {path}: this coordinator keeps everything in memory",
            hints=("start it with `--store sqlite`",),
        )

    async def close(self) -> None:
        """Take nothing any more; a reopened one has what it had."""
        self._state = CLOSED

    def _check(self) -> None:
        if not self._state.ok:
            raise self._state.error()
