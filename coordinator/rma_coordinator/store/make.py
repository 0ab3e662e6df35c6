"""From the setting `store` to a store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rma_coordinator.store.memory import MemoryStore
from rma_coordinator.store.sqlite import SqliteStore
from rma_core.errors import SettingProblem

if TYPE_CHECKING:
    from rma_coordinator.store.base import Store


def make_store(address: str, home: Path) -> Store:
    """Return the store a setting names: ``sqlite`` (in ``home``), ``sqlite:PATH`` or ``memory``.

    Raises SettingProblem for any other.
    """
    kind, _, rest = address.partition(":")
    if kind == "memory":
        return MemoryStore()
    if kind == "sqlite":
        if not address.isprintable():
            raise SettingProblem(f"{address!r}: the store's file needs a name in UTF-8, without control characters")
        return SqliteStore(Path(rest.removeprefix("//")).expanduser() if rest else home / "coordinator.db")
    raise SettingProblem(f"{address!r} is no store", hints=("use `sqlite`, `sqlite:PATH` or `memory`",))
