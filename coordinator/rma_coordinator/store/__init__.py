"""Where the coordinator keeps what must survive it: records by kind and key, committed all or nothing.

The records in memory lead; the store is written behind one door (`commit`), which returns when the changes are on disk.
One contract suite holds for every store.
"""

from __future__ import annotations

from rma_coordinator.store.base import Change, Delete, Put, Store, StoreFailed, StoreState
from rma_coordinator.store.make import make_store
from rma_coordinator.store.memory import MemoryStore
from rma_coordinator.store.sqlite import SqliteStore

__all__ = ["Change", "Delete", "MemoryStore", "Put", "SqliteStore", "Store", "StoreFailed", "StoreState", "make_store"]
